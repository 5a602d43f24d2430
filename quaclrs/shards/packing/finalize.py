"""Turns the records of finished shards into a finished folder: sample table, CSV, and the manifest last."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quaclrs.data.metadata import Metadata
from quaclrs.errors import DataError
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import SharedTables
from quaclrs.shards.packing.changed_sources import remember_sources
from quaclrs.shards.packing.write_shard import ShardPlan
from quaclrs.shards.work_folder import RECORDED_FIELDS, ShardRecord, remove_other_shards, remove_shard
from quaclrs.system.atomic_files import write_bytes


def describe(
    manifest: fmt.Manifest, records: list[ShardRecord], shared: SharedTables | None
) -> tuple[fmt.Manifest, bytes]:
    """``manifest`` filled in for the shards of ``records``, and the bytes of its samples.npy.

    ``shared`` are the tables of a two-pass encoding.
    """
    filled = [record for record in records if record.entry.samples]
    samples = _samples_table(filled)
    samples_bytes = fmt.npy_bytes(samples)
    skipped = sorted((row for record in records for row in record.skipped), key=lambda row: row.row)
    described = replace(
        manifest,
        num_samples=len(samples),
        samples_sha256=hashlib.sha256(samples_bytes).hexdigest(),
        shards=tuple(record.entry for record in filled),
        skipped=tuple(skipped),
        layouts=tuple(layout.to_dict() for layout in shared.layouts) if shared else (),
        palettes=tuple(palette.tobytes().hex() for palette in shared.palettes) if shared else (),
        facts=_facts(samples, filled),
    )
    return described, samples_bytes


def finalize(
    manifest: fmt.Manifest,
    metadata: Metadata,
    plans: list[ShardPlan],
    records: list[ShardRecord],
    shared: SharedTables | None,
    output_dir: Path,
) -> fmt.Manifest:
    """Write everything but the tars, from the ``plans`` and ``records`` of all shards; returns the finished manifest.

    The manifest is written last: only a folder with a manifest is a shard folder. The caller holds the folder
    exclusively. Raises :class:`DataError` where every row was skipped, :class:`StorageError` if the output disk cannot
    be written.
    """
    remove_other_shards((record.entry.file for record in records), output_dir)
    finished, samples_bytes = describe(manifest, records, shared)
    if not finished.num_samples:
        raise DataError(f"{metadata.csv_file}: not one row has a good image; nothing was packed")
    write_bytes(output_dir / fmt.METADATA_FILE, metadata.raw)
    write_bytes(output_dir / fmt.SAMPLES_FILE, samples_bytes)
    for record in records:
        if not record.entry.samples:  # all its images were skipped, and other readers fail on empty tars
            remove_shard(record.entry.file, output_dir)
    remember_sources(plans, finished, output_dir)
    write_bytes(output_dir / fmt.MANIFEST_FILE, finished.to_json())
    return finished


def _samples_table(records: list[ShardRecord]) -> NDArray[np.void]:
    table = np.zeros(sum(record.entry.samples for record in records), dtype=fmt.SAMPLE_DTYPE)
    start = 0
    for shard, record in enumerate(records):
        part = table[start : start + record.entry.samples]
        part["shard"], part["fold"] = shard, record.entry.fold
        columns = np.array(record.samples, dtype=np.uint64).T
        for name, column in zip(RECORDED_FIELDS, columns, strict=True):
            part[name] = column
        start += len(part)
    return table


def _facts(samples: NDArray[np.void], records: list[ShardRecord]) -> dict[str, Any]:
    modes: Counter[str] = Counter()
    for record in records:
        modes.update(record.modes)
    sizes, counts = np.unique(np.stack([samples["width"], samples["height"]], axis=1), axis=0, return_counts=True)
    return {
        "modes": dict(sorted(modes.items())),
        "picture_sizes": {
            f"{width}x{height}": int(count) for (width, height), count in zip(sizes, counts, strict=True)
        },
        "transparent_pictures": int(np.count_nonzero(samples["flags"] & fmt.FLAG_TRANSPARENT)),
    }
