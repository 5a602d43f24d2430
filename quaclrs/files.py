"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quaclrs.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes ``path``'s name only when the block ends without an exception; its folder is made if needed.

    ``durable`` also waits until it would survive a power cut; without, many small files are written much faster.
    Raises :class:`StorageError` naming the path when the disk is full, read-only or otherwise refuses.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise storage_error(path, error) from None
    except BaseException:
        _remove(temporary)
        raise


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to ``path``, whole or not at all; ``durable`` and errors as :func:`atomic_writer`."""
    with atomic_writer(path, durable=durable) as file:
        file.write(content)


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` to ``path`` as indented JSON, whole or not at all. NaN is refused (ValueError): JSON has none."""
    write_bytes(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def make_folder(path: Path) -> Path:
    """Make ``path`` and its parents; errors as :func:`atomic_writer`. Returns it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from None
    return path


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block, among those that lock the same existing folder; leaves an empty ``.lock`` in it."""
    with file_lock(folder / ".lock"):
        yield


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``path``, an empty file that is made if needed; without ``wait``, says False where another process holds it.

    A file rather than its folder, since network file systems lock only what is open for writing. The lock of a process that ends,
    however it does, frees itself. Raises :class:`StorageError` where the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield True
        return
    try:
        file = path.open("ab")
    except OSError as error:
        raise storage_error(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process, such as a DataLoader's worker, has the file open too


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one-line :class:`StorageError` for ``error`` met while writing ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        step = "free some space and run the same command again; what is finished is kept"
    else:
        step = "choose a folder that can be written"
    return StorageError(f"cannot write {path}: {error.strerror or error}; {step}")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the first error is the one to report
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the file system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
