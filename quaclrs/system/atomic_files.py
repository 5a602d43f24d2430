"""Atomic writes: a file is either complete or absent.

The content is written to ``{name}.tmp``, flushed to disk (fsync), and renamed. The folder is flushed after the rename,
so that the rename survives a power cut. Every operating-system error becomes a :class:`StorageError` of one line.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quaclrs.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"
_LIST_OF_NUMBERS = re.compile(r"\[\n\s*-?\d[^\s,]*(?:,\n\s*-?\d[^\s,]*)*\n\s*\]")
"""In indented JSON, whose strings hold no line breaks."""


@contextlib.contextmanager
def atomic_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that gets the name ``path`` only if the block ends without an exception. Creates its folder.

    ``durable`` waits until the file would survive a power cut. Without it, many small files are written much faster.
    Raises :class:`StorageError` naming the path if the disk is full, read-only or refuses for another reason, whatever
    the block makes of that.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    refused: list[OSError] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with io.BufferedWriter(_NotingErrors(temporary, refused)) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise storage_error(path, refused[0] if refused else error) from None
    except BaseException as error:
        _remove(temporary)
        if refused and isinstance(error, Exception):  # torch.save raises a RuntimeError about positions in the file
            raise storage_error(path, refused[0]) from None
        raise


class _NotingErrors(io.FileIO):
    """A file opened for writing that appends the errors of its writes to ``refused``, and raises them."""

    def __init__(self, path: Path, refused: list[OSError]) -> None:
        super().__init__(path, "wb")
        self._refused = refused

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self._refused.append(error.with_traceback(None))
            raise


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to ``path`` atomically; ``durable`` and errors as for :func:`atomic_writer`."""
    with atomic_writer(path, durable=durable) as file:
        file.write(content)


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` to ``path`` as indented JSON, atomically. Raises ``ValueError`` for NaN, which JSON lacks.

    A list of numbers, such as a row of a matrix, is one line.
    """
    text = json.dumps(document, indent=2, allow_nan=False)
    text = _LIST_OF_NUMBERS.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    write_bytes(path, f"{text}\n".encode())


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents, and return ``path``. Errors as for :func:`atomic_writer`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from None
    return path


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one-line :class:`StorageError` for an ``error`` that occurred while writing ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        step = "free some space and run the same command again; what is finished is kept"
    else:
        step = "choose a folder that can be written"
    return StorageError(f"cannot write {path}: {error.strerror or error}; {step}")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # report the first error, not this one
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in ``folder`` survive a power cut, if the file system allows opening a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
