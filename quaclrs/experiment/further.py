"""A finished fold that ``--resume`` with more ``--epochs`` trains further.

Its new checkpoints and results are written to ``fold_{k}/further/``, as for any fold. ``metrics.json`` comes last there
too: once it is written the new result is whole, and :func:`take_over` moves it over the old one. So a process that is
killed before leaves the old result as it was; one that is killed within the move leaves a move that the next one ends.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from quaclrs.experiment.results import METRICS_FILE
from quaclrs.system.atomic_files import storage_error, sync_folder
from quaclrs.training import checkpoint

FURTHER_FOLDER = "further"


def work_folder(folder: Path) -> Path:
    """Where to write what the training of the fold in ``folder`` makes: beside a result that is there, not over it."""
    return folder / FURTHER_FOLDER if (folder / METRICS_FILE).is_file() else folder


def is_whole(folder: Path) -> bool:
    """Whether a new result of the fold in ``folder`` waits to be moved over the old one."""
    return (folder / FURTHER_FOLDER / METRICS_FILE).is_file()


def take_over(folder: Path, keep_checkpoints: int) -> None:
    """Move the whole new result over the old one in ``folder``, if there is one; ``metrics.json`` last.

    The caller holds the fold's lock. Raises :class:`StorageError` when the disk refuses.
    """
    if not is_whole(folder):
        return
    further = folder / FURTHER_FOLDER
    try:
        for part in sorted(further.iterdir(), key=lambda part: (part.name == METRICS_FILE, part.name)):
            target = folder / part.name
            if part.name == METRICS_FILE:
                checkpoint.delete_superseded(folder, keep_checkpoints)
                sync_folder(folder)  # the parts before must not be lost where this one is kept
            if part.is_dir() and target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
        sync_folder(folder)
        further.rmdir()
    except OSError as error:
        raise storage_error(folder, error) from None
