"""From the receipts of finished shards to a finished folder: sample table, CSV, and the manifest last."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quaclrs.data.metadata import Metadata
from quaclrs.errors import DataError
from quaclrs.imaging.shared_layouts import SharedLayouts
from quaclrs.shards import format as fmt
from quaclrs.shards.packing.coordination import remove_shard, shard_records_in
from quaclrs.shards.packing.write_shard import RECORDED, ShardRecord, npy_bytes
from quaclrs.system.atomic_files import TEMPORARY_SUFFIX, write_bytes


def describe(
    manifest: fmt.Manifest, shard_records: list[ShardRecord], shared: SharedLayouts | None
) -> tuple[fmt.Manifest, bytes]:
    """``manifest`` filled in for the shards of ``receipts``, on the ``shared`` layouts and palettes; and its
    samples.npy.
    """
    filled = [shard_record for shard_record in shard_records if shard_record.entry.samples]
    samples = _samples_table(filled)
    samples_bytes = npy_bytes(samples)
    described = replace(
        manifest,
        num_samples=len(samples),
        samples_sha256=hashlib.sha256(samples_bytes).hexdigest(),
        shards=tuple(shard_record.entry for shard_record in filled),
        skipped=tuple(
            sorted(
                (row for shard_record in shard_records for row in shard_record.skipped), key=lambda skipped: skipped.row
            )
        ),
        layouts=tuple(layout.to_dict() for layout in shared.layouts) if shared else (),
        palettes=tuple(palette.tobytes().hex() for palette in shared.palettes) if shared else (),
        facts=_facts(samples, filled),
    )
    return described, samples_bytes


def finish(
    manifest: fmt.Manifest,
    metadata: Metadata,
    shard_records: list[ShardRecord],
    shared: SharedLayouts | None,
    output_dir: Path,
) -> fmt.Manifest:
    """Write everything but the tars, from the ``receipts`` of all of them; the manifest last: it is what makes a folder
    a shard folder.

    The caller holds the folder alone. Raises :class:`DataError` where every row was skipped, :class:`StorageError` for
    the disk.
    """
    _remove_leftovers(shard_records, output_dir)
    finished, samples_bytes = describe(manifest, shard_records, shared)
    if not finished.num_samples:
        raise DataError(f"{metadata.csv_file}: not one row has a good image; nothing was packed")
    write_bytes(output_dir / fmt.METADATA_FILE, metadata.raw)
    write_bytes(output_dir / fmt.SAMPLES_FILE, samples_bytes)
    for shard_record in shard_records:
        if not shard_record.entry.samples:  # every image of it was skipped; readers stumble over empty tars
            remove_shard(shard_record.entry.file, output_dir)
    write_bytes(output_dir / fmt.MANIFEST_FILE, finished.to_json())
    return finished


def _remove_leftovers(shard_records: list[ShardRecord], output_dir: Path) -> None:
    """Delete shards, whole or half-written, that an earlier call left behind when it was stopped here and that belong
    here no more.
    """
    wanted = {shard_record.entry.file for shard_record in shard_records}
    for shard_record_file in shard_records_in(output_dir):
        shard_record = ShardRecord.load(shard_record_file)
        if shard_record is not None and shard_record.entry.file not in wanted:
            remove_shard(shard_record.entry.file, output_dir)
    for half_written in output_dir.glob(f"fold*/fold*{TEMPORARY_SUFFIX}"):
        half_written.unlink(missing_ok=True)


def _samples_table(shard_records: list[ShardRecord]) -> np.ndarray:
    table = np.zeros(sum(shard_record.entry.samples for shard_record in shard_records), dtype=fmt.SAMPLE_DTYPE)
    start = 0
    for shard, shard_record in enumerate(shard_records):
        part = table[start : start + shard_record.entry.samples]
        part["shard"], part["fold"] = shard, shard_record.entry.fold
        columns = np.array(shard_record.samples, dtype=np.uint64).T
        for name, column in zip(RECORDED, columns, strict=True):
            part[name] = column
        start += len(part)
    return table


def _facts(samples: np.ndarray, shard_records: list[ShardRecord]) -> dict[str, Any]:
    modes: Counter[str] = Counter()
    for shard_record in shard_records:
        modes.update(shard_record.modes)
    sizes, counts = np.unique(np.stack([samples["width"], samples["height"]], axis=1), axis=0, return_counts=True)
    return {
        "modes": dict(sorted(modes.items())),
        "picture_sizes": {
            f"{width}x{height}": int(count) for (width, height), count in zip(sizes, counts, strict=True)
        },
        "transparent_pictures": int(np.count_nonzero(samples["flags"] & fmt.FLAG_TRANSPARENT)),
    }
