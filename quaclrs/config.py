"""What a user can choose, as frozen dataclasses: validated when made, saved whole with every run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quaclrs.errors import UsageError

DEFAULT_CSV_FILE = Path("spectrograms_balanced_no_sirens.csv")
DEFAULT_SPECTROGRAMS_DIR = Path("spectrograms")
DEFAULT_IMAGE_SIZE = 224

ENCODINGS = ("png", "indexed", "rgb")
"""The encodings of quaclrs itself, for command lines; quaclrs.shards.encodings has their classes, and takes more."""
SCHEDULERS = ("plateau", "cosine", "none")
AMP_DTYPES = ("float16", "bfloat16")
COMPILERS = ("none", "inductor", "cudagraph")
PARALLEL = ("folds",)
ON_ERROR = ("stop", "skip")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def default_num_workers() -> int:
    """The processors this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """``256MiB``, ``1GB``, ``1000000`` → bytes. Raises :class:`UsageError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?)b?\s*", text, flags=re.IGNORECASE)
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"--shard_size {text!r}: not a size; write for example 256MiB or 1GB")
    return int(float(match[1]) * unit)


def parse_folds(text: str) -> tuple[int, ...]:
    """``3``, ``1,2,3`` or ``1-3,7`` → folds. Raises :class:`UsageError` for anything else."""
    folds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        several = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        _require(len(several) > 0, f"--folds {text!r}: not a list of folds; write for example 3 or 1,2 or 1-3,7")
        folds += several
    return tuple(folds)


def folds_text(folds: Iterable[int]) -> str:
    """``folds`` in order and as short as :func:`parse_folds` reads them: ``1-3,7``."""
    runs: list[list[int]] = []
    for fold in sorted(set(folds)):
        if runs and fold == runs[-1][-1] + 1:
            runs[-1].append(fold)
        else:
            runs.append([fold])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which CSV columns hold what."""

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
    num_workers: int = field(default_factory=default_num_workers)
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
        _require(self.on_error in ON_ERROR, f"--on_error {self.on_error}: choose one of {', '.join(ON_ERROR)}")
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
class TrainConfig:
    """One run of ``quaclrs-train``: one model over one fold or all of them. Defaults are the original trainer's."""

    csv_file: Path | None = None
    """None takes DEFAULT_CSV_FILE; with ``shards``, a CSV that is named must be the one they were packed from."""
    spectrograms_dir: Path | None = None
    """None takes DEFAULT_SPECTROGRAMS_DIR."""
    shards: Path | None = None
    """A folder of quaclrs-pack; None packs into a cache beside the CSV."""
    columns: Columns = field(default_factory=Columns)

    model_name: str = "resnet18"
    """One, several with commas, or ``all``."""
    pretrained: bool = False
    freeze_features: bool = False
    image_size: int | None = None
    """Pixels; None takes the model's own (224, InceptionV3 299)."""

    batch_size: int = 32
    """Of each process."""
    epochs: int = 30
    patience: int = 7
    """Epochs without a better validation accuracy before training stops."""
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    scheduler: str = "plateau"
    use_amp: bool = False
    amp_dtype: str | None = None
    """None takes bfloat16 where the device is fast with it, else float16."""
    tf32: bool = False
    compile: str = "none"
    sync_bn: bool = False
    seed: int = 42

    fold: int | None = None
    """The test fold; None runs them all."""
    num_folds: int = 10
    loader: str = "auto"
    num_workers: int = 4
    prefetch: int = 2
    """Batches made ahead by the loaders that read from disk."""
    device: str = "auto"
    parallel: str | None = None
    """``folds``: each process trains whole folds."""
    nproc: int | None = None
    """Processes of --distributed and --parallel; None takes one per GPU."""
    output_dir: Path = Path("results")
    keep_checkpoints: int = 1
    gradcam_per_class: int = 5
    resume: bool = False
    checkpoint_minutes: float | None = None
    """Between checkpoints within an epoch; None writes them after each epoch only."""
    profile: bool = False

    def __post_init__(self) -> None:
        _require(
            self.batch_size >= 2,
            f"--batch_size {self.batch_size}: at least 2, since BatchNorm cannot train on one sample",
        )
        _require(self.epochs >= 1, f"--epochs {self.epochs}: at least 1")
        _require(self.patience >= 1, f"--patience {self.patience}: at least 1")
        _require(
            0 < self.learning_rate < math.inf, f"--learning_rate {self.learning_rate}: must be positive and finite"
        )
        _require(
            0 <= self.weight_decay < math.inf, f"--weight_decay {self.weight_decay}: must be finite and not negative"
        )
        _require(self.scheduler in SCHEDULERS, f"--scheduler {self.scheduler}: choose one of {', '.join(SCHEDULERS)}")
        _require(self.seed >= 0, f"--seed {self.seed}: not negative")
        _require(self.num_folds >= 3, f"--num_folds {self.num_folds}: at least 3, to train, validate and test")
        _require(self.num_workers >= 0, f"--num_workers {self.num_workers}: not negative")
        _require(self.keep_checkpoints >= 1, f"--keep_checkpoints {self.keep_checkpoints}: at least 1, the last one")
        _require(self.gradcam_per_class >= 0, f"--gradcam_per_class {self.gradcam_per_class}: not negative")
        _require(
            self.amp_dtype is None or self.amp_dtype in AMP_DTYPES,
            f"--amp_dtype {self.amp_dtype}: choose one of {', '.join(AMP_DTYPES)}",
        )
        _require(
            self.amp_dtype is None or self.use_amp,
            f"--amp_dtype {self.amp_dtype}: is about --use_amp; give both, or neither",
        )
        _require(self.compile in COMPILERS, f"--compile {self.compile}: choose one of {', '.join(COMPILERS)}")
        _require(self.prefetch >= 1, f"--prefetch {self.prefetch}: at least 1 batch")
        _require(
            self.parallel is None or self.parallel in PARALLEL,
            f"--parallel {self.parallel}: choose {', '.join(PARALLEL)}",
        )
        _require(self.nproc is None or self.nproc >= 1, f"--nproc {self.nproc}: at least 1 process")
        _require(
            self.checkpoint_minutes is None or 0 < self.checkpoint_minutes < math.inf,
            f"--checkpoint_minutes {self.checkpoint_minutes}: must be positive and finite",
        )
        if self.fold is not None:
            _require(
                1 <= self.fold <= self.num_folds,
                f"--fold {self.fold}: there are folds 1 to {self.num_folds}; choose one of them (or --num_folds)",
            )
