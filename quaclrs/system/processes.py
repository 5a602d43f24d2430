"""Runs tasks in worker processes, with progress, prompt failure, and no process left behind.

Workers count finished units in shared memory, which the calling process polls every 0.1 s. The first exception sets a
stop flag; the other workers see it at their next unit and raise :class:`Cancelled`. A worker ends when its parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from quaclrs.errors import QuaclrsError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], object]
"""The work calls it after each unit. It raises :class:`Cancelled` if the work should stop."""

_POLL_S = 0.1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_KEPT_BYTES = 64 << 20
_LARGEST_KEPT_BLOCK_BYTES = 32 << 20  # the maximum that glibc accepts
_shared: dict[str, Any] = {}


class Cancelled(Exception):
    """Raised in a task that must clean up and stop, because another task failed or the user interrupted."""


def run_tasks(
    work: Callable[[Task, Tick], Result],
    tasks: Sequence[Task],
    *,
    num_workers: int,
    on_progress: Callable[[int], object] = lambda units: None,
) -> list[Result]:
    """Call ``work(task, tick)`` for every task in ``num_workers`` spawned processes; results in the order of ``tasks``.

    With one worker, the tasks run in the calling process. ``work`` must be importable (a module's function) and call
    ``tick()`` once per unit. ``on_progress`` receives the units done since its last call. The first exception cancels
    the other tasks and is raised here. A worker that dies raises :class:`QuaclrsError`.
    """
    if num_workers == 1 or not tasks:
        return [work(task, lambda: on_progress(1)) for task in tasks]
    context = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
    # only workers take the counter's lock: a worker killed while holding it must not block this process
    counter, stop = context.Value("Q", 0), context.RawValue("b", 0)
    workers = min(num_workers, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise, initargs=(counter, stop)) as pool:
        try:
            futures = _submit_all(pool, work, tasks)
            _wait_for_all(futures, counter, on_progress)
        except BaseException as error:
            stop.value = 1
            if isinstance(error, BrokenProcessPool):  # a worker that is just starting would not see the stop flag
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


def _submit_all(
    pool: ProcessPoolExecutor, work: Callable[[Task, Tick], Result], tasks: Sequence[Task]
) -> list[Future[Result]]:
    """Submit ``tasks``, which starts the workers. Raises BrokenProcessPool for a worker that dies meanwhile."""
    try:
        with interrupts_held():
            return [pool.submit(_call, work, task) for task in tasks]
    except BrokenPipeError:  # it was killed before it had read what this process writes to it
        raise BrokenProcessPool("a worker process died while it started") from None


def _wait_for_all(futures: list[Future[Any]], counter: Any, on_progress: Callable[[int], object]) -> None:
    """Report progress until all ``futures`` are done. Raises the first exception of any."""
    seen, pending = 0, set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
        units = counter.get_obj().value
        on_progress(units - seen)
        seen = units
        for future in done:
            future.result()


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay SIGINT until the end of the block. Workers started in it inherit the mask and never receive SIGINT.

    Ctrl-C goes to all processes of the terminal. Only the parent should react to it, and stop its workers.
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
    """Let glibc keep up to :data:`_KEPT_BYTES` of freed memory for reuse. Does nothing with other C libraries.

    Every image allocates and frees buffers of about a megabyte. By default glibc returns each to the operating system,
    which must clear its pages when it hands them out again. That took a sixth of the time of packing ``png`` and a
    quarter for ``rgb``.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def exit_with_parent() -> None:
    """End this process when its parent ends. A killed parent cannot stop its workers, which would wait forever."""
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
