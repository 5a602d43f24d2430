"""Write shards of a two-pass encoding: examine every image, then encode them with the tables that all share.

``indexed`` is one: its layouts and palettes belong to the whole dataset, so no image can be stored before all have been
examined. The first pass decodes the images and keeps what the second needs in ``.packing/``; the second pass encodes
without decoding again. Jobs with ``--folds`` share the first pass: each needs the findings of all images, whichever job
examined them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quaclrs.errors import ShardError
from quaclrs.imaging.png import PngFacts
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import EncodedImage, ExaminedImage, Finding, SharedTables, TwoPassEncoding
from quaclrs.shards.packing.write_shard import (
    SampleSource,
    ShardPlan,
    finished_shard_record,
    read_source,
    skip_if_bad,
    write_encoded,
)
from quaclrs.shards.work_folder import ShardRecord, arrays_file, findings_file
from quaclrs.system.atomic_files import atomic_writer, write_bytes
from quaclrs.system.processes import Tick


def examine_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path) -> set[Finding]:
    """First pass: examine ``plan``'s images and store the result; returns their findings; one tick per image.

    Raises :class:`DataError` naming row and file for a bad image or one that the encoding cannot store (unless the plan
    skips those), :class:`StorageError` if the output disk cannot be written.
    """
    samples: list[dict[str, Any]] = []
    findings: set[Finding] = set()
    with atomic_writer(arrays_file(plan.file, output_dir)) as file:
        for source in plan.sources:
            examined = skip_if_bad(source, plan, _examine)
            if isinstance(examined, fmt.SkippedRow):
                samples.append({"skipped": asdict(examined)})
            else:
                for array in examined.arrays:
                    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
                samples.append({"facts": asdict(examined.facts), "pixels": examined.pixels})
                findings.add(examined.finding)
            tick()
    document = {"plan": plan.fingerprint, "samples": samples, "told": [_to_json(finding) for finding in findings]}
    write_bytes(findings_file(plan.file, output_dir), json.dumps(document).encode())
    return findings


def stored_findings(plan: ShardPlan, *, output_dir: Path) -> set[Finding] | None:
    """The findings of ``plan``'s images if a process has examined their present files, else None."""
    document = _findings_document(plan, output_dir)
    skipped = any("skipped" in sample for sample in document["samples"]) if document else False
    if document is None or (skipped and not plan.skip_bad) or not arrays_file(plan.file, output_dir).is_file():
        return None
    return {_from_json(finding) for finding in document["told"]}


def write_shared_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path, shared: SharedTables) -> ShardRecord:
    """Second pass: write ``plan``'s shard with the ``shared`` tables; one tick per image."""
    encoding = _two_pass(plan)

    def encoded() -> Iterator[tuple[SampleSource, EncodedImage | fmt.SkippedRow]]:
        for source, examined in _read_examined(plan, output_dir):
            if isinstance(examined, fmt.SkippedRow):
                yield source, examined
            else:
                yield source, encoding.encode_shared(examined, shared)

    return write_encoded(plan, encoded(), tick, output_dir=output_dir, fingerprint=_fingerprint(plan, shared))


def finished_shared_shard_record(plan: ShardPlan, *, output_dir: Path, shared: SharedTables) -> ShardRecord | None:
    """As :func:`finished_shard_record`, for a shard that was written with the ``shared`` tables."""
    return finished_shard_record(plan, output_dir=output_dir, fingerprint=_fingerprint(plan, shared))


def _fingerprint(plan: ShardPlan, shared: SharedTables) -> str:
    """As :attr:`ShardPlan.fingerprint`, over the ``shared`` tables too: the shard's bytes depend on them."""
    layouts = json.dumps([layout.to_dict() for layout in shared.layouts])
    palettes = b"".join(palette.tobytes() + b"|" for palette in shared.palettes)
    return hashlib.sha256(plan.fingerprint.encode() + layouts.encode() + palettes).hexdigest()


def _two_pass(plan: ShardPlan) -> TwoPassEncoding:
    assert isinstance(plan.encoding, TwoPassEncoding)
    return plan.encoding


def _examine(source: SampleSource, plan: ShardPlan) -> ExaminedImage:
    return _two_pass(plan).examine(read_source(source), source.name)


def _findings_document(plan: ShardPlan, output_dir: Path) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads(findings_file(plan.file, output_dir).read_bytes())
    except (OSError, ValueError):
        return None
    return document if document["plan"] == plan.fingerprint else None


def _read_examined(plan: ShardPlan, output_dir: Path) -> Iterator[tuple[SampleSource, ExaminedImage | fmt.SkippedRow]]:
    """What the first pass stored of each image."""
    document = _findings_document(plan, output_dir)
    if document is None:  # another job, begun earlier or later, has examined other images of the tree
        raise ShardError(
            f"{output_dir}: another job looked at other images for {plan.file}: some changed while jobs were running; "
            "run the same command again when the others are done"
        )
    kept = _two_pass(plan).arrays_kept
    with arrays_file(plan.file, output_dir).open("rb") as file:
        for source, sample in zip(plan.sources, document["samples"], strict=True):
            if "skipped" in sample:
                yield source, fmt.SkippedRow(**sample["skipped"])
                continue
            arrays = tuple(np.lib.format.read_array(file, allow_pickle=False) for _ in range(kept))
            facts = PngFacts(**sample["facts"])
            yield source, ExaminedImage(facts=facts, arrays=arrays, pixels=sample["pixels"], finding=())


def _to_json(finding: Finding) -> list[int | str]:
    return [part.hex() if isinstance(part, bytes) else part for part in finding]


def _from_json(finding: list[int | str]) -> Finding:
    return tuple(bytes.fromhex(part) if isinstance(part, str) else part for part in finding)
