"""One shard, in one worker process: check every picture, write the tar, its index and a receipt. Imports neither pandas nor torch.

The receipt is written last. A shard without one, or with one for other input, is written anew; so a killed packing goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from quaclrs.errors import DataError
from quaclrs.files import atomic_writer, write_bytes
from quaclrs.imaging.png import PngFacts, check_png, decode_png, resize_rgb
from quaclrs.parallel import Tick
from quaclrs.shards import format as fmt

PACKING_FOLDER = ".packing"
"""Receipts and the lock of a packing that is not finished."""


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Where one sample comes from."""

    row: int
    key: str
    label: int
    path: str
    file: str
    """The picture as the CSV names it."""
    size: int
    """Bytes of the file when the shard was planned."""
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

        Not over ``skip_bad``: good pictures pack alike either way.
        """
        digest = hashlib.sha256(repr((self.file, self.encoding, self.image_size)).encode())
        for source in self.sources:
            digest.update(repr(source).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a finished shard is; kept on disk until the manifest is written."""

    plan: str
    """The plan's fingerprint."""
    entry: fmt.ShardEntry
    samples: list[list[int]]
    """Per sample: row, label, flags, offset, size, width, height."""
    modes: dict[str, int]
    skipped: list[fmt.SkippedRow]

    @classmethod
    def load(cls, path: Path) -> Receipt | None:
        """The receipt at ``path``; None when there is none or it cannot be read."""
        try:
            document = json.loads(path.read_bytes())
            document["entry"] = fmt.ShardEntry(**document["entry"])
            document["skipped"] = [fmt.SkippedRow(**row) for row in document["skipped"]]
            return cls(**document)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def receipt_file(plan: ShardPlan, output_dir: Path) -> Path:
    """Where ``plan``'s receipt lies while the packing of ``output_dir`` is not finished."""
    return output_dir / PACKING_FOLDER / (Path(plan.file).stem + ".json")


def finished_receipt(plan: ShardPlan, output_dir: Path) -> Receipt | None:
    """The receipt of ``plan``'s shard if it was written from the same input and still stands whole, else None."""
    receipt = Receipt.load(receipt_file(plan, output_dir))
    if receipt is None or receipt.plan != plan.fingerprint or (receipt.skipped and not plan.skip_bad):
        return None
    tar, index = output_dir / plan.file, output_dir / fmt.index_file(plan.file)
    whole = index.is_file() and tar.is_file() and tar.stat().st_size == receipt.entry.bytes
    return receipt if whole else None


def write_shard(plan: ShardPlan, tick: Tick, *, output_dir: Path) -> Receipt:
    """Write ``plan``'s tar, its index and then its receipt below ``output_dir``; one tick a picture.

    Raises :class:`DataError` naming row and file for a bad picture (unless the plan skips those), :class:`StorageError` for the disk.
    """
    samples: list[list[int]] = []
    modes: dict[str, int] = {}
    skipped: list[fmt.SkippedRow] = []
    with atomic_writer(output_dir / plan.file) as file:
        writer = fmt.ShardWriter(file)
        for source in plan.sources:
            try:
                payload, facts = _payload(source, plan)
            except DataError as error:
                if not plan.skip_bad:
                    raise
                skipped.append(fmt.SkippedRow(row=source.row, file=source.file, reason=_reason(error, source)))
            else:
                offset = writer.add_sample(fmt.members(source.key, plan.encoding, payload, source.label, source.csv_row))
                samples.append([source.row, source.label, flags_of(facts), offset, len(payload), facts.width, facts.height])
                modes[facts.mode] = modes.get(facts.mode, 0) + 1
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
    receipt = Receipt(plan=plan.fingerprint, entry=entry, samples=samples, modes=modes, skipped=skipped)
    write_bytes(receipt_file(plan, output_dir), json.dumps(asdict(receipt)).encode())
    return receipt


def _reason(error: DataError, source: SampleSource) -> str:
    return str(error).removeprefix(f"{source.name}: ")  # the manifest must not depend on where the tree lies


def _payload(source: SampleSource, plan: ShardPlan) -> tuple[bytes, PngFacts]:
    data = _read(source)
    if plan.encoding == "png":
        return data, check_png(data, source.name)
    image, facts = decode_png(data, source.name)
    return npy_bytes(resize_rgb(image, plan.image_size)), facts


def _read(source: SampleSource) -> bytes:
    try:
        data = Path(source.path).read_bytes()
    except OSError as error:
        raise DataError(f"{source.name}: cannot read the file ({error.strerror}); restore it or take the row out") from None
    if len(data) != source.size:
        raise DataError(f"{source.name}: has {len(data)} bytes, a moment ago {source.size}; let nobody write to it while packing")
    return data


def npy_bytes(array: np.ndarray) -> bytes:
    """``array`` as the bytes of a .npy file, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def flags_of(facts: PngFacts) -> int:
    """The FLAG_ bits of samples.npy for a picture."""
    return (0 if facts.plain else fmt.FLAG_NOT_PLAIN) | (fmt.FLAG_TRANSPARENT if facts.transparent else 0)
