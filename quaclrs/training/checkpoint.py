"""Checkpoints: whole or absent, versioned, loaded without running code, and refused when they belong to another run.

After each epoch ``checkpoint_epoch_{epoch}.pth``; between two, where asked for, ``checkpoint_within_epoch.pth``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from quaclrs.errors import TrainingError
from quaclrs.system.atomic_files import atomic_writer

CHECKPOINT_VERSION = 2
BEST_MODEL_FILE = "best_model.pth"
WITHIN_EPOCH_FILE = "checkpoint_within_epoch.pth"
_NAME = re.compile(r"checkpoint_epoch_(\d+)\.pth")


def checkpoint_file(folder: Path, epoch: int) -> Path:
    """``checkpoint_epoch_{epoch}.pth``, as the original names it."""
    return folder / f"checkpoint_epoch_{epoch}.pth"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of finished epochs in ``folder``, oldest first."""
    numbered = [
        (int(match[1]), path) for path in folder.glob("checkpoint_epoch_*.pth") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(numbered)]


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, whole or not at all. Raises :class:`StorageError` for the disk."""
    with atomic_writer(path) as file:
        torch.save(content, file)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], run: dict[str, Any], keep: int) -> None:
    """Write epoch ``epoch``'s checkpoint, then delete all but the last ``keep``; ``run`` says what it belongs to."""
    save(checkpoint_file(folder, epoch), _content(epoch, state, run))
    delete_superseded(folder, keep)


def delete_superseded(folder: Path, keep: int) -> None:
    """Once the last finished epoch has its checkpoint: delete that of its middle, and all but the last ``keep``."""
    for old in (folder / WITHIN_EPOCH_FILE, *checkpoints(folder)[:-keep]):
        old.unlink(missing_ok=True)


def save_within_epoch(folder: Path, epoch: int, state: dict[str, Any], run: dict[str, Any]) -> None:
    """Write the state in the middle of ``epoch``; it is of use until that epoch's own checkpoint is there."""
    save(folder / WITHIN_EPOCH_FILE, _content(epoch, state, run))


def _content(epoch: int, state: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    return {"version": CHECKPOINT_VERSION, "epoch": epoch, "run": run, "state": state}


def load_checkpoint(folder: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The most advanced state in ``folder``; None when there is none.

    Raises :class:`TrainingError` when it cannot be read, or belongs to a run that differs from ``run``, naming the
    differences.
    """
    finished = checkpoints(folder)[-1:]
    within = folder / WITHIN_EPOCH_FILE
    loaded = [_load_checked(path, run) for path in (*finished, *([within] if within.is_file() else []))]
    return max(loaded, key=lambda content: content["epoch"])["state"] if loaded else None


def _load_checked(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    content = load(path)
    if content.get("version") != CHECKPOINT_VERSION:
        raise TrainingError(
            f"{path}: checkpoint version {content.get('version')!r}, this quaclrs reads {CHECKPOINT_VERSION}; train "
            "without --resume"
        )
    refuse_other_run(path, content["run"], run)
    return content


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote, to the CPU. Raises :class:`TrainingError` naming the file when it
    cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a damaged file
        reason = " ".join(str(error).split())[:120]
        raise TrainingError(f"{path}: cannot be loaded ({reason}); delete it and run again") from None


def refuse_other_run(where: Path, saved: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise :class:`TrainingError` naming each setting in which the run saved at ``where`` differs from ``run``."""
    differences = [
        f"{name} was {saved.get(name)!r}, now {run.get(name)!r}"
        for name in sorted({*saved, *run})
        if saved.get(name) != run.get(name)
    ]
    if differences:
        raise TrainingError(
            f"{where}: belongs to another run ({'; '.join(differences)}); use the same settings, or another "
            "--output_dir"
        )
