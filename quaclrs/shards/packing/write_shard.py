"""One shard, in one worker process: check every image, write the tar, its index and a record. Imports neither pandas
nor torch.

The record is written last. A shard without one, or with one for other input, is written anew; so a killed packing goes
on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from quaclrs.errors import DataError
from quaclrs.imaging.png import PngFacts, check_png, decode_png, resize_rgb
from quaclrs.shards import format as fmt
from quaclrs.shards.work_folder import ShardRecord, shard_record_file
from quaclrs.system.atomic_files import atomic_writer, write_bytes
from quaclrs.system.processes import Tick

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Where one sample comes from."""

    row: int
    key: str
    label: int
    path: str
    file: str
    """The image as the CSV names it."""
    size: int
    """Bytes of the image when the shard was planned."""
    offset: int = 0
    """Where the image begins in ``path``: in a tar of ``png`` shards; a file of its own begins at 0."""
    mtime_ns: int
    csv_row: dict[str, str]

    @property
    def name(self) -> str:
        """Row (counted from 1, as in messages about the CSV) and path."""
        return f"row {self.row + 1}: {self.path}"


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard to be written: which samples, in which order, how."""

    file: str
    fold: int
    encoding: str
    image_size: int
    skip_bad: bool
    sources: tuple[SampleSource, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything the shard's bytes depend on, the files' sizes and times in place of their content.

        Not over ``skip_bad``: good images pack alike either way. Nor over ``path``, which jobs may spell in different
        ways.
        """
        digest = hashlib.sha256(repr((self.file, self.encoding, self.image_size)).encode())
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


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One sample ready to be stored."""

    payload: bytes
    facts: PngFacts
    layout: int = 0
    palette: int = 0
    pixels: int = 0


def finished_shard_record(plan: ShardPlan, *, output_dir: Path, fingerprint: str | None = None) -> ShardRecord | None:
    """The record of ``plan``'s shard if it was written from the same input and still stands whole, else None."""
    record = ShardRecord.load(shard_record_file(plan.file, output_dir))
    if record is None or record.plan != (fingerprint or plan.fingerprint) or (record.skipped and not plan.skip_bad):
        return None
    tar, index = output_dir / plan.file, output_dir / fmt.index_file(plan.file)
    whole = index.is_file() and tar.is_file() and tar.stat().st_size == record.entry.bytes
    return record if whole else None


def write_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path) -> ShardRecord:
    """Write ``plan``'s tar (``png`` or ``rgb``), its index and then its record below ``output_dir``; one tick an
    image.

    Raises :class:`DataError` naming row and file for a bad image (unless the plan skips those), :class:`StorageError`
    for the disk.
    """
    prepared = ((source, attempt(source, plan, _prepare)) for source in plan.sources)
    return write_samples(plan, prepared, tick, output_dir=output_dir, fingerprint=plan.fingerprint)


def write_samples(
    plan: ShardPlan,
    prepared: Iterable[tuple[SampleSource, Prepared | fmt.SkippedRow]],
    tick: Tick,
    *,
    output_dir: Path,
    fingerprint: str,
) -> ShardRecord:
    """Write what ``prepared`` yields, in its order, as ``plan``'s shard; ``fingerprint`` goes into the record."""
    samples: list[list[int]] = []
    modes: dict[str, int] = {}
    skipped: list[fmt.SkippedRow] = []
    with atomic_writer(output_dir / plan.file) as file:
        writer = fmt.ShardWriter(file)
        for source, sample in prepared:
            if isinstance(sample, fmt.SkippedRow):
                skipped.append(sample)
            else:
                offset = writer.add_sample(
                    fmt.members(source.key, plan.encoding, sample.payload, source.label, source.csv_row)
                )
                samples.append(_record(source, sample, offset))
                modes[sample.facts.mode] = modes.get(sample.facts.mode, 0) + 1
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


def attempt(
    source: SampleSource, plan: ShardPlan, work: Callable[[SampleSource, ShardPlan], Made]
) -> Made | fmt.SkippedRow:
    """``work``'s result, or why the plan skips the row; without skipping, its :class:`DataError`."""
    try:
        return work(source, plan)
    except DataError as error:
        if not plan.skip_bad:
            raise
        reason = str(error).removeprefix(f"{source.name}: ")  # the manifest must not depend on where the tree lies
        return fmt.SkippedRow(row=source.row, file=source.file, reason=reason)


def read_source(source: SampleSource) -> bytes:
    """The image's bytes. Raises :class:`DataError` when they cannot be read or are not as many as planned."""
    try:
        with Path(source.path).open("rb") as file:
            file.seek(source.offset)
            # of a file of its own everything, to notice one that has grown
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


def _prepare(source: SampleSource, plan: ShardPlan) -> Prepared:
    data = read_source(source)
    if plan.encoding == "png":
        return Prepared(payload=data, facts=check_png(data, source.name))
    image, facts = decode_png(data, source.name)
    return Prepared(payload=fmt.npy_bytes(resize_rgb(image, plan.image_size)), facts=facts)


def _record(source: SampleSource, sample: Prepared, offset: int) -> list[int]:
    facts = sample.facts
    place = (source.row, source.label, fmt.flags_of(facts), offset, len(sample.payload))
    return [*place, facts.width, facts.height, sample.layout, sample.palette, sample.pixels]
