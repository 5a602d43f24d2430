"""The folds of one or several models, one after another: open the data once, train, sum up."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quaclrs.config import TrainConfig, default_num_workers
from quaclrs.errors import UsageError, told_once
from quaclrs.experiment.fold import (
    METRICS_FILE,
    Log,
    Run,
    agreed_global_batch,
    fold_samples,
    provenance,
    read_document,
    run_fold,
)
from quaclrs.loaders import MemoryEstimate, build_loader, choose_loader, needs_shards
from quaclrs.loaders.base import Loader, LoaderConfig
from quaclrs.loaders.dataset import Dataset, open_dataset
from quaclrs.loaders.resident import ResidentLoader
from quaclrs.system.atomic_files import make_folder, write_json
from quaclrs.system.environment import free_memory
from quaclrs.system.file_locks import folder_lock
from quaclrs.system.signals import SignalHandler
from quaclrs.training import trainer
from quaclrs.training.distributed import World
from quaclrs.training.models import ARCHITECTURES, check_input_size, input_size
from quaclrs.training.state import amp_dtype, set_tf32

SUMMARY_FILE = "summary.json"


def run_cross_validation(
    config: TrainConfig, log: Log = print, hooks: trainer.Hooks | None = None, world: World | None = None
) -> dict[str, dict[str, Any]]:
    """Train and test the fold(s) of ``config``'s model(s); returns by model the summary that is also written to
    ``summary.json``.

    Everything that can be refused is refused before the first fold starts. Raises the errors of quaclrs.errors.
    """
    with FoldRunner.opened(config, log, hooks, world) as place:
        for name, fold in tasks(config):
            place.train(name, fold)
        return place.summaries


def tasks(config: TrainConfig) -> list[tuple[str, int]]:
    """Every (model, fold) of ``config``; models of one input size are neighbours, so that few loaders are made.

    Raises :class:`UsageError` for an unknown model or a size that one cannot take.
    """
    names = model_names(config.model_name)
    for name in names:
        check_input_size(name, image_size_of(name, config))
    names.sort(key=lambda name: image_size_of(name, config))
    folds = [config.fold] if config.fold is not None else range(1, config.num_folds + 1)
    return [(name, fold) for name in names for fold in folds]


def model_names(text: str) -> list[str]:
    """The models of ``--model_name``: one, several with commas, or ``all``. Raises :class:`UsageError` for one that
    there is not.
    """
    names = list(ARCHITECTURES) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise UsageError(
            f"--model_name {unknown[0] or text}: choose one of {', '.join(ARCHITECTURES)}, several with commas, or all"
        )
    return list(dict.fromkeys(names))


def image_size_of(name: str, config: TrainConfig) -> int:
    """Pixels a side that the model ``name`` is trained on."""
    return input_size(name) if config.image_size is None else config.image_size


class FoldRunner:
    """What one process keeps over all folds and models: its device, the dataset, and the loader of one image size."""

    def __init__(self, config: TrainConfig, log: Log, hooks: trainer.Hooks | None, world: World) -> None:
        self._config, self._log, self._world = config, log, world
        self._watch = SignalHandler(config.checkpoint_minutes)
        self._hooks = hooks or trainer.Hooks()
        self.summaries: dict[str, dict[str, Any]] = {}
        """By model, of the folds trained here and those found."""
        with told_once():
            self._device = pick_device(config.device, world)
            refuse_for_device(config, self._device, world)
            names = dict.fromkeys(name for name, _ in tasks(config))
        set_tf32(config.tf32)
        self._global_batches = {name: self._global_batch(name) for name in names}
        if world.size > 1:
            for name, batch in self._global_batches.items():
                log(f"{name}: {world.size} processes, global batch {batch} ({batch // world.size} samples of each)")
        self._dataset = self._open_dataset()
        self._loader: Loader | None = None
        self._loader_size = 0
        self._parts = 1

    @classmethod
    @contextmanager
    def opened(
        cls, config: TrainConfig, log: Log = print, hooks: trainer.Hooks | None = None, world: World | None = None
    ) -> Iterator[FoldRunner]:
        """A workplace for the block. Checks all that the folds will need."""
        place = cls(config, log, hooks, world or World())
        try:
            with told_once():
                place.check_folds()
            if place._world.is_main:
                make_folder(config.output_dir)
            yield place
        finally:
            place.close()

    def check_folds(self) -> None:
        """Raise what the dataset has against the folds of ``config``."""
        highest, config = int(self._dataset.fold.max()), self._config
        if highest > config.num_folds:
            raise UsageError(
                f"{self._dataset.name}: has a fold {highest}, but the protocol has {config.num_folds}; give "
                f"--num_folds {highest} or mend "
                "the CSV"
            )
        for fold in dict.fromkeys(fold for _, fold in tasks(config)):
            fold_samples(self._dataset, fold, config.num_folds)

    def train(self, name: str, fold: int) -> dict[str, Any]:
        """Train and test one fold of the model ``name``; returns its metrics (on rank 0; other ranks get none).

        Raises :class:`Interrupted` after a signal, once the training is saved.
        """
        config = dataclasses.replace(self._config, model_name=name)
        size = image_size_of(name, config)
        run = Run(
            config=config,
            dataset=self._dataset,
            loader=self._loader_for(size),
            device=self._device,
            image_size=size,
            global_batch=self._global_batches[name],
            world=self._world,
            watch=self._watch,
            log=self._log,
            hooks=self._hooks,
        )
        with self._watch:  # only here: what has nothing to save can be stopped at once
            metrics = run_fold(run, fold)
            if self._world.is_main:  # after each fold, so that a later failure does not cost it
                self.summaries[name] = write_summary(run, metrics)
        if any(self._world.gather(self._watch.signal is not None)):
            raise self._watch.interrupted(f"fold {fold}, which is done")
        return metrics

    def close(self) -> None:
        """Give back the loader and the data."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None
        self._dataset.close()

    def _global_batch(self, name: str) -> int:
        config = dataclasses.replace(self._config, model_name=name)
        return self._world.broadcast_object(agreed_global_batch(config, self._world) if self._world.is_main else 0)

    def _open_dataset(self) -> Dataset:
        with self._world.main_process_first():
            dataset = open_dataset(self._config, want_shards=needs_shards(self._config), log=self._log)
        for rank, identity in enumerate(self._world.gather(dataset.identity)):
            if identity != dataset.identity:
                raise UsageError(f"{dataset.name}: rank {rank} has other data there; give all machines the same")
        return dataset

    def _loader_for(self, image_size: int) -> Loader:
        """The loader of ``image_size``: the one there is, rendering its data at that size if it can, or else a new one
        in its place.
        """
        if self._loader is not None and self._loader_size != image_size:
            config = self._loader_config(image_size, self._parts)
            if not (isinstance(self._loader, ResidentLoader) and self._loader.resize(config)):
                self._loader.close()
                self._loader = None
        if self._loader is None:
            self._loader = self._new_loader(image_size)
        self._loader_size = image_size
        return self._loader

    def _new_loader(self, image_size: int) -> Loader:
        dataset, config = self._dataset, self._config
        encoding = dataset.shards.encoding.name if dataset.shards else None
        choice = choose_loader(config.loader, encoding, self._fit(image_size))
        if config.compile == "cudagraph" and choice.name != "resident":
            raise UsageError(
                f"--compile cudagraph: takes its images from device memory, and --loader {choice.name} does not keep "
                "them there; "
                "use --loader resident"
            )
        self._log(f"loader: {choice.name} on {self._device} ({choice.reason})")
        self._parts = choice.parts
        return build_loader(choice, dataset, self._loader_config(image_size, choice.parts))

    def _fit(self, image_size: int) -> MemoryEstimate | None:
        """The data against the memory of the fullest device; None on the CPU, where the page cache keeps them anyway,
        unless asked for.
        """
        shards, on_gpu = self._dataset.shards, self._device.type == "cuda"
        if shards is None or not (on_gpu or self._config.loader == "resident"):
            return None
        free = free_memory(self._device) or 0
        least = min(self._world.gather(free if on_gpu else free // self._beside))
        return MemoryEstimate(needed=shards.memory_bytes(image_size), free=least, ranks=self._world.size)

    @property
    def _beside(self) -> int:
        """Processes like this one on this machine."""
        return self._config.nproc or self._world.local_size

    def _loader_config(self, image_size: int, parts: int) -> LoaderConfig:
        config = self._config
        largest = max(self._global_batches.values()) // self._world.size
        return LoaderConfig(
            image_size=image_size,
            device=self._device,
            dtype=amp_dtype(self._device, config),
            max_batch=largest + 1,  # a lone last sample joins its neighbour
            # more than there are processors only get in each other's way
            num_workers=min(config.num_workers, max(1, default_num_workers() // self._beside)),
            prefetch=config.prefetch,
            part=(self._world.rank, parts) if parts > 1 else (0, 1),
        )


def pick_device(wanted: str, world: World | None = None) -> torch.device:
    """:func:`find_device`, and make it this process's own."""
    device = find_device(wanted, world)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches keep one shape, so trying out algorithms pays
        torch.cuda.set_device(device)  # for what asks nobody which device is meant: events, pinned memory, kernels
    return device


def find_device(wanted: str, world: World | None = None) -> torch.device:
    """``auto`` is the GPU where there is one, of several processes each its own. Raises :class:`UsageError` for one
    that is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {wanted}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if device.index is not None and world and world.size > 1:
            raise UsageError(
                f"--device {wanted}: names one GPU, and {world.size} processes take one each; use --device cuda, and "
                "CUDA_VISIBLE_DEVICES "
                "to choose among them"
            )
        index = device.index if device.index is not None else world.local_rank if world else 0
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= found:
            raise UsageError(f"--device {wanted}: torch sees {found} CUDA device(s) here; use --device auto or cpu")
        return torch.device("cuda", index)
    return device


def refuse_for_device(config: TrainConfig, device: torch.device, world: World) -> None:
    """Raise :class:`UsageError` for what torch cannot do on ``device``."""
    if config.sync_bn and device.type != "cuda":
        raise UsageError("--sync_bn: torch synchronises BatchNorm between GPUs only; leave it out on the CPU")
    if config.compile == "cudagraph" and (device.type != "cuda" or world.size > 1):
        where = f"{world.size} processes" if world.size > 1 else str(device)
        raise UsageError(
            f"--compile cudagraph: captures the work of one GPU, and this is {where}; for several GPUs use --parallel "
            "folds, or --compile "
            "inductor"
        )


def write_summary(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Write ``summary.json`` over all folds that have results in the run's folder, those of other
    processes included.
    """
    with folder_lock(run.folder):
        return _write_summary(run, result)


def _write_summary(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    by_fold = {int(result["fold"]): result}
    for fold in range(1, run.config.num_folds + 1):
        path = run.folder / f"fold_{fold}" / METRICS_FILE
        if fold not in by_fold and path.is_file():
            earlier = read_document(path)
            if earlier.get("run") == run.identity(fold):
                by_fold[fold] = earlier
    folds = [by_fold[fold] for fold in sorted(by_fold)]
    summary = {
        "model_name": run.config.model_name,
        "num_folds": len(folds),
        **_mean_and_std(folds, "test_accuracy"),
        **_mean_and_std(folds, "test_accuracy_originals"),
        **_mean_and_std(folds, "macro_f1"),
        "fold_accuracies": {f"fold_{result['fold']}": result["test_accuracy"] for result in folds},
        "folds": [
            {
                name: result[name]
                for name in (
                    "fold",
                    "test_accuracy",
                    "test_loss",
                    "test_accuracy_originals",
                    "macro_f1",
                    "best_epoch",
                    "epochs_run",
                    "train_images_per_s",
                    "seconds",
                )
            }
            for result in folds
        ],
        "seconds": sum(result["seconds"] for result in folds),
        "train_images_per_s": statistics.median(result["train_images_per_s"] for result in folds),
        **provenance(run),
    }
    write_json(run.folder / SUMMARY_FILE, summary)
    return summary


def _mean_and_std(folds: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Mean and sample standard deviation over the folds that have the value; None where there are too few."""
    values = [result[name] for result in folds if result.get(name) is not None]
    return {
        f"mean_{name}": statistics.fmean(values) if values else None,
        f"std_{name}": statistics.stdev(values) if len(values) > 1 else None,
    }
