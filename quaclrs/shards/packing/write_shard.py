"""Write one shard: check and encode every image, write the tar and its index, then its record in ``.packing/``.

Runs in worker processes, so it imports neither pandas nor torch. The record is written last. A shard without a record,
or with the record of other input, is written anew; so a killed packing can be continued.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from quaclrs.errors import DataError
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import EncodedImage, Encoding
from quaclrs.shards.work_folder import ShardRecord, shard_record_file
from quaclrs.system.atomic_files import atomic_writer, write_bytes
from quaclrs.system.processes import Tick

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Where the image of one sample is, and what its CSV row says."""

    row: int
    key: str
    label: int
    path: str
    file: str
    """The image as the CSV names it."""
    size: int
    """Bytes of the image when the shard was planned."""
    offset: int = 0
    """Where the image begins in ``path``, which is a tar when packing from ``png`` shards; 0 for a PNG file."""
    mtime_ns: int
    image: str
    """Equal for samples that have one image."""
    csv_row: dict[str, str]

    @property
    def name(self) -> str:
        """Row (counted from 1, as in messages about the CSV) and path."""
        return f"row {self.row + 1}: {self.path}"


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to be written: which samples, in which order, in which encoding."""

    file: str
    fold: int
    encoding: Encoding
    """The object, not its name: a worker process imports the encoding's module when it unpickles the plan."""
    image_size: int
    skip_bad: bool
    sources: tuple[SampleSource, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the shard's bytes depend on.

        The size and time of an image file stand for its content. Leaves out ``skip_bad``, which does not change good
        images, and ``path``, which jobs may spell differently.
        """
        digest = hashlib.sha256(repr((self.file, self.encoding.name, self.image_size)).encode())
        for source in self.sources:
            depends_on = (
                source.row,
                source.key,
                source.label,
                source.file,
                source.size,
                source.offset,
                source.mtime_ns,
            )
            digest.update(repr((depends_on, source.csv_row)).encode())
        return digest.hexdigest()


def finished_shard_record(plan: ShardPlan, *, output_dir: Path, fingerprint: str | None = None) -> ShardRecord | None:
    """The record of ``plan``'s shard if it was written from the same input and its files are complete, else None."""
    record = ShardRecord.load(shard_record_file(plan.file, output_dir))
    if record is None or record.plan != (fingerprint or plan.fingerprint) or (record.skipped and not plan.skip_bad):
        return None
    tar, index = output_dir / plan.file, output_dir / fmt.index_file(plan.file)
    complete = index.is_file() and tar.is_file() and tar.stat().st_size == record.entry.bytes
    return record if complete else None


def write_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path) -> ShardRecord:
    """Write ``plan``'s tar, index and record below ``output_dir``, reading each image once; one tick per image.

    Raises :class:`DataError` naming row and file for a bad image (unless the plan skips those), :class:`StorageError`
    if the output disk cannot be written.
    """
    encoded = ((source, skip_if_bad(source, plan, _encode)) for source in plan.sources)
    return write_encoded(plan, encoded, tick, output_dir=output_dir, fingerprint=plan.fingerprint)


def write_encoded(
    plan: ShardPlan,
    encoded: Iterable[tuple[SampleSource, EncodedImage | fmt.SkippedRow]],
    tick: Tick,
    *,
    output_dir: Path,
    fingerprint: str,
) -> ShardRecord:
    """Write the ``encoded`` samples, in their order, as ``plan``'s shard; its record carries ``fingerprint``."""
    samples: list[list[int]] = []
    modes: dict[str, int] = {}
    skipped: list[fmt.SkippedRow] = []
    with atomic_writer(output_dir / plan.file) as file:
        writer = fmt.ShardWriter(file)
        for source, image in encoded:
            if isinstance(image, fmt.SkippedRow):
                skipped.append(image)
            else:
                offset = writer.add_sample(
                    fmt.members(source.key, plan.encoding.extension, image.payload, source.label, source.csv_row)
                )
                samples.append(_recorded_fields(source, image, offset))
                modes[image.facts.mode] = modes.get(image.facts.mode, 0) + 1
            tick()
        sha256 = writer.finish()
    write_bytes(output_dir / fmt.index_file(plan.file), writer.index())
    entry = fmt.ShardEntry(
        file=plan.file,
        fold=plan.fold,
        samples=len(samples),
        bytes=writer.bytes,
        sha256=sha256,
        index_sha256=hashlib.sha256(writer.index()).hexdigest(),
    )
    record = ShardRecord(plan=fingerprint, entry=entry, samples=samples, modes=modes, skipped=skipped)
    write_bytes(shard_record_file(plan.file, output_dir), record.to_json())
    return record


def skip_if_bad(
    source: SampleSource, plan: ShardPlan, work: Callable[[SampleSource, ShardPlan], Made]
) -> Made | fmt.SkippedRow:
    """``work(source, plan)``; if that raises :class:`DataError` and the plan skips bad images, a SkippedRow instead."""
    try:
        return work(source, plan)
    except DataError as error:
        if not plan.skip_bad:
            raise
        reason = str(error).removeprefix(f"{source.name}: ")  # the manifest must not depend on the tree's folder
        return fmt.SkippedRow(row=source.row, file=source.file, reason=reason)


def read_source(source: SampleSource) -> bytes:
    """The image file's bytes. Raises :class:`DataError` when it cannot be read or its size is not the planned one."""
    try:
        with Path(source.path).open("rb") as file:
            file.seek(source.offset)
            # a PNG file is read to its end, to detect one that has grown
            data = file.read(max(source.size, 0)) if source.offset else file.read()
    except OSError as error:
        raise DataError(
            f"{source.name}: cannot read the file ({error.strerror}); restore it or take the row out"
        ) from None
    if len(data) != source.size:
        raise DataError(
            f"{source.name}: has {len(data)} bytes, a moment ago {source.size}; let nobody write to it while packing"
        )
    return data


def _encode(source: SampleSource, plan: ShardPlan) -> EncodedImage:
    return plan.encoding.encode(read_source(source), source.name, plan.image_size)


def _recorded_fields(source: SampleSource, image: EncodedImage, offset: int) -> list[int]:
    """The values of :data:`quaclrs.shards.work_folder.RECORDED_FIELDS`."""
    facts = image.facts
    place = (source.row, source.label, fmt.flags_of(facts), offset, len(image.payload))
    return [*place, facts.width, facts.height, image.layout, image.palette, image.pixels]
