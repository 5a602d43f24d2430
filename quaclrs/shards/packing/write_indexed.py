"""``indexed`` shards in two rounds, each in worker processes: look at every image, then write what all of them agree
on.

Layouts and palettes belong to the whole dataset, so no image can be stored before every one has been seen. The first
round decodes and keeps each image's own grid in ``.packing/``; the second puts the grids on the shared layouts and
palettes, without decoding again. Jobs with ``--folds`` share the first round: each needs what all images tell, whoever
looked at them. Lossless in two proven steps: every image is rendered from its own grid and compared with its pixels,
and again from its final one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quaclrs.errors import DataError, ShardError
from quaclrs.imaging.indexed import IndexedImage, NotIndexable, decode, encode, recode
from quaclrs.imaging.layout import Layout
from quaclrs.imaging.png import PngFacts, decode_png
from quaclrs.imaging.shared_layouts import Facts, SharedLayouts, image_facts
from quaclrs.shards import format as fmt
from quaclrs.shards.packing.write_shard import (
    PACKING_FOLDER,
    Prepared,
    SampleSource,
    ShardPlan,
    ShardRecord,
    attempt,
    finished_shard_record,
    npy_bytes,
    read_source,
    write_samples,
)
from quaclrs.system.atomic_files import atomic_writer, write_bytes
from quaclrs.system.processes import Tick


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the first round found in one image."""

    image: IndexedImage
    facts: PngFacts
    pixels: int


def scan_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path) -> set[Facts]:
    """First round: prove ``plan``'s images indexable, keep their grids, and return what they tell; one tick an image.

    Raises :class:`DataError` naming row and file for a bad image or one that is not indexable (unless the plan skips
    those),
    :class:`StorageError` for the disk.
    """
    records: list[dict[str, Any]] = []
    facts: set[Facts] = set()
    with atomic_writer(_cells_file(plan, output_dir)) as file:
        for source in plan.sources:
            seen = attempt(source, plan, _look)
            if isinstance(seen, fmt.SkippedRow):
                records.append({"skipped": asdict(seen)})
            else:
                _store(file, seen.image)
                records.append({"facts": asdict(seen.facts), "pixels": seen.pixels})
                facts.add(image_facts(seen.image))
            tick()
    document = {"plan": plan.fingerprint, "samples": records, "told": [_facts_record(one) for one in facts]}
    write_bytes(_record_file(plan, output_dir), json.dumps(document).encode())
    return facts


def seen_facts(plan: ShardPlan, *, output_dir: Path) -> set[Facts] | None:
    """What :func:`scan_shard` returned when some process looked at ``plan``'s images as they are now; None where none
    did.
    """
    document = _seen_document(plan, output_dir)
    skipped = any("skipped" in record for record in document["samples"]) if document else False
    if document is None or (skipped and not plan.skip_bad) or not _cells_file(plan, output_dir).is_file():
        return None
    return {Facts(height, width, *map(bytes.fromhex, sets)) for height, width, *sets in document["told"]}


def write_indexed_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path, shared: SharedLayouts) -> ShardRecord:
    """Second round: write ``plan``'s shard on the ``shared`` layouts and palettes; one tick an image."""

    def prepared() -> Iterator[tuple[SampleSource, Prepared | fmt.SkippedRow]]:
        for source, seen in _read_back(plan, output_dir):
            yield source, seen if isinstance(seen, fmt.SkippedRow) else _prepare(seen, shared)

    return write_samples(plan, prepared(), tick, output_dir=output_dir, fingerprint=indexed_fingerprint(plan, shared))


def finished_indexed_shard_record(plan: ShardPlan, *, output_dir: Path, shared: SharedLayouts) -> ShardRecord | None:
    """As :func:`quaclrs.shards.packing.write_shard.finished_shard_record`, for a shard on the ``shared`` layouts and
    palettes.
    """
    return finished_shard_record(plan, output_dir=output_dir, fingerprint=indexed_fingerprint(plan, shared))


def indexed_fingerprint(plan: ShardPlan, shared: SharedLayouts) -> str:
    """As :attr:`ShardPlan.fingerprint`, with the layouts and palettes that a shard's bytes depend on too."""
    layouts = json.dumps([layout.to_dict() for layout in shared.layouts])
    palettes = b"".join(palette.tobytes() + b"|" for palette in shared.palettes)
    return hashlib.sha256(plan.fingerprint.encode() + layouts.encode() + palettes).hexdigest()


def _look(source: SampleSource, plan: ShardPlan) -> _Seen:
    decoded, facts = decode_png(read_source(source), source.name)
    rgb = np.asarray(decoded)
    try:
        image = encode(rgb)
    except NotIndexable as error:
        raise DataError(
            f"{source.name}: {error}; pack with --encoding png or rgb, or leave it out with --on_error skip"
        ) from None
    return _Seen(image=image, facts=facts, pixels=fmt.pixel_digest(rgb))


def _prepare(seen: _Seen, shared: SharedLayouts) -> Prepared:
    layout, palette = shared.choose(image_facts(seen.image))
    final = recode(seen.image, shared.layouts[layout], shared.palettes[palette])
    if fmt.pixel_digest(decode(final)) != seen.pixels:
        raise RuntimeError(
            "an image on a shared layout differs from its pixels: a bug in quaclrs.imaging; please report it"
        )
    return Prepared(payload=npy_bytes(final.grid), facts=seen.facts, layout=layout, palette=palette, pixels=seen.pixels)


def _cells_file(plan: ShardPlan, output_dir: Path) -> Path:
    return output_dir / PACKING_FOLDER / (Path(plan.file).stem + ".cells")


def _record_file(plan: ShardPlan, output_dir: Path) -> Path:
    return output_dir / PACKING_FOLDER / (Path(plan.file).stem + ".seen")


def _seen_document(plan: ShardPlan, output_dir: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(_record_file(plan, output_dir).read_bytes())
    except (OSError, ValueError):
        return None
    return document if document["plan"] == plan.fingerprint else None


def _facts_record(facts: Facts) -> list[int | str]:
    return [part.hex() if isinstance(part, bytes) else part for part in facts]


def _store(file: BinaryIO, image: IndexedImage) -> None:
    layout = image.layout
    edges = (np.array(layout.row_edges, np.int32), np.array(layout.column_edges, np.int32))
    for array in (image.grid, image.palette, *edges):
        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)


def _read_back(plan: ShardPlan, output_dir: Path) -> Iterator[tuple[SampleSource, _Seen | fmt.SkippedRow]]:
    document = _seen_document(plan, output_dir)
    if document is None:  # a job that began earlier or later, with other images in the tree
        raise ShardError(
            f"{output_dir}: another job looked at other images for {plan.file}: some changed while jobs were running; "
            "run the same command again when the others are done"
        )
    with _cells_file(plan, output_dir).open("rb") as file:
        for source, record in zip(plan.sources, document["samples"], strict=True):
            if "skipped" in record:
                yield source, fmt.SkippedRow(**record["skipped"])
                continue
            facts = PngFacts(**record["facts"])
            grid, palette, rows, columns = (np.lib.format.read_array(file, allow_pickle=False) for _ in range(4))
            layout = Layout(
                height=facts.height,
                width=facts.width,
                row_edges=tuple(rows.tolist()),
                column_edges=tuple(columns.tolist()),
            )
            yield source, _Seen(image=IndexedImage(grid, palette, layout), facts=facts, pixels=record["pixels"])
