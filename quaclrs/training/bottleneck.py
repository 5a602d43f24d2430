"""What bounds a training step: step times and trace events → a bottleneck, advice, a page of text. Imports no torch."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quaclrs.config import TrainConfig

DEVICE_BUSY = 0.9
"""Fraction of busy time from which the device is the bottleneck: without idle time, steps would save 10 % at most."""
DATA_WAIT = 0.2
"""The one rule for "bound by data": the training thread waits for at least this fraction of the time.

Below it, data at no cost would make steps at most 1 / (1 - 0.2) = 1.25 times as fast.
"""
LOST = 0.01
"""Fraction of launches whose kernels may be missing from the trace; above it, the device's time counts as unknown."""
TOP = 10
"""Operators listed on the page."""

DATA, HOST, DEVICE, COMPUTE, UNKNOWN = "data", "host", "device", "compute", "unknown"

_HOST_CALLS = ("cuda_runtime", "cuda_driver")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = re.compile(r"(cudaLaunch(Cooperative)?Kernel|cuLaunch(Cooperative)?Kernel|cudaGraphLaunch|cuGraphLaunch)")
_SYNCHRONISATIONS = {
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
}
"""CUDA calls that block the host until the device has finished some work. ``.item()`` of a tensor on the device makes
such a call; ``.item()`` of a CPU tensor costs nothing and makes none.
"""
_NAME_WIDTH = 60

Event = Mapping[str, Any]
"""One of a Chrome trace's ``traceEvents``; times in µs."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Consecutive training steps; each list has one value per step."""

    wall_s: Sequence[float]
    """Seconds from the end of the previous step to the end of this one, on a GPU by the GPU's clock."""
    host_s: Sequence[float]
    """Seconds of the training thread, without waiting for data."""
    waited_s: Sequence[float]
    samples: Sequence[int]

    @property
    def samples_per_s(self) -> float:
        """Throughput of all steps together."""
        return sum(self.samples) / sum(self.wall_s)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Figures read from a trace, over all its steps."""

    steps: int
    device_s: float
    """Seconds in which the device was busy: the union of its kernels and copies, since streams overlap."""
    launches: int
    lost_launches: int
    """Launches whose kernel is missing from the trace."""
    synchronisations: Mapping[str, int]
    """Number of host synchronisations by "call in operator"."""
    operators: Sequence[tuple[str, float]]
    """(operator, self time in seconds), longest first: device time where a device was traced, else CPU time."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What bounds the training steps."""

    bound: str
    waiting: float
    """Fraction of the wall time in which the training thread had no batch."""
    busy: float | None
    """Fraction of the wall time in which the device was busy; None on the CPU."""

    @property
    def line(self) -> str:
        """The bottleneck in a few words."""
        device = "" if self.busy is None else f", device idle {1 - self.busy:.0%}"
        return f"bound by {self.bound} (waiting for data {self.waiting:.0%}{device})"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The measured setting: for the head of the page, and for advice that names nothing already in use."""

    config: TrainConfig
    loader: str
    processes: int
    device: str
    """Its name as shown on the page."""
    on_gpu: bool
    steps: str
    """Description of the measured steps."""
    peak_bytes: tuple[int, int] = (0, 0)
    """Peak device memory in bytes: (allocated by tensors, reserved from the device)."""


# --- from a trace's events ---


def read_trace(events: Iterable[Event], steps: int, device: int | None) -> Trace:
    """Read the first ``steps`` steps of a trace, with the work that they launched on GPU number ``device`` (None: CPU).

    Raises ValueError when the trace does not hold them.
    """
    events = [event for event in events if event.get("ph") == "X"]
    annotations = sorted(
        (
            event
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep#")
        ),
        key=lambda event: float(event["ts"]),
    )[:steps]
    if len(annotations) < max(steps, 1):
        raise ValueError(f"the trace holds {len(annotations)} of {steps} steps")
    begin, end = annotations[0]["ts"], annotations[-1]["ts"] + annotations[-1]["dur"]
    inside = [event for event in events if begin <= event["ts"] < end]
    operators = [event for event in inside if event.get("cat") == "cpu_op"]
    calls = [event for event in inside if event.get("cat") in _HOST_CALLS]
    self_us, makers = _self_times_and_makers(operators, calls)
    work = [] if device is None else _work_of(events, device, begin, end)
    launches = [call for call in calls if _LAUNCH.match(call["name"])]
    done = {_correlation(event) for event in work}
    times = self_us if device is None else _device_us(work, calls, makers)
    return Trace(
        steps=steps,
        device_s=union_length([(event["ts"], event["ts"] + event["dur"]) for event in work]) / 1e6,
        launches=len(launches),
        lost_launches=sum(_correlation(call) not in done for call in launches),
        synchronisations=_synchronisations(calls, makers, {_thread(event) for event in (*operators, annotations[0])}),
        operators=[(name, us / 1e6) for name, us in Counter(times).most_common()],
    )


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length of the union of (begin, end) intervals."""
    length, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def _thread(event: Event) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _self_times_and_makers(
    operators: Sequence[Event], calls: Sequence[Event]
) -> tuple[dict[str, float], dict[int, str]]:
    """(self time in µs by operator name, name of the innermost operator around each call by the call's ``id``)."""
    threads: dict[Any, list[tuple[float, float, bool, Event]]] = defaultdict(list)
    for is_call, events in ((False, operators), (True, calls)):
        for event in events:
            threads[_thread(event)].append((event["ts"], -event["dur"], is_call, event))
    self_us: dict[str, float] = defaultdict(float)
    makers: dict[int, str] = {}
    for members in threads.values():
        around: list[Event] = []
        for begin, minus_us, is_call, event in sorted(members, key=lambda member: member[:3]):
            while around and around[-1]["ts"] + around[-1]["dur"] <= begin:
                around.pop()
            if is_call:
                if around:
                    makers[id(event)] = around[-1]["name"]
                continue
            if around:
                self_us[around[-1]["name"]] += minus_us
            self_us[event["name"]] -= minus_us
            around.append(event)
    return self_us, makers


def _work_of(events: Sequence[Event], device: int, begin: float, end: float) -> list[Event]:
    """The device's kernels and copies that were launched between ``begin`` and ``end``, whenever they ran."""
    launched: dict[Any, float] = {
        _correlation(event): event["ts"] for event in events if event.get("cat") in _HOST_CALLS
    }
    return [
        event
        for event in events
        if event.get("cat") in _DEVICE_WORK
        and event.get("args", {}).get("device", device) == device
        and begin <= launched.get(_correlation(event), float(event["ts"])) < end
    ]


def _device_us(work: Sequence[Event], calls: Sequence[Event], makers: Mapping[int, str]) -> dict[str, float]:
    """Device time in µs by the launching operator; a kernel without one (of a graph, our own) counts under its name."""
    by_call = {_correlation(call): makers[id(call)] for call in calls if id(call) in makers}
    found: dict[str, float] = defaultdict(float)
    for event in work:
        found[by_call.get(_correlation(event), str(event["name"]))] += event["dur"]
    return found


def _synchronisations(
    calls: Sequence[Event], makers: Mapping[int, str], threads: set[tuple[Any, Any]]
) -> dict[str, int]:
    """Count the synchronising calls on ``threads``, those that train; a loader's threads may synchronise freely."""
    return dict(
        Counter(
            f"{call['name']} in {makers.get(id(call), 'Python')}"
            for call in calls
            if call["name"] in _SYNCHRONISATIONS and _thread(call) in threads
        )
    )


# --- the bottleneck ---


def find_bottleneck(timed: Steps, traced: Steps, trace: Trace, on_gpu: bool) -> Bottleneck:
    """Find what bounds the steps. ``timed`` ran without the profiler, which slows the host; ``traced`` ran with it.

    The device's busy fraction is its traced seconds per sample × the samples per second of ``timed``.
    """
    waiting = sum(timed.waited_s) / sum(timed.wall_s)
    if not on_gpu:
        return Bottleneck(bound=DATA if waiting >= DATA_WAIT else COMPUTE, waiting=waiting, busy=None)
    busy = min(1.0, trace.device_s / sum(traced.samples) * timed.samples_per_s)
    if trace.launches == 0 or trace.lost_launches > LOST * trace.launches:
        bound = UNKNOWN
    elif busy >= DEVICE_BUSY:  # first: while the device is busy, waiting of the host costs nothing
        bound = DEVICE
    else:
        bound = DATA if waiting >= DATA_WAIT else HOST
    return Bottleneck(bound=bound, waiting=waiting, busy=busy)


def advice(bound: str, setting: Setting) -> str:
    """One sentence: what to try next."""
    config = setting.config
    if bound == DATA and setting.loader == "resident":
        return (
            "The data lie in memory already; a larger --batch_size (now "
            f"{config.batch_size}) or a smaller --image_size draws faster."
        )
    if bound == DATA:
        return (
            "Try --loader resident, which keeps the data in memory, with shards of --encoding indexed, which need no "
            "decoding; or more "
            f"--num_workers (now {config.num_workers})."
        )
    if bound == HOST:
        graph = "--compile cudagraph, one launch for a whole step, or " if _could_capture(setting) else ""
        return (
            f"Try {graph}a larger --batch_size (now {config.batch_size}): the host's "
            "work for a step hardly depends on its size."
        )
    if bound == DEVICE:
        faster = [] if config.use_amp else ["--use_amp", *([] if config.tf32 else ["--tf32"])]
        return (
            f"Try {', '.join([*faster, 'a smaller --model_name'])} or a smaller "
            "--image_size; the device has no time to spare."
        )
    if bound == COMPUTE:
        return "Train on a GPU, or try a smaller --model_name (mobilenet) or --image_size."
    return (
        "The trace lacks work of the device; KINETO_LOG_LEVEL=0 in the "
        "environment shows what the profiler says about it."
    )


def _could_capture(setting: Setting) -> bool:
    return setting.config.compile != "cudagraph" and setting.processes == 1


# --- the page ---


def page(setting: Setting, timed: Steps, traced: Steps, trace: Trace, bottleneck: Bottleneck) -> str:
    """The page of plain text that ``--profile`` writes."""
    config = setting.config
    lines = [
        f"{config.model_name}, batch {max(timed.samples)}, loader {setting.loader}, {setting.device}",
        setting.steps,
        "",
        f"Bottleneck: {bottleneck.line}",
        f"Advice:     {advice(bottleneck.bound, setting)}",
        "",
        *_times(setting, timed, traced, trace, bottleneck),
        "",
        *(_on_the_device(setting, trace) if setting.on_gpu else []),
        *_operators(setting, trace),
    ]
    return "\n".join(lines) + "\n"


def _times(setting: Setting, timed: Steps, traced: Steps, trace: Trace, bottleneck: Bottleneck) -> list[str]:
    wall = [1e3 * seconds for seconds in timed.wall_s]
    host = sum(timed.host_s) / sum(timed.wall_s)
    lines = [
        "Mean of a step      time   share",
        f"{_row('wall', timed.wall_s)}           median {statistics.median(wall):.2f} ms, from {min(wall):.2f} to "
        f"{max(wall):.2f}; "
        f"{timed.samples_per_s:.0f} images/s",
        f"{_row('data wait', timed.waited_s)} {bottleneck.waiting:7.1%}   the training thread has no batch",
    ]
    if bottleneck.busy is None:
        lines.append(f"{_row('compute', timed.host_s)} {host:7.1%}   the training thread outside waiting")
    else:
        device = f"some kernel or copy runs; idle {1 - bottleneck.busy:.1%}"
        lines += [
            f"{_row('host', timed.host_s)} {host:7.1%}   the training thread outside waiting: Python, launches, and "
            "blocked by the device",
            f"{_row('device', [trace.device_s / trace.steps])} {bottleneck.busy:7.1%}   {device}",
        ]
    lines.append(f"{_row('traced', traced.wall_s)}           wall time under the profiler, which slows the host")
    if setting.processes > 1:
        lines.append(
            f"This is rank 0 of {setting.processes}; waiting for the other ranks' gradients counts as its own work."
        )
    return lines


def _row(name: str, seconds: Sequence[float]) -> str:
    return f"{name:<11} {1e3 * statistics.fmean(seconds):9.2f} ms"


def _on_the_device(setting: Setting, trace: Trace) -> list[str]:
    tensors, taken = (count / 2**30 for count in setting.peak_bytes)
    lost = f", of which {trace.lost_launches} without their work in the trace" if trace.lost_launches else ""
    found = [f"  {count} × {name}" for name, count in sorted(trace.synchronisations.items(), key=lambda item: -item[1])]
    return [
        f"Kernel launches: {trace.launches / trace.steps:.1f} a step ({trace.launches} in all{lost})",
        f"Host synchronisations inside the {trace.steps} traced steps: {'none' if not found else ''}".rstrip(),
        *found[:TOP],
        f"Peak device memory: {tensors:.2f} GiB in tensors, {taken:.2f} GiB taken from the device",
        "",
    ]


def _operators(setting: Setting, trace: Trace) -> list[str]:
    total = sum(seconds for _, seconds in trace.operators) or 1.0
    return [
        f"Operators by {'device' if setting.on_gpu else 'self CPU'} time (top {TOP})".ljust(_NAME_WIDTH + 2)
        + "     a step   share",
        *(
            f"{name[:_NAME_WIDTH]:<{_NAME_WIDTH + 2}} {1e3 * seconds / trace.steps:7.3f} ms {seconds / total:7.1%}"
            for name, seconds in trace.operators[:TOP]
        ),
    ]
