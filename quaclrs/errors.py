"""What can go wrong by the user's data, flags or machine: one root, one exit code each, formatted once in the command
lines.

A message is one line: what is wrong, the file, row or flag with its value, and the next step.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class QuaclrsError(Exception):
    """Root of all errors a user can cause and mend. ``str(error)`` is the line that is shown.

    ``everywhere``: every process of a training raises it alike, so that one of them need say it.
    """

    exit_code = 2

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class UsageError(QuaclrsError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(QuaclrsError):
    """The CSV or an image is not what it has to be."""


class ShardError(QuaclrsError):
    """A shard folder is missing, damaged, of another version or made from other data."""


class MissingDependencyError(QuaclrsError):
    """An optional package, or a file that it would download, is not there."""


class TrainingError(QuaclrsError):
    """Training cannot start or go on: no rows in a fold, a loss that is not finite, a checkpoint that does not fit."""


class StorageError(QuaclrsError):
    """The output disk is full, read-only or otherwise refuses to be written."""


class Interrupted(QuaclrsError):
    """A signal ended the work, which has been saved; not a failure."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, everywhere=True)
        self.exit_code = SIGNAL_EXIT_CODE + signal_number


@contextmanager
def told_once() -> Iterator[None]:
    """What the block raises, every process of a training raises alike: see :attr:`QuaclrsError.everywhere`."""
    try:
        yield
    except QuaclrsError as error:
        error.everywhere = True
        raise


SIGNAL_EXIT_CODE = 128
"""Shells report a process ended by a signal as this and the signal's number."""


def run_command(command: Callable[[], int | None], program: str) -> int:
    """Run a command line's body and turn every :class:`QuaclrsError` into one line on stderr.

    Returns the process's exit code. Errors that are not the user's (bugs) keep their traceback.
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
