"""Open a shard folder and read any sample by its number."""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quaclrs.config import Columns, folds_text
from quaclrs.data.metadata import Metadata, parse_metadata
from quaclrs.errors import ShardError
from quaclrs.imaging.layout import Layout
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings import encoding_names, get_encoding
from quaclrs.shards.encodings.base import ArrayEncoding, ManifestTables, Record
from quaclrs.shards.work_folder import PACKING_FOLDER, folds_not_packed


class ShardSet:
    """One shard folder. Tars are memory-mapped at their first use.

    Pickling, for worker processes, transfers the path, the tables and the encoding, but neither maps nor open files.
    Raises :class:`ShardError` naming the file when the folder is no shard folder, or is incomplete, damaged or of
    another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.encoding = get_encoding(self.manifest.encoding)
        self.samples = self._read_samples()
        """(N,) of :data:`format.SAMPLE_DTYPE`"""
        self._maps: dict[int, mmap.mmap] = {}
        self._descriptors: dict[int, int] = {}
        for entry in self.manifest.shards:
            self._check_size(entry)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, number: int) -> str:
        """Sample ``number`` for messages: its tar, and its row of the CSV counted from 1."""
        fields = self.samples[number]
        return f"{self.root / self.manifest.shards[fields['shard']].file}: sample {number} (row {fields['row'] + 1})"

    def payload(self, number: int) -> NDArray[np.uint8]:
        """(bytes,) uint8, read-only: the payload of sample ``number``, a view of the memory map."""
        fields = self.samples[number]
        return np.frombuffer(self._map(int(fields["shard"])), np.uint8, int(fields["size"]), int(fields["offset"]))

    def record(self, number: int) -> Record:
        """Sample ``number`` as its encoding reads it."""
        return Record(
            payload=self.payload(number), fields=self.samples[number], tables=self.tables, name=self.name(number)
        )

    def array(self, number: int) -> NDArray[np.uint8]:
        """The array in the .npy payload of sample ``number``, a view of the memory map.

        ``rgb``: (S, S, 3), ``indexed``: (rows, columns), both uint8. ``TypeError`` for an encoding without arrays.
        """
        return self._array_encoding.array(self.record(number))

    def array_bytes(self) -> NDArray[np.int64]:
        """(N,) int64: size of each sample's array in bytes. ``TypeError`` for an encoding without arrays."""
        return self._array_encoding.array_bytes(self.samples, self.tables)

    def image(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8: the original image of sample ``number``; (S, S, 3), resized, in ``rgb`` shards."""
        return self.encoding.image(self.record(number))

    def memory_bytes(self, image_size: int) -> int:
        """Bytes of device memory that all samples take in the resident loader, for images of ``image_size``."""
        return self.encoding.memory_bytes(self.samples, self.tables, image_size)

    @cached_property
    def tables(self) -> ManifestTables:
        """What all records of the folder share."""
        return ManifestTables(self.manifest.image_size, self.layouts, self.palettes)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """``indexed``: the layouts, by the ``layout`` field of :attr:`samples`."""
        try:
            return tuple(Layout.from_dict(layout) for layout in self.manifest.layouts)
        except ValueError as error:
            raise ShardError(
                f"{self.root / fmt.MANIFEST_FILE}: damaged layouts ({error}); pack the shards anew"
            ) from None

    @cached_property
    def palettes(self) -> tuple[NDArray[np.uint8], ...]:
        """``indexed``: (1..256, 3) uint8 each, by the ``palette`` field of :attr:`samples`."""
        return tuple(
            np.frombuffer(bytes.fromhex(palette), np.uint8).reshape(-1, 3) for palette in self.manifest.palettes
        )

    def read_arrays_into(self, numbers: list[int], buffer: memoryview, ends: list[int]) -> None:
        """Read the arrays of the samples ``numbers`` into ``buffer``, one after another.

        ``ends[i]`` is the position in ``buffer`` where the i-th array ends. Unlike :meth:`array` this maps nothing, so
        memory does not grow with the data read. Several threads may call it at the same time.
        """
        shard_of, array_end = self._shards_and_ends
        start = 0
        for number, end in zip(numbers, ends, strict=True):
            shard, size = shard_of[number], end - start
            descriptor = self._descriptors.get(shard) or self._open(shard)
            if os.preadv(descriptor, [buffer[start:end]], array_end[number] - size) != size:
                raise ShardError(f"{self.name(number)}: cannot be read whole; the file was cut after it was opened")
            start = end

    @cached_property
    def _shards_and_ends(self) -> tuple[list[int], list[int]]:
        """Each sample's shard, and the end of its payload (and so of its array) in the tar.

        Lists, because indexing a NumPy record takes longer than reading one from the page cache.
        """
        return self.samples["shard"].tolist(), (self.samples["offset"] + self.samples["size"]).tolist()

    @property
    def _array_encoding(self) -> ArrayEncoding:
        if not isinstance(self.encoding, ArrayEncoding):
            raise TypeError(f"{self.root}: {self.encoding.name} payloads are no arrays")
        return self.encoding

    def metadata(self, parsed: Metadata | None = None) -> Metadata:
        """The CSV that the shards carry; ``parsed`` itself, without parsing again, if it has the same content.

        Raises :class:`ShardError` when metadata.csv is not the CSV that the shards were packed from.
        """
        path, columns = self.root / fmt.METADATA_FILE, Columns(**self.manifest.columns)
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() != self.manifest.csv_fingerprint:
            raise ShardError(f"{path}: is not the CSV these shards were packed from; pack them anew")
        if parsed is not None and (parsed.fingerprint, parsed.columns) == (self.manifest.csv_fingerprint, columns):
            return parsed
        return parse_metadata(raw, path, columns)

    def image_keys(self, metadata: Metadata) -> list[str]:
        """For each row of the CSV, a text that is equal for rows that have one image.

        Rows of one fold have one image where they name the same file; rows of different folds where the payloads are
        equal too, because only the packer knew whether ``{file}`` was in each fold's folder or outside of them. Reads
        only payloads of equal names and sizes.
        """
        keys = [metadata.relative_path(row) for row in range(len(metadata))]
        alike: dict[tuple[str, int], list[int]] = {}
        for number, row in enumerate(self.samples["row"].tolist()):
            alike.setdefault((metadata.file[row], int(self.samples["size"][number])), []).append(number)
        for (file, _), numbers in alike.items():
            if len(np.unique(self.samples["fold"][numbers])) > 1:
                for number in numbers:
                    digest = (
                        int(self.samples["pixels"][number]) or hashlib.sha256(self.payload(number).data).hexdigest()
                    )
                    keys[int(self.samples["row"][number])] = f"{file} {digest}"
        return keys

    def close(self) -> None:
        """Close all files and maps. Arrays returned earlier stay valid: they keep their map alive."""
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):  # an array still uses it; the map is freed together with the array
                mapped.close()
        self._maps.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}, "_descriptors": {}}

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            path = self.root / self.manifest.shards[shard].file
            try:
                with path.open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise ShardError(f"{path}: cannot be read ({error.strerror}); restore it or pack anew") from None
        return self._maps[shard]

    def _open(self, shard: int) -> int:
        path = self.root / self.manifest.shards[shard].file
        try:
            opened = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror}); restore it or pack anew") from None
        descriptor = self._descriptors.setdefault(shard, opened)
        if descriptor != opened:  # another thread opened it in the meantime
            os.close(opened)
        return descriptor

    def _read_samples(self) -> NDArray[np.void]:
        path = self.root / fmt.SAMPLES_FILE
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() != self.manifest.samples_sha256:
            raise ShardError(f"{path}: does not match the manifest (SHA-256 differs); pack the shards anew")
        samples: NDArray[np.void] = np.load(io.BytesIO(raw), allow_pickle=False)
        if samples.dtype != fmt.SAMPLE_DTYPE or samples.shape != (self.manifest.num_samples,):
            raise ShardError(
                f"{path}: has {samples.shape} records of {samples.dtype}, not what version {fmt.FORMAT_VERSION} has"
            )
        samples.flags.writeable = False
        return samples

    def _check_size(self, entry: fmt.ShardEntry) -> None:
        path = self.root / entry.file
        try:
            size = path.stat().st_size
        except OSError:
            raise ShardError(f"{path}: missing; restore it or pack the shards anew") from None
        if size != entry.bytes:
            raise ShardError(
                f"{path}: has {size} bytes, the manifest says {entry.bytes}; restore it or pack the shards anew"
            )


def read_manifest(root: Path) -> fmt.Manifest:
    """The manifest of the shard folder ``root``. Raises as :class:`ShardSet`."""
    path = root / fmt.MANIFEST_FILE
    if not path.is_file():
        raise ShardError(_no_manifest(root))
    return fmt.Manifest.from_json(_read(path), str(path), encoding_names())


def _no_manifest(root: Path) -> str:
    """The error message about ``root``, which has no manifest: what it is instead, and the next step."""
    path = root / fmt.MANIFEST_FILE
    if root.is_file():
        return f"{root}: is a file; name the folder of shards that holds {fmt.MANIFEST_FILE}"
    if not root.is_dir():
        return f"{path}: no such file; make shards with quaclrs-pack"
    if (root / PACKING_FOLDER).is_dir():
        folds = folds_not_packed(root)
        missing = f"; fold(s) {folds_text(folds)} are missing" if folds else ""
        return (
            f"{path}: no such file (a packing was begun here: run quaclrs-pack again to finish it, if it is not "
            f"running{missing}); make shards with quaclrs-pack"
        )
    below = next(root.glob(f"*/{fmt.MANIFEST_FILE}"), None)
    if below is not None:
        return f"{root}: holds no shards itself; name the folder in it that does, such as {below.parent}"
    if any(next(root.glob(f"{level}*.[pP][nN][gG]"), None) for level in ("", "*/", "*/*/")):
        return (
            f"{root}: holds PNGs, not shards; give --csv_file and --spectrograms_dir, or pack it with quaclrs-pack and "
            "name the folder that this writes"
        )
    if next(root.glob("*/*.tar"), None) is not None:
        return f"{path}: no such file, beside tars that may be shards; restore it, or pack anew with quaclrs-pack"
    return f"{root}: holds no shards ({fmt.MANIFEST_FILE} is missing); make shards with quaclrs-pack"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); restore it or pack the shards anew") from None
