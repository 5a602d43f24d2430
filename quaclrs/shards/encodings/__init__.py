"""The registry of encodings. An encoding defines the payload of an image, and how to read the image from it."""

from __future__ import annotations

from typing import TypeVar

from quaclrs.settings import choose
from quaclrs.shards.encodings.base import Encoding
from quaclrs.shards.encodings.indexed import IndexedEncoding
from quaclrs.shards.encodings.png import PngEncoding
from quaclrs.shards.encodings.rgb import RgbEncoding

AnyEncoding = TypeVar("AnyEncoding", bound=Encoding)

_REGISTRY: dict[str, Encoding] = {}


def register_encoding(encoding: AnyEncoding) -> AnyEncoding:
    """Make ``encoding`` known by its name; returns it.

    Call it at the top level of the module that defines the class: a spawned worker process imports that module when it
    unpickles the encoding. Raises ``ValueError`` if an encoding of another class has the name already.
    """
    known = _REGISTRY.setdefault(encoding.name, encoding)
    if type(known).__qualname__ != type(encoding).__qualname__:
        raise ValueError(f"encoding {encoding.name!r} is registered already, as {type(known).__qualname__}")
    return encoding


def get_encoding(name: str) -> Encoding:
    """The encoding called ``name``. Raises :class:`UsageError` naming the known ones for any other name."""
    return _REGISTRY[choose("encoding", name, _REGISTRY)]


def encoding_names() -> tuple[str, ...]:
    """The names of all registered encodings; the default one first."""
    return tuple(_REGISTRY)


for _encoding in (PngEncoding(), IndexedEncoding(), RgbEncoding()):
    register_encoding(_encoding)
