"""Measuring on machines that are shared and noisy: interleaved repeats, medians with spread, ratios
taken pair by pair.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.bottleneck import bound_by
from harness.peer_process import Pass, PeerError
from harness.processes import cpu_seconds, own_processes
from quaclrs.config import default_num_workers

if TYPE_CHECKING:  # spawned workers import the scripts anew, and shall not wait for torch
    import torch

    from quaclrs.training.distributed import World


@dataclass(kw_only=True)
class Contender:
    """One way of doing the work, or a limit of the machine that no way can pass. ``run`` does all of it once."""

    name: str
    run: Callable[[], Pass]
    facts: dict[str, Any] = field(default_factory=dict)
    limit: bool = False
    """A bound and not a way of doing the work: never what others are compared with."""
    bounded_by: Contender | None = None
    """The limit that it comes up against."""
    work: str = "work on the cores"
    """What its cores do when they are busy, for the verdict; of a limit, what it is a limit of."""
    processes: Callable[[], list[int]] = own_processes
    """Whose processor time is its own."""
    peak_bytes: Callable[[], int] | None = None
    """Of the host memory of those processes; asked for when the race is over."""
    rates: list[float] = field(default_factory=list)
    """images/s of each counted repeat, over all ranks."""
    passes: list[Pass] = field(default_factory=list)
    """What each counted repeat told about itself, on this rank."""
    busy_s: float = 0.0
    """Processor time that the counted repeats had together, on this rank; of all of them, since the kernel counts in 10
    ms.
    """
    available_s: float = 0.0
    """Processor time that they could have had."""
    left_out: str | None = None
    """Why it is not in the race, or not any more."""

    @property
    def median(self) -> float:
        """The middle of the repeats, in images/s."""
        return statistics.median(self.rates)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Contenders that do the same work, and the one they are compared with."""

    name: str
    contenders: list[Contender]
    baseline: Contender


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one mode of throughput.py measured, to be saved."""

    what: str
    groups: list[Group]
    setting: dict[str, Any]
    device: torch.device


def race(contenders: Sequence[Contender], repeats: int, world: World | None = None) -> None:
    """Warm every contender up once, then run all of them in turn, ``repeats`` times: A B C A B C ..., so that a drift
    of the machine meets all alike. A peer that fails on the way is left out from there on, with its reason.

    In a ``world`` of several processes all start each run together, and it lasts until the slowest is done.
    """
    for contender in contenders:
        _run(contender)
    for _ in range(repeats):
        for contender in contenders:
            _run_timed(contender, world)
    for contender in contenders:
        if contender.left_out is None:
            contender.facts |= _facts(contender, world)


def _run_timed(contender: Contender, world: World | None) -> None:
    cores = default_num_workers() / (1 if world is None else world.local_size)
    busy_s = cpu_seconds(contender.processes())
    _everyones(None, world)  # nobody starts before all are here
    started = time.perf_counter()
    done = _run(contender)
    seconds = time.perf_counter() - started
    if done is None:
        return
    contender.busy_s += cpu_seconds(contender.processes()) - busy_s
    contender.available_s += cores * seconds
    images_of, seconds_of = zip(*_everyones((done.images, seconds), world), strict=True)
    contender.rates.append(sum(images_of) / max(seconds_of))
    contender.passes.append(done)


def _everyones(value: Any, world: World | None) -> list[Any]:
    return [value] if world is None else world.gather(value)


def _run(contender: Contender) -> Pass | None:
    if contender.left_out is None:
        try:
            return contender.run()
        except PeerError as error:
            contender.left_out, contender.rates = error.reason, []
    return None


def spent() -> Pass:
    """What a contender runs once its race is over: its own way would keep what it needs in memory."""
    raise RuntimeError("this contender's race is over")


def repeated(run: Callable[[], Pass], times: int) -> Callable[[], Pass]:
    """``run`` several times as one pass: epochs of a few hundredths of a second are too short to be timed alone."""

    def run_all() -> Pass:
        done = [run() for _ in range(times)]
        firsts = [part.first_batch_s for part in done if part.first_batch_s is not None]
        on_device = [part.device_s for part in done if part.device_s is not None]
        return Pass(
            images=sum(part.images for part in done),
            first_batch_s=statistics.median(firsts) if firsts else None,
            device_s=sum(on_device) if on_device else None,
        )

    return run_all if times > 1 else run


def _facts(contender: Contender, world: World | None) -> dict[str, Any]:
    """What a race found out beside the rates. Of several processes, all but images/s are about this one."""
    processes = 1 if world is None else world.size
    facts: dict[str, Any] = {"world_size": processes, "images_per_s_per_process": contender.median / processes}
    if contender.limit:
        return facts | {"limit": True}
    for name in ("first_batch_s", "data_wait"):
        values = [value for done in contender.passes if (value := getattr(done, name)) is not None]
        if values:
            facts[name] = statistics.median(values)
    on_device = [processes * done.images / done.device_s for done in contender.passes if done.device_s]
    if on_device:
        facts["device_images_per_s"] = statistics.median(on_device)
    if contender.peak_bytes is not None:
        facts["host_peak_mb"] = contender.peak_bytes() / 1e6
    cores_busy = (
        contender.busy_s / contender.available_s or None
    )  # none at all: too short for the kernel's clock, or no /proc
    share = share_of_limit(contender)
    facts |= {"cores_busy": cores_busy, "share_of_limit": share}
    limit = contender.bounded_by
    if "device_images_per_s" in facts:
        cores_busy = None  # it is not they that do the work
    verdict = bound_by(
        share_of_limit=share, limit=limit.work if limit else "", cores_busy=cores_busy, work=contender.work
    )
    return facts | ({"bound_by": verdict} if verdict else {})


def share_of_limit(contender: Contender) -> float | None:
    """How much of its limit a contender reaches; None where it has none."""
    if contender.bounded_by is None:
        return None
    share = ratio(contender, contender.bounded_by)
    return None if math.isnan(share) else share


def ratio(contender: Contender, baseline: Contender) -> float:
    """Median of the ratios of runs that followed each other; NaN where one of the two was left out."""
    if contender.left_out is not None or baseline.left_out is not None:
        return math.nan
    return statistics.median(a / b for a, b in zip(contender.rates, baseline.rates, strict=True))
