"""Which sample goes into which shard: decided before anything is written, from names and sizes alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quaclrs.config import Columns, PackConfig, folds_text
from quaclrs.data.metadata import Metadata, file_key, read_metadata
from quaclrs.data.sampling import storage_order
from quaclrs.errors import DataError, ShardError
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings import get_encoding
from quaclrs.shards.encodings.base import Encoding
from quaclrs.shards.packing.write_shard import SampleSource, ShardPlan
from quaclrs.shards.reader import ShardSet


@dataclass(frozen=True, kw_only=True)
class ImageLocation:
    """Where the image of one row is."""

    path: Path
    size: int
    """Bytes; -1 if there is no image and packing skips the row."""
    mtime_ns: int = 0
    offset: int = 0
    key: str
    """Equal for rows that have one image."""


ImageFinder = Callable[[int], ImageLocation]
"""Row of the CSV to its image. Raises :class:`DataError` naming row and file when there is none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is packed: a CSV, and the images of its rows."""

    metadata: Metadata
    csv_name: str
    columns: Columns
    find: ImageFinder


def open_source(config: PackConfig, metadata: Metadata | None = None) -> Source:
    """The CSV of ``config``, and where its images are: in the PNG tree, or in ``png`` shards.

    ``metadata`` is the parsed CSV, if the caller has it already.
    """
    if config.from_shards is not None:
        with ShardSet(config.from_shards) as shards:
            manifest = shards.manifest
            metadata = shards.metadata()
            find = _shard_finder(shards, metadata, config)
            return Source(metadata=metadata, csv_name=manifest.csv_name, columns=Columns(**manifest.columns), find=find)
    assert config.csv_file is not None
    metadata = metadata or read_metadata(config.csv_file, config.columns)
    find = _tree_finder(metadata, config)
    return Source(metadata=metadata, csv_name=metadata.csv_file.name, columns=config.columns, find=find)


def check_tree(metadata: Metadata, spectrograms_dir: Path, *, partly: bool = False) -> None:
    """Raise :class:`DataError` naming ``spectrograms_dir`` if it does not exist or lacks the folder of a fold.

    A fold whose first row lies in ``spectrograms_dir`` itself needs no folder. ``partly``: one fold's folder is enough.
    """
    if not spectrograms_dir.is_dir():
        what = "is no folder" if spectrograms_dir.exists() else "no such folder"
        raise DataError(f"{spectrograms_dir}: {what}; check --spectrograms_dir")
    first_rows = [int(np.argmax(metadata.fold == fold)) for fold in metadata.fold_numbers]
    folders = [metadata.path(row, spectrograms_dir).parent for row in first_rows]
    lacking = [fold for fold, folder in zip(metadata.fold_numbers, folders, strict=True) if not folder.is_dir()]
    if not lacking or (partly and len(lacking) < len(folders)):
        return
    fold = lacking[0]
    inner = next((found.parent for found in sorted(spectrograms_dir.glob(f"*/fold{fold}")) if found.is_dir()), None)
    step = f"check --spectrograms_dir; {inner} has it" if inner else "check --spectrograms_dir"
    raise DataError(
        f"{spectrograms_dir}: has no folder fold{fold} (of {metadata.csv_file}'s folds, those of {folds_text(lacking)} "
        f"are missing); {step}"
    )


def _tree_finder(metadata: Metadata, config: PackConfig) -> ImageFinder:
    spectrograms_dir = config.spectrograms_dir
    assert spectrograms_dir is not None
    check_tree(metadata, spectrograms_dir, partly=config.on_error == "skip")

    def find(row: int) -> ImageLocation:
        path = metadata.path(row, spectrograms_dir)
        try:
            stat = path.stat()
        except OSError as error:
            if config.on_error == "skip":
                return ImageLocation(path=path, size=-1, key=str(path))
            raise DataError(
                f"{metadata.csv_file}: row {row + 1}: no image at {path} ({error.strerror}); check --spectrograms_dir, "
                "restore the file, or pack with --on_error skip to leave it out"
            ) from None
        return ImageLocation(path=path, size=stat.st_size, mtime_ns=stat.st_mtime_ns, key=file_key(path, stat))

    return find


def _shard_finder(shards: ShardSet, metadata: Metadata, config: PackConfig) -> ImageFinder:
    if not shards.encoding.keeps_original_files:
        raise ShardError(
            f"--from_shards {shards.root}: is encoded {shards.encoding.name}; only png shards hold the original images"
        )
    number_of_row = {int(row): number for number, row in enumerate(shards.samples["row"])}
    tars = [shards.root / entry.file for entry in shards.manifest.shards]
    keys = shards.image_keys(metadata)
    times = [tar.stat().st_mtime_ns for tar in tars]

    def find(row: int) -> ImageLocation:
        if row not in number_of_row:
            if config.on_error == "skip":
                return ImageLocation(path=shards.root / "skipped before", size=-1, key=keys[row])
            raise DataError(
                f"{shards.root}: row {row + 1} was skipped when these shards were packed; go on with --on_error skip"
            )
        fields = shards.samples[number_of_row[row]]
        shard = int(fields["shard"])
        return ImageLocation(
            path=tars[shard],
            size=int(fields["size"]),
            mtime_ns=times[shard],
            offset=int(fields["offset"]),
            key=keys[row],
        )

    return find


def plan_shards(source: Source, config: PackConfig) -> tuple[list[ShardPlan], str]:
    """All shards to be written, and the source fingerprint; reads only names and sizes of the images.

    Raises :class:`DataError` naming the first row whose image is missing, unless packing skips bad images.
    """
    metadata, encoding = source.metadata, get_encoding(config.encoding)
    plans: list[ShardPlan] = []
    source_hash = hashlib.sha256()
    sources: list[SampleSource] = []
    shard_bytes = position = number = 0

    def close_shard(fold: int) -> None:
        nonlocal shard_bytes, number
        plans.append(
            ShardPlan(
                file=fmt.shard_file(fold, number),
                fold=fold,
                encoding=encoding,
                image_size=config.image_size,
                skip_bad=config.on_error == "skip",
                sources=tuple(sources),
            )
        )
        sources.clear()
        shard_bytes, number = 0, number + 1

    fold = 0
    for row in storage_order(metadata.fold, config.seed).tolist():
        if fold != metadata.fold[row]:
            if sources:
                close_shard(fold)
            fold, position, number = int(metadata.fold[row]), 0, 0
        sample = _sample_source(source, row, fmt.sample_key(fold, position))
        source_hash.update(f"{metadata.relative_path(row)}\t{sample.size}\n".encode())
        stored = planned_sample_bytes(sample, encoding, config.image_size)
        if sources and shard_bytes + stored > config.shard_size:
            close_shard(fold)
        sources.append(sample)
        shard_bytes += stored
        position += 1
    close_shard(fold)
    return plans, source_hash.hexdigest()


def _sample_source(source: Source, row: int, key: str) -> SampleSource:
    metadata, location = source.metadata, source.find(row)
    return SampleSource(
        row=row,
        key=key,
        label=int(metadata.label[row]),
        path=str(location.path),
        file=metadata.relative_path(row),
        size=location.size,
        offset=location.offset,
        mtime_ns=location.mtime_ns,
        image=location.key,
        csv_row=metadata.row_json(row),
    )


def planned_sample_bytes(source: SampleSource, encoding: Encoding, image_size: int) -> int:
    """Bytes that ``source`` takes in its tar, with the payload size that ``encoding`` estimates."""
    payload_bytes = encoding.planned_bytes(max(source.size, 0), image_size)
    contents = fmt.members(source.key, encoding.extension, b"", source.label, source.csv_row)
    return fmt.stored_bytes(payload_bytes) + sum(fmt.stored_bytes(len(content)) for _, content in contents[1:])
