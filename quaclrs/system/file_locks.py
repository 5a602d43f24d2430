"""Locks between processes, on one machine or on several that share a file system. A dead process's locks free
themselves.

A lock is an empty file that is open for writing, since network file systems lock nothing else. Imports neither pandas
nor torch.
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
except ImportError:  # not a POSIX system: whether two processes do the same at once is then up to the user
    fcntl = None  # type: ignore[assignment]

_PATIENCE_S = 0.5
"""How long a lock may take before the user hears of it: others hold it only for a moment when they begin or end."""
_POLL_S = 0.05


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, on_wait: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock ``path``, alone or ``shared``, and yield True; without ``on_wait``, yield False where another holds
    it.

    ``on_wait`` is called once, before a wait that is not over at once; it may raise. Raises :class:`StorageError` where
    the file cannot be made or the file system has no locks.
    """
    while True:
        with _opened(path) as file:
            held = _acquire(file, path, shared, on_wait)
            if held and not _is_still(file, path):  # its holder removed it with the whole folder: the next one counts
                continue
            try:
                yield held
            finally:
                if held and fcntl is not None:
                    fcntl.flock(
                        file, fcntl.LOCK_UN
                    )  # a forked process, such as a DataLoader's worker, has the file open too
            return


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block, among those that lock the same folder; leaves an empty
    ``.lock`` in it.
    """
    with locked(folder / ".lock", on_wait=lambda: None):
        yield


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
            f"cannot lock {path}: {error.strerror}; choose an --output_dir on a file system with locks (Lustre: "
            "mounted with flock)"
        ) from None
    return True


def _is_still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
