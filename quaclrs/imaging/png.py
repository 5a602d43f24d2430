"""PNG bytes to RGB pixels, with every way a file can be bad told apart.

Pillow decodes, and says what is wrong with a file. Only that a file is good can be proven without it, in a third of its
time.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from quaclrs.errors import DataError
from quaclrs.imaging.png_check import PNG_SIGNATURE, Stream, has_all_rows, is_transparent, read_stream

_OTHER_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP or WAV",
    b"<": "HTML or SVG text",
}

_END_CHUNK = b"\0\0\0\0IEND\xae\x42\x60\x82"
_BIT_DEPTH_OFFSET = 24

PLAIN_MODES = ("RGB", "RGBA")
"""8-bit colour as the dataset has it; any other mode is converted by Pillow before anything else sees it."""


@dataclass(frozen=True, kw_only=True)
class PngFacts:
    """What decoding a PNG told about it."""

    width: int
    height: int
    mode: str
    """Pillow's mode: RGBA, RGB, P, L, LA, I;16, ..."""
    bits: int
    """Per channel, in the file; Pillow keeps 8 of 16 in colour images."""
    transparent: bool
    """Some pixel is not opaque; converting to RGB drops that."""

    @property
    def plain(self) -> bool:
        """8-bit RGB or RGBA: every decoder agrees with Pillow on it."""
        return self.mode in PLAIN_MODES and self.bits == 8


def decode_png(data: bytes, name: str) -> tuple[Image.Image, PngFacts]:
    """Check and decode one PNG: the RGB image as Pillow's ``convert("RGB")`` makes it, and its facts.

    ``name`` names the image in messages. Raises :class:`DataError` when the bytes are not a PNG, a chunk's CRC is
    wrong, the file is cut short or its pixels are not all there, or it is a decompression bomb.
    """
    image = _checked(data, name)
    return _guarded(lambda: image.convert("RGB"), name), _facts(image, data)


def check_png(data: bytes, name: str) -> PngFacts:
    """The facts of :func:`decode_png` and its errors, without the image."""
    return _proven_facts(data) or _facts(_checked(data, name), data)


def to_rgb(data: bytes, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of a PNG already proven good; errors as :func:`decode_png`, without the check of CRCs."""
    return np.asarray(_guarded(lambda: _open(data).convert("RGB"), name))


def resize_rgb(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the original's resize, antialiased bilinear, aspect ratio not kept."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _proven_facts(data: bytes) -> PngFacts | None:
    """The facts of an image that is proven to be good; None for any other, good or bad."""
    stream = read_stream(data)
    if stream is None:
        return None
    try:
        image = _guarded(lambda: _open(data), "")  # reads what comes before the pixels
    except DataError:
        return None
    transparent = is_transparent(stream)
    if transparent is None:
        return None
    return PngFacts(width=image.width, height=image.height, mode=image.mode, bits=stream.bits, transparent=transparent)


def _facts(image: Image.Image, data: bytes) -> PngFacts:
    return PngFacts(
        width=image.width,
        height=image.height,
        mode=image.mode,
        bits=data[_BIT_DEPTH_OFFSET],
        transparent=_is_transparent(image),
    )


def _checked(data: bytes, name: str) -> Image.Image:
    if not data.startswith(PNG_SIGNATURE):
        raise DataError(f"{name}: not a PNG ({_guess_kind(data)}); convert it to PNG or take its row out of the CSV")

    def verify_then_load() -> Image.Image:
        if data.rfind(_END_CHUNK) < 0:  # Pillow does without the last bytes, other decoders do not
            raise EOFError("the end of the file is missing")
        stream = read_stream(data)  # checks CRCs in a third of the time that Pillow takes, but cannot say what is wrong
        if stream is None:
            _open(data).verify()  # afterwards that image object is spent
        image = _open(data)
        image.load()
        _refuse_what_pillow_takes(image, stream)
        return image

    return _guarded(verify_then_load, name)


def _refuse_what_pillow_takes(image: Image.Image, stream: Stream | None) -> None:
    """Raise where other decoders would: Pillow leaves rows black that are missing from a stream with a proper end."""
    if stream is None:
        raise SyntaxError("its chunks are not as the PNG specification has them")
    if image.mode == "P" and image.palette is None:
        raise SyntaxError("there is no palette before its pixels")
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    may_lack_rows = stream.interlaced or last_row.getbbox(alpha_only=False) is None  # else something was drawn there
    if may_lack_rows and not has_all_rows(stream):
        raise EOFError("there are fewer pixel rows than the header says")


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["PNG"])


def _guarded(decode: Callable[[], Image.Image], name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings(
            "ignore", "Palette images with Transparency", UserWarning
        )  # dropping it is what is asked for
        try:
            return decode()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            reason = f"a decompression bomb? {_first_line(error)}"
        except UnidentifiedImageError:  # its text holds a memory address
            reason = "truncated or damaged: the header cannot be read"
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
            reason = f"truncated or damaged: {_first_line(error)}"
    raise DataError(f"{name}: {reason}; restore the file, or pack with --on_error skip to leave it out")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _guess_kind(data: bytes) -> str:
    if not data:
        return "the file is empty"
    return next(
        (f"it looks like {kind}" for start, kind in _OTHER_SIGNATURES.items() if data.startswith(start)),
        "wrong signature",
    )


def _is_transparent(image: Image.Image) -> bool:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    if (
        image.mode != "RGBA"
    ):  # a tRNS chunk counts only when some pixel uses it; grey with alpha cannot be taken apart below
        image = image.convert("RGBA")
    alpha = np.frombuffer(image.tobytes("raw", "A"), np.uint8)  # getextrema would take twice as long
    return bool(alpha.min() < 255)
