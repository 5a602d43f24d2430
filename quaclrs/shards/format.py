"""The shard format, declared in one place for packer, reader, verifier and README.

A shard folder holds::

    manifest.json             version, encoding, classes, folds, size and SHA-256 of every shard; written last
    metadata.csv              the CSV it was packed from, byte for byte
    samples.npy               one SAMPLE_DTYPE record per sample: position of its payload, CSV row, fold, label
    fold01/fold01-000000.tar  plain USTAR; per sample KEY.png or KEY.npy, KEY.cls and KEY.json, in this order
    fold01/fold01-000000.idx  the same offsets for DALI's own WebDataset reader (wds2idx, version v1.2)
    sources.json              size and time of each source image, a hint for packing again; no reader needs it

KEY is ``fold01-000123``: the fold, and the position inside it. It is unique and has no dot. A *sample number* is a
position in samples.npy: fold by fold, shuffled inside each fold. The tars hold the samples in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from quaclrs.errors import ShardError
from quaclrs.imaging.png import PngFacts

FORMAT_NAME = "quaclrs-shards"
FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
METADATA_FILE = "metadata.csv"
SAMPLES_FILE = "samples.npy"

FLAG_NOT_PLAIN = 1
"""The image is not 8-bit RGB or RGBA but palette, grey or 16 bit; :mod:`quaclrs.imaging.png` converts it."""
FLAG_TRANSPARENT = 2
"""Some pixel is not opaque; training drops alpha."""
FLAG_ALPHA = 4
"""The image has an alpha channel, which ``export`` restores."""


def flags_of(facts: PngFacts) -> int:
    """The FLAG_ bits of samples.npy for an image."""
    flags = (
        (FLAG_NOT_PLAIN, not facts.plain),
        (FLAG_TRANSPARENT, facts.transparent),
        (FLAG_ALPHA, facts.mode.endswith("A")),
    )
    return sum(flag for flag, is_set in flags if is_set)


SAMPLE_DTYPE = np.dtype(
    [
        ("row", "<u4"),  # of metadata.csv, counted from 0 below the header
        ("fold", "<u2"),
        ("label", "<u2"),  # position in the manifest's classes
        ("shard", "<u4"),  # position in the manifest's shards
        ("flags", "<u4"),
        ("offset", "<u8"),  # of the payload's first byte in its tar
        ("size", "<u8"),  # of the payload in bytes
        ("width", "<u4"),  # of the original image, in pixels
        ("height", "<u4"),
        ("layout", "<u2"),  # indexed: position in the manifest's layouts
        ("palette", "<u2"),  # indexed: position in the manifest's palettes
        ("pixels", "<u8"),  # indexed: pixel_digest of the original image in RGB; else 0
    ]
)

TAR_BLOCK = tarfile.BLOCKSIZE
INDEX_VERSION = "v1.2"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of the manifest."""

    file: str
    """Relative to the shard folder, with forward slashes."""
    fold: int
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that ``--on_error skip`` left out."""

    row: int
    """Counted from 0, as in samples.npy."""
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json. It does not depend on time, place or number of workers of the packing."""

    encoding: str
    image_size: int | None
    """S of payloads resized to S × S (``rgb``); None where payloads keep the image's own size."""
    seed: int
    shard_size: int
    csv_fingerprint: str
    csv_name: str
    columns: dict[str, str]
    """``file``, ``label`` and ``fold`` to the names of these CSV columns."""
    source_fingerprint: str
    """SHA-256 over each packed row's path and file size."""
    classes: tuple[str, ...]
    folds: tuple[int, ...]
    num_samples: int
    samples_sha256: str
    shards: tuple[ShardEntry, ...]
    skipped: tuple[SkippedRow, ...] = ()
    layouts: tuple[dict[str, Any], ...] = ()
    """``indexed``: :meth:`quaclrs.imaging.layout.Layout.to_dict` of each."""
    palettes: tuple[str, ...] = ()
    """``indexed``: each palette's RGB triples, in hexadecimal."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts found while packing: image sizes, modes, transparent images."""

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        document = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, raw: bytes, name: str, known_encodings: Sequence[str]) -> Manifest:
        """Parse and check manifest.json; ``name`` is its path for messages.

        Raises :class:`ShardError` for another kind of file, another version or none of the ``known_encodings``.
        """
        try:
            document = json.loads(raw)
        except ValueError as error:
            raise ShardError(f"{name}: not JSON ({error}); pack the shards anew") from None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT_NAME:
            raise ShardError(f"{name}: not a manifest of {FORMAT_NAME}; point --shards at a folder of quaclrs-pack")
        version = document.pop("version", None)
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            step = "update quaclrs" if newer else "pack the shards anew"
            raise ShardError(f"{name}: format version {version!r}, this quaclrs reads version {FORMAT_VERSION}; {step}")
        if document.get("encoding") not in known_encodings:
            known = ", ".join(known_encodings)
            raise ShardError(
                f"{name}: unknown encoding {document.get('encoding')!r} (known: {known}); update quaclrs or pack anew"
            )
        try:
            document["shards"] = tuple(ShardEntry(**entry) for entry in document["shards"])
            document["skipped"] = tuple(SkippedRow(**entry) for entry in document["skipped"])
            for part in ("classes", "folds", "layouts", "palettes"):
                document[part] = tuple(document[part])
            return cls(**document)
        except (KeyError, TypeError) as error:
            raise ShardError(f"{name}: damaged manifest ({error}); pack the shards anew") from None

    @property
    def data_fingerprint(self) -> str:
        """SHA-256 over all shards' SHA-256: equal fingerprints mean equal training data, byte for byte."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.shards).encode()).hexdigest()


def shard_file(fold: int, number: int) -> str:
    """``fold01/fold01-000000.tar``: shard ``number`` of ``fold``."""
    return f"fold{fold:02d}/fold{fold:02d}-{number:06d}.tar"


def index_file(shard: str) -> str:
    """The DALI index beside ``shard``."""
    return shard.removesuffix(".tar") + ".idx"


def sample_key(fold: int, position: int) -> str:
    """KEY of the sample at ``position`` (from 0) inside its fold."""
    return f"fold{fold:02d}-{position:06d}"


def members(key: str, extension: str, payload: bytes, label: int, row: dict[str, str]) -> list[tuple[str, bytes]]:
    """The (name, content) pairs of one sample, in the order of the tar."""
    document = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
    return [(f"{key}.{extension}", payload), (f"{key}.cls", b"%d" % label), (f"{key}.json", document)]


def pixel_digest(rgb: NDArray[np.uint8]) -> int:
    """The first 8 bytes of SHA-256 over an image's pixels, (H, W, 3) uint8, as a little-endian number."""
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(rgb).data).digest()[:8], "little")


def npy_bytes(array: NDArray[Any]) -> bytes:
    """``array`` as the bytes of a .npy file, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def stored_bytes(content_bytes: int) -> int:
    """Size in a tar of a member of ``content_bytes``: its header, and its content in whole blocks."""
    return TAR_BLOCK + -(-content_bytes // TAR_BLOCK) * TAR_BLOCK


_HEADER_TEMPLATE = tarfile.TarInfo().tobuf(format=tarfile.USTAR_FORMAT)
"""The standard library's header of a regular file of mode 0644 without name, size, time or owner."""
_SIZE_FIELD, _CHECKSUM_FIELD = slice(124, 135), slice(148, 156)


def _tar_header(name: bytes, size: int) -> bytes:
    """The USTAR header of a member. Filling in a template takes a tenth of the time of ``TarInfo.tobuf``."""
    header = bytearray(_HEADER_TEMPLATE)
    header[: len(name)] = name
    header[_SIZE_FIELD] = b"%011o" % size
    header[_CHECKSUM_FIELD] = b" " * 8  # the checksum is computed with blanks in its own field
    header[_CHECKSUM_FIELD] = b"%06o\0 " % sum(header)
    return bytes(header)


class ShardWriter:
    """Writes members to an open binary file as a USTAR tar without times or owners; keeps its hash, size and index.

    The tar is complete only after :meth:`finish`. The caller must write to a temporary file and rename it afterwards,
    so that an exception leaves no incomplete tar under the final name.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._index: list[str] = []
        self.bytes = 0

    def add_sample(self, named_contents: Iterable[tuple[str, bytes]]) -> int:
        """Append one sample; returns the offset of its first member's content (the payload)."""
        components, first_offset = [], -1
        for name, content in named_contents:
            self._write(_tar_header(name.encode(), len(content)))
            first_offset = self.bytes if first_offset < 0 else first_offset
            components.append(f"{name.partition('.')[2]} {self.bytes} {len(content)} {name}")
            self._write(content)
            self._write(b"\0" * (-len(content) % TAR_BLOCK))
        self._index.append(" ".join(components))
        return first_offset

    def finish(self) -> str:
        """Write the end of the archive; returns the tar's SHA-256 in hexadecimal."""
        self._write(b"\0" * (2 * TAR_BLOCK))
        self._write(b"\0" * (-self.bytes % tarfile.RECORDSIZE))
        return self._hash.hexdigest()

    def index(self) -> bytes:
        """The .idx file of the samples written so far, as NVIDIA's wds2idx makes it."""
        return "\n".join([f"{INDEX_VERSION} {len(self._index)}", *self._index, ""]).encode()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)
