"""The things that are measured: contenders in groups, what one pass of a contender tells, and a peer's failure."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.processes import list_own_pids
from quaclrs.errors import MissingDependencyError

if TYPE_CHECKING:  # spawned workers import these modules anew and must not wait for torch
    import torch

Options = argparse.Namespace
"""The parsed flags of throughput.py, together with ``world`` and ``log``."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass over all images reports about itself. Its duration is measured from outside."""

    images: float
    first_batch_s: float | None = None
    """From requesting the first batch to having it."""
    data_wait: float | None = None
    """Share of the time in which the consumer had no batch."""
    device_s: float | None = None
    """Between CUDA events around the whole pass; None on the CPU."""


class PeerError(MissingDependencyError):
    """A peer cannot be installed or fails at its work. ``reason`` is the message without the peer's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


@dataclass(kw_only=True)
class Contender:
    """One way of doing the work, or a limit of the machine that no way can exceed. ``run`` does all the work once."""

    name: str
    run: Callable[[], Pass]
    facts: dict[str, Any] = field(default_factory=dict)
    """Everything the result file says about the contender beside its rates."""
    is_limit: bool = False
    """A bound, not a way of doing the work: never the baseline of ratios."""
    limit: Contender | None = None
    """The limit of the machine that applies to this work."""
    work: str = "work on the cores"
    """What the cores do when they are busy, as the bottleneck's name; for a limit, what is limited."""
    list_pids: Callable[[], list[int]] = list_own_pids
    """The processes whose CPU time counts as the contender's."""
    read_peak_bytes: Callable[[], int] | None = None
    """Peak host memory of those processes; called when the race is over."""
    rates: list[float] = field(default_factory=list)
    """images/s of each counted repeat, over all ranks."""
    passes: list[Pass] = field(default_factory=list)
    """What each counted repeat reported, on this rank."""
    busy_s: float = 0.0
    """CPU time of all counted repeats together, on this rank. Summed, because the kernel counts in units of 10 ms."""
    available_s: float = 0.0
    """CPU time that the cores could have given: cores × seconds."""
    left_out: str | None = None
    """Why the contender is not in the race, or no longer."""

    @property
    def median(self) -> float:
        """Median of the repeats, in images/s."""
        return statistics.median(self.rates)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Contenders that do the same work, and the one that ratios are taken to."""

    name: str
    contenders: list[Contender]
    baseline: Contender


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one mode of throughput.py measured, ready to be saved."""

    what: str
    groups: list[Group]
    setting: dict[str, Any]
    device: torch.device
