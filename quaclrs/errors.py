"""Errors in the user's data, flags or machine: one root class, an exit code each, formatted by :func:`run_command`.

A message is one line: what is wrong, the file, row or flag with its value, and the next step.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class QuaclrsError(Exception):
    """Root of all errors that a user can cause and fix. ``str(error)`` is the line that is shown.

    ``everywhere``: every rank raises the same error, so only one of them prints it.
    """

    exit_code = 2

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class UsageError(QuaclrsError):
    """A flag, or a combination of flags, cannot work."""


class DataError(QuaclrsError):
    """The CSV or an image is missing, damaged or inconsistent."""


class ShardError(QuaclrsError):
    """A shard folder is missing, damaged, of another version or made from other data."""


class MissingDependencyError(QuaclrsError):
    """An optional package, or a file to be downloaded, is missing."""


class TrainingError(QuaclrsError):
    """Training cannot start or go on: an empty fold, a loss that is not finite, a checkpoint of another run."""


class StorageError(QuaclrsError):
    """A file cannot be written: the disk is full, read-only or broken."""


class Interrupted(QuaclrsError):
    """A signal ended the work, and its state has been saved; not a failure."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, everywhere=True)
        self.exit_code = SIGNAL_EXIT_CODE + signal_number


@contextmanager
def raised_on_every_rank() -> Iterator[None]:
    """Mark errors raised in the block as raised by every rank: see :attr:`QuaclrsError.everywhere`."""
    try:
        yield
    except QuaclrsError as error:
        error.everywhere = True
        raise


SIGNAL_EXIT_CODE = 128
"""Shells report a process that a signal ended as 128 + the signal's number."""


def run_command(command: Callable[[], int | None], program: str) -> int:
    """Run the body of a command and print a :class:`QuaclrsError` as one line on stderr; returns the exit code.

    Other exceptions are bugs and keep their traceback.
    """
    try:
        return command() or 0
    except Interrupted as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except QuaclrsError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return SIGNAL_EXIT_CODE + signal.SIGINT
