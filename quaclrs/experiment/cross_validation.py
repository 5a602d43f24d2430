"""The folds of one or several models, one after another, in one process: the data are opened once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from quaclrs.config import TrainConfig, usable_processors
from quaclrs.errors import UsageError, raised_on_every_rank
from quaclrs.experiment.fold import run_fold
from quaclrs.experiment.results import FoldResult, Summary
from quaclrs.experiment.run import Log, Run, agreed_global_batch, select_fold_samples
from quaclrs.experiment.summary import write_summary
from quaclrs.loaders import MemoryEstimate, build_loader, choose_loader, loader_called, needs_shards
from quaclrs.loaders.base import Loader, LoaderConfig
from quaclrs.loaders.dataset import Dataset, open_dataset
from quaclrs.loaders.resident import ResidentLoader
from quaclrs.system.atomic_files import make_folder
from quaclrs.system.environment import free_memory
from quaclrs.system.signals import SignalHandler
from quaclrs.training.architectures import check_input_size, input_size, parse_model_names
from quaclrs.training.device import pick_device, refuse_unsupported
from quaclrs.training.distributed import World
from quaclrs.training.state import amp_dtype, set_tf32
from quaclrs.training.trainer import FoldSamples, Hooks


def run_cross_validation(
    config: TrainConfig, log: Log = print, hooks: Hooks | None = None, world: World | None = None
) -> dict[str, Summary]:
    """Train and test the fold(s) of ``config``'s model(s); returns the summaries, also in ``summary.json``, by model.

    Everything that can be refused is refused before the first fold starts. Raises the errors of quaclrs.errors.
    """
    with FoldRunner.opened(config, log, hooks, world) as runner:
        for name, fold in list_tasks(config):
            runner.train(name, fold)
        return runner.summaries


def list_tasks(config: TrainConfig) -> list[tuple[str, int]]:
    """List every (model, fold) of ``config``, models of one input size together, so that few loaders are made.

    Raises :class:`UsageError` for an unknown model or an image size that one of them cannot take.
    """
    names = parse_model_names(config.model_name)
    for name in names:
        check_input_size(name, image_size_of(name, config))
    names.sort(key=lambda name: image_size_of(name, config))
    folds = [config.fold] if config.fold is not None else range(1, config.num_folds + 1)
    return [(name, fold) for name in names for fold in folds]


def image_size_of(name: str, config: TrainConfig) -> int:
    """Side in pixels of the square images that the model ``name`` is trained on."""
    return input_size(name) if config.image_size is None else config.image_size


class FoldRunner:
    """Trains folds in one process, keeping the device, the dataset and the loader of one image size between them."""

    def __init__(self, config: TrainConfig, log: Log, hooks: Hooks | None, world: World) -> None:
        self._config, self._log, self._world = config, log, world
        self._signals = SignalHandler(config.checkpoint_minutes)
        self._hooks = hooks or Hooks()
        self.summaries: dict[str, Summary] = {}
        """By model, over the folds trained here and those found in its folder. Rank 0 only."""
        with raised_on_every_rank():
            self._device = pick_device(config.device, world)
            refuse_unsupported(config, self._device, world)
            names = dict.fromkeys(name for name, _ in list_tasks(config))
        set_tf32(config.tf32)
        self._global_batches = {name: self._global_batch(name) for name in names}
        if world.size > 1:
            for name, batch in self._global_batches.items():
                log(f"{name}: {world.size} processes, global batch {batch} ({batch // world.size} samples of each)")
        self._dataset = self._open_dataset()
        self._samples: dict[int, FoldSamples] = {}
        self._loader: Loader | None = None
        self._loader_size = 0
        self._parts = 1

    @classmethod
    @contextmanager
    def opened(
        cls, config: TrainConfig, log: Log = print, hooks: Hooks | None = None, world: World | None = None
    ) -> Iterator[FoldRunner]:
        """Yield a runner that has checked everything that the folds of ``config`` need; close it after the block."""
        runner = cls(config, log, hooks, world or World())
        try:
            with raised_on_every_rank():
                runner.prepare_folds()
            if runner._world.is_main:
                make_folder(config.output_dir)
            yield runner
        finally:
            runner.close()

    def prepare_folds(self) -> None:
        """Split the dataset. Raises :class:`UsageError` or :class:`TrainingError` for folds that it cannot serve."""
        highest, config = int(self._dataset.fold.max()), self._config
        if highest > config.num_folds:
            raise UsageError(
                f"{self._dataset.name}: has a fold {highest}, but the protocol has {config.num_folds}; give "
                f"--num_folds {highest} or mend the CSV"
            )
        for fold in dict.fromkeys(fold for _, fold in list_tasks(config)):
            self._samples[fold] = select_fold_samples(self._dataset, fold, config.num_folds)

    def train(self, name: str, fold: int) -> FoldResult | None:
        """Train and test one fold of the model ``name``; returns its result, on rank 0 at least.

        Raises :class:`Interrupted` after a signal, once the training is saved.
        """
        config = dataclasses.replace(self._config, model_name=name)
        size = image_size_of(name, config)
        run = Run(
            config=config,
            dataset=self._dataset,
            samples=self._samples,
            loader=self._loader_for(size),
            device=self._device,
            image_size=size,
            global_batch=self._global_batches[name],
            world=self._world,
            signals=self._signals,
            log=self._log,
            hooks=self._hooks,
        )
        with self._signals:  # only here: outside of a fold there is nothing to save, so a signal may end the process
            result = run_fold(run, fold)
            if self._world.is_main and result is not None:  # after each fold, so that a later failure keeps it
                self.summaries[name] = write_summary(run, result)
        if any(self._world.gather(self._signals.signal is not None)):
            raise self._signals.interrupted(f"fold {fold}, which is done")
        return result

    def close(self) -> None:
        """Close the loader and the dataset."""
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
        """Return the loader of ``image_size``: the present one, resized if possible, or a new one in its place."""
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
        choice = choose_loader(config.loader, encoding, self._estimate_memory(image_size))
        if config.compile == "cudagraph" and choice.name != "resident":
            raise UsageError(
                f"--compile cudagraph: takes its images from device memory, and --loader {choice.name} does not keep "
                "them there; use --loader resident"
            )
        self._log(f"loader: {choice.name} on {self._device} ({choice.reason})")
        self._parts = choice.parts
        return build_loader(choice, dataset, self._loader_config(image_size, choice.parts))

    def _estimate_memory(self, image_size: int) -> MemoryEstimate | None:
        """Compare the data with the free memory of the fullest device.

        None on the CPU, where the page cache holds the data anyway, unless ``--loader resident`` was given.
        """
        shards, on_gpu = self._dataset.shards, self._device.type == "cuda"
        if shards is None or not (on_gpu or loader_called(self._config.loader) == "resident"):
            return None
        free = free_memory(self._device) or 0
        least = min(self._world.gather(free if on_gpu else free // self._local_processes))
        return MemoryEstimate(needed=shards.memory_bytes(image_size), free=least, ranks=self._world.size)

    @property
    def _local_processes(self) -> int:
        """Number of training processes on this machine."""
        return self._config.nproc or self._world.local_size

    def _loader_config(self, image_size: int, parts: int) -> LoaderConfig:
        config = self._config
        largest = max(self._global_batches.values()) // self._world.size
        return LoaderConfig(
            image_size=image_size,
            device=self._device,
            dtype=amp_dtype(self._device, config),
            max_batch=largest + 1,  # a last batch of one sample joins the batch before it
            # more workers than processors only slow each other down
            num_workers=min(config.num_workers, max(1, usable_processors() // self._local_processes)),
            prefetch=config.prefetch,
            part=(self._world.rank, parts) if parts > 1 else (0, 1),
        )
