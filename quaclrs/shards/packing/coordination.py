"""Which processes may pack into a folder at the same time, and with which settings.

A call without ``--folds`` packs alone; jobs with ``--folds`` pack side by side. ``.packing/settings.json`` holds the
settings of all work in ``.packing/``. While jobs with ``--folds`` are running or have left finished work, a call with
other settings raises :class:`ShardError`, since other jobs may build on that work. After any other stopped packing, the
call deletes its work and starts anew. Repaired images do not count as other settings: the call packs only their shards
anew.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from quaclrs.config import PackConfig
from quaclrs.errors import ShardError
from quaclrs.shards import format as fmt
from quaclrs.shards.work_folder import (
    PACKING_FOLDER,
    PackSettings,
    has_finished_work,
    has_manifest,
    lock_file,
    remove_finished_work,
    settings_file,
)
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
"""The settings that shards depend on (fields of the manifest), each with the text for a difference in messages."""

_JOBS_MUST_AGREE = WHAT_MUST_AGREE | {"from_shards": "another kind of source"}
"""Packing from the tree and from ``png`` shards gives the same bytes. But the plans have different fingerprints, so a
job of one kind does not recognise the finished shards of the other.
"""

_RETRY_S = 0.05


def difference_text(name: str, theirs: object, ours: object) -> str:
    """The two values of a setting that differs, for messages; nothing for a fingerprint, which nobody can compare."""
    return "" if name == "csv_fingerprint" else f" ({name}: {theirs}, now {ours})"


def settings_of(manifest: fmt.Manifest, shards: list[str], config: PackConfig) -> PackSettings:
    """The settings of ``config``'s packing.

    ``manifest`` need not be filled in yet; ``shards`` are the files of all planned shards.
    """
    values = {name: getattr(manifest, name) for name in WHAT_MUST_AGREE}
    values["from_shards"] = config.from_shards is not None
    return PackSettings(values=values, by_folds=config.folds is not None, shards=shards)


@contextlib.contextmanager
def packing_alone(output_dir: Path, settings: PackSettings) -> Iterator[None]:
    """Hold ``output_dir`` exclusively for the block, so that calls started together do not pack the same cache twice.

    Deletes ``.packing/`` at the end of the block if there is a manifest by then. Raises :class:`ShardError` naming the
    difference where ``settings`` are refused.
    """

    def on_wait() -> None:
        _refuse_to_differ_from_jobs(PackSettings.load(output_dir), settings, output_dir)
        _say_waiting(output_dir)

    try:
        with locked(lock_file(output_dir), on_wait=on_wait):
            _adopt(settings, output_dir)
            try:
                yield
            finally:
                if has_manifest(output_dir):
                    shutil.rmtree(output_dir / PACKING_FOLDER, ignore_errors=True)
    finally:
        # NFS keeps the name of an open file (here: of the lock), and so the folder, until the file is closed
        if has_manifest(output_dir):
            with contextlib.suppress(OSError):
                (output_dir / PACKING_FOLDER).rmdir()


@contextlib.contextmanager
def packing_together(output_dir: Path, settings: PackSettings) -> Iterator[None]:
    """Share ``output_dir`` with other jobs with ``--folds`` for the block; wait for a call without ``--folds``.

    Raises as :func:`packing_alone`.
    """
    lock = lock_file(output_dir)
    while True:
        with locked(lock) as alone:
            if alone:
                _adopt(settings, output_dir)
        # other processes may come between the two locks: the checks under the second one see what they did
        with locked(lock, shared=True, on_wait=lambda: _say_waiting(output_dir)):
            stored = PackSettings.load(output_dir)
            finished = has_manifest(output_dir)
            if not finished:
                _refuse_to_differ_from_jobs(stored, settings, output_dir)
            if finished or (stored is not None and stored.by_folds):
                yield
                return
        time.sleep(_RETRY_S)


def _adopt(settings: PackSettings, output_dir: Path) -> None:
    """Store ``settings`` as those of the folder, which the caller holds exclusively."""
    if has_manifest(output_dir):
        return  # nothing is left to pack, and the shards of a finished folder are never deleted
    stored = PackSettings.load(output_dir)
    if stored is None or stored.values != settings.values:
        if has_finished_work(output_dir):
            _refuse_to_differ_from_jobs(stored, settings, output_dir)
        remove_finished_work(output_dir)
        stored = None
    wanted = replace(settings, by_folds=settings.by_folds or bool(stored and stored.by_folds))
    if stored != wanted:
        # not fsynced: the file is written anew after a power cut, and a full disk should first be reported for a shard
        write_bytes(settings_file(output_dir), wanted.to_json(), durable=False)


def _refuse_to_differ_from_jobs(stored: PackSettings | None, wanted: PackSettings, output_dir: Path) -> None:
    if stored is None or not stored.by_folds:
        return
    for name, what in _JOBS_MUST_AGREE.items():
        theirs, ours = stored.values.get(name), wanted.values[name]
        if theirs != ours:
            raise ShardError(
                f"{output_dir}: jobs with --folds pack here from {what}{difference_text(name, theirs, ours)}; "
                "go on as they do, choose another folder, or delete this one to pack anew"
            )


def _say_waiting(output_dir: Path) -> None:
    print(f"{output_dir}: another process is packing here; waiting for it", file=sys.stderr)
