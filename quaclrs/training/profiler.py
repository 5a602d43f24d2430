"""``--profile``: torch's profiler over some steps of an epoch, and a page that says what bounds them.

It wraps the trainer's hooks. It times some steps without the profiler and traces the next ones: the profiler slows the
host, so its own times would blame the host too often. The computed values stay the same, bit for bit.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from quaclrs.config import TrainConfig
from quaclrs.loaders.base import Batch
from quaclrs.system.atomic_files import TEMPORARY_SUFFIX, atomic_writer, make_folder, storage_error, write_bytes
from quaclrs.training.bottleneck import Setting, Steps, find_bottleneck, page, read_trace
from quaclrs.training.loop import OnStep
from quaclrs.training.running_metrics import RunningMetrics
from quaclrs.training.state import TrainState
from quaclrs.training.trainer import Hooks

FOLDER, TRACE_FILE, BOTTLENECK_FILE = "profile", "trace.json.gz", "bottleneck.txt"
WARM_UP = 5
"""Steps before the first measured one: they allocate memory, choose algorithms and fill queues."""
MEASURED = 20
"""Steps to time, and as many to trace: enough for a median, few enough that a browser can show the trace."""
FEWEST = 3
"""Fewest steps of an epoch that can be profiled: one to warm up, one to time and one to trace."""

Log = Callable[[str], None]


@contextmanager
def with_profile(
    hooks: Hooks, config: TrainConfig, state: TrainState, loader: str, folder: Path, log: Log
) -> Iterator[Hooks]:
    """Yield hooks that also profile the block's first epoch of enough steps, into ``folder/profile``.

    Without ``--profile``, and on ranks other than 0, these are ``hooks`` themselves. An exception also stops the
    profiler.
    """
    if not config.profile or not state.world.is_main:
        yield hooks
        return
    _prepare_kineto(config)
    profiler = _Profiler(hooks, config, state, loader, folder / FOLDER, log)
    try:
        yield dataclasses.replace(hooks, step_meter=profiler.step_meter)
        profiler.end()
    finally:
        profiler.stop()


def _prepare_kineto(config: TrainConfig) -> None:
    """Set environment variables that torch's profiler library (Kineto) reads when it starts."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs to stderr
    if config.compile == "cudagraph":  # as torch does for its own graphs: otherwise a second profile can crash
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
        os.environ.setdefault("TEARDOWN_CUPTI", "0")


@dataclasses.dataclass(frozen=True)
class ProfileSchedule:
    """The step numbers at which each part of a profile begins and ends."""

    timed: int
    """Steps to warm up."""
    timed_end: int
    """The profiler starts after this step."""
    traced: int
    """Tracing starts after this step, when the profiler has warmed up."""
    end: int


def schedule_steps(steps: int) -> ProfileSchedule | None:
    """The schedule of a profile within an epoch of ``steps`` steps; None for fewer than :data:`FEWEST`.

    Short epochs get fewer steps of each part.
    """
    if steps < FEWEST:
        return None
    warm_up = min(WARM_UP, 1 + (steps - FEWEST) // 8)
    settling = 1 if steps - warm_up > 3 else 0
    remaining = steps - warm_up - settling
    timed = min(MEASURED, remaining // 2)
    traced = min(MEASURED, remaining - timed)
    return ProfileSchedule(warm_up, warm_up + timed, warm_up + timed + settling, warm_up + timed + settling + traced)


class _Clock:
    """Times between steps, on a GPU by CUDA events, which do not block the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[float, float, int]] = []  # host's clock, waited so far, samples of the step before
        self._events: list[torch.cuda.Event] = []

    def mark(self, samples: int, waited_s: float) -> None:
        """Note the end of a step of ``samples`` samples; ``waited_s`` is the epoch's waiting so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        self._marks.append((time.perf_counter(), waited_s, samples))

    def __len__(self) -> int:
        """Number of steps between the marks."""
        return max(len(self._marks) - 1, 0)

    def steps(self) -> Steps:
        """The times of all steps. Call it once the device has reached the last mark."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        between_s = [after[0] - before[0] for before, after in pairs]
        waited_s = [after[1] - before[1] for before, after in pairs]
        device_s = [
            before.elapsed_time(after) / 1e3 for before, after in zip(self._events, self._events[1:], strict=False)
        ]
        return Steps(
            wall_s=device_s or between_s,
            host_s=[between - waited for between, waited in zip(between_s, waited_s, strict=True)],
            waited_s=waited_s,
            samples=[after[2] for _, after in pairs],
        )


class _Recording:
    """Times and traces the steps of one epoch while they run."""

    def __init__(self, device: torch.device, epoch: int, samples: int) -> None:
        self._device, self._samples = device, samples
        self._schedule: ProfileSchedule | None = None
        self._tracer: torch.profiler.profile | None = None
        self.epoch, self.done = epoch, 0
        self.timed, self.traced = _Clock(device), _Clock(device)

    def after_step(self, batch: Batch, metrics: RunningMetrics, waited_s: float) -> bool:
        """Record a step; returns whether the schedule is complete."""
        self.done += 1
        # The batch size and the samples done before an interruption are known only after the first step.
        if self.done == 1:
            self._schedule = schedule_steps(1 + -(-max(self._samples - metrics.samples, 0) // len(batch)))
        schedule, done = self._schedule, self.done
        if schedule is None or done > schedule.end:
            return False
        if schedule.timed <= done <= schedule.timed_end:
            self.timed.mark(len(batch), waited_s)
        if done < schedule.end:
            self._trace_on(schedule)
        if schedule.traced <= done:
            self.traced.mark(len(batch), waited_s)
        return done == schedule.end

    def _trace_on(self, schedule: ProfileSchedule) -> None:
        if self.done == schedule.timed_end:
            self._tracer = _tracer(self._device, settling=schedule.traced - schedule.timed_end)
            self._tracer.start()
        elif self._tracer is not None:
            self._tracer.step()

    def stop(self) -> torch.profiler.profile | None:
        """Stop the profiler if it runs; returns it with what it has traced, or None."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.stop()
        return tracer

    def describe(self) -> str:
        """A sentence that names the measured steps."""
        schedule = self._schedule
        assert schedule is not None
        timed, traced = _numbers(schedule.timed, len(self.timed)), _numbers(schedule.traced, len(self.traced))
        return (
            f"Epoch {self.epoch}, counting this call's steps: {timed} timed as they are, {traced} traced ({TRACE_FILE})"
        )


def _numbers(done: int, steps: int) -> str:
    return f"{done + 1} to {done + steps}" if steps > 1 else f"{done + 1}"


def _tracer(device: torch.device, settling: int) -> torch.profiler.profile:
    """A profiler that is not started yet. It discards its first ``settling`` steps."""
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *cuda],
        schedule=lambda step: ProfilerAction.WARMUP if step < settling else ProfilerAction.RECORD,
    )


class _Profiler:
    """Profiles the first training epoch that is long enough."""

    def __init__(
        self, hooks: Hooks, config: TrainConfig, state: TrainState, loader: str, folder: Path, log: Log
    ) -> None:
        self._hooks, self._config, self._state, self._loader = hooks, config, state, loader
        self._folder, self._log = folder, log
        self._recording: _Recording | None = None
        self._longest = 0
        self._finished = False

    def step_meter(self, phase: str, epoch: int, samples: int) -> OnStep:
        """As :attr:`quaclrs.training.trainer.Hooks.step_meter`."""
        self._end_epoch()
        meter = self._hooks.step_meter(phase, epoch, samples)
        if phase != "train" or self._finished:
            return meter
        recording = self._recording = _Recording(self._state.device, epoch, samples)

        def on_step(batch: Batch, metrics: RunningMetrics, waited_s: float) -> None:
            meter(batch, metrics, waited_s)
            if recording.after_step(batch, metrics, waited_s):
                self._finish(recording)

        return on_step

    def end(self) -> None:
        """Finish after the last epoch."""
        self._end_epoch()
        if not self._finished:
            self._log(
                f"profile: too few steps; the longest epoch trained here had {self._longest}, and it takes {FEWEST}"
            )

    def stop(self) -> None:
        """Stop torch's profiler, also after an exception. A recording that an exception cut off is not written."""
        if self._recording is not None:
            self._recording.stop()

    def _end_epoch(self) -> None:
        """Use what was recorded so far: the epoch may have had fewer steps than its samples suggested."""
        recording, self._recording = self._recording, None
        if recording is None or self._finished:
            return
        self._longest = max(self._longest, recording.done)
        if len(recording.traced):
            self._finish(recording)
        else:
            recording.stop()

    def _finish(self, recording: _Recording) -> None:
        self._finished = True
        tracer = recording.stop()
        assert tracer is not None
        try:
            self._log(self._write(recording, _write_trace(tracer, make_folder(self._folder))))
        except (
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # the trace format is torch's; a change of it must not end a training
            self._log(
                "profile: no bottleneck found, since torch's trace cannot be understood "
                f"({type(error).__name__}: {error})"
            )

    def _write(self, recording: _Recording, events: list[dict[str, Any]]) -> str:
        """Write the page; returns its one-line form."""
        device, on_gpu = self._state.device, self._state.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(device)  # outside the steps, so that the clocks' last events are reached
        timed, traced = recording.timed.steps(), recording.traced.steps()
        trace = read_trace(events, len(recording.traced), device.index if on_gpu else None)
        setting = Setting(
            config=self._config,
            loader=self._loader,
            processes=self._state.world.size,
            device=f"{device} ({torch.cuda.get_device_name(device)})" if on_gpu else str(device),
            on_gpu=on_gpu,
            steps=recording.describe(),
            peak_bytes=(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
            if on_gpu
            else (0, 0),
        )
        bottleneck = find_bottleneck(timed, traced, trace, on_gpu)
        path = self._folder / BOTTLENECK_FILE
        write_bytes(path, page(setting, timed, traced, trace, bottleneck).encode())
        return f"profile: {bottleneck.line}; see {path}"


def _write_trace(tracer: torch.profiler.profile, folder: Path) -> list[dict[str, Any]]:
    """Write the trace of ``tracer`` into ``folder``, compressed; returns its events."""
    plain = folder / f"trace.json{TEMPORARY_SUFFIX}"
    try:
        tracer.export_chrome_trace(str(plain))
        content = plain.read_bytes()
        events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
    except OSError as error:
        raise storage_error(plain, error) from None
    except ValueError:  # the profiler does not say that the disk was full
        raise storage_error(plain, OSError(errno.ENOSPC, "the file was cut short")) from None
    finally:
        plain.unlink(missing_ok=True)
    with (
        atomic_writer(folder / TRACE_FILE) as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
    ):
        packed.write(content)
    return events
