"""One fold: trains it from whatever state it is in, tests the best weights and writes the results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quaclrs.data.folds import class_weights
from quaclrs.data.sampling import evaluation_batches
from quaclrs.experiment.original_outputs import ORIGINAL_METRICS_FILE, REPORT_FILE, original_metrics
from quaclrs.experiment.results import METRICS_FILE, FoldResult, parse_fold_result, read_document
from quaclrs.experiment.run import RUN_FILE, Log, Run
from quaclrs.experiment.run_status import hold_fold, mark_done
from quaclrs.loaders.files import dead_readers_named
from quaclrs.report.gradcam import pick_samples, write_gradcams
from quaclrs.report.metrics import compute_metrics, scores_for_results
from quaclrs.report.plots import write_plots
from quaclrs.settings import identity_defaults
from quaclrs.system.atomic_files import TEMPORARY_SUFFIX, make_folder, storage_error, write_json
from quaclrs.training import checkpoint
from quaclrs.training.loop import Evaluation
from quaclrs.training.models import build_model
from quaclrs.training.profiler import with_profile
from quaclrs.training.state import TrainState
from quaclrs.training.trainer import FoldSamples, Trainer


def run_fold(run: Run, fold: int) -> FoldResult | None:
    """Train and test one fold and write its results. With ``--resume``, a finished fold is only read.

    Every rank calls it. Rank 0 alone reads and writes files, and may be the only one to get a result.
    """
    read = run.config.resume and run.world.is_main
    finished = run.world.broadcast_object(_read_finished(run, fold) if read else None)
    if finished:
        if run.world.is_main:
            mark_done(run.folder, fold)
        run.log(f"fold {fold}: finished before, test accuracy {finished.test_accuracy:.2%}")
        return finished
    if not run.world.is_main:
        return _train_and_test(run, fold)
    with hold_fold(run.folder, fold):
        if not run.config.resume:
            _rename_earlier_results(run.fold_folder(fold), run.log)
        return _train_and_test(run, fold)


def _read_finished(run: Run, fold: int) -> FoldResult | None:
    path = run.fold_folder(fold) / METRICS_FILE
    if not path.is_file():
        return None
    document = read_document(path)
    checkpoint.refuse_other_run(path, document.get("run", {}), run.identity(fold), identity_defaults(run.config))
    return parse_fold_result(document, path)


def _train_and_test(run: Run, fold: int) -> FoldResult | None:
    """Train and test the fold, from its last checkpoint with ``--resume``; returns its result on rank 0."""
    samples = run.samples[fold]
    run.log(
        f"fold {fold}: training on {len(samples.train)} samples, validating on {len(samples.validation)}, testing on "
        f"{len(samples.test)}"
    )
    started = time.monotonic()
    state = _prepare_state(run, samples, fold)
    config, folder = run.config, run.fold_folder(fold)
    with with_profile(run.hooks, config, state, run.loader.name, folder, run.log) as hooks:
        trainer = Trainer(
            state, run.loader, samples, config, run.global_batch, folder, run.identity(fold), run.signals, hooks
        )
        with dead_readers_named():
            stopped_early = trainer.fit()
            test_result = trainer.test()
    if not run.world.is_main:
        return None
    return _write_results(run, fold, state, test_result, stopped_early, started)


def _prepare_state(run: Run, samples: FoldSamples, fold: int) -> TrainState:
    """Create the state to train: fresh or, with ``--resume``, from the last checkpoint if there is one."""
    config, folder, identity = run.config, run.fold_folder(fold), run.identity(fold)
    state = _create_state(run, samples, fold)
    if run.world.is_main:
        make_folder(folder)
    if config.resume:
        _restore(run, state, folder, identity)
    if run.world.is_main:
        write_json(folder / RUN_FILE, {"run": identity, "batch_size": config.batch_size, "processes": run.world.size})
    return state


def _create_state(run: Run, samples: FoldSamples, fold: int) -> TrainState:
    config = run.config
    # each fold has its own seed, so its result does not depend on the folds that ran before it in this process
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
    found = None
    if run.world.is_main:
        found = checkpoint.load_checkpoint(folder, identity, identity_defaults(run.config))
    saved = run.world.broadcast_object(found)
    if run.world.is_main:
        for half_written in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
            half_written.unlink(missing_ok=True)
    if saved is None:
        run.log(f"{folder}: no checkpoint to resume from; starting at the beginning")
        return
    state.load_state_dict(saved)
    if run.world.is_main and state.progress is None:
        _complete_last_epoch(state, folder, run.config.keep_checkpoints)
    within = "" if state.progress is None else f" and step {state.progress.step} of the next"
    run.log(f"{folder}: resuming after epoch {len(state.history)}{within}")


def _complete_last_epoch(state: TrainState, folder: Path, keep: int) -> None:
    """Do what follows an epoch's checkpoint, in case the process was killed before it could."""
    checkpoint.delete_superseded(folder, keep)
    if state.best_epoch == len(state.history):
        checkpoint.save(folder / checkpoint.BEST_MODEL_FILE, state.model.state_dict())


def _rename_earlier_results(folder: Path, log: Log) -> None:
    """Rename the results of an earlier run: a forgotten --resume must not cost the work of hours."""
    if not folder.exists():
        return
    previous = folder.with_name(f"{folder.name}.previous")
    number = 1
    while previous.exists():
        number += 1
        previous = folder.with_name(f"{folder.name}.previous{number}")
    try:
        folder.rename(previous)
    except OSError as error:
        raise storage_error(previous, error) from None
    log(f"{folder}: holds an earlier run, which is now {previous} (--resume would have continued it)")


def _write_results(
    run: Run, fold: int, state: TrainState, test_result: Evaluation, stopped_early: bool, started: float
) -> FoldResult:
    """Write the report and the documents of a fold that was started at ``started`` on time.monotonic()'s clock.

    ``metrics.json`` comes last: it marks the fold as finished.
    """
    folder, samples = run.fold_folder(fold), run.samples[fold]
    metrics = _write_report(run, state, test_result, folder)
    result = FoldResult(
        model_name=run.config.model_name,
        fold=fold,
        scores=scores_for_results(metrics),
        test_loss=test_result.loss,
        best_epoch=state.best_epoch,
        history=tuple(state.history),
        stopped_early=stopped_early,
        num_samples={"train": len(samples.train), "validation": len(samples.validation), "test": len(samples.test)},
        test_images_per_s=len(test_result.index) / test_result.seconds,
        class_names=tuple(run.dataset.classes),
        confusion_matrix=metrics["confusion_matrix"],
        seconds=time.monotonic() - started,
        identity=run.identity(fold),
        provenance=run.provenance(),
    )
    write_json(folder / ORIGINAL_METRICS_FILE, original_metrics(result, folder))
    write_json(folder / METRICS_FILE, result.to_json())
    run.log(
        f"fold {fold}: test accuracy {result.test_accuracy:.2%}, macro F1 {result.scores['macro_f1']:.3f}, "
        f"best epoch {result.best_epoch} of {len(result.history)}, {result.seconds:.0f} s"
    )
    return result


def _write_report(run: Run, state: TrainState, test_result: Evaluation, folder: Path) -> dict[str, Any]:
    """Write plots, classification report and Grad-CAMs of the test; returns all metrics."""
    dataset = run.dataset
    labels = dataset.label[test_result.index]
    is_original = None if dataset.is_original is None else dataset.is_original[test_result.index]
    metrics = compute_metrics(labels, test_result.probabilities, dataset.classes, is_original)
    write_plots(folder / "plots", state.history, metrics)
    write_json(folder / REPORT_FILE, metrics["classification_report"])
    _write_gradcams(run, state, test_result, folder / "grad_cam")
    return metrics


def _write_gradcams(run: Run, state: TrainState, test_result: Evaluation, folder: Path) -> None:
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
