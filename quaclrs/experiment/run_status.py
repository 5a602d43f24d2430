"""``run_status.json``: which folds of a model are running, done, failed or interrupted; and the lock of each fold.

The file is for people: a fold is finished if it has a ``metrics.json``. A fold belongs to the process that holds the
lock of ``.fold_{k}.lock``. The operating system releases the lock when that process ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quaclrs.errors import Interrupted, QuaclrsError, UsageError
from quaclrs.system.atomic_files import make_folder, write_json
from quaclrs.system.file_locks import folder_lock, locked

RUN_STATUS_FILE = "run_status.json"


def read_run_status(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the status of the model in ``folder``: ``fold_{k}`` to its entry. Empty without a readable file."""
    try:
        return dict(json.loads((folder / RUN_STATUS_FILE).read_bytes()))
    except (OSError, ValueError):
        return {}


def update_status(folder: Path, fold: int, **entry: Any) -> None:
    """Change the given keys of a fold's entry. Raises :class:`StorageError` if it cannot be written."""
    with folder_lock(folder):
        status = read_run_status(folder)
        status[f"fold_{fold}"] = status.get(f"fold_{fold}", {}) | entry
        by_fold = sorted(status.items(), key=lambda item: int(item[0].removeprefix("fold_")))
        write_json(folder / RUN_STATUS_FILE, dict(by_fold))


def mark_done(folder: Path, fold: int) -> None:
    """Set a finished fold's state to done: the process that finished it may have been killed before it could."""
    if read_run_status(folder).get(f"fold_{fold}", {}).get("state") != "done":
        update_status(folder, fold, state="done", until=_now(), error=None)


def lock_file(folder: Path, fold: int) -> Path:
    """The file whose lock gives a fold of the model in ``folder`` to one process."""
    return folder / f".fold_{fold}.lock"


@contextlib.contextmanager
def hold_fold(folder: Path, fold: int) -> Iterator[None]:
    """Hold the lock of a fold of the model in ``folder`` for the block, and note how the block begins and ends.

    Raises :class:`UsageError` if another process holds it.
    """
    make_folder(folder)
    with locked(lock_file(folder, fold)) as held:
        if not held:
            holder = read_run_status(folder).get(f"fold_{fold}", {})
            raise UsageError(
                f"{folder}: fold {fold} is being trained by process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')}; wait for it, or choose another --fold or --output_dir"
            )
        who = {"host": socket.gethostname(), "pid": os.getpid()}
        update_status(folder, fold, state="running", **who, since=_now(), until=None, error=None)
        try:
            yield
        except BaseException as error:
            state = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            message = str(error) if isinstance(error, QuaclrsError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(QuaclrsError):  # the first error is the one to report
                update_status(folder, fold, state=state, until=_now(), error=message)
            raise
        update_status(folder, fold, state="done", until=_now())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
