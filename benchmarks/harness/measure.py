"""Measuring on shared, noisy machines: interleaved repeats, medians with spread, ratios of neighbouring runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.bottleneck import find_bottleneck
from harness.contender import Contender, Pass, PeerError
from harness.processes import read_cpu_seconds
from quaclrs.config import usable_processors

if TYPE_CHECKING:  # spawned workers import these modules anew and must not wait for torch
    from quaclrs.training.distributed import World


def race(contenders: Sequence[Contender], repeats: int, world: World | None = None) -> None:
    """Warm up every contender once, then run all of them in turn, ``repeats`` times: A B C A B C ...

    Interleaving makes a drift of the machine hit all contenders alike. A peer that fails during the race is left out
    from then on, with its reason. In a ``world`` of several processes all ranks start each run together, and the run
    lasts until the slowest rank has finished.
    """
    for contender in contenders:
        _run_unless_left_out(contender)
    for _ in range(repeats):
        for contender in contenders:
            _run_timed(contender, world)
    for contender in contenders:
        if contender.left_out is None:
            contender.facts |= _collect_facts(contender, world)


def _run_timed(contender: Contender, world: World | None) -> None:
    cores = usable_processors() / (1 if world is None else world.local_size)
    busy_s = read_cpu_seconds(contender.list_pids())
    _gather(None, world)  # a barrier: all ranks start together
    started = time.perf_counter()
    done = _run_unless_left_out(contender)
    seconds = time.perf_counter() - started
    if done is None:
        return
    contender.busy_s += read_cpu_seconds(contender.list_pids()) - busy_s
    contender.available_s += cores * seconds
    images_of, seconds_of = zip(*_gather((done.images, seconds), world), strict=True)
    contender.rates.append(sum(images_of) / max(seconds_of))
    contender.passes.append(done)


def _gather(value: Any, world: World | None) -> list[Any]:
    """Return the ``value`` of every rank."""
    return [value] if world is None else world.gather(value)


def _run_unless_left_out(contender: Contender) -> Pass | None:
    if contender.left_out is None:
        try:
            return contender.run()
        except PeerError as error:
            contender.left_out, contender.rates = error.reason, []
    return None


def refuse_to_run() -> Pass:
    """Replace ``Contender.run`` once the race is over, so that the loader or model it refers to can be freed."""
    raise RuntimeError("this contender's race is over")


def repeat_run(run: Callable[[], Pass], times: int) -> Callable[[], Pass]:
    """Return a run of ``times`` epochs that counts as one pass: an epoch of a few hundredths of a second is too short
    to be timed alone."""

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


def _collect_facts(contender: Contender, world: World | None) -> dict[str, Any]:
    """Return what the race found beside the rates. All but images/s describe this rank only."""
    world_size = 1 if world is None else world.size
    facts: dict[str, Any] = {"world_size": world_size, "images_per_s_per_process": contender.median / world_size}
    if contender.is_limit:
        return facts | {"limit": True}
    facts |= _median_of_passes(contender.passes, world_size)
    if contender.read_peak_bytes is not None:
        facts["host_peak_mb"] = contender.read_peak_bytes() / 1e6
    # 0 means unknown: the run was shorter than a tick of the kernel's clock, or there is no /proc
    cores_busy = contender.busy_s / contender.available_s or None
    facts |= {"cores_busy": cores_busy, "share_of_limit": share_of_limit(contender)}
    bottleneck = find_bottleneck(
        share_of_limit=facts["share_of_limit"],
        limit=contender.limit.work if contender.limit else "",
        cores_busy=None if "device_images_per_s" in facts else cores_busy,  # a GPU does the work, not the cores
        work=contender.work,
    )
    return facts | ({"bound_by": bottleneck} if bottleneck else {})


def _median_of_passes(passes: Sequence[Pass], world_size: int) -> dict[str, float]:
    """Return the medians of what the passes reported, without what they did not report."""
    facts = {}
    for name in ("first_batch_s", "data_wait"):
        values = [value for done in passes if (value := getattr(done, name)) is not None]
        if values:
            facts[name] = statistics.median(values)
    on_device = [world_size * done.images / done.device_s for done in passes if done.device_s]
    if on_device:
        facts["device_images_per_s"] = statistics.median(on_device)
    return facts


def share_of_limit(contender: Contender) -> float | None:
    """Return the contender's ratio to its limit; None if it has none."""
    if contender.limit is None:
        return None
    share = ratio(contender, contender.limit)
    return None if math.isnan(share) else share


def ratio(contender: Contender, baseline: Contender) -> float:
    """Return the median of ``a / b`` over runs that followed each other; NaN if one of the two was left out."""
    if contender.left_out is not None or baseline.left_out is not None:
        return math.nan
    return statistics.median(a / b for a, b in zip(contender.rates, baseline.rates, strict=True))
