"""Checkpoints: versioned, written atomically, loaded without running code. Those of another run are refused.

``checkpoint_epoch_{epoch}.pth`` after each epoch; ``checkpoint_within_epoch.pth`` after a signal, or with
``--checkpoint_minutes``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quaclrs.errors import TrainingError
from quaclrs.system.atomic_files import atomic_writer
from quaclrs.training.optimizer import SPANNING_SCHEDULERS

CHECKPOINT_VERSION = 2
BEST_MODEL_FILE = "best_model.pth"
WITHIN_EPOCH_FILE = "checkpoint_within_epoch.pth"
_NAME = re.compile(r"checkpoint_epoch_(\d+)\.pth")


def checkpoint_file(folder: Path, epoch: int) -> Path:
    """``checkpoint_epoch_{epoch}.pth``, the original trainer's name."""
    return folder / f"checkpoint_epoch_{epoch}.pth"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of finished epochs in ``folder``, oldest first."""
    numbered = [
        (int(match[1]), path) for path in folder.glob("checkpoint_epoch_*.pth") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(numbered)]


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, atomically. Raises :class:`StorageError` when that fails."""
    with atomic_writer(path) as file:
        torch.save(content, file)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], identity: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of ``epoch``, then delete all but the last ``keep``.

    The checkpoint stores ``identity``; :func:`load_checkpoint` refuses another one.
    """
    save(checkpoint_file(folder, epoch), _content(epoch, state, identity))
    delete_superseded(folder, keep)


def delete_superseded(folder: Path, keep: int) -> None:
    """Delete the checkpoint within the last finished epoch, and all but the last ``keep`` of finished epochs."""
    for old in (folder / WITHIN_EPOCH_FILE, *checkpoints(folder)[:-keep]):
        old.unlink(missing_ok=True)


def save_within_epoch(folder: Path, epoch: int, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Write the state between two steps of ``epoch``; the epoch's own checkpoint supersedes it."""
    save(folder / WITHIN_EPOCH_FILE, _content(epoch, state, identity))


def _content(epoch: int, state: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    return {"version": CHECKPOINT_VERSION, "epoch": epoch, "run": identity, "state": state}


def load_checkpoint(
    folder: Path, identity: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The most advanced state in ``folder``; None when there is none.

    Raises :class:`TrainingError` when a checkpoint cannot be read, or its identity differs from ``identity``, naming
    the differences.
    """
    finished = checkpoints(folder)[-1:]
    within = folder / WITHIN_EPOCH_FILE
    loaded = [_load_checked(path, identity, defaults) for path in (*finished, *([within] if within.is_file() else []))]
    return max(loaded, key=lambda content: content["epoch"])["state"] if loaded else None


def _load_checked(path: Path, identity: dict[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    content = load(path)
    if content.get("version") != CHECKPOINT_VERSION:
        raise TrainingError(
            f"{path}: checkpoint version {content.get('version')!r}, this quaclrs reads {CHECKPOINT_VERSION}; train "
            "without --resume"
        )
    refuse_other_run(path, content["run"], identity, defaults, reached=content["epoch"])
    return content


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote, to the CPU. Raises :class:`TrainingError` naming a file that cannot be read."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise TrainingError(f"{path}: cannot be loaded ({reason}); delete it and run again") from None
    return content


def refuse_other_run(
    where: Path,
    saved: dict[str, Any],
    identity: dict[str, Any],
    defaults: Mapping[str, Any] | None = None,
    *,
    reached: int | None = None,
) -> None:
    """Raise :class:`TrainingError` naming each entry in which ``saved``, read from ``where``, differs.

    ``defaults`` are the values of entries that ``saved`` may lack, because their setting is younger than the run.
    ``reached`` is the last epoch that ``saved`` finished or began; with it, ``epochs`` may differ where that changes no
    epoch until then.
    """
    saved = {**(defaults or {}), **saved}
    differences = []
    for name in sorted({*saved, *identity}):
        if saved.get(name) == identity.get(name):
            continue
        reason = _why_epochs_matter(saved, identity, reached) if name == "epochs" and reached is not None else ""
        if reason is not None:
            differences.append(f"{name} was {saved.get(name)!r}, now {identity.get(name)!r}{reason}")
    if differences:
        raise TrainingError(
            f"{where}: belongs to another run ({'; '.join(differences)}); "
            "use the same settings, or another --output_dir"
        )


def _why_epochs_matter(saved: dict[str, Any], identity: dict[str, Any], reached: int) -> str | None:
    """For the message: why a run that ``reached`` an epoch cannot have another number of epochs; None if it can."""
    for schedule in (saved.get("scheduler"), identity.get("scheduler")):
        if schedule in SPANNING_SCHEDULERS:
            return f": the {schedule} schedule spans all epochs"
    return f", but epoch {reached} was reached" if identity["epochs"] < reached else None
