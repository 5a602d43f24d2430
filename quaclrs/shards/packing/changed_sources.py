"""Finds source images that are no longer what a finished folder was packed from.

Size and modification time are the hint, the content is the proof. ``sources.json`` keeps size and time of each row's
image as they were when its content was last known to be that of the shards. An image with the same size and time is
not read. Any other image is compared with its payload; if all are equal, the file gets the new times.

The times are kept beside the manifest and not in it, because the manifest must not depend on when and where it was
packed. No hash of the images is kept: the shards themselves hold what to compare with. Without ``sources.json`` (shards
of earlier versions, a folder that cannot be written) every image is compared.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from quaclrs.config import PackConfig
from quaclrs.errors import DataError, StorageError
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings import get_encoding
from quaclrs.shards.packing.write_shard import SampleSource, ShardPlan, read_source
from quaclrs.shards.reader import ShardSet
from quaclrs.system.atomic_files import write_bytes

SOURCES_FILE = "sources.json"

_Hint = dict[str, list[int]]
"""The row, as text, to (size, mtime_ns) of its image."""


def remember_sources(plans: Sequence[ShardPlan], manifest: fmt.Manifest, output_dir: Path) -> None:
    """Store size and time of all images of ``plans``, whose content is that of the shards of ``manifest``.

    Does nothing where the folder cannot be written: the images are then compared again the next time.
    """
    document = {"shards": manifest.data_fingerprint, "sources": _hint_of(plans)}
    with contextlib.suppress(StorageError):
        write_bytes(output_dir / SOURCES_FILE, json.dumps(document).encode(), durable=False)


def first_changed_source(
    plans: Sequence[ShardPlan], manifest: fmt.Manifest, config: PackConfig, *, progress: bool
) -> str | None:
    """The first image, as ``fold{k}/{file}``, whose content is not that of the shards of ``manifest``; None if none is.

    ``plans`` are those of the whole dataset, with the present sizes and times.
    """
    known = _stored_hint(manifest, config.output_dir)
    sources = [source for plan in plans for source in plan.sources]
    touched = [source for source in sources if known.get(str(source.row)) != [source.size, source.mtime_ns]]
    if not touched:
        return None
    with ShardSet(config.output_dir) as shards, ThreadPoolExecutor(config.num_workers) as pool:
        number_of_row = {row: number for number, row in enumerate(shards.samples["row"].tolist())}

        def is_same(source: SampleSource) -> bool:
            return _is_same(source, number_of_row.get(source.row), shards, config)

        answers = pool.map(is_same, touched)
        bar = tqdm(answers, total=len(touched), unit="image", desc="comparing", disable=None if progress else True)
        try:
            for source, same in zip(touched, bar, strict=True):
                if not same:
                    return source.file
        finally:  # also after Ctrl-C
            pool.shutdown(cancel_futures=True)
    remember_sources(plans, manifest, config.output_dir)
    return None


def _is_same(source: SampleSource, number: int | None, shards: ShardSet, config: PackConfig) -> bool:
    """Whether ``source`` is the image that sample ``number`` was made from; None stands for a skipped row."""
    try:
        png = read_source(source) if source.size >= 0 else None
        if number is not None:
            return png is not None and shards.encoding.is_made_from(
                shards.record(number), png, source.name, config.image_size
            )
        if png is not None:
            get_encoding(config.encoding).encode(png, source.name, config.image_size)
    except DataError:
        return number is None  # what was skipped as a bad image still is one
    return number is None and png is None


def _hint_of(plans: Sequence[ShardPlan]) -> _Hint:
    return {str(source.row): [source.size, source.mtime_ns] for plan in plans for source in plan.sources}


def _stored_hint(manifest: fmt.Manifest, output_dir: Path) -> _Hint:
    try:
        document = json.loads((output_dir / SOURCES_FILE).read_bytes())
        hint: _Hint = document["sources"] if document["shards"] == manifest.data_fingerprint else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return hint if isinstance(hint, dict) else {}
