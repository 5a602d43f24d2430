"""Train one epoch, evaluate, fit. One path with and without AMP; nothing is read back from the device within an epoch.

The engine neither prints nor parses: progress goes through a callback, and errors are exceptions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from quaclrs import checkpoint
from quaclrs.config import TrainConfig
from quaclrs.errors import TrainingError
from quaclrs.loaders.base import Batch, Loader
from quaclrs.models import AUX_LOSS_WEIGHT, forward_logits
from quaclrs.order import epoch_order, evaluation_batches, train_batches

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 3
COSINE_FLOOR = 1e-6
"""Learning rate that the cosine schedule ends at."""


def amp_dtype(device: torch.device, use_amp: bool) -> torch.dtype:
    """What AMP computes in: float16 on GPUs below sm_80, which have no bfloat16 tensor cores, else bfloat16; float32 without AMP."""
    if not use_amp:
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


class Totals:
    """Sums over an epoch that stay on the device; :meth:`read` is a host synchronisation, meant for its end."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, loss: torch.Tensor, weight: torch.Tensor, correct: torch.Tensor, samples: int) -> None:
        """Add one batch: its summed loss, what to divide that by, and its right predictions; all scalars on the device."""
        self._sums += torch.stack([loss.double(), weight.double(), correct.double()])
        self.samples += samples

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy as a fraction)."""
        loss, weight, correct = self._sums.tolist()
        return loss / weight if weight else math.nan, correct / max(self.samples, 1)

    def snapshot(self) -> torch.Tensor:
        """The sums on their way to the host, not waited for; what is added later does not show in them."""
        return self._sums.clone().to("cpu", non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over some samples without learning."""

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
    seconds: float
    waited_s: float
    """Time in which the training thread had no batch."""


OnStep = Callable[[Batch, Totals, float], None]
"""Called after each step with its batch, the epoch's sums so far and the seconds waited for data so far."""


def _ignore_step(batch: Batch, totals: Totals, waited_s: float) -> None:
    pass


@dataclass(kw_only=True)
class Training:
    """A model being trained, and all of its state that a resume needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: ReduceLROnPlateau | CosineAnnealingLR | None
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    """float32, or what AMP computes in."""
    class_weights: torch.Tensor
    """(classes,) float32 on the device."""
    history: list[dict[str, float | int]] = field(default_factory=list)
    """One entry per finished epoch."""
    best_epoch: int = 0
    best_val_accuracy: float = -1.0

    @classmethod
    def begin(cls, model: nn.Module, class_weights: np.ndarray, device: torch.device, config: TrainConfig) -> Training:
        """Move ``model`` to ``device`` and set up the original protocol's optimizer and schedule."""
        model = model.to(device)
        dtype = amp_dtype(device, config.use_amp)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # the fused kernel also checks for overflow on the device, so that the scaler need not ask the host
        optimizer = torch.optim.Adam(
            learning, lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda"
        )
        return cls(
            model=model,
            optimizer=optimizer,
            scheduler=_scheduler(optimizer, config),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            device=device,
            dtype=dtype,
            class_weights=torch.from_numpy(class_weights).to(device),
        )

    def autocast(self) -> torch.autocast:
        """AMP's context, for training and evaluation alike; does nothing in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the epoch to come."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def epochs_without_improvement(self) -> int:
        """Epochs since the best validation accuracy."""
        return len(self.history) - self.best_epoch

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best_val_accuracy,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = list(state["history"])
        self.best_epoch, self.best_val_accuracy = state["best_epoch"], state["best_val_accuracy"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> ReduceLROnPlateau | CosineAnnealingLR | None:
    if config.scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)
    if config.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=COSINE_FLOOR)
    return None


class _Timed:
    """Iterates over batches and adds up the time spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(self._batches, None)
            self.waited_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def train_epoch(training: Training, loader: Loader, batches: Sequence[np.ndarray], on_step: OnStep = _ignore_step) -> TrainedEpoch:
    """One pass over ``batches`` (arrays of sample numbers) with one optimizer step each."""
    training.model.train()
    started = time.perf_counter()
    totals = Totals(training.device)
    timed = _Timed(loader.load(batches))
    for batch in timed:
        training.optimizer.zero_grad(set_to_none=True)
        with training.autocast():
            logits, aux_logits = forward_logits(training.model, batch.images)
            loss = functional.cross_entropy(logits, batch.labels, training.class_weights)
            if aux_logits is not None:
                loss = loss + AUX_LOSS_WEIGHT * functional.cross_entropy(aux_logits, batch.labels, training.class_weights)
        training.scaler.scale(loss).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        with torch.no_grad():
            correct = (logits.argmax(1) == batch.labels).sum()
            totals.add(loss.detach() * len(batch), torch.full_like(loss, len(batch)), correct, len(batch))
        on_step(batch, totals, timed.waited_s)
    mean_loss, accuracy = totals.read()
    return TrainedEpoch(
        loss=mean_loss,
        accuracy=accuracy,
        samples=totals.samples,
        seconds=time.perf_counter() - started,
        waited_s=timed.waited_s,
    )


@torch.inference_mode()
def evaluate(training: Training, loader: Loader, batches: Sequence[np.ndarray], on_step: OnStep = _ignore_step) -> Evaluation:
    """Loss, accuracy and class probabilities over ``batches``; each sample counts once."""
    training.model.eval()
    started = time.perf_counter()
    totals = Totals(training.device)
    probabilities = []
    timed = _Timed(loader.load(batches))
    for batch in timed:
        with training.autocast():
            logits, _ = forward_logits(training.model, batch.images)
        logits = logits.float()
        loss = functional.cross_entropy(logits, batch.labels, training.class_weights, reduction="sum")
        weight = training.class_weights[batch.labels].sum()
        totals.add(loss, weight, (logits.argmax(1) == batch.labels).sum(), len(batch))
        probabilities.append(logits.softmax(1))
        on_step(batch, totals, timed.waited_s)
    mean_loss, accuracy = totals.read()
    return Evaluation(
        loss=mean_loss,
        accuracy=accuracy,
        index=np.concatenate(batches),
        probabilities=torch.cat(probabilities).cpu().numpy(),
        seconds=time.perf_counter() - started,
        waited_s=timed.waited_s,
    )


@dataclass(frozen=True, kw_only=True)
class FoldSamples:
    """The sample numbers of one fold's training, each (n,) int64."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the engine tells its caller: ``step_meter(phase, epoch, samples)`` gives an :data:`OnStep`."""

    step_meter: Callable[[str, int, int], OnStep] = lambda phase, epoch, samples: _ignore_step
    epoch_done: Callable[[dict[str, float | int]], None] = lambda entry: None


def fit(
    training: Training,
    loader: Loader,
    samples: FoldSamples,
    config: TrainConfig,
    folder: Path,
    run: dict[str, Any],
    hooks: Hooks | None = None,
) -> bool:
    """Train until ``config.epochs`` or until validation stops improving; returns whether it stopped early.

    After each epoch ``folder`` holds its checkpoint, and ``best_model.pth`` the weights of the best validation accuracy so far; at
    the end those weights are loaded. Raises :class:`TrainingError` when the training loss, or every validation loss, is not finite.
    """
    hooks = hooks or Hooks()
    validation = evaluation_batches(samples.validation, config.batch_size)
    while len(training.history) < config.epochs and training.epochs_without_improvement < config.patience:
        epoch = len(training.history) + 1
        batches = train_batches(epoch_order(samples.train, config.seed, epoch), config.batch_size)
        learning_rate = training.learning_rate
        trained = train_epoch(training, loader, batches, hooks.step_meter("train", epoch, len(samples.train)))
        _refuse_divergence(trained.loss, epoch, config)
        validated = evaluate(training, loader, validation, hooks.step_meter("validate", epoch, len(samples.validation)))
        finite = math.isfinite(validated.loss)  # of NaN scores the first class is the prediction, and sometimes right
        _step_scheduler(training.scheduler, validated.accuracy if finite else 0.0)
        training.history.append(_history_entry(epoch, learning_rate, trained, validated))
        if finite and validated.accuracy > training.best_val_accuracy:
            training.best_epoch, training.best_val_accuracy = epoch, validated.accuracy
            checkpoint.save(folder / checkpoint.BEST_MODEL_FILE, training.model.state_dict())
        checkpoint.save_checkpoint(folder, epoch, training.state(), run, config.keep_checkpoints)
        hooks.epoch_done(training.history[-1])
    if training.best_epoch == 0:
        raise TrainingError(f"the validation loss of no epoch is finite; lower --learning_rate (now {config.learning_rate:g})")
    training.model.load_state_dict(checkpoint.load(folder / checkpoint.BEST_MODEL_FILE))
    return len(training.history) < config.epochs


def _refuse_divergence(loss: float, epoch: int, config: TrainConfig) -> None:
    if not math.isfinite(loss):
        amp = ", or train without --use_amp" if config.use_amp else ""
        kept = "; the checkpoint of the epoch before is kept" if epoch > 1 else ""
        raise TrainingError(
            f"epoch {epoch}: the training loss is {loss}; lower --learning_rate (now {config.learning_rate:g}){amp}{kept}"
        )


def _step_scheduler(scheduler: ReduceLROnPlateau | CosineAnnealingLR | None, val_accuracy: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(val_accuracy)
    elif scheduler is not None:
        scheduler.step()


def _history_entry(epoch: int, learning_rate: float, trained: TrainedEpoch, validated: Evaluation) -> dict[str, float | int]:
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
