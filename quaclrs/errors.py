"""Errors that the user's data, flags or machine cause: one root class, one exit code each, one function to print them.

A message is one line: what is wrong, the file, row or flag with its value, and the next step.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class QuaclrsError(Exception):
    """Root of all errors that a user can cause and fix. ``str(error)`` is the line that the user sees.

    ``everywhere``: every rank of a training raises this error, so one rank is enough to print it.
    """

    exit_code = 2

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class UsageError(QuaclrsError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(QuaclrsError):
    """The CSV or an image is missing, damaged or of the wrong form."""


class ShardError(QuaclrsError):
    """A shard folder is missing, damaged, of another version or made from other data."""


class MissingDependencyError(QuaclrsError):
    """An optional package, or a file that it would download, is missing."""


class TrainingError(QuaclrsError):
    """Training cannot start or continue: an empty fold, a loss that is not finite, a checkpoint of another run."""


class StorageError(QuaclrsError):
    """The output disk is full, read-only, or refuses a write for another reason."""


class Interrupted(QuaclrsError):
    """A signal ended the work after it was saved. Not a failure."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, everywhere=True)
        self.exit_code = SIGNAL_EXIT_CODE + signal_number


@contextmanager
def told_once() -> Iterator[None]:
    """Mark a :class:`QuaclrsError` of the block as one that every rank raises; see :attr:`QuaclrsError.everywhere`."""
    try:
        yield
    except QuaclrsError as error:
        error.everywhere = True
        raise


SIGNAL_EXIT_CODE = 128
"""Exit code of a process that signal number n ended: ``SIGNAL_EXIT_CODE + n``, as shells report it."""


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
