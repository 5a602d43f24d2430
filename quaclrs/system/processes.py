"""Work spread over processes: progress while it runs, the first failure at once, and no process left behind."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from quaclrs.errors import QuaclrsError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], object]
"""To be called by the work after each unit of it; raises :class:`Cancelled` when the work is no longer wanted."""

_POLL_S = 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 64 << 20
_LARGEST_KEPT_BLOCK_BYTES = 32 << 20  # the most that glibc takes
_shared: dict[str, Any] = {}


class Cancelled(Exception):
    """Another task failed, or the user interrupted: clean up and stop."""


def run_tasks(
    work: Callable[[Task, Tick], Result],
    tasks: Sequence[Task],
    *,
    num_workers: int,
    on_progress: Callable[[int], object] = lambda units: None,
) -> list[Result]:
    """``work(task, tick)`` for every task, each in one of ``num_workers`` spawned processes; results in the order of
    ``tasks``.

    One worker is the calling process itself. ``work`` must be importable (a module's function) and calls ``tick()``
    once per unit; ``on_progress`` gets the units done since its last call. The first exception cancels the rest and is
    raised here. A worker that dies is a :class:`QuaclrsError`.
    """
    if num_workers == 1 or not tasks:
        return [work(task, lambda: on_progress(1)) for task in tasks]
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of whatever threads run here
    # only the workers take the counter's lock: one that is killed while it holds it must not block this process
    counter, stop = context.Value("Q", 0), context.RawValue("b", 0)
    workers = min(num_workers, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise, initargs=(counter, stop)) as pool:
        try:
            with interrupts_held():
                futures = [pool.submit(_call, work, task) for task in tasks]
            seen, pending = 0, set(futures)
            while pending:
                done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                units = counter.get_obj().value
                on_progress(units - seen)
                seen = units
                for future in done:
                    future.result()
        except BaseException as error:
            stop.value = 1
            if isinstance(
                error, BrokenProcessPool
            ):  # workers that start just then are never told; nobody waits for them
                for process in list(pool._processes.values()):
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise QuaclrsError(
                    "a worker process died (killed, or out of memory?); run the same command again, with fewer "
                    "--num_workers"
                ) from None
            raise
    return [future.result() for future in futures]


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and never reaches the workers started in it: this process has to tell
    them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialise(counter: Any, stop: Any) -> None:
    _shared.update(counter=counter, stop=stop)
    exit_with_parent()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc keep up to :data:`_KEPT_BYTES` that are free for what comes next; other C libraries are left alone.

    Buffers of a megabyte come and go with every image. By default each goes back to the kernel, which has to clear its
    pages when it hands them out again: a sixth of the time of packing ``png``, a quarter of ``rgb``.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def exit_with_parent() -> None:
    """End this process when its parent is gone: a killed one cannot say goodbye, and workers would wait for work for
    ever.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(work: Callable[[Task, Tick], Result], task: Task) -> Result:
    return work(task, _tick)


def _tick() -> None:
    with _shared["counter"].get_lock():
        _shared["counter"].value += 1
    if _shared["stop"].value:
        raise Cancelled
