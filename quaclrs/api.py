"""The public Python API; ``from quaclrs import NAME`` loads it when a name is first used.

:func:`open_shards` opens shards, :func:`make_loader` and :func:`batches` read them in batches, and :func:`evaluate`
scores a model. The training loop, the model and the optimizer are yours. :func:`pack` and :func:`train` run what the
commands ``quaclrs-pack`` and ``quaclrs-train`` run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from quaclrs.config import PackConfig, TrainConfig, usable_processors
from quaclrs.data.folds import SampleSplit, class_weights
from quaclrs.data.sampling import epoch_order, evaluation_batches, train_batches
from quaclrs.errors import QuaclrsError
from quaclrs.loaders import MemoryEstimate, build_loader, choose_loader, loader_called
from quaclrs.loaders.base import Batch, Loader, LoaderConfig
from quaclrs.loaders.dataset import Dataset, open_dataset
from quaclrs.shards.packing.pack import PackSummary
from quaclrs.system.environment import free_memory
from quaclrs.training import loop
from quaclrs.training.device import pick_device
from quaclrs.training.loop import Evaluation
from quaclrs.training.models import build_model

if TYPE_CHECKING:
    from quaclrs.experiment.results import Summary

__all__ = [
    "Batch",
    "BatchLoader",
    "Dataset",
    "Evaluation",
    "PackSummary",
    "QuaclrsError",
    "SampleSplit",
    "batches",
    "build_model",
    "class_weights",
    "evaluate",
    "make_loader",
    "open_shards",
    "pack",
    "train",
]

_PATHS = ("csv_file", "spectrograms_dir", "shards", "from_shards", "output_dir")
"""Settings that are paths; they may be given as strings."""

_log = logging.getLogger("quaclrs")


def open_shards(folder: str | Path) -> Dataset:
    """The samples of a shard folder that ``quaclrs-pack`` wrote: their classes, labels, folds and payloads.

    Warnings about the data (a recording in two folds, skipped rows) go to the logger ``quaclrs``. Raises
    :class:`ShardError` naming the file when the folder is no shard folder, is incomplete or damaged.
    """
    return open_dataset(TrainConfig(shards=Path(folder)), want_shards=False, log=_log_data_warning)


def _log_data_warning(text: str) -> None:
    _log.log(logging.INFO if text.startswith("note:") else logging.WARNING, "%s", text)


class BatchLoader:
    """A loader that knows the size of its batches; a context manager that closes it.

    It is a :class:`Loader` itself, and can be used wherever one is expected.
    """

    def __init__(self, loader: Loader, config: LoaderConfig, batch_size: int) -> None:
        self.loader = loader
        self.config = config
        self.batch_size = batch_size
        self.name = loader.name
        self.pixels = loader.pixels
        self.replicated = loader.replicated

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return self.config.device

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One :class:`Batch` for each array of sample numbers, in that order.

        Raises ValueError for an array of more than ``batch_size`` + 1 samples (a single last sample joins its
        neighbour).
        """
        largest = max(map(len, batches), default=0)
        if largest > self.config.max_batch:
            raise ValueError(f"a batch of {largest} samples from a loader made with batch_size={self.batch_size}")
        return self.loader.load(batches)

    def close(self) -> None:
        """End its processes and threads and release its memory; the loader cannot be used afterwards."""
        self.loader.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_loader(
    data: Dataset,
    image_size: int = 224,
    *,
    batch_size: int = 32,
    loader: str = "auto",
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    num_workers: int | None = None,
    prefetch: int = 2,
) -> BatchLoader:
    """A loader of ``data`` as images of ``image_size`` × ``image_size`` pixels on ``device``.

    ``loader`` is ``resident``, ``mapped``, ``dali``, ``files``, or ``auto``, which chooses by encoding, device and free
    memory as ``quaclrs-train`` does. ``device="auto"`` is the GPU if there is one; a GPU becomes torch's current
    device. ``dtype`` is float32, float16 or bfloat16 for normalised images, uint8 for plain pixels. ``num_workers``
    processes or threads read and decode (default: one per usable processor); ``prefetch`` batches are made ahead where
    they are read from disk.

    Raises :class:`UsageError` for a loader that cannot read the encoding or an image size that the shards do not have,
    :class:`MissingDependencyError` for ``dali`` where it is not installed.
    """
    config = LoaderConfig(
        image_size=image_size,
        device=pick_device(str(device)),
        dtype=dtype,
        max_batch=batch_size + 1,  # a single last sample joins its neighbour
        num_workers=usable_processors() if num_workers is None else num_workers,
        prefetch=prefetch,
    )
    encoding = data.shards.encoding.name if data.shards else None
    choice = choose_loader(
        loader, encoding, _estimate_resident_memory(data, config, wanted=loader_called(loader) == "resident")
    )
    return BatchLoader(build_loader(choice, data, config), config, batch_size)


def batches(
    loader: BatchLoader, samples: np.ndarray, *, epoch: int | None = None, seed: int = 42, batch_size: int | None = None
) -> Iterator[Batch]:
    """The batches of ``samples`` (N,), sample numbers: shuffled for training, or in order for evaluation.

    With ``epoch`` (1, 2, …) the order is the one in which ``quaclrs-train --seed SEED`` trains in that epoch, the same
    for every loader; the smaller last batch is kept, and a single last sample joins its neighbour. Without it, samples
    come in the order given. ``batch_size`` is the loader's own unless given, and cannot be larger.
    """
    size = loader.batch_size if batch_size is None else batch_size
    if epoch is None:
        return loader.load(evaluation_batches(samples, size))
    return loader.load(train_batches(epoch_order(samples, seed, epoch), size))


def evaluate(
    model: nn.Module,
    loader: BatchLoader,
    samples: np.ndarray,
    *,
    class_weights: np.ndarray | None = None,
    labelled: bool = True,
) -> Evaluation:
    """Loss, accuracy and class probabilities of ``model`` over ``samples`` (N,), each sample once.

    ``class_weights`` (classes,) weight the loss, as :func:`quaclrs.class_weights` gives them: Σ w·loss / Σ w. The model
    computes in the loader's dtype, by autocast. The call sets it to evaluation mode and restores its mode afterwards.
    It must be on the loader's device. Without ``labelled`` the labels are ignored, and loss and accuracy are NaN.
    Raises ValueError when there are no samples.
    """
    if len(samples) == 0:
        raise ValueError("no samples to evaluate")
    weights = None if class_weights is None else torch.from_numpy(class_weights).to(loader.device)
    was_training = model.training
    try:
        return loop.evaluate(
            model,
            loader,
            samples,
            global_batch=loader.batch_size,
            class_weights=weights,
            labelled=labelled,
            dtype=loader.config.dtype,
        )
    finally:
        model.train(was_training)


def pack(**settings: Any) -> PackSummary:
    """Pack a CSV and its PNG tree into a shard folder, as ``quaclrs-pack`` does; returns what was packed.

    ``settings`` are the fields of :class:`quaclrs.config.PackConfig`, which are the flags of the command:
    ``pack(csv_file="a.csv", spectrograms_dir="images", output_dir="shards", encoding="indexed")``.
    """
    from quaclrs.shards.packing.pack import pack as pack_shards

    return pack_shards(PackConfig(**_convert_paths(settings)))


def train(*, log: Callable[[str], None] = print, **settings: Any) -> dict[str, Summary]:
    """Train and test by cross-validation, as ``quaclrs-train`` does; returns each model's summary by its name.

    ``settings`` are the fields of :class:`quaclrs.config.TrainConfig`, which are the flags of the command:
    ``train(shards="shards", model_name="resnet18", fold=1, epochs=5)``. Results are written to ``output_dir``. Under
    torchrun, every rank calls it alike. ``log`` gets one line of text at a time, on rank 0 alone. Raises the errors of
    quaclrs.errors.
    """
    from quaclrs.experiment.cross_validation import run_cross_validation
    from quaclrs.experiment.fold_pool import run_in_parallel
    from quaclrs.training.distributed import joined_world
    from quaclrs.training.launcher import processes_wanted
    from quaclrs.training.progress import console_hooks
    from quaclrs.training.trainer import Hooks

    config = TrainConfig(**_convert_paths(settings))
    if config.parallel:
        return run_in_parallel(config, processes_wanted(config.nproc, config.device, "--parallel folds"), log)
    with joined_world(config.device) as world:
        if not world.is_main:
            return run_cross_validation(config, lambda text: None, Hooks(), world)
        hooks = console_hooks(config.epochs) if log is print else Hooks()
        return run_cross_validation(config, log, hooks, world)


def _convert_paths(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: Path(value) if name in _PATHS and value is not None else value for name, value in settings.items()}


def _estimate_resident_memory(data: Dataset, config: LoaderConfig, wanted: bool) -> MemoryEstimate | None:
    """The data against the device's free memory; None on the CPU, where the page cache holds them, unless wanted."""
    if data.shards is None or not (wanted or config.device.type == "cuda"):
        return None
    return MemoryEstimate(needed=data.shards.memory_bytes(config.image_size), free=free_memory(config.device) or 0)
