"""Open a shard folder and read any sample of it by number, through memory maps."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import mmap
import os
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from quaclrs.config import Columns, folds_text
from quaclrs.data.metadata import Metadata, parse_metadata
from quaclrs.errors import ShardError
from quaclrs.imaging.indexed import IndexedImage, decode
from quaclrs.imaging.layout import Layout
from quaclrs.shards import format as fmt
from quaclrs.shards.packing.coordination import folds_not_there


class ShardSet:
    """One shard folder. Tars are mapped when first read; pickling (for worker processes) carries the path, not the
    maps.

    Raises :class:`ShardError` naming the file when the folder is not one, is incomplete, damaged or of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        self.samples = self._read_samples()
        """(N,) of :data:`format.SAMPLE_DTYPE`"""
        self._maps: dict[int, mmap.mmap] = {}
        self._descriptors: dict[int, int] = {}
        for entry in self.manifest.shards:
            self._check_size(entry)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def encoding(self) -> str:
        """``png``, ``indexed`` or ``rgb``."""
        return self.manifest.encoding

    def name(self, number: int) -> str:
        """Sample ``number`` for messages: its tar, and its row of the CSV counted from 1."""
        record = self.samples[number]
        return f"{self.root / self.manifest.shards[record['shard']].file}: sample {number} (row {record['row'] + 1})"

    def payload(self, number: int) -> np.ndarray:
        """(bytes,) uint8, read-only: the payload of sample ``number`` where it lies in its map, nothing copied."""
        record = self.samples[number]
        return np.frombuffer(self._map(int(record["shard"])), np.uint8, int(record["size"]), int(record["offset"]))

    def array(self, number: int) -> np.ndarray:
        """The .npy payload of sample ``number`` as an array, nothing copied: ``rgb`` (S, S, 3), ``indexed`` (rows,
        columns) uint8.
        """
        shape = self.shape(number)
        return self.payload(number)[-math.prod(shape) :].reshape(shape)

    def shape(self, number: int) -> tuple[int, ...]:
        """Of the array of sample ``number``."""
        if self.encoding == "rgb":
            assert self.manifest.image_size is not None
            return (self.manifest.image_size, self.manifest.image_size, 3)
        layout = self.layouts[int(self.samples["layout"][number])]
        return (layout.rows, layout.columns)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """``indexed``: where cells lie, by the ``layout`` of :attr:`samples`."""
        try:
            return tuple(Layout.from_dict(layout) for layout in self.manifest.layouts)
        except ValueError as error:
            raise ShardError(
                f"{self.root / fmt.MANIFEST_FILE}: damaged layouts ({error}); pack the shards anew"
            ) from None

    @cached_property
    def palettes(self) -> tuple[np.ndarray, ...]:
        """``indexed``: (1..256, 3) uint8 each, by the ``palette`` of :attr:`samples`."""
        return tuple(
            np.frombuffer(bytes.fromhex(palette), np.uint8).reshape(-1, 3) for palette in self.manifest.palettes
        )

    def image(self, number: int) -> np.ndarray:
        """``indexed``: the original image of sample ``number``, (H, W, 3) uint8."""
        record = self.samples[number]
        palette, layout = self.palettes[int(record["palette"])], self.layouts[int(record["layout"])]
        return decode(IndexedImage(self.array(number), palette, layout))

    def read_arrays_into(self, numbers: list[int], buffer: memoryview, ends: list[int]) -> None:
        """Read the arrays of the samples ``numbers`` into ``buffer``, one after another; ``ends`` says where each one
        ends.

        Unlike :meth:`array` it maps nothing: memory does not grow with the data that were read, and threads can read
        side by side.
        """
        shard_of, array_end = self._places
        start = 0
        for number, end in zip(numbers, ends, strict=True):
            shard = shard_of[number]
            size = end - start
            # a numpy record would cost more to look at than a record to read
            if (
                os.preadv(
                    self._descriptors.get(shard) or self._open(shard), [buffer[start:end]], array_end[number] - size
                )
                != size
            ):
                raise ShardError(f"{self.name(number)}: cannot be read whole; the file was cut after it was opened")
            start = end

    @cached_property
    def _places(self) -> tuple[list[int], list[int]]:
        """Each sample's shard, and where its payload, whose last part the array is, ends in it."""
        return self.samples["shard"].tolist(), (self.samples["offset"] + self.samples["size"]).tolist()

    def metadata(self) -> Metadata:
        """The CSV that the shards carry. Raises :class:`ShardError` when it is not the one they were packed from."""
        path = self.root / fmt.METADATA_FILE
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() != self.manifest.csv_fingerprint:
            raise ShardError(f"{path}: is not the CSV these shards were packed from; pack them anew")
        return parse_metadata(raw, path, Columns(**self.manifest.columns))

    def close(self) -> None:
        """Unmap the tars that nobody looks at any more; arrays handed out earlier keep theirs alive."""
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):  # an array still points into it; the map goes with the array
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

    def __getstate__(self) -> dict[str, object]:
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
        if descriptor != opened:  # another thread was quicker
            os.close(opened)
        return descriptor

    def _read_samples(self) -> np.ndarray:
        path = self.root / fmt.SAMPLES_FILE
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() != self.manifest.samples_sha256:
            raise ShardError(f"{path}: does not match the manifest (SHA-256 differs); pack the shards anew")
        samples = np.load(io.BytesIO(raw), allow_pickle=False)
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
    """The manifest of the shard folder ``root``; errors as :class:`ShardSet`."""
    path = root / fmt.MANIFEST_FILE
    if not path.is_file():
        raise ShardError(f"{path}: no such file{_unfinished(root)}; make shards with quaclrs-pack")
    return fmt.Manifest.from_json(_read(path), str(path))


def _unfinished(root: Path) -> str:
    """What an error says about a folder without manifest."""
    if not root.is_dir():
        return ""
    folds = folds_not_there(root)
    missing = f"; fold(s) {folds_text(folds)} are missing" if folds else ""
    return f" (a packing was begun here: run quaclrs-pack again to finish it, if it is not running{missing})"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); restore it or pack the shards anew") from None
