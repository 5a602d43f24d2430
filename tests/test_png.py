"""Contract of imaging/png.py: good PNGs decode as by Pillow, bad ones raise one line with the image's name."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from png_trees import grid_image

from quaclrs.errors import DataError
from quaclrs.imaging.png import check_png, decode_png, resize_rgb, to_rgb

WIDTH, HEIGHT = 21, 10
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of the PNG specification
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width: int, height: int, bits: int, colour_type: int, interlaced: int = 0) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced))


def craft(bits: int, colour_type: int, lines: bytes, *extra: bytes, interlaced: int = 0) -> bytes:
    """A PNG made by hand, for kinds that Pillow does not write. ``lines`` are pixel rows with filter type 0."""
    start = header(WIDTH, HEIGHT, bits, colour_type, interlaced)
    return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def values(bits: int, colour_type: int) -> NDArray[Any]:
    """(HEIGHT, WIDTH * channels) random unsigned values, big-endian if they have 16 bits."""
    shape = (HEIGHT, WIDTH * CHANNELS[colour_type])
    return (
        np.random.default_rng(bits + colour_type)
        .integers(0, 1 << bits, shape)
        .astype(">u2" if bits == 16 else np.uint8)
    )


def as_lines(rows: NDArray[Any]) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in rows)


def interlaced_lines(rows: NDArray[Any], channels: int) -> bytes:
    """The seven Adam7 passes of 8-bit ``rows``."""
    pixels = rows.reshape(HEIGHT, WIDTH, channels)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes]
    return b"".join(as_lines(part.reshape(len(part), -1)) for part in parts if part.size)


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def made_image(mode: str) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    pixels[0, 0, 3] = 128
    image = Image.fromarray(pixels)
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


def opaque_rgba() -> Image.Image:
    image = made_image("RGBA")
    image.putalpha(255)
    return image


def corner(mode: str) -> object:
    return made_image(mode).getpixel((0, 0))


SIXTEEN = as_lines(values(16, RGB))
GOOD = {
    "opaque RGBA": (saved(opaque_rgba()), "RGBA", False, True),
    "RGBA with transparency": (saved(made_image("RGBA")), "RGBA", True, True),
    "RGB": (saved(made_image("RGB")), "RGB", False, True),
    "RGB with a transparent colour": (saved(made_image("RGB"), transparency=corner("RGB")), "RGB", True, True),
    "RGB with an unused transparent colour": (
        saved(Image.new("RGB", (4, 4)), transparency=(1, 2, 3)),
        "RGB",
        False,
        True,
    ),
    "palette": (saved(made_image("P")), "P", False, False),
    "palette with a transparent entry": (saved(made_image("P"), transparency=corner("P")), "P", True, False),
    "palette with alphas": (saved(made_image("P"), transparency=bytes([0, 100] + [255] * 14)), "P", True, False),
    "palette with opaque alphas": (saved(made_image("P"), transparency=bytes([255] * 16)), "P", False, False),
    "grey": (saved(made_image("L")), "L", False, False),
    "grey with a transparent value": (saved(made_image("L"), transparency=corner("L")), "L", True, False),
    "grey and alpha": (saved(made_image("LA")), "LA", True, False),
    "black and white": (saved(made_image("1")), "1", False, False),
    "16-bit grey": (saved(Image.fromarray(values(16, GREY).astype(np.uint16))), "I;16", False, False),
    "16-bit RGB": (craft(16, RGB, SIXTEEN), "RGB", False, False),
    "16-bit RGBA": (craft(16, RGBA, as_lines(values(16, RGBA))), "RGBA", True, False),
    "interlaced RGB": (craft(8, RGB, interlaced_lines(values(8, RGB), 3), interlaced=1), "RGB", False, True),
    "interlaced RGBA": (craft(8, RGBA, interlaced_lines(values(8, RGBA), 4), interlaced=1), "RGBA", True, True),
    "gamma": (craft(8, RGB, as_lines(values(8, RGB)), chunk(b"gAMA", b"\0\0\xb1\x8f")), "RGB", False, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_good_pngs_become_what_pillow_makes_of_them(kind: str) -> None:
    data, mode, transparent, plain = GOOD[kind]
    image, facts = decode_png(data, "a.png")
    assert (facts.mode, facts.transparent, facts.plain) == (mode, transparent, plain)
    assert (facts.width, facts.height) == image.size
    assert check_png(data, "a.png") == facts
    with Image.open(io.BytesIO(data)) as opened:
        oracle: Image.Image = opened
        if oracle.mode == "I;16":
            oracle = Image.fromarray((np.asarray(oracle) >> 8).astype(np.uint8))  # Pillow would clip it at 255
        # Pillow warns when it drops alphas given in bytes, but not after a conversion to RGBA
        expected = np.asarray(oracle.convert("RGBA").convert("RGB") if "alphas" in kind else oracle.convert("RGB"))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(to_rgb(data, "a.png"), expected)


@pytest.mark.parametrize("colour_type", [GREY, RGB, GREY_ALPHA, RGBA])
def test_every_16_bit_image_is_rendered_as_its_upper_8_bits(colour_type: int) -> None:
    """As libpng, OpenCV and DALI do. Pillow itself clips grey at 255."""
    samples = values(16, colour_type).reshape(HEIGHT, WIDTH, CHANNELS[colour_type])
    colours = samples if samples.shape[2] >= 3 else samples[:, :, :1].repeat(3, axis=2)
    data = craft(16, colour_type, as_lines(values(16, colour_type)))
    expected = (colours[:, :, :3] >> 8).astype(np.uint8)
    np.testing.assert_array_equal(to_rgb(data, "a.png"), expected)
    np.testing.assert_array_equal(np.asarray(decode_png(data, "a.png")[0]), expected)


def test_interlacing_changes_no_pixel() -> None:
    rows = values(8, RGBA)
    straight = craft(8, RGBA, as_lines(rows))
    np.testing.assert_array_equal(to_rgb(GOOD["interlaced RGBA"][0], "i.png"), to_rgb(straight, "s.png"))
    np.testing.assert_array_equal(to_rgb(straight, "s.png"), rows.reshape(HEIGHT, WIDTH, 4)[:, :, :3])


def test_alpha_is_dropped_not_blended() -> None:
    image = made_image("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(to_rgb(saved(image), "a.png"), np.asarray(image)[:, :, :3])


def test_resize_is_the_originals() -> None:
    image = grid_image("police", seed=3).convert("RGB")
    resized = resize_rgb(image, 32)
    assert resized.shape == (32, 32, 3)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))


def refusal(data: bytes, name: str = "row 7: data/fold3/b.png") -> str:
    """The message about an image that must be refused; the same from checking and from decoding."""
    messages = []
    for read in (check_png, decode_png):
        with pytest.raises(DataError) as caught:
            read(data, name)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{name}: ")
    assert "\n" not in messages[0]
    assert " at 0x" not in messages[0]  # an address would make manifests differ from run to run
    return messages[0]


@pytest.mark.parametrize("kind", ["opaque RGBA", "palette with alphas", "interlaced RGB"])
def test_a_png_cut_anywhere_is_refused(kind: str) -> None:
    data = GOOD[kind][0]
    for length in range(len(SIGNATURE), len(data)):
        message = refusal(data[:length])
        assert "truncated or damaged" in message, length
        assert "restore the file, or pack with --on_error skip to leave it out" in message


def test_less_than_a_signature_is_not_a_png() -> None:
    for length in range(1, len(SIGNATURE)):
        assert "not a PNG (wrong signature)" in refusal(SIGNATURE[:length])


def idat_start(data: bytes) -> int:
    return data.index(b"IDAT") + 4


def test_a_flipped_byte_in_the_pixels_is_found() -> None:
    data = GOOD["opaque RGBA"][0]
    start, end = idat_start(data), len(data) - 12
    for place in range(start, end):  # pixels and the CRC that follows them
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        assert "truncated or damaged" in refusal(bytes(damaged)), place


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"gAMA"])
def test_a_wrong_crc_is_found_in_any_chunk(kind: bytes) -> None:
    palette, gamma = chunk(b"PLTE", bytes(range(256)) * 3), chunk(b"gAMA", b"\0\0\xb1\x8f")
    data = craft(8, PALETTE, as_lines(values(8, PALETTE)), gamma, palette)
    assert check_png(data, "good.png").mode == "P"
    at = data.index(kind)
    (length,) = struct.unpack(">I", data[at - 4 : at])
    damaged = bytearray(data)
    damaged[at + 4 + length] ^= 1
    assert "truncated or damaged" in refusal(bytes(damaged))


def test_missing_pixel_rows_are_found() -> None:
    lines = as_lines(values(8, RGB))
    assert "truncated" in refusal(craft(8, RGB, lines[:-5]))


def test_random_damage_gives_a_message_or_an_image_never_another_error() -> None:
    dice = random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(GOOD[dice.choice(sorted(GOOD))][0])
        for _ in range(dice.choice([1, 2, 8])):
            damaged[dice.randrange(8, len(damaged))] = dice.randrange(256)
        try:
            decode_png(bytes(damaged), "a.png")
            outcomes.add("image")
        except DataError as error:
            outcomes.add(str(error).split(":")[1])
    assert " truncated or damaged" in outcomes


@pytest.mark.parametrize(("kind", "named"), [("JPEG", "JPEG"), ("GIF", "GIF"), ("BMP", "BMP"), ("WebP", "WebP or WAV")])
def test_another_format_named_png(kind: str, named: str) -> None:
    buffer = io.BytesIO()
    made_image("RGB").save(buffer, kind)
    message = refusal(buffer.getvalue())
    assert f"not a PNG (it looks like {named}); convert it to PNG or take its row out of the CSV" in message


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "the file is empty"), (b"<html>", "it looks like HTML or SVG text"), (b"hello, world", "wrong signature")],
)
def test_something_else_named_png(data: bytes, reason: str) -> None:
    assert f"not a PNG ({reason})" in refusal(data)


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow only warns about the first
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    bomb = header(side, side, 8, RGB) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    message = refusal(bomb)
    assert f"a decompression bomb? Image size ({side * side} pixels) exceeds limit" in message


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(width: int, height: int) -> None:
    data = header(width, height, 8, RGB) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert "truncated or damaged" in refusal(data)


def test_a_png_without_pixels_chunk_is_refused() -> None:
    assert "truncated or damaged" in refusal(header(5, 5, 8, RGB) + chunk(b"IEND", b""))
