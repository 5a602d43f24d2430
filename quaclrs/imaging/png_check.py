"""Proves that a PNG is good without decoding its pixels.

It answers three questions: is every CRC right, is every pixel row there, and is any pixel transparent?

PNG stores each pixel row filtered: each byte is replaced by its difference, modulo 256, from a prediction made from the
pixels to the left and above. This is a bijection. So once the zlib stream is decompressed, the only error left is a
filter type that does not exist. A decoder spends most of its time undoing the filters, and none of the three questions
needs that.

An opaque image has alpha 255 everywhere, and PNG filters each channel independently. So its alpha bytes are stored as
known constants, which depend only on the filter type of the row and on whether the pixel is in the first column or the
first row (:data:`_OPAQUE_IN_FIRST_COLUMN`, :data:`_OPAQUE_IN_TOP_ROW`). Comparing with them replaces decoding.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from isal import isal_zlib
except ImportError:  # isal does not exist for every processor
    isal_zlib = None  # type: ignore[assignment]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

inflating: Any = isal_zlib or zlib
"""Decompresses and computes CRCs: isal takes half the time of most builds of zlib and is as strict."""
_DAMAGE = (zlib.error, inflating.error, ValueError)
"""The exceptions of reading a damaged stream."""

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Number of channels of each colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(first column, first row, column step, row step) of each pass of an interlaced image."""
_RGB, _RGBA = 2, 6
_HARMLESS = frozenset(
    [b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"tIME", b"eXIf"]
)
"""Chunks that change neither the pixels nor their transparency."""
_LAST_FILTER = 4
_OPAQUE = 255
_OPAQUE_IN_FIRST_COLUMN = np.array([255, 255, 0, 128, 0], np.uint8)
"""How alpha 255 is stored in the first column, by filter type 0 to 4 (none, left, above, average, Paeth).

There the pixel to the left counts as 0 and the pixel above is opaque. In the top left corner, where both count as 0,
every filter stores 255. Away from the first column and the top row, filter 0 stores 255 and every other filter 0.
"""
_OPAQUE_IN_TOP_ROW = np.array([255, 0, 255, 128, 0], np.uint8)
"""How alpha 255 is stored in the top row, where the pixel above counts as 0."""
_PIECE_BYTES = 1 << 18
"""Bytes to decompress at a time, which fit in the processor's cache. A whole image at once takes 1.5 times as long."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The header and the compressed pixels of a PNG."""

    width: int
    height: int
    bits: int
    colour_type: int
    interlaced: bool
    zlib_stream: bytes
    """The contents of all IDAT chunks, joined."""
    extras: frozenset[bytes]
    """The types of all chunks other than IHDR, IDAT and IEND."""
    trailing: bool
    """Whether some of ``extras`` come after the pixels. Pillow reads those last and may still refuse them."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one decompressed pixel row with its filter type, in an image that is not interlaced."""
        return self._row_bytes(self.width)

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of all decompressed pixel rows, each with its filter type."""
        if not self.interlaced:
            return self.height * self.row_bytes
        sides = ((-(-(self.width - x) // dx), -(-(self.height - y) // dy)) for x, y, dx, dy in _ADAM7)
        return sum(rows * self._row_bytes(columns) for columns, rows in sides if columns > 0 and rows > 0)

    def _row_bytes(self, width: int) -> int:
        return 1 + -(-width * self.bits * _CHANNELS[self.colour_type] // 8)


def read_stream(data: bytes) -> Stream | None:
    """The stream of a PNG with chunks in order, correct CRCs and an empty IEND at the end; None for any other bytes.

    The compressed pixels may still be damaged, or too few.
    """
    if not data.startswith(PNG_SIGNATURE):
        return None
    try:
        chunks = list(_chunks(data))
        kinds, contents = [kind for kind, _ in chunks], [content for _, content in chunks]
        width, height, bits, colour_type, deflate, filters, interlaced = struct.unpack(">IIBBBBB", contents[0])
        first = kinds.index(b"IDAT")
    except (struct.error, ValueError, IndexError):
        return None
    behind = first + kinds.count(b"IDAT")
    if (
        kinds[0] != b"IHDR"
        or kinds.count(b"IHDR") > 1
        or set(kinds[first:behind]) != {b"IDAT"}
        or len(contents[-1]) > 0
    ):
        return None
    if colour_type not in _CHANNELS or (deflate, filters) != (0, 0) or interlaced > 1:
        return None
    return Stream(
        width=width,
        height=height,
        bits=bits,
        colour_type=colour_type,
        interlaced=bool(interlaced),
        zlib_stream=b"".join(contents[first:behind]),
        extras=frozenset(kinds) - {b"IHDR", b"IDAT", b"IEND"},
        trailing=kinds[behind:] != [b"IEND"],
    )


def is_transparent(stream: Stream) -> bool | None:
    """Whether some pixel is not opaque. A bool also proves that every pixel is there and can be decoded.

    None proves nothing. The stream is damaged, too short or too long, or it is of a kind that is not handled here:
    other than 8-bit RGB and RGBA, interlaced, with a transparent colour, animated, or with chunks after the pixels.
    """
    if stream.bits != 8 or stream.colour_type not in (_RGB, _RGBA) or stream.interlaced:
        return None
    if stream.trailing or not stream.extras <= _HARMLESS:
        return None
    try:
        return _scan_rows(stream)
    except _DAMAGE:
        return None


def has_all_rows(stream: Stream) -> bool:
    """Whether the stream decompresses to at least the bytes of all pixel rows. Bytes after those are ignored."""
    inflate, packed, missing = inflating.decompressobj(-zlib.MAX_WBITS), stream.zlib_stream[2:], stream.unpacked_bytes
    try:
        while missing > 0 and (piece := inflate.decompress(packed, min(missing, _PIECE_BYTES))):
            packed = inflate.unconsumed_tail
            missing -= len(piece)
    except _DAMAGE:
        return False
    return missing <= 0


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(type, content) of each chunk up to IEND.

    Raises ``struct.error`` for a file that ends before IEND, ``ValueError`` for a wrong CRC.
    """
    view, at, kind = memoryview(data), len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if struct.unpack_from(">I", data, end)[0] != inflating.crc32(view[at + 4 : end]):
            raise ValueError("a chunk's CRC is wrong")
        yield kind, view[at + 8 : end]
        at = end + 4


def _scan_rows(stream: Stream) -> bool:
    """:func:`is_transparent` for 8-bit RGB or RGBA. Raises one of :data:`_DAMAGE` if nothing is proven."""
    rows_at_once = max(1, _PIECE_BYTES // stream.row_bytes)
    inflate, packed, transparent = inflating.decompressobj(), stream.zlib_stream, False
    for row in range(0, stream.height, rows_at_once):
        wanted = min(rows_at_once, stream.height - row) * stream.row_bytes
        piece = inflate.decompress(packed, wanted)
        packed = inflate.unconsumed_tail
        rows = np.frombuffer(piece, np.uint8).reshape(-1, stream.row_bytes)  # each: filter type, filtered pixels
        if len(piece) != wanted or rows[:, 0].max() > _LAST_FILTER:
            raise ValueError("too few bytes, or a filter that does not exist")
        # rows below one that is not opaque are stored differently, but then the answer is already known
        transparent = transparent or (stream.colour_type == _RGBA and not _are_opaque(rows, is_top=row == 0))
    if inflate.decompress(packed, 1) or not inflate.eof or inflate.unused_data:
        # at the end of the stream zlib has also compared its checksum
        raise ValueError("the stream does not end with the last row")
    return transparent


def _are_opaque(rows: NDArray[np.uint8], *, is_top: bool) -> bool:
    """Whether all alphas of the filtered ``rows`` (N, 1 + 4 W) are 255, given that the row above them is opaque.

    ``is_top`` says that there is no row above. The module docstring explains the constants.
    """
    if is_top:
        if rows[0, 4] != _OPAQUE or (rows[0, 8::4] != _OPAQUE_IN_TOP_ROW[rows[0, 0]]).any():
            return False
        rows = rows[1:]
    if (rows[:, 4] != _OPAQUE_IN_FIRST_COLUMN[rows[:, 0]]).any():
        return False
    unfiltered = rows[:, 0] == 0
    if unfiltered.any():
        if (rows[unfiltered, 8::4] != _OPAQUE).any():
            return False
        rows = rows[~unfiltered]
    # reduce whole rows: reading every fourth byte of each would take four times as long
    return not np.bitwise_or.reduce(rows, axis=0)[8::4].any()
