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
    """Open a file that takes ``path``'s name only when the block ends without an exception; its folder is made if
    needed.

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
    """Write ``document`` to ``path`` as indented JSON, whole or not at all. NaN is refused (ValueError):
    JSON has none.
    """
    write_bytes(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def make_folder(path: Path) -> Path:
    """Make ``path`` and its parents; errors as :func:`atomic_writer`. Returns it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from None
    return path


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
