"""What a user can choose, as frozen dataclasses: validated on creation, saved whole with every run.

Each field of :class:`TrainConfig` is a :func:`~quaclrs.settings.setting`: its flag, the values that are refused, and
whether ``--resume`` accepts another value all derive from it.
"""

# ruff: noqa: RUF009 - setting() returns a dataclasses.field, not a default value

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quaclrs.errors import UsageError
from quaclrs.settings import (
    FINITE_NOT_NEGATIVE,
    NOT_NEGATIVE,
    POSITIVE,
    Settings,
    at_least,
    check_requirements,
    choose,
    setting,
)

DEFAULT_CSV_FILE = Path("spectrograms_balanced_no_sirens.csv")
DEFAULT_SPECTROGRAMS_DIR = Path("spectrograms")
DEFAULT_IMAGE_SIZE = 224

ENCODINGS = {
    "png": "keeps the files' bytes",
    "indexed": "keeps colour-mapped grids, lossless and smaller",
    "rgb": "resizes once",
}
"""Built-in encodings, and their words in the help: command lines list them without importing shards/encodings."""
"""The encodings of quaclrs itself, for command lines; quaclrs.shards.encodings has their classes, and takes more."""
SCHEDULERS = ("plateau", "cosine", "none")
AMP_DTYPES = ("float16", "bfloat16")
COMPILERS = ("none", "inductor", "cudagraph")
PARALLEL = ("folds",)
ON_ERROR = ("stop", "skip")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def usable_processors() -> int:
    """Number of processors this process may use; in a container it can be smaller than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """Parse ``256MiB``, ``1GB`` or ``1000000`` to bytes. Raises :class:`UsageError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?)b?\s*", text, flags=re.IGNORECASE)
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"--shard_size {text!r}: not a size; write for example 256MiB or 1GB")
    return int(float(match[1]) * unit)


def parse_folds(text: str) -> tuple[int, ...]:
    """Parse ``3``, ``1,2,3`` or ``1-3,7``. Raises :class:`UsageError` for anything else."""
    folds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        several = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        _require(len(several) > 0, f"--folds {text!r}: not a list of folds; write for example 3 or 1,2 or 1-3,7")
        folds += several
    return tuple(folds)


def folds_text(folds: Iterable[int]) -> str:
    """Write ``folds`` sorted and in the shortest form that :func:`parse_folds` reads: ``1-3,7``."""
    runs: list[list[int]] = []
    for fold in sorted(set(folds)):
        if runs and fold == runs[-1][-1] + 1:
            runs[-1].append(fold)
        else:
            runs.append([fold])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the CSV columns that hold the image's file name, the class and the fold."""

    file: str = "spec_file_name"
    label: str = "class"
    fold: str = "fold"

    def __iter__(self) -> Iterator[str]:
        return iter((self.file, self.label, self.fold))


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """One packing of a PNG tree into shards."""

    csv_file: Path | None = None
    spectrograms_dir: Path | None = None
    from_shards: Path | None = None
    """``png`` shards to take the CSV and the images from, instead of ``csv_file`` and ``spectrograms_dir``."""
    output_dir: Path
    encoding: str = "png"
    """A name registered in quaclrs.shards.encodings; packing refuses an unknown one."""
    image_size: int = DEFAULT_IMAGE_SIZE
    """S of the ``rgb`` encoding, in pixels; ``png`` and ``indexed`` keep the image's own size."""
    shard_size: int = 256 * 2**20
    """Upper bound of one tar in bytes; a single sample may exceed it."""
    seed: int = 0
    num_workers: int = field(default_factory=usable_processors)
    on_error: str = "stop"
    folds: tuple[int, ...] | None = None
    """Pack only these, beside other calls that pack other folds into the same folder; None packs all missing folds."""
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        from_tree = self.csv_file is not None and self.spectrograms_dir is not None
        from_anything = from_tree or (self.csv_file, self.spectrograms_dir) != (None, None)
        _require(
            from_tree != (self.from_shards is not None) and from_tree == from_anything,
            "give --csv_file and --spectrograms_dir, or --from_shards alone",
        )
        object.__setattr__(self, "on_error", choose("on_error", self.on_error, ON_ERROR))
        _require(1 <= self.image_size <= 4096, f"--image_size {self.image_size}: choose 1 to 4096 pixels")
        _require(self.shard_size >= 1, f"--shard_size {self.shard_size}: at least 1 byte")
        _require(self.seed >= 0, f"--seed {self.seed}: not negative")
        _require(self.num_workers >= 1, f"--num_workers {self.num_workers}: at least 1")
        if self.folds is not None:
            given = ",".join(map(str, self.folds))
            twice = next((fold for fold in self.folds if self.folds.count(fold) > 1), None)
            _require(len(self.folds) > 0, "--folds: names no fold; write for example 3 or 1,2 or 1-3,7")
            _require(min(self.folds) >= 1, f"--folds {given}: folds count from 1")
            _require(twice is None, f"--folds {given}: names fold {twice} twice; name each fold once")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """One run of ``quaclrs-train``: one model over one fold or all of them. Defaults are the original trainer's.

    The fields have the order of ``quaclrs-train --help``.
    """

    csv_file: Path | None = setting(None, affects_result=True, identity=("data",))
    """None takes DEFAULT_CSV_FILE; with ``shards``, a given CSV must be the one they were packed from."""
    spectrograms_dir: Path | None = setting(None, affects_result=True, identity=("data",))
    """None takes DEFAULT_SPECTROGRAMS_DIR."""
    columns: Columns = setting(default_factory=Columns, affects_result=True, identity=("data",))

    shards: Path | None = setting(
        None,
        affects_result=True,
        identity=("data",),
        group="reading",
        help="folder of quaclrs-pack; without it, the CSV's images are packed once",
        metavar="DIR",
    )
    """A folder of quaclrs-pack; None packs into a cache beside the CSV."""
    loader: str = setting(
        "auto",
        affects_result=True,
        identity=("pixels", "order"),
        group="reading",
        help="auto, resident, mapped, dali or files (Pillow)",
    )
    num_workers: int = setting(
        4,
        affects_result=False,
        group="reading",
        help="processes or threads that read and decode",
        metavar="N",
        requires=NOT_NEGATIVE,
    )
    prefetch: int = setting(
        2,
        affects_result=False,
        group="reading",
        help="batches made ahead, where they are read from disk",
        metavar="N",
        requires=at_least(1, " batch"),
    )
    image_size: int | None = setting(
        None, affects_result=True, group="reading", help="pixels; the model's own size if not given", metavar="S"
    )
    """None takes the model's own (224, InceptionV3 299); the identity has the size in effect."""

    model_name: str = setting(
        "resnet18", affects_result=True, group="model", help="{architectures}; several with commas, or all"
    )
    """cli/train.py puts the names of training/architectures.py into the help."""
    pretrained: bool = setting(False, affects_result=True, group="model", help="start from ImageNet weights")
    freeze_features: bool = setting(False, affects_result=True, group="model", help="train the classifier only")

    batch_size: int = setting(
        32,
        affects_result=True,
        identity=("global_batch",),
        group="training",
        help="samples per step and process",
        metavar="B",
        requires=at_least(2, ", since BatchNorm cannot train on one sample"),
    )
    epochs: int = setting(30, affects_result=True, group="training", help="at most", metavar="N", requires=at_least(1))
    patience: int = setting(
        7,
        affects_result=True,
        group="training",
        help="epochs without a better validation accuracy before stopping",
        metavar="N",
        requires=at_least(1),
    )
    learning_rate: float = setting(
        1e-3, affects_result=True, group="training", help="the optimizer's", metavar="LR", requires=POSITIVE
    )
    weight_decay: float = setting(
        1e-5, affects_result=True, group="training", help="the optimizer's", metavar="WD", requires=FINITE_NOT_NEGATIVE
    )
    scheduler: str = setting(
        "plateau",
        affects_result=True,
        group="training",
        help="plateau halves the learning rate when validation stalls; cosine anneals it",
        choices=SCHEDULERS,
    )
    use_amp: bool = setting(False, affects_result=True, group="training", help="automatic mixed precision")
    amp_dtype: str | None = setting(
        None,
        affects_result=True,
        identity=("compute_dtype",),
        group="training",
        help="what it computes in; by default bfloat16 where the GPU is fast with it, else float16",
        choices=AMP_DTYPES,
    )
    tf32: bool = setting(
        False, affects_result=True, group="training", help="let float32 on a GPU round to TF32, which is faster"
    )
    compile: str = setting(
        "none",
        affects_result=False,  # the same mathematics by other kernels, as on another device
        group="training",
        help="inductor: torch.compile; cudagraph: capture each whole step, for small batches",
        choices=COMPILERS,
    )
    sync_bn: bool = setting(False, affects_result=True, group="training", help="BatchNorm over the batches of all GPUs")
    seed: int = setting(42, affects_result=True, group="training", help="of weights and order", requires=NOT_NEGATIVE)

    fold: int | None = setting(
        None, affects_result=True, group="run", help="test this fold only; all folds if not given", metavar="K"
    )
    """The test fold; the identity has the fold being trained."""
    num_folds: int = setting(
        10,
        affects_result=True,
        group="run",
        help="folds of the protocol",
        metavar="K",
        requires=at_least(3, ", to train, validate and test"),
    )
    device: str = setting("auto", affects_result=False, group="run", help="auto, cpu, cuda or cuda:N")
    output_dir: Path = setting(
        Path("results"),
        affects_result=False,
        group="run",
        help="results go to {output_dir}/{model_name}/fold_{k}",
        metavar="DIR",
    )
    resume: bool = setting(
        False,
        affects_result=False,
        group="run",
        help="go on where an interrupted run stopped; finished folds are kept, or go on to more --epochs",
    )
    keep_checkpoints: int = setting(
        1,
        affects_result=False,
        group="run",
        help="regular checkpoints to keep per fold",
        metavar="N",
        requires=at_least(1, ", the last one"),
    )
    gradcam_per_class: int = setting(
        5,
        affects_result=False,
        group="run",
        help="Grad-CAM images per class; 0 for none",
        metavar="N",
        requires=NOT_NEGATIVE,
    )
    checkpoint_minutes: float | None = setting(
        None,
        affects_result=False,
        group="run",
        help="also write a checkpoint within an epoch each time so long has passed",
        metavar="MIN",
        requires=POSITIVE,
    )
    profile: bool = setting(
        False,
        affects_result=False,
        group="run",
        help="write a profile of some steps of the first epoch, and what bounds them",
    )

    parallel: str | None = setting(
        None,
        affects_result=False,
        group="several processes",
        help="folds: one process per GPU, each training whole folds",
        choices=PARALLEL,
    )
    nproc: int | None = setting(
        None,
        affects_result=False,  # of --distributed: the global batch and the order are compared
        group="several processes",
        help="processes of the two above; needed on the CPU",
        metavar="N",
        requires=at_least(1, " process"),
    )
    """None takes one per GPU."""

    def __post_init__(self) -> None:
        check_requirements(self)
        _require(
            self.amp_dtype is None or self.use_amp,
            f"--amp_dtype {self.amp_dtype}: is about --use_amp; give both, or neither",
        )
        _require(
            self.fold is None or 1 <= self.fold <= self.num_folds,
            f"--fold {self.fold}: there are folds 1 to {self.num_folds}; choose one of them (or --num_folds)",
        )
