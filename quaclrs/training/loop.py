"""One epoch of training, and one pass of evaluation.

One code path serves training with and without AMP, on one rank and on many. It reads nothing back from the device
within an epoch. The functions neither print nor parse: progress goes through callbacks, errors are exceptions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from quaclrs.data.sampling import (
    epoch_order,
    evaluation_batches,
    rank_shard_batches,
    rank_shard_evaluation_batches,
    step_seeds,
    train_batches,
)
from quaclrs.errors import TrainingError
from quaclrs.loaders.base import Batch, Loader
from quaclrs.training.cuda_graph import GraphedStep, graphed_steps
from quaclrs.training.distributed import World
from quaclrs.training.models import forward_logits
from quaclrs.training.running_metrics import EpochProgress, RunningMetrics
from quaclrs.training.state import TrainState, autocast

OnStep = Callable[[Batch, RunningMetrics, float], None]
"""``on_step(batch, metrics, waited_s)`` after each step: the rank's sums so far, and its seconds without a batch."""
AfterStep = Callable[[], None]
"""Called between two steps, equally often on every rank. It may raise, to stop there."""


def ignore_step(batch: Batch, metrics: RunningMetrics, waited_s: float) -> None:
    """An :data:`OnStep` that does nothing."""


def _continue() -> None:
    pass


class _TimedBatches:
    """Iterates over batches and sums the seconds spent waiting for them."""

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


# --- training ---


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The steps of one rank in one epoch of training, known before the first."""

    batches: Sequence[np.ndarray]
    """Per step: (B,) int64 sample numbers."""
    samples: Sequence[int]
    """Per step: samples in the global batch."""
    loss_scales: torch.Tensor
    """(steps,) float32 on the device, see :meth:`TrainState.loss_scales`."""
    seeds: np.ndarray
    """(steps,) uint64: seeds of the step's random numbers (dropout)."""


@dataclass(frozen=True, kw_only=True)
class TrainedEpoch:
    """Figures of one epoch of training, over all ranks."""

    loss: float
    """Mean over samples of the minimised loss, including the auxiliary loss."""
    accuracy: float
    """Fraction."""
    samples: int
    """More than the training folds have if the last batch wraps around, so that it divides among the ranks."""
    seconds: float
    waited_s: float
    """Seconds without a batch, of the rank that waited longest."""


def plan_epoch(
    state: TrainState,
    samples: np.ndarray,
    label: np.ndarray,
    global_batch: int,
    seed: int,
    epoch: int,
    replicated: bool = True,
) -> EpochPlan:
    """The steps of ``state``'s rank in ``epoch`` over ``samples`` (n,).

    ``label`` (N,) int64 by sample number; ``replicated`` as :class:`Loader` has it. Raises :class:`TrainingError` where
    a rank would have no batch.
    """
    world = state.world
    if replicated:
        order = epoch_order(samples, seed, epoch)
        of_ranks = [train_batches(order, global_batch, world.size, rank) for rank in range(world.size)]
    else:
        try:
            of_ranks = rank_shard_batches(samples, global_batch, seed, epoch, world.size)
        except ValueError as error:
            raise TrainingError(f"--loader resident: {error}; use fewer processes", everywhere=True) from None
    own = of_ranks[world.rank]
    return EpochPlan(
        batches=own,
        samples=[world.size * len(batch) for batch in own],
        loss_scales=state.loss_scales(label, of_ranks),
        seeds=step_seeds(len(own), seed, epoch, world.rank),
    )


def train_epoch(
    state: TrainState,
    loader: Loader,
    plan: EpochPlan,
    on_step: OnStep = ignore_step,
    after_step: AfterStep = _continue,
    graphed: GraphedStep | None = None,
) -> TrainedEpoch:
    """Run the steps of ``plan`` that ``state.progress`` has not done yet.

    With ``graphed``, each step replays its CUDA graph on its own loader's data; ``loader`` is then unused.
    """
    state.model.train()
    progress = state.progress = state.progress or EpochProgress(metrics=RunningMetrics(state.device))
    remaining = slice(progress.step, None)
    batches, loss_scales, seeds = plan.batches[remaining], plan.loss_scales[remaining], plan.seeds[remaining]
    waited_before_s, timed = progress.waited_s, _TimedBatches(iter(()) if graphed else loader.load(batches))
    if graphed:
        steps = graphed_steps(graphed, batches, loss_scales, seeds)
    else:
        steps = _eager_steps(state, timed, loss_scales, seeds)
    for batch, loss, correct in steps:
        # The mean over the ranks of their losses is that of the global batch, so a rank's part of the sum over samples
        # is loss × samples / world_size.
        rank_loss_sum = loss * (plan.samples[progress.step] / state.world.size)
        progress.metrics.add(rank_loss_sum, torch.full_like(loss, len(batch)), correct, len(batch))
        progress.step, progress.waited_s = progress.step + 1, waited_before_s + timed.waited_s
        on_step(batch, progress.metrics, progress.waited_s)
        after_step()
    mean_loss, accuracy, samples = progress.metrics.read(state.world)
    waited_s = max(state.world.gather(progress.waited_s))
    return TrainedEpoch(loss=mean_loss, accuracy=accuracy, samples=samples, seconds=progress.seconds, waited_s=waited_s)


def _eager_steps(
    state: TrainState, batches: Iterable[Batch], loss_scales: torch.Tensor, seeds: np.ndarray
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Run one step per batch; yields (batch, loss, correct), as :func:`graphed_steps` does."""
    for batch, loss_scale, seed in zip(batches, loss_scales, seeds, strict=True):
        torch.manual_seed(int(seed))
        yield batch, *state.step(batch.images, batch.labels, loss_scale)


# --- evaluation ---


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of one pass over some samples without learning. All ranks have equal values except for the times."""

    loss: float
    """Σ w·loss / Σ w over all samples, for any batch size; NaN without labels."""
    accuracy: float
    """Fraction; NaN without labels."""
    index: np.ndarray
    """(n,) int64 sample numbers, in the order of ``probabilities``."""
    probabilities: np.ndarray
    """(n, classes) float32"""
    seconds: float
    waited_s: float
    """Seconds without a batch, of the rank that waited longest."""


def evaluate(
    model: nn.Module,
    loader: Loader,
    samples: np.ndarray,
    *,
    global_batch: int,
    class_weights: torch.Tensor | None = None,
    labelled: bool = True,
    dtype: torch.dtype = torch.float32,
    world: World | None = None,
    on_step: OnStep = ignore_step,
    after_step: AfterStep = _continue,
) -> Evaluation:
    """Class probabilities of ``samples`` (n,) int64, and their loss and accuracy where they are ``labelled``.

    Each sample is evaluated exactly once, on one rank; ``global_batch`` is the batch size of all ranks together.
    ``model`` runs on the device of its parameters, in evaluation mode, computing in ``dtype``; rank 0's buffers
    (BatchNorm's running statistics) are used on every rank. ``class_weights`` (classes,) float32 on that device weigh
    the loss, equally by default.
    """
    started, world = time.perf_counter(), world or World()
    world.broadcast_tensors(list(model.buffers()))
    of_ranks = _positions_of_ranks(samples, global_batch, world, loader.replicated)
    own = of_ranks[world.rank]
    metrics = RunningMetrics(next(model.parameters()).device)
    timed, probabilities = _TimedBatches(loader.load([samples[batch] for batch in own])), []
    for batch in timed:
        logits = _logits(model, batch.images, dtype)
        probabilities.append(logits.softmax(1))
        if labelled:
            _add_scores(metrics, logits, batch.labels, class_weights)
        on_step(batch, metrics, timed.waited_s)
        after_step()
    for _ in range(max(map(len, of_ranks)) - len(own)):
        after_step()
    loss, accuracy, _ = metrics.read(world)
    return Evaluation(
        loss=loss,
        accuracy=accuracy if labelled else math.nan,
        index=samples,
        probabilities=_gather_rows(probabilities, of_ranks, len(samples), world),
        seconds=time.perf_counter() - started,
        waited_s=max(world.gather(timed.waited_s)),
    )


def _positions_of_ranks(
    samples: np.ndarray, global_batch: int, world: World, replicated: bool
) -> list[list[np.ndarray]]:
    """Per rank its batches of positions in ``samples``."""
    ranks = range(world.size)
    if replicated:
        return [evaluation_batches(np.arange(len(samples)), global_batch, world.size, rank) for rank in ranks]
    return [rank_shard_evaluation_batches(samples, global_batch, world.size, rank) for rank in ranks]


@torch.inference_mode()
def _logits(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, classes) float32 class scores on the device."""
    model.eval()
    with autocast(images.device, dtype):
        logits, _ = forward_logits(model, images)
    return logits.float()


@torch.inference_mode()
def _add_scores(
    metrics: RunningMetrics, logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None
) -> None:
    loss = functional.cross_entropy(logits, labels, class_weights, reduction="sum")
    weights = torch.ones_like(labels, dtype=torch.float32) if class_weights is None else class_weights[labels]
    metrics.add(loss, weights.sum(), (logits.argmax(1) == labels).sum(), len(labels))


def _gather_rows(
    own: list[torch.Tensor], of_ranks: list[list[np.ndarray]], num_samples: int, world: World
) -> np.ndarray:
    """(num_samples, classes) float32: the rows of all ranks' batches, each at its position."""
    rows_of_ranks = world.gather(torch.cat(own).cpu().numpy() if own else None)
    classes = next((rows.shape[1] for rows in rows_of_ranks if rows is not None), 0)
    gathered = np.zeros((num_samples, classes), np.float32)
    for batches, rows in zip(of_ranks, rows_of_ranks, strict=True):
        if rows is not None:
            gathered[np.concatenate(batches)] = rows
    return gathered
