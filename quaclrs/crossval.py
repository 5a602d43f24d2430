"""The folds of a run, one after another: train, test, write the results, and sum them up."""

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

from quaclrs import checkpoint, engine
from quaclrs.config import TrainConfig, default_num_workers
from quaclrs.dataset import Dataset, open_dataset
from quaclrs.environment import describe_environment
from quaclrs.errors import TrainingError, UsageError
from quaclrs.files import folder_lock, make_folder, write_json
from quaclrs.folds import class_weights, select, split_for
from quaclrs.loaders import build_loader, choose_loader, fit_in
from quaclrs.loaders.base import Loader, LoaderConfig
from quaclrs.models import build_model, check_input_size, input_size
from quaclrs.order import evaluation_batches
from quaclrs.report.gradcam import pick_samples, write_gradcams
from quaclrs.report.metrics import compute_metrics, to_json_safe
from quaclrs.report.plots import write_plots

METRICS_FILE = "metrics.json"
SUMMARY_FILE = "summary.json"
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the folds of one run share."""

    config: TrainConfig
    dataset: Dataset
    loader: Loader
    device: torch.device
    image_size: int
    log: Log
    hooks: engine.Hooks = field(default_factory=engine.Hooks)

    @property
    def folder(self) -> Path:
        """``{output_dir}/{model_name}``"""
        return self.config.output_dir / self.config.model_name

    def identity(self, fold: int) -> dict[str, Any]:
        """What must not change between a training and its resumption."""
        config = self.config
        return {
            "model_name": config.model_name,
            "pretrained": config.pretrained,
            "freeze_features": config.freeze_features,
            "image_size": self.image_size,
            "batch_size": config.batch_size,
            "epochs": config.epochs,
            "patience": config.patience,
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
            "scheduler": config.scheduler,
            "use_amp": config.use_amp,
            "compute_dtype": str(engine.amp_dtype(self.device, config.use_amp)),
            "seed": config.seed,
            "fold": fold,
            "num_folds": config.num_folds,
            "data": self.dataset.fingerprint,
            "pixels": self.loader.pixels,
        }


def run_cross_validation(config: TrainConfig, log: Log = print, hooks: engine.Hooks | None = None) -> dict[str, Any]:
    """Train and test the fold(s) of ``config``; returns the summary that is also written to ``summary.json``.

    Everything that can be refused is refused before the first fold starts. Raises the errors of quaclrs.errors.
    """
    image_size = input_size(config.model_name) if config.image_size is None else config.image_size
    check_input_size(config.model_name, image_size)
    device = pick_device(config.device)
    wants_shards = config.shards is None and choose_loader(config.loader, "png").name != "files"
    dataset = open_dataset(config, want_shards=wants_shards, log=log)
    try:
        folds = [config.fold] if config.fold is not None else list(range(1, config.num_folds + 1))
        _refuse_unknown_folds(dataset, config)
        for fold in folds:
            fold_samples(dataset, fold, config.num_folds)
        make_folder(config.output_dir)
        encoding = dataset.shards.encoding if dataset.shards else None
        choice = choose_loader(config.loader, encoding, fit_in(dataset, image_size, device))
        log(f"loader: {choice.name} on {device} ({choice.reason})")
        loader = build_loader(choice, dataset, _loader_config(config, image_size, device))
        try:
            run = Run(
                config=config,
                dataset=dataset,
                loader=loader,
                device=device,
                image_size=image_size,
                log=log,
                hooks=hooks or engine.Hooks(),
            )
            results: list[dict[str, Any]] = []
            for fold in folds:
                results.append(run_fold(run, fold))
                summary = write_summary(run, results)  # after each fold, so that a later failure does not cost it
        finally:
            loader.close()
    finally:
        dataset.close()
    return summary


def pick_device(wanted: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises :class:`UsageError` for a device that is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {wanted}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UsageError(f"--device {wanted}: torch sees {found} CUDA device(s) here; use --device auto or cpu")
        torch.backends.cudnn.benchmark = True  # batches keep one shape, so trying out algorithms pays
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # for what asks nobody which device is meant: events, pinned memory, kernels
        return device
    return device


def fold_samples(dataset: Dataset, fold: int, num_folds: int) -> engine.FoldSamples:
    """The sample numbers of test fold ``fold``. Raises :class:`TrainingError` when a part, or a class in training, is empty."""
    train, validation, test = select(dataset.fold, split_for(fold, num_folds))
    class_weights(dataset.label[train], dataset.classes)
    if len(train) < 2:
        raise TrainingError(f"--fold {fold}: training on {len(train)} sample(s) is not possible; it takes two at least")
    return engine.FoldSamples(train=train, validation=validation, test=test)


def _refuse_unknown_folds(dataset: Dataset, config: TrainConfig) -> None:
    highest = int(dataset.fold.max())
    if highest > config.num_folds:
        raise UsageError(
            f"{dataset.name}: has a fold {highest}, but the protocol has {config.num_folds}; give --num_folds {highest} or mend the CSV"
        )


def _loader_config(config: TrainConfig, image_size: int, device: torch.device) -> LoaderConfig:
    return LoaderConfig(
        image_size=image_size,
        device=device,
        dtype=engine.amp_dtype(device, config.use_amp),
        max_batch=config.batch_size + 1,  # a lone last sample joins its neighbour
        num_workers=min(config.num_workers, default_num_workers()),  # more than there are processors only get in each other's way
    )


def run_fold(run: Run, fold: int) -> dict[str, Any]:
    """Train and test one fold and write its results; returns its metrics. With ``--resume``, a finished fold is only read."""
    config, folder = run.config, run.folder / f"fold_{fold}"
    identity = run.identity(fold)
    if config.resume and (finished := _finished(folder, identity)):
        run.log(f"fold {fold}: finished before, test accuracy {finished['test_accuracy']:.2%}")
        return finished
    if not config.resume:
        _set_aside(folder, run.log)
    make_folder(folder)
    samples = fold_samples(run.dataset, fold, config.num_folds)
    run.log(
        f"fold {fold}: training on {len(samples.train)} samples, validating on {len(samples.validation)}, testing on {len(samples.test)}"
    )
    started = time.monotonic()
    training = _begin(run, samples, fold)
    if config.resume:
        _restore(training, folder, identity, run.log)
    stopped_early = engine.fit(training, run.loader, samples, config, folder, identity, run.hooks)
    metrics = _test(run, training, samples, folder, stopped_early)
    metrics = to_json_safe(metrics | {"fold": fold, "seconds": time.monotonic() - started, "run": identity})
    write_json(folder / METRICS_FILE, metrics)
    run.log(
        f"fold {fold}: test accuracy {metrics['test_accuracy']:.2%}, macro F1 {metrics['macro_f1']:.3f}, best epoch "
        f"{training.best_epoch} of {len(training.history)}, {metrics['seconds']:.0f} s"
    )
    return metrics


def _begin(run: Run, samples: engine.FoldSamples, fold: int) -> engine.Training:
    config = run.config
    # each fold starts from its own seed, so its result does not depend on which folds ran before it in this process
    torch.manual_seed(int(np.random.SeedSequence([config.seed, fold]).generate_state(1)[0]))
    model = build_model(
        config.model_name, len(run.dataset.classes), pretrained=config.pretrained, freeze_features=config.freeze_features
    )
    weights = class_weights(run.dataset.label[samples.train], run.dataset.classes)
    return engine.Training.begin(model, weights, run.device, config)


def _restore(training: engine.Training, folder: Path, identity: dict[str, Any], log: Log) -> None:
    state = checkpoint.load_checkpoint(folder, identity)
    if state is None:
        log(f"{folder}: no checkpoint to resume from; starting at the beginning")
        return
    training.restore(state)
    log(f"{folder}: resuming after epoch {len(training.history)}")


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    metrics = read_metrics(path)
    checkpoint.refuse_other_run(path, metrics.get("run", {}), identity)
    return metrics


def read_metrics(path: Path) -> dict[str, Any]:
    """A fold's ``metrics.json``. Raises :class:`TrainingError` naming it when it cannot be read."""
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


def _test(run: Run, training: engine.Training, samples: engine.FoldSamples, folder: Path, stopped_early: bool) -> dict[str, Any]:
    """Test the best weights and write plots, report and Grad-CAMs; returns the content of metrics.json."""
    dataset, config = run.dataset, run.config
    batches = evaluation_batches(samples.test, config.batch_size)
    tested = engine.evaluate(training, run.loader, batches, run.hooks.step_meter("test", training.best_epoch, len(samples.test)))
    labels = dataset.label[tested.index]
    is_original = None if dataset.is_original is None else dataset.is_original[tested.index]
    scores = compute_metrics(labels, tested.probabilities, dataset.classes, is_original)
    write_plots(folder / "plots", training.history, scores)
    write_json(folder / "classification_report.json", scores["classification_report"])
    _write_gradcams(run, training, tested, folder / "grad_cam")
    best = training.history[training.best_epoch - 1]
    return {
        "model_name": config.model_name,
        "test_accuracy": scores["accuracy"],
        "test_loss": tested.loss,
        "test_accuracy_originals": scores["accuracy_originals"],
        "num_test_originals": scores["num_originals"],
        "macro_f1": scores["macro_f1"],
        "macro_auc": scores["roc"]["macro"]["auc"],
        "best_epoch": training.best_epoch,
        "best_val_accuracy": best["val_accuracy"],
        "best_val_loss": best["val_loss"],
        "epochs_run": len(training.history),
        "stopped_early": stopped_early,
        "num_samples": {"train": len(samples.train), "validation": len(samples.validation), "test": len(samples.test)},
        "train_images_per_s": statistics.median(entry["train_images_per_s"] for entry in training.history),
        "train_data_wait": statistics.median(entry["train_data_wait"] for entry in training.history),
        "test_images_per_s": len(tested.index) / tested.seconds,
        "class_names": list(dataset.classes),
        "confusion_matrix": scores["confusion_matrix"],
        "history": training.history,
        **_provenance(run),
    }


def _provenance(run: Run) -> dict[str, Any]:
    """What a result was made from and with."""
    shards = run.dataset.shards
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(run.config).items()},
        "loader": run.loader.name,
        "image_size": run.image_size,
        "data": {
            "csv_sha256": run.dataset.fingerprint,
            "shards_sha256": shards.manifest.data_fingerprint if shards else None,
            "encoding": shards.encoding if shards else None,
            "num_samples": len(run.dataset),
        },
        "environment": describe_environment(run.device),
    }


def _write_gradcams(run: Run, training: engine.Training, tested: engine.Evaluation, folder: Path) -> None:
    dataset = run.dataset
    labels, predictions = dataset.label[tested.index], tested.probabilities.argmax(axis=1)
    is_original = None if dataset.is_original is None else dataset.is_original[tested.index]
    picked = pick_samples(labels, predictions, is_original, run.config.gradcam_per_class)
    if len(picked) == 0:
        return
    batches = evaluation_batches(tested.index[picked], run.config.batch_size)
    images = torch.cat([batch.images.float() for batch in run.loader.load(batches)])
    write_gradcams(training.model, run.config.model_name, images, labels[picked], predictions[picked], dataset.classes, folder)


def write_summary(run: Run, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Write ``summary.json`` over all folds that have results in the run's folder, those of other processes included."""
    with folder_lock(run.folder):
        return _write_summary(run, results)


def _write_summary(run: Run, results: list[dict[str, Any]]) -> dict[str, Any]:
    by_fold = {int(result["fold"]): result for result in results}
    for fold in range(1, run.config.num_folds + 1):
        path = run.folder / f"fold_{fold}" / METRICS_FILE
        if fold not in by_fold and path.is_file():
            earlier = read_metrics(path)
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
        **_provenance(run),
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
