"""The optimizer and the learning-rate schedule of the original protocol, and how a checkpoint restores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from quaclrs.config import TrainConfig

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 3
COSINE_FLOOR = 1e-6
"""Learning rate at the end of the cosine schedule."""

SPANNING_SCHEDULERS = ("cosine",)
"""Schedules whose every step depends on ``--epochs``; ``--resume`` accepts no other number of epochs with them."""

Scheduler = ReduceLROnPlateau | CosineAnnealingLR


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Adam over the ``parameters`` that require gradients."""
    in_cuda_graph = config.compile == "cudagraph" and device.type == "cuda"
    return torch.optim.Adam(
        [parameter for parameter in parameters if parameter.requires_grad],
        # A captured graph reads its learning rate from the device, where the schedule can change it.
        lr=torch.tensor(config.learning_rate, device=device) if in_cuda_graph else config.learning_rate,
        weight_decay=config.weight_decay,
        # The fused kernel reads each weight once (AlexNet on 2 cores: 40 ms a step instead of 280). On a GPU it checks
        # for overflow itself, so that the gradient scaler does not synchronise with the host.
        fused=True,
        capturable=in_cuda_graph,
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Scheduler | None:
    """The schedule that ``--scheduler`` names; None for ``none``. It steps once an epoch, after validation."""
    if config.scheduler == "plateau":
        return ReduceLROnPlateau(optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)
    if config.scheduler == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=COSINE_FLOOR)
    return None


def step_scheduler(scheduler: Scheduler | None, val_accuracy: float) -> None:
    """Step ``scheduler`` at the end of an epoch with validation accuracy ``val_accuracy``."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(val_accuracy)
    elif scheduler is not None:
        scheduler.step()


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state and hyperparameters of ``saved``, possibly from another device; keep ``optimizer``'s kernels."""
    groups = []
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        implementation = {name: own[name] for name in ("fused", "foreach", "capturable") if name in own}
        lr = float(group["lr"])
        # A tensor on the device for a captured graph, a float elsewhere; the checkpoint may hold the other kind.
        own_lr = own["lr"].new_tensor(lr) if isinstance(own["lr"], torch.Tensor) else lr
        groups.append(group | implementation | {"lr": own_lr})
    optimizer.load_state_dict(saved | {"param_groups": groups})
