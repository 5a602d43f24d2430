"""What bounds a training step: from times and the events of a trace to a word, a sentence of advice and a page. Pure,
no torch.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quaclrs.config import TrainConfig

DEVICE_BUSY = 0.9
"""Share of its time from which on a device counts as busy: with no gap left, steps would be a ninth faster at most."""
DATA_WAIT = 0.2
"""Share of waiting from which on the data are to blame: below it, data that cost no time would make steps a quarter
faster at most.
"""
LOST = 0.01
"""Share of launches without their work in the trace, above which the device's time is not known."""
TOP = 10
"""Operators on the page."""

DATA, HOST, DEVICE, COMPUTE, UNKNOWN = "data", "host", "device", "compute", "unknown"

_HOST_CALLS = ("cuda_runtime", "cuda_driver")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = re.compile(r"(cudaLaunch(Cooperative)?Kernel|cuLaunch(Cooperative)?Kernel|cudaGraphLaunch|cuGraphLaunch)")
_SYNCHRONISATIONS = {
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
}
"""Calls that come back only when the device has done something. ``.item()`` of a tensor on the device makes one; that
of a tensor on the CPU, which costs nothing, does not."""
_NAME_WIDTH = 60

Event = Mapping[str, Any]
"""One of a Chrome trace's ``traceEvents``; times in µs."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Some training steps in a row; one value of each list for each."""

    wall_s: Sequence[float]
    """From the end of the step before to its own, on a GPU by the GPU's clock."""
    host_s: Sequence[float]
    """The training thread outside waiting for data."""
    waited_s: Sequence[float]
    samples: Sequence[int]

    @property
    def samples_per_s(self) -> float:
        """Of all the steps together."""
        return sum(self.samples) / sum(self.wall_s)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a trace says about the steps that it holds."""

    steps: int
    device_s: float
    """In which the device did something: the union of its work, since streams overlap."""
    launches: int
    lost_launches: int
    """Those whose work is not in the trace."""
    synchronisations: Mapping[str, int]
    """How often the training waited for the device, by call and by the operator that made it."""
    operators: Sequence[tuple[str, float]]
    """Every operator's self time in seconds, the longest first: the device's where it was traced, else the CPU's."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What bounds the steps."""

    bound: str
    waiting: float
    """Share of the wall time in which the training thread had no batch."""
    busy: float | None
    """Share of the wall time in which the device did something; None on the CPU."""

    @property
    def line(self) -> str:
        """The verdict in a few words."""
        device = "" if self.busy is None else f", device idle {1 - self.busy:.0%}"
        return f"bound by {self.bound} (waiting for data {self.waiting:.0%}{device})"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was measured, for the page's head and for advice that is not followed already."""

    config: TrainConfig
    loader: str
    processes: int
    device: str
    """Its name, for people."""
    on_gpu: bool
    steps: str
    """Which ones were measured, in words."""
    peak_bytes: tuple[int, int] = (0, 0)
    """Of device memory: in tensors, and taken from the device."""


# --- from a trace's events ---


def read_trace(events: Iterable[Event], steps: int, device: int | None) -> Trace:
    """The first ``steps`` steps of a trace and the work of GPU number ``device`` that they launched; None: of the CPU.

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
    self_us, makers = _nested(operators, calls)
    work = [] if device is None else _work_of(events, device, begin, end)
    launches = [call for call in calls if _LAUNCH.match(call["name"])]
    done = {_correlation(event) for event in work}
    times = self_us if device is None else _device_us(work, calls, makers)
    return Trace(
        steps=steps,
        device_s=union([(event["ts"], event["ts"] + event["dur"]) for event in work]) / 1e6,
        launches=len(launches),
        lost_launches=sum(_correlation(call) not in done for call in launches),
        synchronisations=_synchronisations(calls, makers, {_thread(event) for event in (*operators, annotations[0])}),
        operators=[(name, us / 1e6) for name, us in Counter(times).most_common()],
    )


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what some (begin, end) cover together."""
    length, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def _thread(event: Event) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _nested(operators: Sequence[Event], calls: Sequence[Event]) -> tuple[dict[str, float], dict[int, str]]:
    """(µs of each operator's name without the operators inside it, the innermost operator's name around each call by
    its ``id``).
    """
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
    """µs on the device by the operator that launched it; a kernel launched by none (a graph's, our own) goes by its own
    name.
    """
    by_call = {_correlation(call): makers[id(call)] for call in calls if id(call) in makers}
    found: dict[str, float] = defaultdict(float)
    for event in work:
        found[by_call.get(_correlation(event), str(event["name"]))] += event["dur"]
    return found


def _synchronisations(
    calls: Sequence[Event], makers: Mapping[int, str], threads: set[tuple[Any, Any]]
) -> dict[str, int]:
    """On the threads that train; others, a loader's, may wait as they like."""
    return dict(
        Counter(
            f"{call['name']} in {makers.get(id(call), 'Python')}"
            for call in calls
            if call["name"] in _SYNCHRONISATIONS and _thread(call) in threads
        )
    )


# --- the verdict ---


def judge(timed: Steps, traced: Steps, trace: Trace, on_gpu: bool) -> Verdict:
    """``timed`` ran without the profiler, which slows the host: the device's share is its traced time in steps of their
    length.
    """
    waiting = sum(timed.waited_s) / sum(timed.wall_s)
    if not on_gpu:
        return Verdict(bound=DATA if waiting >= DATA_WAIT else COMPUTE, waiting=waiting, busy=None)
    busy = min(1.0, trace.device_s / sum(traced.samples) * timed.samples_per_s)
    if trace.launches == 0 or trace.lost_launches > LOST * trace.launches:
        bound = UNKNOWN
    elif busy >= DEVICE_BUSY:  # first: while the device is busy, whatever the host waits for costs nothing
        bound = DEVICE
    else:
        bound = DATA if waiting >= DATA_WAIT else HOST
    return Verdict(bound=bound, waiting=waiting, busy=busy)


def advice(bound: str, setting: Setting) -> str:
    """One sentence about what to try."""
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


def page(setting: Setting, timed: Steps, traced: Steps, trace: Trace, verdict: Verdict) -> str:
    """One page of plain text."""
    config = setting.config
    lines = [
        f"{config.model_name}, batch {max(timed.samples)}, loader {setting.loader}, {setting.device}",
        setting.steps,
        "",
        f"Verdict: {verdict.line}",
        f"Advice:  {advice(verdict.bound, setting)}",
        "",
        *_times(setting, timed, traced, trace, verdict),
        "",
        *(_on_the_device(setting, trace) if setting.on_gpu else []),
        *_operators(setting, trace),
    ]
    return "\n".join(lines) + "\n"


def _times(setting: Setting, timed: Steps, traced: Steps, trace: Trace, verdict: Verdict) -> list[str]:
    wall = [1e3 * seconds for seconds in timed.wall_s]
    host = sum(timed.host_s) / sum(timed.wall_s)
    lines = [
        "Mean of a step      time   share",
        f"{_row('wall', timed.wall_s)}           median {statistics.median(wall):.2f} ms, from {min(wall):.2f} to "
        f"{max(wall):.2f}; "
        f"{timed.samples_per_s:.0f} images/s",
        f"{_row('data wait', timed.waited_s)} {verdict.waiting:7.1%}   the training thread has no batch",
    ]
    if verdict.busy is None:
        lines.append(f"{_row('compute', timed.host_s)} {host:7.1%}   the training thread outside waiting")
    else:
        device = f"some kernel or copy runs; idle {1 - verdict.busy:.1%}"
        lines += [
            f"{_row('host', timed.host_s)} {host:7.1%}   the training thread outside waiting: Python, launches, and "
            "blocked by the device",
            f"{_row('device', [trace.device_s / trace.steps])} {verdict.busy:7.1%}   {device}",
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
