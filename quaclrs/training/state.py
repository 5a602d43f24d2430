"""``TrainState``: a model in training, one optimizer step, and everything that a resume needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from quaclrs.config import TrainConfig
from quaclrs.training.distributed import World
from quaclrs.training.models import AUX_LOSS_WEIGHT, forward_logits
from quaclrs.training.optimizer import Scheduler, build_optimizer, build_scheduler, load_optimizer_state
from quaclrs.training.records import EpochRecord
from quaclrs.training.running_metrics import EpochProgress

_AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(device: torch.device, config: TrainConfig) -> torch.dtype:
    """The compute dtype: float32 without ``--use_amp``, else ``--amp_dtype``.

    By default float16 on GPUs below sm_80, which have no bfloat16 tensor cores, and bfloat16 everywhere else.
    """
    if not config.use_amp:
        return torch.float32
    if config.amp_dtype is not None:
        return _AMP_DTYPES[config.amp_dtype]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The mixed-precision context of training and evaluation alike; disabled where ``dtype`` is float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 (10 bits of mantissa) in float32 matrix products and convolutions on a GPU.

    torch's default allows it for convolutions only, which is neither fast nor exact.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@dataclass(kw_only=True)
class TrainState:
    """A model in training on one rank. All ranks hold the same weights."""

    model: nn.Module
    ddp_model: nn.Module
    """``model``, wrapped in DistributedDataParallel where there are several ranks. For training steps only."""
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    """float32, or the compute dtype of AMP."""
    class_weights: torch.Tensor
    """(classes,) float32 on the device."""
    world: World = field(default_factory=World)
    history: list[EpochRecord] = field(default_factory=list)
    """One record per finished epoch."""
    best_epoch: int = 0
    """0 before the first epoch with a finite validation loss."""
    best_val_accuracy: float = -1.0
    progress: EpochProgress | None = None
    """Of the epoch in training; None between epochs."""
    _gradient_buckets_settled: bool = False

    @classmethod
    def create(
        cls,
        model: nn.Module,
        class_weights: np.ndarray,
        device: torch.device,
        config: TrainConfig,
        world: World | None = None,
    ) -> TrainState:
        """Move ``model`` to ``device`` and set up optimizer, schedule and gradient scaler as ``config`` says.

        ``class_weights`` (classes,) float32.
        """
        world = world or World()
        dtype = amp_dtype(device, config)
        if config.sync_bn and world.size > 1:  # one rank sees the whole batch anyway
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(device)
        if config.compile == "inductor":
            model.compile()
        optimizer = build_optimizer(model.parameters(), config, device)
        return cls(
            model=model,
            ddp_model=_data_parallel(model, device, world),
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, config),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            device=device,
            dtype=dtype,
            class_weights=torch.from_numpy(class_weights).to(device),
            world=world,
        )

    def step(
        self, images: torch.Tensor, labels: torch.Tensor, loss_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns (loss, correct predictions), scalars on the device. No host synchronisation.

        ``images`` (B, 3, S, S) and ``labels`` (B,) int64 are this rank's part of the global batch. ``loss_scale`` is a
        float32 scalar on the device, one of :meth:`loss_scales`: the loss is ``loss_scale × Σ w·loss`` over the rank's
        samples. DDP averages gradients over the ranks, and the mean of this loss over the ranks is the class-weighted
        mean over the global batch.
        """
        if self.world.size > 2 and not self._gradient_buckets_settled:  # a sum of two has one order
            self._settle_gradient_buckets(images)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.dtype):
            logits, aux_logits = forward_logits(self.ddp_model, images)
            loss = self._weighted_loss_sum(logits, labels)
            if aux_logits is not None:
                loss = loss + AUX_LOSS_WEIGHT * self._weighted_loss_sum(aux_logits, labels)
            loss = loss * loss_scale
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            return loss.detach(), (logits.argmax(1) == labels).sum()

    def loss_scales(self, label: np.ndarray, batches_of_ranks: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
        """``world_size / Σ class weights of the global batch`` for each step: (steps,) float32 on the device.

        ``label`` (N,) int64 by sample number; ``batches_of_ranks[rank][step]`` are sample numbers. Every rank knows all
        batches, so nothing is communicated.
        """
        weights = self.class_weights.double().cpu().numpy()[label]
        sums = [sum(weights[batch].sum() for batch in step) for step in zip(*batches_of_ranks, strict=True)]
        return (self.world.size / torch.tensor(sums, dtype=torch.float64)).float().to(self.device)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next epoch."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def epochs_without_improvement(self) -> int:
        """Epochs since the best validation accuracy."""
        return len(self.history) - self.best_epoch

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values. Collective on several ranks.

        Random state is not part of it: each step is seeded by its number (:func:`quaclrs.data.sampling.step_seeds`).
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.scaler.state_dict(),
            "history": [asdict(record) for record in self.history],
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best_val_accuracy,
            "progress": None if self.progress is None else self.progress.state_dict(self.world),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, which another device or another number of ranks may have made."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.best_epoch, self.best_val_accuracy = state["best_epoch"], state["best_val_accuracy"]
        progress = state["progress"]
        self.progress = None if progress is None else EpochProgress.from_state_dict(progress, self.world, self.device)

    def _settle_gradient_buckets(self, images: torch.Tensor) -> None:
        """Run one backward pass so that DDP fixes the layout of its gradient buckets before the first step.

        Otherwise DDP fixes it after the first step. The layout determines the order in which DDP sums the ranks'
        gradients, and so the last digit: a resumed training would end at other weights. This method restores buffers
        and random state; the step that follows discards the gradients.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with autocast(self.device, self.dtype):
                logits, aux_logits = forward_logits(self.ddp_model, images)
                total = logits.sum() if aux_logits is None else logits.sum() + aux_logits.sum()
            total.backward()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self._gradient_buckets_settled = True

    def _weighted_loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, self.class_weights, reduction="sum")


def _data_parallel(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    if world.size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
