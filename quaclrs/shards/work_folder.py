"""``.packing/``, the work folder of an unfinished packing: the paths of its files, and the records in them.

::

    settings.json         what the packing depends on (:class:`PackSettings`)
    lock                  held by one packing process, or shared by several jobs with ``--folds``
    fold01-000000.json    one :class:`ShardRecord` per finished shard
    fold01-000000.claim   locked by the worker that works on the shard
    fold01-000000.cells   two-pass encodings: what the first pass keeps of each image
    fold01-000000.seen    two-pass encodings: what the first pass found in each image

The folder is deleted once the manifest is written. Reader, verifier and packer all use this module, so it imports
nothing of ``shards/packing/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quaclrs.shards import format as fmt
from quaclrs.system.atomic_files import TEMPORARY_SUFFIX

PACKING_FOLDER = ".packing"

RECORDED_FIELDS = ("row", "label", "flags", "offset", "size", "width", "height", "layout", "palette", "pixels")
"""The fields of format.SAMPLE_DTYPE that the writer of a shard knows; ``shard`` and ``fold`` follow from the shard."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard; kept on disk until the manifest is written."""

    plan: str
    """Fingerprint of the plan that the shard was written from."""
    entry: fmt.ShardEntry
    samples: list[list[int]]
    """Per sample: the values of :data:`RECORDED_FIELDS`."""
    modes: dict[str, int]
    """Pillow's image mode to the number of images that have it."""
    skipped: list[fmt.SkippedRow]

    @classmethod
    def load(cls, path: Path) -> ShardRecord | None:
        """The record at ``path``; None when there is none or it cannot be read."""
        try:
            document = json.loads(path.read_bytes())
            document["entry"] = fmt.ShardEntry(**document["entry"])
            document["skipped"] = [fmt.SkippedRow(**row) for row in document["skipped"]]
            return cls(**document)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> bytes:
        """The bytes of the record's file."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """The settings that all processes packing into one folder must share."""

    values: dict[str, Any]
    """Name to value of each setting; see :func:`quaclrs.shards.packing.coordination.settings_of`."""
    by_folds: bool
    """Whether a job with ``--folds`` has packed here."""
    shards: list[str]
    """Every shard's file, to find the missing ones. Not a setting: it also depends on the images' sizes."""

    @classmethod
    def load(cls, output_dir: Path) -> PackSettings | None:
        """The settings stored in ``output_dir``; None where no packing has begun."""
        try:
            document = json.loads(settings_file(output_dir).read_bytes())
            return cls(values=document.pop("settings"), **document)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def to_json(self) -> bytes:
        """The bytes of settings.json."""
        return json.dumps({"settings": self.values, "by_folds": self.by_folds, "shards": self.shards}).encode()


def settings_file(output_dir: Path) -> Path:
    """Where the :class:`PackSettings` of a packing are stored."""
    return output_dir / PACKING_FOLDER / "settings.json"


def lock_file(output_dir: Path) -> Path:
    """The lock on the whole folder."""
    return output_dir / PACKING_FOLDER / "lock"


def shard_record_file(shard: str, output_dir: Path) -> Path:
    """Where the :class:`ShardRecord` of the tar ``shard`` is stored."""
    return _file_of_shard(shard, output_dir, ".json")


def claim_file(shard: str, output_dir: Path) -> Path:
    """The lock on the tar ``shard``."""
    return _file_of_shard(shard, output_dir, ".claim")


def arrays_file(shard: str, output_dir: Path) -> Path:
    """What the first pass of a two-pass encoding keeps of the images of the tar ``shard``."""
    return _file_of_shard(shard, output_dir, ".cells")


def findings_file(shard: str, output_dir: Path) -> Path:
    """What the first pass of a two-pass encoding found in the images of the tar ``shard``."""
    return _file_of_shard(shard, output_dir, ".seen")


def has_manifest(output_dir: Path) -> bool:
    """Whether ``output_dir`` is a finished shard folder."""
    return (output_dir / fmt.MANIFEST_FILE).is_file()


def folds_not_packed(output_dir: Path) -> tuple[int, ...]:
    """The folds of an unfinished packing that lack a finished shard; empty where no packing has begun."""
    settings = PackSettings.load(output_dir)
    shards = settings.shards if settings else []
    missing = [Path(shard) for shard in shards if not shard_record_file(shard, output_dir).is_file()]
    return tuple(sorted({int(shard.parent.name.removeprefix("fold")) for shard in missing}))


def shard_record_files(output_dir: Path) -> list[Path]:
    """The files of all :class:`ShardRecord` in ``.packing/``, including those of earlier packings."""
    return list((output_dir / PACKING_FOLDER).glob("fold*.json"))


def has_finished_work(output_dir: Path) -> bool:
    """Whether an unfinished packing has finished a shard, or the first pass over one."""
    return bool(shard_record_files(output_dir)) or any((output_dir / PACKING_FOLDER).glob("fold*.seen"))


def remove_shard(shard: str, output_dir: Path) -> None:
    """Delete the tar ``shard`` and its index where they exist."""
    (output_dir / shard).unlink(missing_ok=True)
    (output_dir / fmt.index_file(shard)).unlink(missing_ok=True)


def remove_finished_work(output_dir: Path) -> None:
    """Delete all shards and first passes that a packing with other settings finished.

    It deletes each shard before its record, so that after a kill in between the record still names the shard.
    """
    for path in shard_record_files(output_dir):
        record = ShardRecord.load(path)
        if record is not None:
            remove_shard(record.entry.file, output_dir)
        path.unlink(missing_ok=True)
    for suffix in (".seen", ".cells"):
        for path in (output_dir / PACKING_FOLDER).glob(f"fold*{suffix}"):
            path.unlink(missing_ok=True)


def remove_other_shards(wanted: Iterable[str], output_dir: Path) -> None:
    """Delete half-written shards, and the finished shards of earlier calls that are not ``wanted``."""
    kept = set(wanted)
    for path in shard_record_files(output_dir):
        record = ShardRecord.load(path)
        if record is not None and record.entry.file not in kept:
            remove_shard(record.entry.file, output_dir)
    for half_written in output_dir.glob(f"fold*/fold*{TEMPORARY_SUFFIX}"):
        half_written.unlink(missing_ok=True)


def _file_of_shard(shard: str, output_dir: Path, suffix: str) -> Path:
    return output_dir / PACKING_FOLDER / (Path(shard).stem + suffix)
