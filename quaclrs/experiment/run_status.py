"""Which folds of a model are running, done, failed or interrupted, for all processes that share the output folder.

``run_status.json`` is for people and for the report at the end of a run. Whether a fold is done depends on its
``metrics.json`` alone. A fold belongs to the process that locks ``.fold_{k}.lock``; the system frees the lock when that
process ends for any reason.
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
    """``fold_{k}`` → its entry, for the model whose results are in ``folder``; empty if the file cannot be read."""
    try:
        return dict(json.loads((folder / RUN_STATUS_FILE).read_bytes()))
    except (OSError, ValueError):
        return {}


def note(folder: Path, fold: int, **entry: Any) -> None:
    """Change some values of a fold's entry. Raises :class:`StorageError` if the output disk cannot be written."""
    with folder_lock(folder):
        ledger = read_run_status(folder)
        ledger[f"fold_{fold}"] = ledger.get(f"fold_{fold}", {}) | entry
        write_json(
            folder / RUN_STATUS_FILE, dict(sorted(ledger.items(), key=lambda item: int(item[0].removeprefix("fold_"))))
        )


def note_done(folder: Path, fold: int) -> None:
    """Record a finished fold as done: a kill may have prevented the process that finished it."""
    if read_run_status(folder).get(f"fold_{fold}", {}).get("state") != "done":
        note(folder, fold, state="done", until=_now(), error=None)


@contextlib.contextmanager
def claimed(folder: Path, fold: int) -> Iterator[None]:
    """Hold a fold of the model in ``folder`` for the block, and record its state in ``run_status.json``.

    Raises :class:`UsageError` when another living process holds it.
    """
    make_folder(folder)
    with locked(folder / f".fold_{fold}.lock") as held:
        if not held:
            holder = read_run_status(folder).get(f"fold_{fold}", {})
            raise UsageError(
                f"{folder}: fold {fold} is being trained by process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')}; wait for it, "
                "or choose another --fold or --output_dir"
            )
        note(
            folder,
            fold,
            state="running",
            host=socket.gethostname(),
            pid=os.getpid(),
            since=_now(),
            until=None,
            error=None,
        )
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
            said = str(error) if isinstance(error, QuaclrsError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(QuaclrsError):  # the first error is the one to report
                note(folder, fold, state="interrupted" if interrupted else "failed", until=_now(), error=said)
            raise
        note(folder, fold, state="done", until=_now())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
