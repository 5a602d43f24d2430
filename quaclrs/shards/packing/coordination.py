"""Who packs into a folder, and by which settings: ``.packing/settings.json`` names those of everything that lies in
``.packing/``.

A call without ``--folds`` packs alone; jobs with ``--folds`` pack side by side. A call with other settings than the
folder's is refused where jobs with ``--folds`` are alive or have left finished work, which other jobs may be building
on. What any other stopped packing left is removed, and the call starts afresh. Images that were mended in between are
no other settings: only their shards are made anew.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quaclrs.config import PackConfig
from quaclrs.errors import ShardError
from quaclrs.shards import format as fmt
from quaclrs.shards.packing.write_shard import PACKING_FOLDER, ShardRecord
from quaclrs.system.atomic_files import write_bytes
from quaclrs.system.file_locks import locked

WHAT_MUST_AGREE = {
    "csv_fingerprint": "another CSV",
    "encoding": "another --encoding",
    "image_size": "another --image_size",
    "columns": "other columns",
    "seed": "another --seed",
    "shard_size": "another --shard_size",
}
"""The settings that shards depend on, fields of the manifest; and what to call a difference."""

_JOBS_MUST_AGREE = WHAT_MUST_AGREE | {"from_shards": "another kind of source"}
"""Tree and ``png`` shards give the same bytes, but a shard from one is not known again by a job that packs from the
other.
"""

_SETTINGS_FILE = "settings.json"
_RETRY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What a packing goes by."""

    settings: dict[str, Any]
    """Name to value, of all that jobs must agree on; see :func:`settings_of`."""
    by_folds: bool
    """Jobs with ``--folds`` have a part in it."""
    shards: list[str]
    """Every shard's file, to tell which are not there yet; no setting, for it depends on the images' sizes too."""

    @classmethod
    def load(cls, output_dir: Path) -> PackSettings | None:
        """Those of ``output_dir``; None where no packing was begun."""
        try:
            return cls(**json.loads(_settings_file(output_dir).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def settings_of(manifest: fmt.Manifest, shards: list[str], config: PackConfig) -> PackSettings:
    """The terms of ``config``'s packing, whose ``manifest`` need not be filled in yet; ``shards`` are all files of the
    plan.
    """
    settings = {name: getattr(manifest, name) for name in WHAT_MUST_AGREE} | {
        "from_shards": config.from_shards is not None
    }
    return PackSettings(settings=settings, by_folds=config.folds is not None, shards=shards)


@contextlib.contextmanager
def packing_alone(output_dir: Path, settings: PackSettings) -> Iterator[None]:
    """Hold ``output_dir`` alone for the block: jobs started together must not pack the same cache twice.

    ``.packing/`` goes with the block if it ends with a manifest. Raises :class:`ShardError` naming the difference where
    ``terms`` are refused.
    """

    def on_wait() -> None:
        _refuse_to_differ_from_jobs(PackSettings.load(output_dir), settings, output_dir)
        _say_waiting(output_dir)

    try:
        with locked(_lock_file(output_dir), on_wait=on_wait):
            _adopt(settings, output_dir)
            try:
                yield
            finally:
                if has_manifest(output_dir):
                    shutil.rmtree(output_dir / PACKING_FOLDER, ignore_errors=True)
    finally:
        if has_manifest(output_dir):  # NFS keeps the name of an open file, here of the lock, and with it the folder
            with contextlib.suppress(OSError):
                (output_dir / PACKING_FOLDER).rmdir()


@contextlib.contextmanager
def packing_together(output_dir: Path, settings: PackSettings) -> Iterator[None]:
    """Be one of several jobs with ``--folds`` for the block; a call without, which holds the folder alone, is waited
    for.

    Raises as :func:`packing_alone`.
    """
    lock_file = _lock_file(output_dir)
    while True:
        with locked(lock_file) as alone:
            if alone:
                _adopt(settings, output_dir)
        # others may come between the two locks; whatever they did is seen in the second
        with locked(lock_file, shared=True, on_wait=lambda: _say_waiting(output_dir)):
            stored = PackSettings.load(output_dir)
            finished = has_manifest(output_dir)
            if not finished:
                _refuse_to_differ_from_jobs(stored, settings, output_dir)
            if finished or (stored is not None and stored.by_folds):
                yield
                return
        time.sleep(_RETRY_S)


def has_manifest(output_dir: Path) -> bool:
    """Whether ``output_dir`` is a finished shard folder."""
    return (output_dir / fmt.MANIFEST_FILE).is_file()


def folds_not_there(output_dir: Path) -> tuple[int, ...]:
    """The folds of an unfinished packing of which a shard has no receipt yet, as of the settings file; none where
    nothing was begun.
    """
    settings = PackSettings.load(output_dir)
    missing = [
        Path(file) for file in (settings.shards if settings else ()) if not _shard_record_of(file, output_dir).is_file()
    ]
    return tuple(sorted({int(file.parent.name.removeprefix("fold")) for file in missing}))


def remove_shard(file: str, output_dir: Path) -> None:
    """Delete the shard ``file`` and its index, as far as they are there."""
    (output_dir / file).unlink(missing_ok=True)
    (output_dir / fmt.index_file(file)).unlink(missing_ok=True)


def shard_records_in(output_dir: Path) -> list[Path]:
    """Every receipt's file in ``.packing/``, whoever left it."""
    return list((output_dir / PACKING_FOLDER).glob("fold*.json"))


def _adopt(settings: PackSettings, output_dir: Path) -> None:
    """Make ``terms`` those of the folder, which the caller holds alone."""
    if has_manifest(output_dir):
        return  # there is nothing left to pack, and its shards are nobody's to remove
    stored = PackSettings.load(output_dir)
    if stored is None or stored.settings != settings.settings:
        if _has_finished_work(output_dir):
            _refuse_to_differ_from_jobs(stored, settings, output_dir)
        _remove_work(output_dir)
        stored = None
    wanted = PackSettings(
        settings=settings.settings,
        by_folds=settings.by_folds or bool(stored and stored.by_folds),
        shards=settings.shards,
    )
    if stored != wanted:
        # not flushed: what a power cut loses is made again, and the first thing to be told of a full disk is a shard
        write_bytes(_settings_file(output_dir), json.dumps(asdict(wanted)).encode(), durable=False)


def _refuse_to_differ_from_jobs(stored: PackSettings | None, wanted: PackSettings, output_dir: Path) -> None:
    if stored is None or not stored.by_folds:
        return
    for name, what in _JOBS_MUST_AGREE.items():
        theirs, ours = stored.settings.get(name), wanted.settings[name]
        if theirs != ours:
            raise ShardError(
                f"{output_dir}: jobs with --folds pack here from {what} ({name}: {theirs}, now {ours}); "
                "go on as they do, choose another folder, or delete this one to pack anew"
            )


def _has_finished_work(output_dir: Path) -> bool:
    return bool(shard_records_in(output_dir)) or any((output_dir / PACKING_FOLDER).glob("fold*.seen"))


def _remove_work(output_dir: Path) -> None:
    """Delete what a packing of other settings left: its shards before the receipts that lead to them, so that a kill
    loses none.
    """
    for shard_record_file in shard_records_in(output_dir):
        shard_record = ShardRecord.load(shard_record_file)
        if shard_record is not None:
            remove_shard(shard_record.entry.file, output_dir)
        shard_record_file.unlink(missing_ok=True)
    for suffix in (".seen", ".cells"):
        for left in (output_dir / PACKING_FOLDER).glob(f"fold*{suffix}"):
            left.unlink(missing_ok=True)


def _say_waiting(output_dir: Path) -> None:
    print(f"{output_dir}: another process is packing here; waiting for it", file=sys.stderr)


def _settings_file(output_dir: Path) -> Path:
    return output_dir / PACKING_FOLDER / _SETTINGS_FILE


def _lock_file(output_dir: Path) -> Path:
    return output_dir / PACKING_FOLDER / "lock"


def _shard_record_of(file: str, output_dir: Path) -> Path:
    return output_dir / PACKING_FOLDER / (Path(file).stem + ".json")
