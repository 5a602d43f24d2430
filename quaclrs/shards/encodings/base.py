"""What an encoding is: image file → payload when packing, payload → image when reading.

Encodings have no state, so one object serves all threads, and pickling one carries its class's name only.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quaclrs.errors import ShardError
from quaclrs.imaging.layout import Layout
from quaclrs.imaging.png import PngFacts, decode_png
from quaclrs.shards import format as fmt

Finding = tuple[int | bytes, ...]
"""What one image contributes to the shared tables of a two-pass encoding. Hashable, about 1 KB."""


class Content(Enum):
    """What loaders find in a payload; the value describes it in messages. Loaders declare which of these they read."""

    GRIDS = "grids to render"
    """(rows, columns) uint8 palette indices as .npy; layouts and palettes are in the manifest. Any image size."""
    PIXELS = "ready pixels"
    """(S, S, 3) uint8 RGB as .npy, already resized to ``--image_size`` S."""
    PNGS = "PNGs, which must be decoded"
    """A PNG file. Any image size."""
    OTHER = "images that only their encoding can decode"
    """Anything else: only :meth:`Encoding.image` can decode it."""

    @property
    def is_array(self) -> bool:
        """Whether payloads are .npy files of uint8 that need no decoding; their encoding is an ArrayEncoding."""
        return self in (Content.GRIDS, Content.PIXELS)


class SharedTables(Protocol):
    """The layouts and palettes that all records of a two-pass encoding share; they go into the manifest."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """By the ``layout`` field of samples.npy."""
        ...

    @property
    def palettes(self) -> tuple[NDArray[np.uint8], ...]:
        """(1..256, 3) uint8 each, by the ``palette`` field of samples.npy."""
        ...


@dataclass(frozen=True)
class ManifestTables:
    """The part of a manifest that records are decoded with."""

    image_size: int | None = None
    """S of payloads that are resized when packing; None where payloads keep the image's own size."""
    layouts: tuple[Layout, ...] = ()
    palettes: tuple[NDArray[np.uint8], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One image, encoded: its payload and what goes into samples.npy."""

    payload: bytes
    facts: PngFacts
    layout: int = 0
    palette: int = 0
    pixels: int = 0
    """:func:`quaclrs.shards.format.pixel_digest` of the original image, if :meth:`Encoding.verify` is to check it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One shard record, for reading."""

    payload: NDArray[np.uint8]
    """(bytes,), read-only."""
    fields: Any
    """The record of samples.npy: a scalar of :data:`quaclrs.shards.format.SAMPLE_DTYPE`."""
    tables: ManifestTables
    name: str
    """File, sample number and row, for messages."""


class Encoding(ABC):
    """One way to store images. A subclass must set the three attributes and define ``encode`` and ``image``."""

    name: ClassVar[str]
    """As in ``--encoding`` and in the manifest."""
    extension: ClassVar[str]
    """Of the payload's file name in the tar, without a dot."""
    content: ClassVar[Content]

    depends_on_image_size: ClassVar[bool] = False
    """Payloads are resized to ``--image_size``; the manifest records it, and the shards serve that size only."""
    keeps_original_files: ClassVar[bool] = False
    """A payload is the original file byte for byte, so other shards can be packed from these (``--from_shards``)."""

    @abstractmethod
    def encode(self, png: bytes, name: str, image_size: int) -> EncodedImage:
        """Check the image file ``png`` and encode it.

        ``name`` is the image's name for messages, ``image_size`` is ``--image_size``. Raises :class:`DataError`
        beginning with ``name`` for a damaged image or one that this encoding cannot store.
        """

    @abstractmethod
    def image(self, record: Record) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of ``record``: the original image; (S, S, 3) if the encoding depends on image_size.

        Raises :class:`QuaclrsError` naming the record where it cannot be decoded.
        """

    def planned_bytes(self, png_bytes: int, image_size: int) -> int:
        """Payload size of an image file of ``png_bytes`` bytes, estimated before packing.

        The estimate decides where one shard ends and the next begins. By default the size of the image file.
        """
        return png_bytes

    def memory_bytes(self, samples: NDArray[np.void], tables: ManifestTables, image_size: int) -> int:
        """Bytes of device memory that all ``samples`` take in the resident loader, for images of ``image_size``."""
        return len(samples) * 3 * image_size**2

    def verify(self, record: Record) -> None:
        """Check a payload against samples.npy. Raises :class:`DataError` or :class:`ShardError` naming the record.

        By default: the image has its recorded size, and the recorded pixels if a digest was recorded.
        """
        fields, image = record.fields, self.image(record)
        expected = (int(fields["height"]), int(fields["width"]), 3)
        if image.shape != expected or image.dtype != np.uint8:
            raise ShardError(f"{record.name}: holds {image.shape} {image.dtype}, not {expected} uint8; pack anew")
        if fields["pixels"] and fmt.pixel_digest(image) != int(fields["pixels"]):
            raise ShardError(f"{record.name}: decoded, its pixels are not the original's; pack anew")

    def is_made_from(self, record: Record, png: bytes, name: str, image_size: int) -> bool:
        """Whether ``record`` holds what packing the image file ``png`` would store. Arguments and errors as ``encode``.

        By default: equal size and transparency; then equal pixels where a digest is recorded, else an equal payload.
        """
        fields = record.fields
        if fields["pixels"]:
            image, facts = decode_png(png, name)
            same = fmt.pixel_digest(np.asarray(image)) == int(fields["pixels"])
        else:
            encoded = self.encode(png, name, image_size)
            facts, same = encoded.facts, encoded.payload == record.payload.tobytes()
        now = (facts.width, facts.height, fmt.flags_of(facts))
        return same and now == (int(fields["width"]), int(fields["height"]), int(fields["flags"]))

    def export(self, record: Record) -> bytes:
        """The image file that ``export`` writes: by default :meth:`image` as PNG."""
        return encode_png(Image.fromarray(self.image(record)))

    def advice(self, records: Sequence[Record], total_bytes: int, folder: Path) -> str | None:
        """A hint to the user after packing ``folder``, from a few of its ``records``; None by default.

        ``total_bytes`` is the size of all payloads.
        """
        return None


class ArrayEncoding(Encoding):
    """An encoding whose payload is the .npy file of one uint8 array; loaders read the array without decoding.

    The array is the last ``math.prod(shape)`` bytes of the payload.
    """

    extension = "npy"

    @abstractmethod
    def shape(self, fields: Any, tables: ManifestTables) -> tuple[int, ...]:
        """Shape of the array of the record with the samples.npy ``fields``."""

    @abstractmethod
    def array_bytes(self, samples: NDArray[np.void], tables: ManifestTables) -> NDArray[np.int64]:
        """(N,) int64: size of each sample's array."""

    def array(self, record: Record) -> NDArray[np.uint8]:
        """The array of ``record``, a view of its payload."""
        shape = self.shape(record.fields, record.tables)
        return record.payload[-math.prod(shape) :].reshape(shape)

    def memory_bytes(self, samples: NDArray[np.void], tables: ManifestTables, image_size: int) -> int:
        """The arrays themselves are kept in memory."""
        return int(self.array_bytes(samples, tables).sum())

    def verify(self, record: Record) -> None:
        """The payload is a .npy file of the right shape and dtype."""
        array, shape = _load_npy(record.payload.tobytes()), self.shape(record.fields, record.tables)
        if array is None or array.shape != shape or array.dtype != np.uint8:
            held = "no array" if array is None else f"{array.shape} {array.dtype}"
            raise ShardError(f"{record.name}: holds {held}, not {shape} uint8; pack anew")


@dataclass(frozen=True, kw_only=True)
class ExaminedImage:
    """What the first pass of a two-pass encoding keeps of one image for the second."""

    facts: PngFacts
    arrays: tuple[NDArray[Any], ...]
    """As many for every image: ``TwoPassEncoding.arrays_kept``."""
    pixels: int
    """:func:`quaclrs.shards.format.pixel_digest` of the original image."""
    finding: Finding


class TwoPassEncoding(Encoding):
    """An encoding whose payloads depend on the whole dataset, through tables that all records share.

    The packer calls ``examine`` for every image, then ``share`` once, then ``encode_shared`` for every image.
    """

    arrays_kept: ClassVar[int]
    """Number of arrays in :class:`ExaminedImage`."""

    @abstractmethod
    def examine(self, png: bytes, name: str) -> ExaminedImage:
        """First pass: check and decode one image file. Arguments and errors as :meth:`encode`."""

    @abstractmethod
    def share(self, findings: set[Finding]) -> SharedTables:
        """The tables for images with these ``findings``. Must not depend on the iteration order of the set."""

    @abstractmethod
    def encode_shared(self, examined: ExaminedImage, shared: SharedTables) -> EncodedImage:
        """Second pass: encode one image with the ``shared`` tables. ``examined.finding`` may be empty."""

    def encode(self, png: bytes, name: str, image_size: int) -> EncodedImage:
        """Encode one image as a dataset of its own."""
        examined = self.examine(png, name)
        return self.encode_shared(examined, self.share({examined.finding}))


def encode_png(image: Image.Image) -> bytes:
    """``image`` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def size_text(count: int) -> str:
    """``count`` bytes for a reader: ``12.3 MB`` or ``1.23 GB``."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _load_npy(payload: bytes) -> NDArray[Any] | None:
    try:
        return np.asarray(np.load(io.BytesIO(payload), allow_pickle=False))
    except (ValueError, EOFError, OSError):
        return None
