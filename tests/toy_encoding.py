"""An encoding from outside the package, as a user would write it: raw RGB pixels, compressed by zlib."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from quaclrs.errors import ShardError
from quaclrs.imaging.png import decode_png
from quaclrs.shards.encodings import register_encoding
from quaclrs.shards.encodings.base import Content, EncodedImage, Encoding, Record
from quaclrs.shards.format import pixel_digest


class ZlibEncoding(Encoding):
    name = "zlib"
    extension = "zz"
    content = Content.OTHER

    def encode(self, png: bytes, name: str, image_size: int) -> EncodedImage:
        image, facts = decode_png(png, name)
        rgb = np.asarray(image)
        return EncodedImage(payload=zlib.compress(rgb.tobytes()), facts=facts, pixels=pixel_digest(rgb))

    def image(self, record: Record) -> NDArray[np.uint8]:
        shape = (int(record.fields["height"]), int(record.fields["width"]), 3)
        try:
            return np.frombuffer(zlib.decompress(record.payload.tobytes()), np.uint8).reshape(shape)
        except (zlib.error, ValueError) as error:
            raise ShardError(f"{record.name}: cannot be decompressed ({error}); pack anew") from None


register_encoding(ZlibEncoding())
