"""One fold: trains it from whatever state it is in, tests the best weights and writes the results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quaclrs.data.folds import class_weights
from quaclrs.data.sampling import evaluation_batches
from quaclrs.errors import TrainingError
from quaclrs.experiment.further import is_whole, take_over, work_folder
from quaclrs.experiment.original_outputs import ORIGINAL_METRICS_FILE, REPORT_FILE, original_metrics
from quaclrs.experiment.results import METRICS_FILE, FoldResult, parse_fold_result, read_document
from quaclrs.experiment.run import RUN_FILE, Log, Run
from quaclrs.experiment.run_status import hold_fold, lock_file, mark_done
from quaclrs.loaders.files import dead_readers_named
from quaclrs.report.gradcam import pick_samples, write_gradcams
from quaclrs.report.metrics import compute_metrics, scores_for_results
from quaclrs.report.plots import write_plots
from quaclrs.settings import identity_defaults
from quaclrs.system.atomic_files import TEMPORARY_SUFFIX, make_folder, storage_error, write_json
from quaclrs.system.file_locks import locked
from quaclrs.training import checkpoint
from quaclrs.training.loop import Evaluation
from quaclrs.training.models import build_model
from quaclrs.training.profiler import with_profile
from quaclrs.training.state import TrainState
from quaclrs.training.trainer import FoldSamples, Trainer


def run_fold(run: Run, fold: int) -> FoldResult | None:
    """Train and test one fold and write its results.

    With ``--resume``, a finished fold is only read; with more ``--epochs`` than before it is trained further.

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
    """The fold's result; None if there is none, or another number of epochs is asked for."""
    folder = run.fold_folder(fold)
    path = folder / METRICS_FILE
    if is_whole(folder):
        with locked(lock_file(run.folder, fold)) as held:
            if held:  # otherwise the process that holds it is about to do this
                take_over(folder, run.config.keep_checkpoints)
    if not path.is_file():
        return None
    result = parse_fold_result(read_document(path), path)
    identity, defaults = run.identity(fold), identity_defaults(run.config)
    checkpoint.refuse_other_run(path, result.identity, identity, defaults, reached=len(result.history))
    before = result.identity.get("epochs")
    if before == identity["epochs"]:
        return result
    run.log(f"fold {fold}: finished before with --epochs {before}, and goes on to --epochs {identity['epochs']}")
    return None


def _train_and_test(run: Run, fold: int) -> FoldResult | None:
    """Train and test the fold, from its last checkpoint with ``--resume``; returns its result on rank 0."""
    samples = run.samples[fold]
    run.log(
        f"fold {fold}: training on {len(samples.train)} samples, validating on {len(samples.validation)}, testing on "
        f"{len(samples.test)}"
    )
    started = time.monotonic()
    config, folder = run.config, work_folder(run.fold_folder(fold))
    state = _prepare_state(run, samples, fold, folder)
    with with_profile(run.hooks, config, state, run.loader.name, folder, run.log) as hooks:
        trainer = Trainer(
            state, run.loader, samples, config, run.global_batch, folder, run.identity(fold), run.signals, hooks
        )
        with dead_readers_named():
            stopped_early = trainer.fit()
            test_result = trainer.test()
    if not run.world.is_main:
        return None
    result = _write_results(run, fold, folder, state, test_result, stopped_early, started)
    take_over(run.fold_folder(fold), config.keep_checkpoints)
    return result


def _prepare_state(run: Run, samples: FoldSamples, fold: int, folder: Path) -> TrainState:
    """Create the state to train in ``folder``: fresh or, with ``--resume``, from the last checkpoint there is."""
    config, identity = run.config, run.identity(fold)
    state = _create_state(run, samples, fold)
    if run.world.is_main:
        make_folder(folder)
    if config.resume:
        _restore(run, state, run.fold_folder(fold), folder, identity)
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


def _restore(run: Run, state: TrainState, fold_folder: Path, folder: Path, identity: dict[str, Any]) -> None:
    """Load the last checkpoint into ``state``. ``folder`` is ``fold_folder`` or, beside a result there, its own."""
    found = None
    if run.world.is_main:
        for place in dict.fromkeys((folder, fold_folder)):
            found = found or checkpoint.load_checkpoint(place, identity, identity_defaults(run.config))
        if folder != fold_folder:
            _begin_further(fold_folder, folder, found)
    saved = run.world.broadcast_object(found)
    if run.world.is_main:
        for half_written in fold_folder.rglob(f"*{TEMPORARY_SUFFIX}"):
            half_written.unlink(missing_ok=True)
    if saved is None:
        run.log(f"{fold_folder}: no checkpoint to resume from; starting at the beginning")
        return
    state.load_state_dict(saved)
    if run.world.is_main and state.progress is None:
        _complete_last_epoch(state, folder, run.config.keep_checkpoints)
    within = "" if state.progress is None else f" and step {state.progress.step} of the next"
    run.log(f"{fold_folder}: resuming after epoch {len(state.history)}{within}")


def _begin_further(fold_folder: Path, folder: Path, found: dict[str, Any] | None) -> None:
    """Give ``folder`` the best weights so far. Raises :class:`TrainingError` if the finished fold has no checkpoint."""
    if found is None:
        raise TrainingError(
            f"{fold_folder}: holds a result but no checkpoint to train it further from; give the --epochs that it was "
            "made with, or train without --resume"
        )
    if not (folder / checkpoint.BEST_MODEL_FILE).is_file():
        best = checkpoint.load(fold_folder / checkpoint.BEST_MODEL_FILE)
        checkpoint.save(folder / checkpoint.BEST_MODEL_FILE, best)


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
    run: Run,
    fold: int,
    folder: Path,
    state: TrainState,
    test_result: Evaluation,
    stopped_early: bool,
    started: float,
) -> FoldResult:
    """Write into ``folder`` the documents of a fold that was started at ``started`` on time.monotonic()'s clock.

    ``metrics.json`` comes last: it marks the fold as finished.
    """
    samples = run.samples[fold]
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
    write_json(folder / ORIGINAL_METRICS_FILE, original_metrics(result, run.fold_folder(fold), read_from=folder))
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
