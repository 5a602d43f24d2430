"""``Trainer``: one fold's training from its current state to its test, with checkpoints, signals and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from quaclrs.config import TrainConfig
from quaclrs.errors import TrainingError
from quaclrs.loaders.base import DeviceLoader, Loader
from quaclrs.system.signals import SignalHandler, StopRequest
from quaclrs.training import checkpoint
from quaclrs.training.cuda_graph import GraphedStep
from quaclrs.training.distributed import AsyncConsensus
from quaclrs.training.loop import (
    AfterStep,
    Evaluation,
    OnStep,
    TrainedEpoch,
    evaluate,
    ignore_step,
    plan_epoch,
    train_epoch,
)
from quaclrs.training.optimizer import step_scheduler
from quaclrs.training.records import EpochRecord
from quaclrs.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class FoldSamples:
    """The sample numbers of one fold, each (n,) int64."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    label: np.ndarray
    """(N,) int64, by sample number."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Callbacks of a training."""

    step_meter: Callable[[str, int, int], OnStep] = lambda phase, epoch, samples: ignore_step
    """``step_meter(phase, epoch, samples)`` at the start of a phase (``train``, ``validate``, ``test``), with the
    number of this rank's samples; returns the callback of the phase's steps.
    """
    epoch_done: Callable[[EpochRecord], None] = lambda record: None


class Trainer:
    """Trains one fold from its current state to the end, and tests it.

    After each epoch ``folder`` holds the epoch's checkpoint, and in ``best_model.pth`` the weights of the best
    validation accuracy so far. Only rank 0 writes. Each checkpoint stores ``identity``, the values that a resumed
    training must match.
    """

    def __init__(
        self,
        state: TrainState,
        loader: Loader,
        samples: FoldSamples,
        config: TrainConfig,
        global_batch: int,
        folder: Path,
        identity: dict[str, Any],
        signals: SignalHandler | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self._state, self._loader, self._samples = state, loader, samples
        self._config, self._global_batch = config, global_batch
        self._folder, self._identity = folder, identity
        self._signals, self._hooks = signals or SignalHandler(), hooks or Hooks()
        self._consensus = AsyncConsensus(state.world)
        self._graphed: GraphedStep | None = None
        if config.compile == "cudagraph":
            assert hasattr(loader, "on_device")  # refused before for all other loaders
            self._graphed = GraphedStep(state, cast(DeviceLoader, loader), global_batch)

    def fit(self) -> bool:
        """Train up to ``config.epochs`` epochs, or until validation stops improving; returns whether it stopped early.

        At the end the best weights are loaded. Raises :class:`TrainingError` when the training loss or every validation
        loss is not finite, :class:`Interrupted` after a signal, once a checkpoint is written.
        """
        state, config = self._state, self._config
        while len(state.history) < config.epochs and state.epochs_without_improvement < config.patience:
            self._run_epoch(len(state.history) + 1)
        if state.best_epoch == 0:
            raise TrainingError(
                f"the validation loss of no epoch is finite; lower --learning_rate (now {config.learning_rate:g})",
                everywhere=True,
            )
        if state.world.is_main:
            state.model.load_state_dict(checkpoint.load(self._folder / checkpoint.BEST_MODEL_FILE))
        state.world.broadcast_tensors(list(state.model.state_dict().values()))
        return len(state.history) < config.epochs

    def test(self) -> Evaluation:
        """Evaluate the best weights on the test samples. Raises :class:`Interrupted` after a signal."""
        test_result = self._evaluate("test", self._state.best_epoch, self._samples.test, self._stop_if_requested)
        self._stop_if_agreed(self._consensus.settle(), "its test")
        return test_result

    def _run_epoch(self, epoch: int) -> None:
        state, config, samples = self._state, self._config, self._samples
        learning_rate = state.learning_rate
        trained = self._train(epoch)
        self._checkpoint_if_agreed(self._consensus.settle())
        _refuse_divergence(trained.loss, epoch, config)
        validated = self._evaluate("validate", epoch, samples.validation, self._checkpoint_if_stop_requested)
        self._checkpoint_if_agreed(self._consensus.settle())
        finite = math.isfinite(validated.loss)  # the prediction from NaN scores is class 0, which is sometimes correct
        step_scheduler(state.scheduler, validated.accuracy if finite else 0.0)
        state.progress = None
        state.history.append(_epoch_record(epoch, learning_rate, trained, validated))
        improved = finite and validated.accuracy > state.best_val_accuracy
        if improved:
            state.best_epoch, state.best_val_accuracy = epoch, validated.accuracy
        self._save_epoch(epoch, improved)
        self._hooks.epoch_done(state.history[-1])

    def _train(self, epoch: int) -> TrainedEpoch:
        samples, seed = self._samples, self._config.seed
        plan = plan_epoch(
            self._state, samples.train, samples.label, self._global_batch, seed, epoch, self._loader.replicated
        )
        meter = self._hooks.step_meter("train", epoch, sum(len(batch) for batch in plan.batches))
        return train_epoch(self._state, self._loader, plan, meter, self._checkpoint_if_requested, self._graphed)

    def _evaluate(self, phase: str, epoch: int, samples: np.ndarray, after_step: AfterStep) -> Evaluation:
        state = self._state
        return evaluate(
            state.model,
            self._loader,
            samples,
            global_batch=self._global_batch,
            class_weights=state.class_weights,
            dtype=state.dtype,
            world=state.world,
            on_step=self._hooks.step_meter(phase, epoch, len(samples)),
            after_step=after_step,
        )

    def _save_epoch(self, epoch: int, improved: bool) -> None:
        """Write the epoch's checkpoint, then the best weights.

        In this order :mod:`quaclrs.experiment.fold` can write ``best_model.pth`` again from the checkpoint. The reverse
        order could leave best weights of an epoch that has no checkpoint.
        """
        saved = self._state.state_dict()
        if self._state.world.is_main:
            checkpoint.save_checkpoint(self._folder, epoch, saved, self._identity, self._config.keep_checkpoints)
            if improved:
                checkpoint.save(self._folder / checkpoint.BEST_MODEL_FILE, saved["model"])
        self._signals.saved()

    # --- signals and --checkpoint_minutes, between two steps ---

    def _checkpoint_if_requested(self) -> None:
        self._checkpoint_if_agreed(self._consensus.exchange(self._signals.requested_action()))

    def _checkpoint_if_stop_requested(self) -> None:
        """For validation: ignore requests of the checkpoint clock, because the epoch's own checkpoint follows soon."""
        request = self._signals.requested_action()
        self._checkpoint_if_agreed(
            self._consensus.exchange(request if request == StopRequest.STOP else StopRequest.CONTINUE)
        )

    def _checkpoint_if_agreed(self, agreed: int) -> None:
        if agreed == StopRequest.CONTINUE:
            return
        state = self._state
        assert state.progress is not None
        epoch, step = len(state.history) + 1, state.progress.step
        saved = state.state_dict()
        if state.world.is_main:
            checkpoint.save_within_epoch(self._folder, epoch, saved, self._identity)
        self._signals.saved()
        self._stop_if_agreed(agreed, f"epoch {epoch}, after step {step}")

    def _stop_if_requested(self) -> None:
        """For the test, which has nothing to save."""
        self._stop_if_agreed(self._consensus.exchange(self._signals.requested_action()), "its test")

    def _stop_if_agreed(self, agreed: int, where: str) -> None:
        if agreed == StopRequest.STOP:
            raise self._signals.interrupted(f"fold {self._identity['fold']}, {where}")


def _refuse_divergence(loss: float, epoch: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        amp = ", or train without --use_amp" if config.use_amp else ""
        kept = "; the checkpoint of the epoch before is kept" if epoch > 1 else ""
        raise TrainingError(
            f"epoch {epoch}: the training loss is {loss}; "
            f"lower --learning_rate (now {config.learning_rate:g}){amp}{kept}",
            everywhere=True,
        )


def _epoch_record(epoch: int, learning_rate: float, trained: TrainedEpoch, validated: Evaluation) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        learning_rate=learning_rate,
        train_loss=trained.loss,
        train_accuracy=trained.accuracy,
        val_loss=validated.loss,
        val_accuracy=validated.accuracy,
        train_seconds=trained.seconds,
        val_seconds=validated.seconds,
        train_images_per_s=trained.samples / trained.seconds,
        val_images_per_s=len(validated.index) / validated.seconds,
        train_data_wait=trained.waited_s / trained.seconds,
        val_data_wait=validated.waited_s / validated.seconds,
    )
