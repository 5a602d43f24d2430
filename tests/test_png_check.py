"""Contract of imaging/png_check.py: its verdict without decoding equals Pillow's after decoding, or is stricter."""

from __future__ import annotations

import io
import math
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from test_png import (
    CHANNELS,
    GOOD,
    GREY,
    PALETTE,
    RGB,
    RGBA,
    SIGNATURE,
    as_lines,
    chunk,
    header,
    interlaced_lines,
    saved,
    values,
)

from quaclrs.errors import DataError
from quaclrs.imaging import png_check
from quaclrs.imaging.png import check_png, decode_png
from quaclrs.imaging.png_check import has_all_rows, is_transparent, read_stream

STRICTER = (
    "fewer pixel rows than the header says",
    "not as the PNG specification has them",
    "no palette",
    "the end of the file is missing",
)
"""Reasons to refuse files that Pillow accepts."""
Verdict = tuple[tuple[int, int], str, bool] | None
"""Size, mode and whether some pixel is transparent; None for a refused file."""


@pytest.fixture(params=["isal", "zlib"], autouse=True, scope="module")
def inflating(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with isal, and with zlib, which replaces it on processors that isal does not support."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            png_check, "inflating", zlib if request.param == "zlib" else pytest.importorskip("isal.isal_zlib")
        )
        yield


# --- an encoder after the specification, and Pillow as the oracle ---


def paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    distances = abs(guess - left), abs(guess - above), abs(guess - corner)
    return (left, above, corner)[distances.index(min(distances))]


def filtered(pixels: NDArray[np.uint8], types: list[int]) -> bytes:
    """The pixel rows of (H, W, C) uint8 as PNG stores them, row y with filter ``types[y]``."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, -1).tolist()
    lines = bytearray()
    for y, kind in enumerate(types):
        lines.append(kind)
        above = rows[y - 1] if y else [0] * (width * channels)
        for x, value in enumerate(rows[y]):
            left, corner = (rows[y][x - channels], above[x - channels]) if x >= channels else (0, 0)
            guess = (0, left, above[x], (left + above[x]) // 2, paeth(left, above[x], corner))[kind]
            lines.append((value - guess) % 256)
    return bytes(lines)


def assembled(head: bytes, stream: bytes, idat_bytes: int | None = None, *extra: bytes) -> bytes:
    """A PNG of a compressed ``stream``, in IDAT chunks of ``idat_bytes``."""
    step = idat_bytes or max(len(stream), 1)
    parts = [chunk(b"IDAT", stream[start : start + step]) for start in range(0, len(stream), step)]
    return head + b"".join(extra) + b"".join(parts) + chunk(b"IEND", b"")


def by_pillow(data: bytes) -> Verdict:
    """Pillow's verdict after decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            Image.open(io.BytesIO(data), formats=["PNG"]).verify()
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            image.load()
            transparent = "A" in image.getbands() or "transparency" in image.info
            lowest = cast("int", image.convert("RGBA").getchannel("A").getextrema()[0]) if transparent else 255
            return image.size, image.mode, lowest < 255
        except Exception:  # Pillow raises many kinds
            return None


def by_us(data: bytes) -> Verdict:
    """Our verdict, the same by checking and by decoding. A file that only we refuse has a reason of STRICTER."""
    verdicts: list[Verdict] = []
    messages: list[str] = []
    for read in (check_png, lambda data, name: decode_png(data, name)[1]):
        try:
            facts = read(data, "a.png")
            verdicts.append(((facts.width, facts.height), facts.mode, facts.transparent))
        except DataError as error:
            verdicts.append(None)
            messages.append(str(error))
    assert verdicts[0] == verdicts[1]
    if messages:
        assert messages[0] == messages[1]
        assert by_pillow(data) is None or any(reason in messages[0] for reason in STRICTER), messages[0]
    return verdicts[0]


# --- good files ---


SIZED = {"channels": st.sampled_from([3, 4]), "width": st.integers(1, 9), "height": st.integers(1, 12)}


@settings(max_examples=25, deadline=None)
@given(data=st.data(), **SIZED)
def test_transparency_is_known_without_decoding(data: st.DataObject, channels: int, width: int, height: int) -> None:
    check_transparency(data, channels, width, height)


@pytest.mark.exhaustive
@settings(max_examples=300, deadline=None)
@given(data=st.data(), **SIZED)
def test_transparency_of_many_is_known_without_decoding(
    data: st.DataObject, channels: int, width: int, height: int
) -> None:
    check_transparency(data, channels, width, height)


def check_transparency(data: st.DataObject, channels: int, width: int, height: int) -> None:
    """An opaque image, or with one pixel that is not opaque; any filters; decompressed in pieces of any size."""
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )
    types = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    clear = channels == 4 and data.draw(st.booleans())
    if channels == 4:
        pixels[:, :, 3] = 255
    if clear:
        pixels[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1)), 3] = data.draw(
            st.integers(0, 254)
        )
    head = header(width, height, 8, RGBA if channels == 4 else RGB)
    png = assembled(head, zlib.compress(filtered(pixels, types)), data.draw(st.sampled_from([None, 1, 7])))
    assert by_pillow(png) == ((width, height), "RGBA" if channels == 4 else "RGB", clear)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(png_check, "_PIECE_BYTES", data.draw(st.sampled_from([1, 60, 1 << 18])))
        stream = read_stream(png)
        assert stream is not None
        assert is_transparent(stream) is clear  # never None, so Pillow is not needed
        assert has_all_rows(stream)
        assert by_us(png) == by_pillow(png)


@pytest.mark.parametrize("kind", GOOD)
def test_all_kinds_are_read_as_pillow_does(kind: str) -> None:
    data, mode, transparent, _ = GOOD[kind]
    stream = read_stream(data)
    assert stream is not None
    assert has_all_rows(stream)
    assert by_us(data) == by_pillow(data)
    assert is_transparent(stream) in (None, transparent)
    by_pillow_alone = mode not in ("RGB", "RGBA") or any(word in kind for word in ("16", "interlaced", "colour"))
    assert (is_transparent(stream) is None) == by_pillow_alone


MODES = st.sampled_from(["RGB", "RGBA", "P", "L", "LA", "1", "I;16"])


@settings(max_examples=20, deadline=None)
@given(data=st.data(), mode=MODES)
def test_whatever_pillow_writes(data: st.DataObject, mode: str) -> None:
    check_what_pillow_writes(data, mode)


@pytest.mark.exhaustive
@settings(max_examples=400, deadline=None)
@given(data=st.data(), mode=MODES)
def test_many_images_that_pillow_writes(data: st.DataObject, mode: str) -> None:
    check_what_pillow_writes(data, mode)


def check_what_pillow_writes(data: st.DataObject, mode: str) -> None:
    width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    noise = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (height, width, 4), dtype=np.uint8)
    noise[:, :, 3] |= data.draw(st.sampled_from([0, 255]))
    image = Image.fromarray(noise)
    image = Image.fromarray(noise.astype(np.uint16)[:, :, 0] * 200) if mode == "I;16" else image.convert(mode)
    png = saved(image, optimize=data.draw(st.booleans()), compress_level=data.draw(st.integers(0, 9)))
    assert by_pillow(png) is not None
    assert by_us(png) == by_pillow(png)


# --- bad files ---


BOMB_PIXELS = 89_478_485
"""Pillow refuses images with more pixels than this."""
DAMAGES = ("bytes", "rows", "cut", "longer", "checksum", "header", "missing row", "order")


def damage(data: bytes, what: str, dice: random.Random) -> bytes:
    """``data`` with its compressed stream, its pixel rows or its chunks changed, but every CRC right."""
    chunks = [(data[8:29][4:8], data[16:29])]
    at = 33
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    packed = b"".join(content for kind, content in chunks if kind == b"IDAT")
    if what == "order":
        dice.shuffle(chunks)
        return SIGNATURE + b"".join(chunk(*one) for one in chunks)
    if what == "bytes":
        packed = flipped(packed, dice)
    elif what == "rows":
        packed = zlib.compress(flipped(zlib.decompress(packed), dice))
    elif what == "cut":
        packed = zlib.compress(zlib.decompress(packed)[: dice.randrange(len(zlib.decompress(packed)))])
    elif what == "longer":
        packed = dice.choice(
            [packed + b"more", zlib.compress(zlib.decompress(packed) + bytes(dice.choice([1, 50, 5000])))]
        )
    elif what == "checksum":
        packed = packed[:-4] + dice.choice([b"", b"\0\0", b"\0\0\0\0"])
    elif what == "header":
        damaged = flipped(chunks[0][1], dice)
        while 1 << 20 < math.prod(struct.unpack(">II", damaged[:8])) < BOMB_PIXELS:  # would take seconds to decode
            damaged = flipped(chunks[0][1], dice)
        chunks[0] = (chunks[0][0], damaged)
    else:  # Pillow leaves the missing row black, if there is only one IDAT chunk
        width, _, bits, colour_type = struct.unpack(">IIBB", chunks[0][1][:10])
        row_bytes = 1 + -(-width * bits * CHANNELS[colour_type] // 8)
        packed = zlib.compress(zlib.decompress(packed)[:-row_bytes])
    before = [chunk(kind, content) for kind, content in chunks if kind not in (b"IDAT", b"IEND")]
    idat_bytes = None if what == "missing row" else dice.choice([None, 1, 30])
    return assembled(SIGNATURE, packed, idat_bytes, *before)


def flipped(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 3])):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("times", [4, pytest.param(40, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", GOOD)
def test_damage_under_a_right_crc_is_judged_as_by_pillow_or_stricter(kind: str, times: int) -> None:
    dice = random.Random(kind)
    verdicts = set()
    for what in DAMAGES * times:
        damaged = damage(GOOD[kind][0], what, dice)
        ours, pillows = by_us(damaged), by_pillow(damaged)
        assert ours in (None, pillows)
        verdicts.add((ours is None, pillows is None))
    assert {(True, True), (True, False)} <= verdicts


def test_a_palette_image_without_a_palette_is_refused() -> None:
    lines = zlib.compress(as_lines(values(8, PALETTE)))
    for extra in ((), (chunk(b"tRNS", b"\0\1"),)):
        png = assembled(header(21, 10, 8, PALETTE), lines, None, *extra)
        with pytest.raises(DataError, match="there is no palette before its pixels; restore"):
            decode_png(png, "a.png")
        assert by_us(png) is None


def test_chunks_out_of_order_are_refused() -> None:
    packed = zlib.compress(as_lines(values(8, RGB)))
    parts = chunk(b"IDAT", packed[:-5]), chunk(b"tIME", bytes(7)), chunk(b"IDAT", packed[-5:]), chunk(b"IEND", b"")
    png = header(21, 10, 8, RGB) + b"".join(parts)
    assert by_us(png) is None


@pytest.mark.parametrize("colours", [RGB, RGBA])
def test_chunks_behind_the_pixels_count_as_by_pillow(colours: int) -> None:
    """Pillow reads them after the pixels. A file that Pillow refuses for one of them must not be proven good."""
    packed = zlib.compress(as_lines(values(8, colours)))
    start = header(21, 10, 8, colours) + chunk(b"IDAT", packed)
    for behind, good in (
        (chunk(b"tEXt", b"a\0b"), True),
        (chunk(b"pHYs", b"\1"), False),
        (chunk(b"gAMA", b"\1"), False),
    ):
        assert (by_us(start + behind + chunk(b"IEND", b"")) is not None) == good
    assert by_us(start + chunk(b"IEND", b"abc")) is None


def test_a_second_header_is_refused() -> None:
    """Pillow uses the height of the last header, and leaves the rows black that the image does not have."""
    packed = zlib.compress(as_lines(values(8, RGB)))
    second = header(21, 20, 8, RGB)[len(SIGNATURE) :]
    assert by_us(header(21, 10, 8, RGB) + second + chunk(b"IDAT", packed) + chunk(b"IEND", b"")) is None


SHORT = {
    "RGB": (8, RGB, as_lines(values(8, RGB))),
    "RGBA": (8, RGBA, as_lines(values(8, RGBA))),
    "palette": (8, PALETTE, as_lines(values(8, PALETTE))),
    "grey": (8, GREY, as_lines(values(8, GREY))),
    "16-bit grey": (16, GREY, as_lines(values(16, GREY))),
    "16-bit RGBA": (16, RGBA, as_lines(values(16, RGBA))),
}


@pytest.mark.parametrize("missing_rows", [1, 4, 9])
@pytest.mark.parametrize("kind", SHORT)
def test_missing_rows_under_a_proper_end_are_found(kind: str, missing_rows: int) -> None:
    """Pillow leaves such rows black and reports nothing."""
    bits, colour_type, lines = SHORT[kind]
    palette = chunk(b"PLTE", bytes(range(256)) * 3)
    head = header(21, 10, bits, colour_type) + (palette if colour_type == PALETTE else b"")
    row = len(lines) // 10
    assert by_us(assembled(head, zlib.compress(lines))) is not None
    short = assembled(head, zlib.compress(lines[: len(lines) - missing_rows * row]))
    assert by_pillow(short) is not None
    for read in (check_png, decode_png):
        with pytest.raises(DataError) as caught:
            read(short, "row 7: b.png")
        assert str(caught.value) == (
            "row 7: b.png: truncated or damaged: there are fewer pixel rows than the header says; "
            "restore the file, or pack with --on_error skip to leave it out"
        )


@pytest.mark.parametrize(("width", "height"), [(2, 3), (5, 1), (3, 5), (21, 10)])
def test_missing_rows_of_an_interlaced_image_are_found(width: int, height: int) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (10, 21 * 3), dtype=np.uint8)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    pixels = rows.reshape(10, 21, 3)[:height, :width]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes]
    lines = b"".join(as_lines(part.reshape(len(part), -1)) for part in parts if part.size)
    assert (width, height) != (21, 10) or lines == interlaced_lines(rows, 3)
    head = header(width, height, 8, RGB, interlaced=1)
    assert by_us(assembled(head, zlib.compress(lines))) == ((width, height), "RGB", False)
    last = next(part for part in reversed(parts) if part.size)
    short = assembled(head, zlib.compress(lines[: -(1 + last.shape[1] * 3)]))
    with pytest.raises(DataError, match="fewer pixel rows than the header says"):
        check_png(short, "a.png")


def test_a_black_last_row_is_no_missing_row() -> None:
    black = Image.new("RGB", (7, 5))
    assert by_us(saved(black)) == ((7, 5), "RGB", False)
    clear = Image.new("RGBA", (7, 5))
    assert by_us(saved(clear)) == ((7, 5), "RGBA", True)


def test_a_stream_that_never_ends_is_not_decompressed_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = as_lines(values(8, RGB))
    bomb = assembled(header(21, 10, 8, RGB), zlib.compress(lines + bytes(10**7)))
    unpacked, decompressobj = [], png_check.inflating.decompressobj

    class Counting:
        def __init__(self, *arguments: int) -> None:
            self.inner = decompressobj(*arguments)

        def decompress(self, packed: bytes, most: int) -> bytes:
            unpacked.append(most)
            piece: bytes = self.inner.decompress(packed, most)
            return piece

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    with monkeypatch.context() as patched:
        patched.setattr(png_check.inflating, "decompressobj", Counting)
        assert by_us(bomb) == by_pillow(bomb)
    assert 0 < sum(unpacked) < 10 * len(lines)
