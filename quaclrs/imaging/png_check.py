"""What the bytes of a PNG prove without a pixel being decoded: every CRC, every pixel row there, some pixel transparent
or none.

PNG stores each pixel row filtered: as its difference, byte by byte and modulo 256, from a guess by the pixels to the
left and above. That is a bijection, so once the deflated stream is unpacked nothing can be wrong with the pixels but a
filter type that does not exist. Undoing the filters is what takes a decoder most of its time, and none of the answers
above needs it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from isal import isal_zlib
except ImportError:  # a processor for which there is none
    isal_zlib = None  # type: ignore[assignment]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

inflating: Any = isal_zlib or zlib
"""Unpacks and computes CRCs: isal takes half the time of most builds of zlib and is as strict."""
_DAMAGE = (zlib.error, inflating.error, ValueError)
"""What reading the stream raises where it is bad."""

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type to channels."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of the passes of an interlaced image."""
_RGB, _RGBA = 2, 6
_HARMLESS = frozenset(
    [b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"tIME", b"eXIf"]
)
"""Chunks that have no say in what the pixels are, nor in which of them are transparent."""
_LAST_FILTER = 4
_OPAQUE = 255
# how an alpha of 255 is stored, for filters 0 to 4 (none, left, above, average, Paeth), where its neighbours are 255
# too ...
_OPAQUE_IN_FIRST_COLUMN = np.array([255, 255, 0, 128, 0], np.uint8)  # ... with 0 to the left of it
_OPAQUE_IN_TOP_ROW = np.array(
    [255, 0, 255, 128, 0], np.uint8
)  # ... with 0 above it; in the corner it is 255 under each filter
# everywhere else it is 255 unfiltered, and 0 under each filter
_PIECE_BYTES = 1 << 18
"""Unpacked at a time: what the processor's cache holds. A whole image at once takes half as long again."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The pixels of a PNG as they lie in it."""

    width: int
    height: int
    bits: int
    colour_type: int
    interlaced: bool
    zlib_stream: bytes
    """The content of all IDAT chunks, joined."""
    extras: frozenset[bytes]
    """The kinds of all other chunks but the header and the end."""
    trailing: bool
    """Some of them stand behind the pixels, where Pillow reads them last and may still refuse them."""

    @property
    def row_bytes(self) -> int:
        """Of one pixel row with the filter type before it; of an image that is not interlaced."""
        return self._row_bytes(self.width)

    @property
    def unpacked_bytes(self) -> int:
        """Of all pixel rows, each with its filter type."""
        if not self.interlaced:
            return self.height * self.row_bytes
        sides = ((-(-(self.width - x) // dx), -(-(self.height - y) // dy)) for x, y, dx, dy in _ADAM7)
        return sum(rows * self._row_bytes(columns) for columns, rows in sides if columns > 0 and rows > 0)

    def _row_bytes(self, width: int) -> int:
        return 1 + -(-width * self.bits * _CHANNELS[self.colour_type] // 8)


def read_stream(data: bytes) -> Stream | None:
    """The stream of a PNG whose chunks are in order up to an empty IEND, each with the right CRC; None for any other
    bytes.

    The pixels in it may still be damaged, or too few.
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
    """Whether some pixel is not opaque, where it is proven that every pixel is there and can be decoded.

    None where nothing is proven: the stream is damaged, short or goes on behind the last row, or it is of a kind that
    is not looked into here (other than 8-bit RGB and RGBA, interlaced, with a transparent colour, animated, with chunks
    behind the pixels).
    """
    if stream.bits != 8 or stream.colour_type not in (_RGB, _RGBA) or stream.interlaced:
        return None
    if stream.trailing or not stream.extras <= _HARMLESS:
        return None
    try:
        return _look_through(stream)
    except _DAMAGE:
        return None


def has_all_rows(stream: Stream) -> bool:
    """Whether the stream unpacks to as many bytes as there are in all pixel rows; bytes behind those are
    not looked at.
    """
    inflate, packed, missing = inflating.decompressobj(-zlib.MAX_WBITS), stream.zlib_stream[2:], stream.unpacked_bytes
    try:
        while missing > 0 and (piece := inflate.decompress(packed, min(missing, _PIECE_BYTES))):
            packed = inflate.unconsumed_tail
            missing -= len(piece)
    except _DAMAGE:
        return False
    return missing <= 0


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each chunk up to IEND. Raises ``struct.error`` or ``ValueError`` for a file that ends before,
    a wrong CRC.
    """
    view, at, kind = memoryview(data), len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if struct.unpack_from(">I", data, end)[0] != inflating.crc32(view[at + 4 : end]):
            raise ValueError("a chunk's CRC is wrong")
        yield kind, view[at + 8 : end]
        at = end + 4


def _look_through(stream: Stream) -> bool:
    """:func:`is_transparent` for 8-bit RGB or RGBA. Raises one of :data:`_DAMAGE` where nothing is proven."""
    rows_at_once = max(1, _PIECE_BYTES // stream.row_bytes)
    inflate, packed, transparent = inflating.decompressobj(), stream.zlib_stream, False
    for row in range(0, stream.height, rows_at_once):
        wanted = min(rows_at_once, stream.height - row) * stream.row_bytes
        piece = inflate.decompress(packed, wanted)
        packed = inflate.unconsumed_tail
        rows = np.frombuffer(piece, np.uint8).reshape(
            -1, stream.row_bytes
        )  # (rows, row_bytes): filter type, filtered pixels
        if len(piece) != wanted or rows[:, 0].max() > _LAST_FILTER:
            raise ValueError("too few bytes, or a filter that does not exist")
        # once one row is not opaque, what the rows below it hold depends on it; but then the answer is known
        transparent = transparent or (stream.colour_type == _RGBA and not _opaque(rows, is_top=row == 0))
    if inflate.decompress(packed, 1) or not inflate.eof or inflate.unused_data:
        raise ValueError("the stream does not end with the last row")  # at its end zlib has compared its checksum
    return transparent


def _opaque(rows: np.ndarray, *, is_top: bool) -> bool:
    """Whether all alphas in ``rows`` (N, 1 + 4 W) are 255, given that those of the row above are; ``is_top``: there is
    no row above.

    Filters work on each channel by itself, so alphas of 255 are stored as what the tables say, and no others are.
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
    return not np.bitwise_or.reduce(rows, axis=0)[
        8::4
    ].any()  # whole rows: reading every fourth byte takes four times as long
