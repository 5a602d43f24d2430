"""One fold: train it from wherever it stands, test the best weights, write the results."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quaclrs.config import TrainConfig
from quaclrs.data.folds import class_weights, select, split_for
from quaclrs.data.sampling import evaluation_batches
from quaclrs.errors import TrainingError
from quaclrs.experiment.run_status import claimed, note_done
from quaclrs.loaders.base import Loader
from quaclrs.loaders.dataset import Dataset
from quaclrs.report.gradcam import pick_samples, write_gradcams
from quaclrs.report.metrics import compute_metrics, to_json_safe
from quaclrs.report.plots import write_plots
from quaclrs.system.atomic_files import TEMPORARY_SUFFIX, make_folder, write_json
from quaclrs.system.environment import describe_environment
from quaclrs.system.signals import SignalHandler
from quaclrs.training import checkpoint, loop, trainer
from quaclrs.training.distributed import World
from quaclrs.training.models import build_model
from quaclrs.training.profiler import with_profile
from quaclrs.training.state import TrainState, amp_dtype

METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the folds of one model share."""

    config: TrainConfig
    """Of one model."""
    dataset: Dataset
    loader: Loader
    device: torch.device
    image_size: int
    global_batch: int
    """Samples of one optimizer step, those of all processes together."""
    world: World
    watch: SignalHandler
    log: Log
    hooks: trainer.Hooks = field(default_factory=trainer.Hooks)

    @property
    def folder(self) -> Path:
        """``{output_dir}/{model_name}``"""
        return model_folder(self.config)

    def identity(self, fold: int) -> dict[str, Any]:
        """What must not change between a training and its resumption."""
        config = self.config
        return {
            "model_name": config.model_name,
            "pretrained": config.pretrained,
            "freeze_features": config.freeze_features,
            "image_size": self.image_size,
            "global_batch": self.global_batch,
            "epochs": config.epochs,
            "patience": config.patience,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "scheduler": config.scheduler,
            "use_amp": config.use_amp,
            "compute_dtype": str(amp_dtype(self.device, config)),
            "tf32": config.tf32,
            "sync_bn": config.sync_bn,
            "seed": config.seed,
            "fold": fold,
            "num_folds": config.num_folds,
            "data": self.dataset.identity,
            "pixels": self.loader.pixels,
            "order": "global" if self.loader.replicated else f"shared out over {self.world.size} processes",
        }


def model_folder(config: TrainConfig) -> Path:
    """Where the results of ``config``'s one model go."""
    return config.output_dir / config.model_name


def fold_folder(config: TrainConfig, fold: int) -> Path:
    """Where the results of one fold of ``config``'s one model go."""
    return model_folder(config) / f"fold_{fold}"


def agreed_global_batch(config: TrainConfig, world: World) -> int:
    """Samples of one optimizer step: ``--batch_size`` × processes.

    A run that is resumed on another number of processes keeps its own. Raises :class:`TrainingError` when those cannot
    share it.
    """
    now = config.batch_size * world.size
    if not config.resume:
        return now
    for path in (fold_folder(config, fold) / RUN_FILE for fold in range(1, config.num_folds + 1)):
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


def fold_samples(dataset: Dataset, fold: int, num_folds: int) -> trainer.FoldSamples:
    """The sample numbers of test fold ``fold``. Raises :class:`TrainingError` when a part, or a class in state, is
    empty.
    """
    train, validation, test = select(dataset.fold, split_for(fold, num_folds))
    class_weights(dataset.label[train], dataset.classes)
    if len(train) < 2:
        raise TrainingError(f"--fold {fold}: training on {len(train)} sample(s) is not possible; it takes two at least")
    return trainer.FoldSamples(train=train, validation=validation, test=test, label=dataset.label)


def run_fold(run: Run, fold: int) -> dict[str, Any]:
    """Train and test one fold and write its results; returns its metrics. With ``--resume``, a finished fold is only
    read.

    On several processes each calls it; rank 0 alone reads and writes files.
    """
    finished = run.world.broadcast_object(_finished(run, fold) if run.config.resume and run.world.is_main else None)
    if finished:
        if run.world.is_main:
            note_done(run.folder, fold)
        run.log(f"fold {fold}: finished before, test accuracy {finished['test_accuracy']:.2%}")
        return finished
    if not run.world.is_main:
        return _train_and_test(run, fold)
    with claimed(run.folder, fold):
        if not run.config.resume:
            _set_aside(fold_folder(run.config, fold), run.log)
        return _train_and_test(run, fold)


def _train_and_test(run: Run, fold: int) -> dict[str, Any]:
    config, folder, identity = run.config, fold_folder(run.config, fold), run.identity(fold)
    samples = fold_samples(run.dataset, fold, config.num_folds)
    run.log(
        f"fold {fold}: training on {len(samples.train)} samples, validating on {len(samples.validation)}, testing on "
        f"{len(samples.test)}"
    )
    started = time.monotonic()
    state = _create_state(run, samples, fold)
    if run.world.is_main:
        make_folder(folder)
    if config.resume:
        _restore(run, state, folder, identity)
    if run.world.is_main:
        write_json(folder / RUN_FILE, {"run": identity, "batch_size": config.batch_size, "processes": run.world.size})
    with with_profile(run.hooks, config, state, run.loader.name, folder, run.log) as hooks:
        fold_trainer = trainer.Trainer(
            state, run.loader, samples, config, run.global_batch, folder, identity, run.watch, hooks
        )
        stopped_early = fold_trainer.fit()
        test_result = fold_trainer.test()
    if not run.world.is_main:
        return {}
    metrics = _report(run, state, samples, test_result, folder)
    more = {"fold": fold, "stopped_early": stopped_early, "seconds": time.monotonic() - started, "run": identity}
    metrics = to_json_safe(metrics | more)
    write_json(folder / METRICS_FILE, metrics)
    run.log(
        f"fold {fold}: test accuracy {metrics['test_accuracy']:.2%}, macro F1 {metrics['macro_f1']:.3f}, best epoch "
        f"{state.best_epoch} of {len(state.history)}, {metrics['seconds']:.0f} s"
    )
    return metrics


def _create_state(run: Run, samples: trainer.FoldSamples, fold: int) -> TrainState:
    config = run.config
    # each fold starts from its own seed, so its result does not depend on which folds ran before it in this process
    torch.manual_seed(int(np.random.SeedSequence([config.seed, fold]).generate_state(1)[0]))
    model = build_model(
        config.model_name,
        len(run.dataset.classes),
        pretrained=config.pretrained,
        freeze_features=config.freeze_features,
    )
    weights = class_weights(run.dataset.label[samples.train], run.dataset.classes)
    return TrainState.create(model, weights, run.device, config, run.world)


def _restore(run: Run, state: TrainState, folder: Path, identity: dict[str, Any]) -> None:
    saved = run.world.broadcast_object(checkpoint.load_checkpoint(folder, identity) if run.world.is_main else None)
    if run.world.is_main:
        for half_written in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
            half_written.unlink(missing_ok=True)
    if saved is None:
        run.log(f"{folder}: no checkpoint to resume from; starting at the beginning")
        return
    state.load_state_dict(saved)
    if run.world.is_main and state.progress is None:
        _finish_epoch(state, folder, run.config.keep_checkpoints)
    within = "" if state.progress is None else f" and step {state.progress.step} of the next"
    run.log(f"{folder}: resuming after epoch {len(state.history)}{within}")


def _finish_epoch(state: TrainState, folder: Path, keep: int) -> None:
    """Do what comes after an epoch's checkpoint, which a process that was killed had no time for."""
    checkpoint.delete_superseded(folder, keep)
    if state.best_epoch == len(state.history):
        checkpoint.save(folder / checkpoint.BEST_MODEL_FILE, state.model.state_dict())


def _finished(run: Run, fold: int) -> dict[str, Any] | None:
    path = fold_folder(run.config, fold) / METRICS_FILE
    if not path.is_file():
        return None
    metrics = read_document(path)
    checkpoint.refuse_other_run(path, metrics.get("run", {}), run.identity(fold))
    return metrics


def read_document(path: Path) -> dict[str, Any]:
    """A JSON file that a run left behind. Raises :class:`TrainingError` naming it when it cannot be read."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); delete it and run again") from None


def _set_aside(folder: Path, log: Log) -> None:
    """Without --resume the fold starts afresh, but results of hours are not thrown away by a forgotten flag."""
    if not folder.exists():
        return
    previous = folder.with_name(f"{folder.name}.previous")
    number = 1
    while previous.exists():
        number += 1
        previous = folder.with_name(f"{folder.name}.previous{number}")
    folder.rename(previous)
    log(f"{folder}: holds an earlier run, which is now {previous} (--resume would have continued it)")


def _report(
    run: Run, state: TrainState, samples: trainer.FoldSamples, test_result: loop.Evaluation, folder: Path
) -> dict[str, Any]:
    """Write plots, report and Grad-CAMs of the test; returns the content of metrics.json."""
    dataset, config = run.dataset, run.config
    labels = dataset.label[test_result.index]
    is_original = None if dataset.is_original is None else dataset.is_original[test_result.index]
    scores = compute_metrics(labels, test_result.probabilities, dataset.classes, is_original)
    write_plots(folder / "plots", [record.to_json() for record in state.history], scores)
    write_json(folder / "classification_report.json", scores["classification_report"])
    _write_gradcams(run, state, test_result, folder / "grad_cam")
    best = state.history[state.best_epoch - 1]
    return {
        "model_name": config.model_name,
        "test_accuracy": scores["accuracy"],
        "test_loss": test_result.loss,
        "test_accuracy_originals": scores["accuracy_originals"],
        "num_test_originals": scores["num_originals"],
        "macro_f1": scores["macro_f1"],
        "macro_auc": scores["roc"]["macro"]["auc"],
        "best_epoch": state.best_epoch,
        "best_val_accuracy": best.val_accuracy,
        "best_val_loss": best.val_loss,
        "epochs_run": len(state.history),
        "num_samples": {"train": len(samples.train), "validation": len(samples.validation), "test": len(samples.test)},
        "train_images_per_s": statistics.median(record.train_images_per_s for record in state.history),
        "train_data_wait": statistics.median(record.train_data_wait for record in state.history),
        "test_images_per_s": len(test_result.index) / test_result.seconds,
        "class_names": list(dataset.classes),
        "confusion_matrix": scores["confusion_matrix"],
        "history": [record.to_json() for record in state.history],
        **provenance(run),
    }


def provenance(run: Run) -> dict[str, Any]:
    """What a result was made from and with."""
    shards = run.dataset.shards
    return {
        "config": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(run.config).items()
        },
        "processes": run.world.size,
        "global_batch": run.global_batch,
        "loader": run.loader.name,
        "image_size": run.image_size,
        "data": {
            "csv_sha256": run.dataset.fingerprint,
            "shards_sha256": shards.manifest.data_fingerprint if shards else None,
            "encoding": shards.encoding.name if shards else None,
            "num_samples": len(run.dataset),
        },
        "environment": describe_environment(run.device),
    }


def _write_gradcams(run: Run, state: TrainState, test_result: loop.Evaluation, folder: Path) -> None:
    dataset = run.dataset
    labels, predictions = dataset.label[test_result.index], test_result.probabilities.argmax(axis=1)
    is_original = None if dataset.is_original is None else dataset.is_original[test_result.index]
    picked = pick_samples(labels, predictions, is_original, run.config.gradcam_per_class)
    if len(picked) == 0:
        return
    batches = evaluation_batches(test_result.index[picked], run.global_batch // run.world.size)
    images = torch.cat([batch.images.float() for batch in run.loader.load(batches)])
    write_gradcams(
        state.model, run.config.model_name, images, labels[picked], predictions[picked], dataset.classes, folder
    )
