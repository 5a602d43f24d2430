"""Locks between packing processes, on one machine or on several that share a file system. A dead process's locks free themselves.

Two kinds, both files in ``.packing/``: ``lock`` for the folder, which one process holds alone or several hold together, and one
``.claim`` per shard, which a worker holds while it works on that shard. Nobody waits while holding a claim, so nobody deadlocks.
Imports neither pandas nor torch: workers start with it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from quaclrs.errors import StorageError
from quaclrs.files import make_folder, storage_error
from quaclrs.parallel import Tick
from quaclrs.shards.write import PACKING_FOLDER, ShardPlan

try:
    import fcntl
except ImportError:  # not a POSIX system: packing twice at once is then up to the user
    fcntl = None  # type: ignore[assignment]

Result = TypeVar("Result")

_PATIENCE_S = 0.5
"""How long a lock may take before the user hears of it: others hold it only for a moment when they begin or end."""
_POLL_S = 0.05


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, on_wait: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock ``path``, alone or ``shared``, and yield True; without ``on_wait``, yield False where another holds it.

    ``on_wait`` is called once, before a wait that is not over at once; it may raise. Raises :class:`StorageError` where the file
    cannot be made or the file system has no locks.
    """
    while True:
        with _opened(path) as file:
            held = _acquire(file, path, shared, on_wait)
            if held and not _is_still(file, path):  # its holder removed it with the whole folder: the next one counts
                continue
            yield held
            return


@contextlib.contextmanager
def claim(plan: ShardPlan, output_dir: Path) -> Iterator[bool]:
    """Claim ``plan``'s shard for the block, if nobody else has; yields whether it is ours."""
    with locked(output_dir / PACKING_FOLDER / (Path(plan.file).stem + ".claim")) as mine:
        yield mine


def is_free(plan: ShardPlan, output_dir: Path) -> bool:
    """Whether nobody works on ``plan``'s shard at this moment."""
    with claim(plan, output_dir) as mine:
        return mine


def claimed(
    plan: ShardPlan,
    tick: Tick,
    *,
    output_dir: Path,
    find: Callable[[ShardPlan], Result | None],
    work: Callable[[ShardPlan, Tick], Result],
) -> Result | None:
    """``work(plan, tick)`` under ``plan``'s claim; None where another process is at it, or has left what ``find`` finds."""
    with claim(plan, output_dir) as mine:
        return work(plan, tick) if mine and find(plan) is None else None


def _opened(path: Path) -> BinaryIO:
    for last_try in (False, True):
        make_folder(path.parent)
        try:
            return path.open("a+b")  # NFS wants it writable for an exclusive lock, readable for a shared one
        except FileNotFoundError as error:  # another process has just finished here and tidied up
            if last_try:
                raise storage_error(path, error) from None
        except OSError as error:
            raise storage_error(path, error) from None
    raise AssertionError("unreachable")


def _acquire(file: BinaryIO, path: Path, shared: bool, on_wait: Callable[[], object] | None) -> bool:
    patient_until = time.monotonic() + _PATIENCE_S
    while not _flock(file, path, shared, wait=False):
        if on_wait is None:
            return False
        if time.monotonic() > patient_until:
            on_wait()
            return _flock(file, path, shared, wait=True)
        time.sleep(_POLL_S)
    return True


def _flock(file: BinaryIO, path: Path, shared: bool, *, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"cannot lock {path}: {error.strerror}; choose an --output_dir on a file system with locks (Lustre: mounted with flock)"
        ) from None
    return True


def _is_still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
