"""One model's run: what all its folds share, the paths of its files, and the identity that a resume must match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quaclrs.config import TrainConfig
from quaclrs.data.folds import refuse_absent_classes, select, split_for
from quaclrs.errors import TrainingError
from quaclrs.experiment.results import Provenance, read_document
from quaclrs.loaders.base import Loader
from quaclrs.loaders.dataset import Dataset
from quaclrs.settings import identity_entries, plain_value
from quaclrs.system.environment import describe_environment
from quaclrs.system.signals import SignalHandler
from quaclrs.training.distributed import World
from quaclrs.training.state import amp_dtype
from quaclrs.training.trainer import FoldSamples, Hooks

RUN_FILE = "run.json"
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the folds of one model share."""

    config: TrainConfig
    """Of one model."""
    dataset: Dataset
    samples: Mapping[int, FoldSamples]
    """By test fold, of the folds to train."""
    loader: Loader
    device: torch.device
    image_size: int
    global_batch: int
    """Samples of one optimizer step over all processes."""
    world: World
    signals: SignalHandler
    log: Log
    hooks: Hooks = field(default_factory=Hooks)

    @property
    def folder(self) -> Path:
        """``{output_dir}/{model_name}``"""
        return model_folder(self.config)

    def fold_folder(self, fold: int) -> Path:
        """``{output_dir}/{model_name}/fold_{fold}``"""
        return self.folder / f"fold_{fold}"

    def identity(self, fold: int) -> dict[str, Any]:
        """Return what must not change between a training and its resumption, as plain JSON values.

        Every field of TrainConfig with ``affects_result=True`` is in it: under its own name, or by the entries that its
        ``identity`` names, whose values in effect are known only here.
        """
        in_effect = {
            "data": self.dataset.identity,
            "pixels": self.loader.pixels,
            "order": "global" if self.loader.replicated else f"shared out over {self.world.size} processes",
            "image_size": self.image_size,
            "global_batch": self.global_batch,
            "compute_dtype": str(amp_dtype(self.device, self.config)),
            "fold": fold,
        }
        return {
            entry: in_effect[entry] if entry in in_effect else plain_value(getattr(self.config, entry))
            for entry in identity_entries(self.config)
        }

    def provenance(self) -> Provenance:
        """Describe the settings, data and machine, for the documents of results."""
        shards = self.dataset.shards
        return Provenance(
            config={name: plain_value(value) for name, value in asdict(self.config).items()},
            processes=self.world.size,
            global_batch=self.global_batch,
            loader=self.loader.name,
            image_size=self.image_size,
            data={
                "csv_sha256": self.dataset.fingerprint,
                "shards_sha256": shards.manifest.data_fingerprint if shards else None,
                "encoding": shards.encoding.name if shards else None,
                "num_samples": len(self.dataset),
            },
            environment=describe_environment(self.device),
        )


def model_folder(config: TrainConfig) -> Path:
    """The folder of results of ``config``'s one model: ``{output_dir}/{model_name}``."""
    return config.output_dir / config.model_name


def agreed_global_batch(config: TrainConfig, world: World) -> int:
    """Samples of one optimizer step: ``--batch_size`` × processes.

    A run that is resumed on another number of processes keeps its own. Raises :class:`TrainingError` if they cannot
    share it.
    """
    now = config.batch_size * world.size
    if not config.resume:
        return now
    for path in (model_folder(config) / f"fold_{fold}" / RUN_FILE for fold in range(1, config.num_folds + 1)):
        if not path.is_file():
            continue
        saved = read_document(path)
        before = int(saved["run"]["global_batch"])
        if saved["batch_size"] == config.batch_size and before != now:
            if before % world.size or before // world.size < 2:
                raise TrainingError(
                    f"{path}: its global batch of {before} samples cannot be shared by {world.size} processes; use a "
                    "number that divides it"
                )
            return before
    return now


def select_fold_samples(dataset: Dataset, fold: int, num_folds: int) -> FoldSamples:
    """The sample numbers of test fold ``fold``.

    Raises :class:`TrainingError` if a part of the split, or a class in the training part, is empty.
    """
    split = split_for(fold, num_folds)
    train, validation, test = select(dataset.fold, split)
    refuse_absent_classes(dataset.label, dataset.fold, dataset.classes, split, num_folds)
    if len(train) < 2:
        raise TrainingError(f"--fold {fold}: training on {len(train)} sample(s) is not possible; it takes two at least")
    return FoldSamples(train=train, validation=validation, test=test, label=dataset.label)
