"""Train one epoch, evaluate, fit. One path with and without AMP, on one rank and on many; nothing is read back within
an epoch.

The engine neither prints nor parses: progress goes through a callback, and errors are exceptions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from quaclrs.config import TrainConfig
from quaclrs.data.sampling import (
    epoch_order,
    evaluation_batches,
    rank_shard_batches,
    rank_shard_evaluation_batches,
    step_seeds,
    train_batches,
)
from quaclrs.errors import TrainingError
from quaclrs.loaders.base import Batch, DeviceLoader, Loader
from quaclrs.system.signals import SignalHandler, StopRequest
from quaclrs.training import checkpoint
from quaclrs.training.cuda_graph import GraphedStep, graphed_steps
from quaclrs.training.distributed import AsyncConsensus, World
from quaclrs.training.models import forward_logits
from quaclrs.training.state import Progress, RunningMetrics, Training


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over some samples without learning; the same on every rank, but for the times."""

    loss: float
    """Class-weighted cross-entropy: Σ w·loss / Σ w over all samples, whatever the batches."""
    accuracy: float
    index: np.ndarray
    """(N,) int64 sample numbers, in the order of ``probabilities``."""
    probabilities: np.ndarray
    """(N, classes) float32"""
    seconds: float
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class TrainedEpoch:
    """One epoch of learning."""

    loss: float
    """Mean over samples of what was minimised, the auxiliary loss included."""
    accuracy: float
    samples: int
    """Of all ranks; a few more than there are where the last batch wraps round to be shared out."""
    seconds: float
    waited_s: float
    """Time in which the training thread had no batch; of the rank that waited longest."""


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """What one rank does in an epoch of learning, step by step; known before it begins."""

    batches: Sequence[np.ndarray]
    """Of sample numbers."""
    samples: Sequence[int]
    """In the global batch."""
    shares: torch.Tensor
    """(steps,) float32 on the device, see :meth:`Training.step`."""
    seeds: np.ndarray
    """(steps,) uint64"""


OnStep = Callable[[Batch, RunningMetrics, float], None]
"""Called after each step with its batch, the rank's sums so far and the seconds waited for data so far."""
Nothing = Callable[[], None]


def _ignore_step(batch: Batch, totals: RunningMetrics, waited_s: float) -> None:
    pass


def _go_on() -> None:
    pass


class _Timed:
    """Iterates over batches and adds up the time spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Batch | None:
        started = time.perf_counter()
        batch = next(self._batches, None)
        self.waited_s += time.perf_counter() - started
        return batch


def plan_epoch(
    training: Training,
    samples: np.ndarray,
    label: np.ndarray,
    global_batch: int,
    seed: int,
    epoch: int,
    replicated: bool = True,
) -> EpochPlan:
    """This rank's part of ``epoch`` over ``samples`` (n,), given the ``label`` (N,) of every sample number.

    ``replicated`` as :class:`Loader` has it. Raises :class:`TrainingError` when a rank would have nothing to learn
    from.
    """
    world = training.world
    if replicated:
        order = epoch_order(samples, seed, epoch)
        of_ranks = [train_batches(order, global_batch, world.size, rank) for rank in range(world.size)]
    else:
        try:
            of_ranks = rank_shard_batches(samples, global_batch, seed, epoch, world.size)
        except ValueError as error:
            raise TrainingError(f"--loader resident: {error}; use fewer processes", everywhere=True) from None
    mine = of_ranks[world.rank]
    return EpochPlan(
        batches=mine,
        samples=[world.size * len(batch) for batch in mine],
        shares=training.shares(label, of_ranks),
        seeds=step_seeds(len(mine), seed, epoch, world.rank),
    )


def train_epoch(
    training: Training,
    loader: Loader,
    plan: EpochPlan,
    on_step: OnStep = _ignore_step,
    after_step: Nothing = _go_on,
    graphed: GraphedStep | None = None,
) -> TrainedEpoch:
    """The steps of ``plan`` that ``training.progress`` has not done yet; ``after_step`` may raise to stop between two.

    ``graphed`` does them from its own loader's data instead of ``loader``'s batches.
    """
    training.model.train()
    progress = training.progress = training.progress or Progress(totals=RunningMetrics(training.device))
    rest = slice(progress.step, None)
    waited_before, timed = progress.waited_s, _Timed(iter(()) if graphed else loader.load(plan.batches[rest]))
    if graphed:
        steps = graphed_steps(graphed, plan.batches[rest], plan.shares[rest], plan.seeds[rest])
    else:
        steps = _eager_steps(training, timed, plan.shares[rest], plan.seeds[rest])
    for batch, loss, correct in steps:
        # a rank's part of the sum over samples: the mean over ranks is the global batch's mean
        of_samples = loss * (plan.samples[progress.step] / training.world.size)
        progress.totals.add(of_samples, torch.full_like(loss, len(batch)), correct, len(batch))
        progress.step, progress.waited_s = progress.step + 1, waited_before + timed.waited_s
        on_step(batch, progress.totals, progress.waited_s)
        after_step()
    mean_loss, accuracy, samples = progress.totals.read(training.world)
    waited_s = max(training.world.gather(progress.waited_s))
    return TrainedEpoch(loss=mean_loss, accuracy=accuracy, samples=samples, seconds=progress.seconds, waited_s=waited_s)


def _eager_steps(
    training: Training, batches: Iterable[Batch], shares: torch.Tensor, seeds: np.ndarray
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """As :func:`quaclrs.training.cuda_graph.graphed_steps`, for batches that come ready made."""
    for batch, share, seed in zip(batches, shares, seeds, strict=True):
        torch.manual_seed(int(seed))
        yield batch, *training.step(batch.images, batch.labels, share)


def evaluate(
    training: Training,
    loader: Loader,
    samples: np.ndarray,
    global_batch: int,
    on_step: OnStep = _ignore_step,
    after_step: Nothing = _go_on,
) -> Evaluation:
    """Loss, accuracy and class probabilities over ``samples`` (N,), each on one rank, once, in batches of
    ``global_batch`` together.

    ``after_step`` is called equally often on every rank.
    """
    started = time.perf_counter()
    training.broadcast_buffers()
    world = training.world
    of_ranks = _positions_of_ranks(samples, global_batch, world, loader.replicated)
    mine = of_ranks[world.rank]
    totals, timed, probabilities = (
        RunningMetrics(training.device),
        _Timed(loader.load([samples[batch] for batch in mine])),
        [],
    )
    for batch in timed:
        probabilities.append(_predict(training, batch, totals))
        on_step(batch, totals, timed.waited_s)
        after_step()
    for _ in range(max(map(len, of_ranks)) - len(mine)):
        after_step()
    loss, accuracy, _ = totals.read(world)
    classes = len(training.class_weights)
    own = torch.cat(probabilities).cpu().numpy() if probabilities else np.zeros((0, classes), np.float32)
    everyones = np.zeros((len(samples), classes), np.float32)
    for batches, rows in zip(of_ranks, world.gather(own), strict=True):
        if batches:
            everyones[np.concatenate(batches)] = rows
    return Evaluation(
        loss=loss,
        accuracy=accuracy,
        index=samples,
        probabilities=everyones,
        seconds=time.perf_counter() - started,
        waited_s=max(world.gather(timed.waited_s)),
    )


def _positions_of_ranks(
    samples: np.ndarray, global_batch: int, world: World, replicated: bool
) -> list[list[np.ndarray]]:
    """For each rank its batches of positions in ``samples``."""
    ranks = range(world.size)
    if replicated:
        return [evaluation_batches(np.arange(len(samples)), global_batch, world.size, rank) for rank in ranks]
    return [rank_shard_evaluation_batches(samples, global_batch, world.size, rank) for rank in ranks]


@torch.inference_mode()
def _predict(training: Training, batch: Batch, totals: RunningMetrics) -> torch.Tensor:
    """(B, classes) probabilities on the device; adds to ``totals``."""
    training.model.eval()
    with training.autocast():
        logits, _ = forward_logits(training.model, batch.images)
    logits = logits.float()
    loss = functional.cross_entropy(logits, batch.labels, training.class_weights, reduction="sum")
    weight = training.class_weights[batch.labels].sum()
    totals.add(loss, weight, (logits.argmax(1) == batch.labels).sum(), len(batch))
    return logits.softmax(1)


@dataclass(frozen=True, kw_only=True)
class FoldSamples:
    """The sample numbers of one fold's training, each (n,) int64."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    label: np.ndarray
    """(N,) int64, by sample number."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the engine tells its caller: ``step_meter(phase, epoch, samples)`` gives an :data:`OnStep`."""

    step_meter: Callable[[str, int, int], OnStep] = lambda phase, epoch, samples: _ignore_step
    epoch_done: Callable[[dict[str, float | int]], None] = lambda entry: None


class Trainer:
    """One fold's training, from wherever it stands to its end, with what it leaves in ``folder``.

    After each epoch ``folder`` holds its checkpoint, and ``best_model.pth`` the weights of the best validation accuracy
    so far. Only rank 0 writes. ``run`` says what the checkpoints belong to.
    """

    def __init__(
        self,
        training: Training,
        loader: Loader,
        samples: FoldSamples,
        config: TrainConfig,
        global_batch: int,
        folder: Path,
        run: dict[str, Any],
        watch: SignalHandler | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self._training, self._loader, self._samples = training, loader, samples
        self._config, self._global_batch = config, global_batch
        self._folder, self._run = folder, run
        self._watch, self._hooks = watch or SignalHandler(), hooks or Hooks()
        self._agreement = AsyncConsensus(training.world)
        self._graphed: GraphedStep | None = None
        if config.compile == "cudagraph":
            assert hasattr(loader, "on_device")  # the caller has seen to it
            self._graphed = GraphedStep(training, cast(DeviceLoader, loader), global_batch)

    def fit(self) -> bool:
        """Train until ``config.epochs`` or until validation stops improving; returns whether it stopped early.

        At the end the best weights are loaded. Raises :class:`TrainingError` when the training loss, or every
        validation loss, is not finite, and :class:`Interrupted` once a checkpoint is written after a signal.
        """
        training, config = self._training, self._config
        while len(training.history) < config.epochs and training.epochs_without_improvement < config.patience:
            self._epoch(len(training.history) + 1)
        if training.best_epoch == 0:
            raise TrainingError(
                f"the validation loss of no epoch is finite; lower --learning_rate (now {config.learning_rate:g})",
                everywhere=True,
            )
        if training.world.is_main:
            training.model.load_state_dict(checkpoint.load(self._folder / checkpoint.BEST_MODEL_FILE))
        training.world.broadcast_tensors(list(training.model.state_dict().values()))
        return len(training.history) < config.epochs

    def test(self) -> Evaluation:
        """The best weights on the test samples. Raises :class:`Interrupted` after a signal; there is
        nothing to save.
        """
        meter = self._hooks.step_meter("test", self._training.best_epoch, len(self._samples.test))
        tested = evaluate(
            self._training, self._loader, self._samples.test, self._global_batch, meter, self._stop_testing
        )
        self._stop_if_agreed(self._agreement.settle(), "its test")
        return tested

    def _epoch(self, epoch: int) -> None:
        training, config, samples = self._training, self._config, self._samples
        plan = plan_epoch(
            training, samples.train, samples.label, self._global_batch, config.seed, epoch, self._loader.replicated
        )
        learning_rate = training.learning_rate
        meter = self._hooks.step_meter("train", epoch, sum(len(batch) for batch in plan.batches))
        trained = train_epoch(training, self._loader, plan, meter, self._save_if_wished, self._graphed)
        self._save_if_agreed(self._agreement.settle())
        _refuse_divergence(trained.loss, epoch, config)
        meter = self._hooks.step_meter("validate", epoch, len(samples.validation))
        validated = evaluate(
            training, self._loader, samples.validation, self._global_batch, meter, self._save_if_stopped
        )
        self._save_if_agreed(self._agreement.settle())
        finite = math.isfinite(validated.loss)  # of NaN scores the first class is the prediction, and sometimes right
        _step_scheduler(training.scheduler, validated.accuracy if finite else 0.0)
        training.progress = None
        training.history.append(_history_entry(epoch, learning_rate, trained, validated))
        better = finite and validated.accuracy > training.best_val_accuracy
        if better:
            training.best_epoch, training.best_val_accuracy = epoch, validated.accuracy
        state = training.state()
        if training.world.is_main:
            checkpoint.save_checkpoint(self._folder, epoch, state, self._run, config.keep_checkpoints)
            # after the checkpoint, which can make it again: the other way round it could be of an epoch that never was
            if better:
                checkpoint.save(self._folder / checkpoint.BEST_MODEL_FILE, state["model"])
        self._watch.saved()
        self._hooks.epoch_done(training.history[-1])

    # --- signals and the clock ---

    def _save_if_wished(self) -> None:
        self._save_if_agreed(self._agreement.exchange(self._watch.wish()))

    def _save_if_stopped(self) -> None:
        """In validation: the epoch's own checkpoint is near, so the clock has to wait."""
        wish = self._watch.wish()
        self._save_if_agreed(self._agreement.exchange(wish if wish == StopRequest.STOP else StopRequest.GO_ON))

    def _save_if_agreed(self, agreed: int) -> None:
        if agreed == StopRequest.GO_ON:
            return
        training = self._training
        assert training.progress is not None
        epoch, step = len(training.history) + 1, training.progress.step
        state = training.state()
        if training.world.is_main:
            checkpoint.save_within_epoch(self._folder, epoch, state, self._run)
        self._watch.saved()
        self._stop_if_agreed(agreed, f"epoch {epoch}, after step {step}")

    def _stop_testing(self) -> None:
        self._stop_if_agreed(self._agreement.exchange(self._watch.wish()), "its test")

    def _stop_if_agreed(self, agreed: int, where: str) -> None:
        if agreed == StopRequest.STOP:
            raise self._watch.interrupted(f"fold {self._run['fold']}, {where}")


def _refuse_divergence(loss: float, epoch: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        amp = ", or train without --use_amp" if config.use_amp else ""
        kept = "; the checkpoint of the epoch before is kept" if epoch > 1 else ""
        raise TrainingError(
            f"epoch {epoch}: the training loss is {loss}; lower --learning_rate (now "
            f"{config.learning_rate:g}){amp}{kept}",
            everywhere=True,
        )


def _step_scheduler(scheduler: ReduceLROnPlateau | CosineAnnealingLR | None, val_accuracy: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(val_accuracy)
    elif scheduler is not None:
        scheduler.step()


def _history_entry(
    epoch: int, learning_rate: float, trained: TrainedEpoch, validated: Evaluation
) -> dict[str, float | int]:
    return {
        "epoch": epoch,
        "learning_rate": learning_rate,
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        "val_loss": validated.loss,
        "val_accuracy": validated.accuracy,
        "train_seconds": trained.seconds,
        "val_seconds": validated.seconds,
        "train_images_per_s": trained.samples / trained.seconds,
        "val_images_per_s": len(validated.index) / validated.seconds,
        "train_data_wait": trained.waited_s / trained.seconds,
        "val_data_wait": validated.waited_s / validated.seconds,
    }
