"""Sums over the steps of an epoch: kept on the device, read once at its end, stored in checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from quaclrs.training.distributed import World


class RunningMetrics:
    """Loss, loss denominator and correct predictions of one rank, summed on the device.

    :meth:`read` synchronises the host with the device; call it once, after the last step.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        """(3,) float64: Σ loss, Σ denominator, Σ correct predictions."""
        self.samples = 0

    def add(self, loss: torch.Tensor, denominator: torch.Tensor, correct: torch.Tensor, samples: int) -> None:
        """Add one batch: its summed loss, that sum's denominator, its correct predictions. Scalars on the device."""
        self.sums += torch.stack([loss.double(), denominator.double(), correct.double()])
        self.samples += samples

    def read(self, world: World) -> tuple[float, float, int]:
        """(mean loss, accuracy as a fraction, samples) over all ranks; every rank gets the same bits.

        The loss is NaN where the denominators sum to 0.
        """
        of_all_ranks = torch.cat([self.sums, torch.full_like(self.sums[:1], self.samples)])
        loss, denominator, correct, samples = world.sum(of_all_ranks).tolist()
        return loss / denominator if denominator else math.nan, correct / max(samples, 1), int(samples)

    def copy_to_host(self) -> torch.Tensor:
        """A copy of the present :attr:`sums` on the host, without waiting for it. Later additions do not change it."""
        return self.sums.clone().to("cpu", non_blocking=True)


@dataclass(kw_only=True)
class EpochProgress:
    """How much of a training epoch is done."""

    metrics: RunningMetrics
    step: int = 0
    """Optimizer steps done."""
    started: float = field(default_factory=time.perf_counter)
    """On the clock of ``time.perf_counter``; after a resume, shifted by the seconds spent before the interruption."""
    waited_s: float = 0.0
    """Seconds in which the training thread had no batch."""

    @property
    def seconds(self) -> float:
        """Seconds spent on the epoch so far."""
        return time.perf_counter() - self.started

    def state_dict(self, world: World) -> dict[str, Any]:
        """Plain values, each rank's sums separately: their order of addition decides the last digit. Collective."""
        ranks = world.gather((self.metrics.sums.tolist(), self.metrics.samples))
        return {"step": self.step, "seconds": self.seconds, "waited_s": self.waited_s, "ranks": ranks}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], world: World, device: torch.device) -> EpochProgress:
        """The inverse of :meth:`state_dict`. If the number of ranks has changed, rank 0 takes all sums."""
        metrics, ranks = RunningMetrics(device), state["ranks"]
        own = ranks[world.rank : world.rank + 1] if len(ranks) == world.size else ranks if world.is_main else []
        for sums, samples in own:
            metrics.sums += torch.tensor(sums, dtype=torch.float64, device=device)
            metrics.samples += samples
        started = time.perf_counter() - state["seconds"]
        return cls(metrics=metrics, step=state["step"], started=started, waited_s=state["waited_s"])
