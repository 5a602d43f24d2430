"""A model being trained: its optimizer and schedule, one optimizer step, and all of the state that a resume needs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from quaclrs.config import TrainConfig
from quaclrs.training.distributed import World
from quaclrs.training.models import AUX_LOSS_WEIGHT, forward_logits

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 3
COSINE_FLOOR = 1e-6
"""Learning rate that the cosine schedule ends at."""
_AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(device: torch.device, config: TrainConfig) -> torch.dtype:
    """What AMP computes in: ``--amp_dtype``, else float16 on GPUs below sm_80, which have no bfloat16 tensor cores,
    else bfloat16.

    float32 without AMP.
    """
    if not config.use_amp:
        return torch.float32
    if config.amp_dtype is not None:
        return _AMP_DTYPES[config.amp_dtype]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def set_tf32(allowed: bool) -> None:
    """Let float32 matrix products and convolutions on a GPU round their factors to TF32 (10 bits of mantissa), or not.

    torch's own default is yes for convolutions, no for products, which is neither fast nor exact.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class RunningMetrics:
    """Sums over an epoch that stay on the device; :meth:`read` is a host synchronisation, meant for its end."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Loss, what to divide that by, right predictions."""
        self.samples = 0

    def add(self, loss: torch.Tensor, weight: torch.Tensor, correct: torch.Tensor, samples: int) -> None:
        """Add one batch: its summed loss, what to divide that by, and its right predictions; all scalars
        on the device.
        """
        self.sums += torch.stack([loss.double(), weight.double(), correct.double()])
        self.samples += samples

    def read(self, world: World) -> tuple[float, float, int]:
        """(mean loss, accuracy as a fraction, samples) over all ranks, the same bits on each."""
        everywhere = torch.cat([self.sums, torch.full_like(self.sums[:1], self.samples)])
        loss, weight, correct, samples = world.sum(everywhere).tolist()
        return loss / weight if weight else math.nan, correct / max(samples, 1), int(samples)

    def snapshot(self) -> torch.Tensor:
        """The sums on their way to the host, not waited for; what is added later does not show in them."""
        return self.sums.clone().to("cpu", non_blocking=True)


@dataclass(kw_only=True)
class Progress:
    """How far an epoch of learning has come."""

    totals: RunningMetrics
    step: int = 0
    """Optimizer steps done."""
    started: float = field(default_factory=time.perf_counter)
    """When the epoch would have begun if it had not been interrupted."""
    waited_s: float = 0.0
    """Time in which the training thread had no batch."""

    @property
    def seconds(self) -> float:
        """Time spent on the epoch so far."""
        return time.perf_counter() - self.started

    def state(self, world: World) -> dict[str, Any]:
        """As plain values, each rank's sums by themselves: added up in another order they could differ in the last
        digit.
        """
        ranks = world.gather((self.totals.sums.tolist(), self.totals.samples))
        return {"step": self.step, "seconds": self.seconds, "waited_s": self.waited_s, "ranks": ranks}

    @classmethod
    def restored(cls, state: dict[str, Any], world: World, device: torch.device) -> Progress:
        """From :meth:`state`. In a world of another size rank 0 takes all sums."""
        totals, ranks = RunningMetrics(device), state["ranks"]
        mine = ranks[world.rank : world.rank + 1] if len(ranks) == world.size else ranks if world.is_main else []
        for sums, samples in mine:
            totals.sums += torch.tensor(sums, dtype=torch.float64, device=device)
            totals.samples += samples
        started = time.perf_counter() - state["seconds"]
        return cls(totals=totals, step=state["step"], started=started, waited_s=state["waited_s"])


@dataclass(kw_only=True)
class Training:
    """A model being trained. On several ranks each has its own, with the same weights."""

    model: nn.Module
    network: nn.Module
    """``model``, or what averages its gradients over the ranks; for learning only."""
    optimizer: torch.optim.Optimizer
    scheduler: ReduceLROnPlateau | CosineAnnealingLR | None
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    """float32, or what AMP computes in."""
    class_weights: torch.Tensor
    """(classes,) float32 on the device."""
    world: World = field(default_factory=World)
    history: list[dict[str, float | int]] = field(default_factory=list)
    """One entry per finished epoch."""
    best_epoch: int = 0
    best_val_accuracy: float = -1.0
    progress: Progress | None = None
    """Of the epoch being learned; None between two."""
    _buckets_settled: bool = False

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        class_weights: np.ndarray,
        device: torch.device,
        config: TrainConfig,
        world: World | None = None,
    ) -> Training:
        """Move ``model`` to ``device`` and set up the original protocol's optimizer and schedule."""
        world = world or World()
        dtype = amp_dtype(device, config)
        if config.sync_bn:
            model = _with_synchronised_batchnorm(model, world)
        model = model.to(device)
        if config.compile == "inductor":
            model.compile()
        graphs = config.compile == "cudagraph" and device.type == "cuda"
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # the fused kernel reads each weight once (AlexNet on 2 cores: 40 ms a step in place of 280), and on a GPU it
        # checks for overflow itself, so that the scaler need not ask the host
        optimizer = torch.optim.Adam(
            learning,
            # a captured graph reads its learning rate from the device, where the schedule can change it
            lr=torch.tensor(config.learning_rate, device=device) if graphs else config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=graphs,
        )
        return cls(
            model=model,
            network=_averaging(model, device, world),
            optimizer=optimizer,
            scheduler=_scheduler(optimizer, config),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            device=device,
            dtype=dtype,
            class_weights=torch.from_numpy(class_weights).to(device),
            world=world,
        )

    def autocast(self) -> torch.autocast:
        """AMP's context, for training and evaluation alike; does nothing in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def step(
        self, images: torch.Tensor, labels: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on a batch; no host synchronisation.

        ``share`` (float32 scalar on the device) makes the mean over ranks of this one's loss the class-weighted mean
        over the global batch: ranks / Σ of its samples' class weights. Returns that loss, and how many predictions were
        right.
        """
        if self.world.size > 2 and not self._buckets_settled:  # two summands come to the same in any order
            self._settle_buckets(images)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits, aux_logits = forward_logits(self.network, images)
            loss = self._summed_loss(logits, labels)
            if aux_logits is not None:
                loss = loss + AUX_LOSS_WEIGHT * self._summed_loss(aux_logits, labels)
            loss = loss * share
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            return loss.detach(), (logits.argmax(1) == labels).sum()

    def _settle_buckets(self, images: torch.Tensor) -> None:
        """Show DDP the order in which gradients come, and so settle how they are laid out when ranks add them up.

        It would do so after its first step. As the layout decides in which order the ranks' summands are added, and so
        the last digit, a resumed training would not come to the same weights. Leaves no trace but in DDP.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with self.autocast():
                logits, aux_logits = forward_logits(self.network, images)
                total = logits.sum() if aux_logits is None else logits.sum() + aux_logits.sum()
            total.backward()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self._buckets_settled = True

    def _summed_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, self.class_weights, reduction="sum")

    def shares(self, label: np.ndarray, batches_of_ranks: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
        """(steps,) float32 on the device: :meth:`step`'s ``share`` for each step, given every rank's batches of sample
        numbers.

        All ranks know all batches, so nothing has to be sent. ``label`` (N,) int64.
        """
        weights = self.class_weights.double().cpu().numpy()[label]
        sums = [sum(weights[batch].sum() for batch in step) for step in zip(*batches_of_ranks, strict=True)]
        return (self.world.size / torch.tensor(sums, dtype=torch.float64)).float().to(self.device)

    def broadcast_buffers(self) -> None:
        """Give all ranks rank 0's running statistics of BatchNorm, which is what its checkpoints hold."""
        self.world.broadcast_tensors(list(self.model.buffers()))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the epoch to come."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def epochs_without_improvement(self) -> int:
        """Epochs since the best validation accuracy."""
        return len(self.history) - self.best_epoch

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values; on several ranks, a meeting point.

        No random state: each step is seeded by its number.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best_val_accuracy,
            "progress": None if self.progress is None else self.progress.state(self.world),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(self._with_own_kernels(state["optimizer"]))
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = list(state["history"])
        self.best_epoch, self.best_val_accuracy = state["best_epoch"], state["best_val_accuracy"]
        progress = state["progress"]
        self.progress = None if progress is None else Progress.restored(progress, self.world, self.device)

    def _with_own_kernels(self, saved: dict[str, Any]) -> dict[str, Any]:
        """``saved`` with this optimizer's way of computing the same thing: it may have been saved on another device."""
        groups = []
        for ours, group in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            ways = {name: ours[name] for name in ("fused", "foreach", "capturable")}
            lr = float(group["lr"])
            groups.append(
                group | ways | {"lr": ours["lr"].new_tensor(lr) if isinstance(ours["lr"], torch.Tensor) else lr}
            )
        return saved | {"param_groups": groups}


def _with_synchronised_batchnorm(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model  # one rank sees the whole batch anyway
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def _averaging(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    if world.size == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> ReduceLROnPlateau | CosineAnnealingLR | None:
    if config.scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)
    if config.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=COSINE_FLOOR)
    return None
