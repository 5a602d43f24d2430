"""What can go wrong by the user's data, flags or machine: one root, one exit code each, formatted once in the command lines.

A message is one line: what is wrong, the file, row or flag with its value, and the next step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class QuaclrsError(Exception):
    """Root of all errors a user can cause and mend. ``str(error)`` is the line that is shown."""

    exit_code = 2


class UsageError(QuaclrsError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(QuaclrsError):
    """The CSV or a picture is not what it has to be."""


class ShardError(QuaclrsError):
    """A shard folder is missing, damaged, of another version or made from other data."""


class MissingDependencyError(QuaclrsError):
    """An optional package, or a file that it would download, is not there."""


class TrainingError(QuaclrsError):
    """Training cannot start or go on: no rows in a fold, a loss that is not finite, a checkpoint that does not fit."""


class StorageError(QuaclrsError):
    """The output disk is full, read-only or otherwise refuses to be written."""


INTERRUPTED_EXIT_CODE = 130
"""What shells report for a process ended by Ctrl-C (128 + SIGINT)."""


def run_command(command: Callable[[], int | None], program: str) -> int:
    """Run a command line's body and turn every :class:`QuaclrsError` into one line on stderr.

    Returns the process's exit code. Errors that are not the user's (bugs) keep their traceback.
    """
    try:
        return command() or 0
    except QuaclrsError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
