"""PNG bytes → RGB pixels, or a :class:`DataError` that says what is wrong with the file.

Pillow decodes, and its errors say what is wrong. :mod:`quaclrs.imaging.png_check` can prove without decoding that a
file is good, in a third of Pillow's time. It cannot say what is wrong with any other file; Pillow then decides. This
module refuses files that Pillow accepts although pixels are missing.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
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

SIXTEEN_BIT_GREY = ("I;16", "I;16B", "I")
"""Modes in which versions of Pillow open 16-bit grey; no other PNG has them."""

PLAIN_MODES = ("RGB", "RGBA")
"""Modes of 8-bit colour, which the dataset has. Pillow converts any other mode before other decoders see the image."""


@dataclass(frozen=True, kw_only=True)
class PngFacts:
    """The properties of a PNG that packing records."""

    width: int
    height: int
    mode: str
    """Pillow's mode: RGBA, RGB, P, L, LA, I;16, ..."""
    bits: int
    """Bits per channel in the file; of 16 bits, decoding keeps the upper 8."""
    transparent: bool
    """Whether some pixel is not opaque; converting to RGB drops the alpha channel."""

    @property
    def plain(self) -> bool:
        """Whether it is 8-bit RGB or RGBA, which every decoder decodes as Pillow does."""
        return self.mode in PLAIN_MODES and self.bits == 8


def decode_png(data: bytes, name: str) -> tuple[Image.Image, PngFacts]:
    """Check and decode one PNG: Pillow's ``convert("RGB")`` of it (16-bit values as ``value >> 8``), and its facts.

    ``name`` stands for the image in messages. Raises :class:`DataError` if the bytes are not a PNG, a chunk's CRC is
    wrong, the file is truncated, pixels are missing, or the image is a decompression bomb.
    """
    image = _load_checked(data, name)
    return _refusing_errors(lambda: _as_rgb(image), name), _facts(image, data)


def check_png(data: bytes, name: str) -> PngFacts:
    """The facts and the errors of :func:`decode_png`, without decoding where that is not needed."""
    return _proven_facts(data) or _facts(_load_checked(data, name), data)


def to_rgb(data: bytes, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a PNG that has been checked before. Errors as :func:`decode_png`, but CRCs are not checked."""
    return np.asarray(_refusing_errors(lambda: _as_rgb(_open(data)), name))


def resize_rgb(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) uint8: antialiased bilinear resize, as in the original trainer; the aspect ratio is not kept."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _as_rgb(image: Image.Image) -> Image.Image:
    """``image.convert("RGB")``, and for every 16-bit image ``value >> 8``, as libpng, OpenCV and DALI have it.

    Pillow does so for 16-bit colour, but clips 16-bit grey at 255.
    """
    if image.mode in SIXTEEN_BIT_GREY:
        image.load()
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _proven_facts(data: bytes) -> PngFacts | None:
    """The facts of an image that png_check proves to be good; None if it proves nothing."""
    stream = read_stream(data)
    if stream is None:
        return None
    try:
        image = _refusing_errors(lambda: _open(data), "")  # reads only the chunks before the pixels
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


def _load_checked(data: bytes, name: str) -> Image.Image:
    """The decoded image, in its own mode. Raises :class:`DataError` if the file is bad in any way."""
    if not data.startswith(PNG_SIGNATURE):
        raise DataError(f"{name}: not a PNG ({_guess_kind(data)}); convert it to PNG or take its row out of the CSV")

    def verify_then_load() -> Image.Image:
        if data.rfind(_END_CHUNK) < 0:  # Pillow accepts a file without these bytes, other decoders do not
            raise EOFError("the end of the file is missing")
        stream = read_stream(data)  # checks CRCs in a third of Pillow's time, but cannot say what is wrong
        if stream is None:
            _open(data).verify()  # the image object cannot be used afterwards
        image = _open(data)
        image.load()
        _refuse_incomplete(image, stream)
        return image

    return _refusing_errors(verify_then_load, name)


def _refuse_incomplete(image: Image.Image, stream: Stream | None) -> None:
    """Raise for files that Pillow accepts and other decoders refuse.

    Pillow leaves missing pixel rows black if the compressed stream has a proper end.
    """
    if stream is None:
        raise SyntaxError("its chunks are not as the PNG specification has them")
    if image.mode == "P" and image.palette is None:
        raise SyntaxError("there is no palette before its pixels")
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    # a last row that is not black was decoded, not left over
    may_lack_rows = stream.interlaced or last_row.getbbox(alpha_only=False) is None
    if may_lack_rows and not has_all_rows(stream):
        raise EOFError("there are fewer pixel rows than the header says")


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["PNG"])


def _refusing_errors(decode: Callable[[], Image.Image], name: str) -> Image.Image:
    """``decode()``, with every error of Pillow turned into a :class:`DataError` in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # converting to RGB drops transparency on purpose
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
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
    # a tRNS chunk counts only where a pixel uses it, and "raw", "A" does not exist for grey with alpha
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    alpha = np.frombuffer(image.tobytes("raw", "A"), np.uint8)  # getextrema() takes twice as long
    return bool(alpha.min() < 255)
