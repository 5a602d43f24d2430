"""Checks a shard folder against every promise of the format, from the bytes on disk; exports it to files."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from quaclrs.data.metadata import Metadata
from quaclrs.data.sampling import storage_order
from quaclrs.errors import DataError, ShardError
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import Record
from quaclrs.shards.reader import ShardSet
from quaclrs.shards.work_folder import PACKING_FOLDER
from quaclrs.system.atomic_files import write_bytes

_CHUNK_BYTES = 1 << 20


def verify(root: Path, *, progress: bool = False) -> int:
    """Check hashes, sizes, members, labels, rows, payloads and the DALI index of the shard folder ``root``.

    Returns the number of samples. Raises :class:`ShardError` at the first broken promise, naming it and the file.
    """
    with ShardSet(root) as shards:
        metadata = shards.metadata()
        _verify_tables(shards, metadata)
        with tqdm(total=len(shards), unit="sample", desc="verifying", disable=None if progress else True) as bar:
            for number, entry in enumerate(shards.manifest.shards):
                _verify_hashes(shards, entry)
                for _ in _verify_members(shards, metadata, number, entry):
                    bar.update()
        return len(shards)


def export(root: Path, output_dir: Path, *, progress: bool = False) -> int:
    """Restore the CSV and the images below ``output_dir``; returns the number of files written.

    What an image file holds depends on the encoding: ``png``: the original file, byte for byte; ``indexed``: the
    original pixels as PNG, with alpha set to opaque; ``rgb``: the resized image as PNG. Rows that share a file restore
    one file. Existing files are kept if they are equal; otherwise raises :class:`DataError`.
    """
    written = 0
    with ShardSet(root) as shards:
        metadata = shards.metadata()
        images = {metadata.relative_path(int(row)): number for number, row in enumerate(shards.samples["row"])}
        for name, number in tqdm(images.items(), unit="file", desc="exporting", disable=None if progress else True):
            content = shards.encoding.export(shards.record(number))
            written += _restore(output_dir / "spectrograms" / name, content)
        written += _restore(output_dir / shards.manifest.csv_name, metadata.raw)
    return written


def _restore(path: Path, content: bytes) -> bool:
    """Write ``content`` to ``path``; returns False if the file exists already."""
    if path.exists():
        if path.read_bytes() == content:
            return False
        raise DataError(f"{path}: exists with other content; export into an empty folder")
    write_bytes(path, content)
    return True


def _verify_tables(shards: ShardSet, metadata: Metadata) -> None:
    samples, manifest, path = shards.samples, shards.manifest, shards.root / fmt.SAMPLES_FILE
    rows = samples["row"].astype(np.int64)
    order = storage_order(metadata.fold, manifest.seed)
    if not np.array_equal(rows, order[~np.isin(order, [skipped.row for skipped in manifest.skipped])]):
        raise ShardError(
            f"{path}: does not hold every row of {fmt.METADATA_FILE} exactly once, in the order of seed "
            f"{manifest.seed}; "
            "pack the shards anew"
        )
    if metadata.classes != manifest.classes or not np.array_equal(samples["label"], metadata.label[rows]):
        raise ShardError(f"{path}: labels differ from the CSV's; pack the shards anew")
    if metadata.fold_numbers != manifest.folds or not np.array_equal(samples["fold"], metadata.fold[rows]):
        raise ShardError(f"{path}: folds differ from the CSV's; pack the shards anew")
    counted = np.bincount(samples["shard"], minlength=len(manifest.shards))
    if counted.tolist() != [entry.samples for entry in manifest.shards]:
        raise ShardError(f"{path}: sample counts per shard differ from the manifest's; pack the shards anew")
    listed = {file for entry in manifest.shards for file in (entry.file, fmt.index_file(entry.file))}
    found = {path.relative_to(shards.root).as_posix() for path in shards.root.glob("fold*/*")}
    if found - listed:
        raise ShardError(
            f"{shards.root / min(found - listed)}: not in the manifest; delete it (left by hand or by another packing)"
        )
    if (shards.root / PACKING_FOLDER).is_dir():
        raise ShardError(
            f"{shards.root / PACKING_FOLDER}: a packing is running or was stopped here; run it again to finish it"
        )


def _verify_hashes(shards: ShardSet, entry: fmt.ShardEntry) -> None:
    for name, sha256 in ((entry.file, entry.sha256), (fmt.index_file(entry.file), entry.index_sha256)):
        path = shards.root / name
        if not path.is_file():
            raise ShardError(f"{path}: missing; pack the shards anew")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise ShardError(
                f"{path}: SHA-256 differs from the manifest's, the file has changed; restore it or pack anew"
            )


def _verify_members(shards: ShardSet, metadata: Metadata, number: int, entry: fmt.ShardEntry) -> Iterator[None]:
    """Read a tar with the standard library, as any other reader would; compare it with samples.npy, CSV and index.

    Yields once per sample.
    """
    path = shards.root / entry.file
    numbers = np.flatnonzero(shards.samples["shard"] == number)
    index = (shards.root / fmt.index_file(entry.file)).read_text().splitlines()
    if index[:1] != [f"{fmt.INDEX_VERSION} {len(numbers)}"] or len(index) != len(numbers) + 1:
        raise ShardError(
            f"{shards.root / fmt.index_file(entry.file)}: not an index of {len(numbers)} samples; pack anew"
        )
    keys = set()
    with tarfile.open(path, "r:") as archive:
        for sample, line in zip(numbers, index[1:], strict=True):
            members = [archive.next() for _ in range(3)]
            if None in members:
                raise ShardError(f"{path}: ends before sample {sample}; pack anew")
            infos = [member for member in members if member is not None]
            keys.add(_verify_sample(shards, metadata, archive, infos, int(sample), line, path))
            yield
        if archive.next() is not None or len(keys) != len(numbers):
            raise ShardError(f"{path}: holds other samples than the manifest says; pack anew")


def _verify_sample(
    shards: ShardSet,
    metadata: Metadata,
    archive: tarfile.TarFile,
    infos: list[tarfile.TarInfo],
    sample: int,
    index_line: str,
    path: Path,
) -> str:
    """Check one sample, whose members are ``infos``; returns its key."""
    fields = shards.samples[sample]
    row = int(fields["row"])
    key = infos[0].name.partition(".")[0]
    where = f"{path}: {key} (sample {sample}, row {row + 1})"
    contents = [archive.extractfile(info).read() for info in infos]  # type: ignore[union-attr]  # regular files have content
    expected = fmt.members(key, shards.encoding.extension, contents[0], int(fields["label"]), metadata.row_json(row))
    if [(info.name, content) for info, content in zip(infos, contents, strict=True)] != expected:
        raise ShardError(f"{where}: key, label or row differ from the CSV's; pack anew")
    if (infos[0].offset_data, infos[0].size) != (int(fields["offset"]), int(fields["size"])):
        raise ShardError(f"{where}: lies elsewhere than {fmt.SAMPLES_FILE} says; pack anew")
    components = [f"{info.name.partition('.')[2]} {info.offset_data} {info.size} {info.name}" for info in infos]
    if index_line != " ".join(components):
        raise ShardError(f"{where}: the DALI index says otherwise; pack anew")
    payload = np.frombuffer(contents[0], np.uint8)
    shards.encoding.verify(Record(payload=payload, fields=fields, tables=shards.tables, name=where))
    return key
