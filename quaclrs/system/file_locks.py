"""Locks between processes, on one machine or on several that share a file system.

A lock is ``flock`` on an empty file that is open for writing, because network file systems lock no other kind. The
operating system releases the locks of a process that dies. Imports neither pandas nor torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from quaclrs.errors import StorageError
from quaclrs.system.atomic_files import make_folder, storage_error

try:
    import fcntl
except ImportError:  # not a POSIX system: the user must make sure that no two processes do the same work
    fcntl = None  # type: ignore[assignment]

_PATIENCE_S = 0.5
"""How long to wait for a lock before telling the user. Other processes hold it briefly when they start or end."""
_POLL_S = 0.05


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, on_wait: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock ``path``, exclusive or ``shared``, for the block, and yield True.

    Without ``on_wait``, do not wait: yield False if another process holds the lock. With it, call ``on_wait`` once,
    before a wait of more than half a second; it may raise. Raises :class:`StorageError` if the file cannot be created
    or the file system has no locks.
    """
    while True:
        with _opened(path) as file:
            held = _acquire(file, path, shared, on_wait)
            if held and not _is_same_file(file, path):  # the last holder deleted it, with its folder: lock the new file
                continue
            try:
                yield held
            finally:
                if held and fcntl is not None:
                    # closing is not enough: a forked process, such as a DataLoader's worker, has the file open too
                    fcntl.flock(file, fcntl.LOCK_UN)
            return


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time run the block, of all that lock ``folder``. Leaves an empty ``.lock`` in it."""
    with locked(folder / ".lock", on_wait=lambda: None):
        yield


def _opened(path: Path) -> BinaryIO:
    for last_try in (False, True):
        make_folder(path.parent)
        try:
            return path.open("a+b")  # NFS needs write access for an exclusive lock, read access for a shared one
        except FileNotFoundError as error:  # another process has just finished and deleted the folder
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
            f"cannot lock {path}: {error.strerror}; choose an --output_dir on a file system with locks (Lustre: "
            "mounted with flock)"
        ) from None
    return True


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    """Whether ``path`` still names the open ``file``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
