"""``rgb``: pixels resized once, when packing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quaclrs.imaging.png import decode_png, resize_rgb
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import ArrayEncoding, Content, EncodedImage, ManifestTables, Record

_NPY_HEADER_BYTES = 128


class RgbEncoding(ArrayEncoding):
    """Payload: (S, S, 3) uint8 RGB, resized as Pillow does (antialiased bilinear)."""

    name = "rgb"
    content = Content.PIXELS
    depends_on_image_size = True

    def encode(self, png: bytes, name: str, image_size: int) -> EncodedImage:
        """The decoded image, resized to ``image_size``."""
        image, facts = decode_png(png, name)
        return EncodedImage(payload=fmt.npy_bytes(resize_rgb(image, image_size)), facts=facts)

    def planned_bytes(self, png_bytes: int, image_size: int) -> int:
        """Exact: every record has the same size."""
        return _NPY_HEADER_BYTES + 3 * image_size**2

    def image(self, record: Record) -> NDArray[np.uint8]:
        """The resized image."""
        return self.array(record)

    def shape(self, fields: Any, tables: ManifestTables) -> tuple[int, ...]:
        """(S, S, 3)."""
        assert tables.image_size is not None
        return (tables.image_size, tables.image_size, 3)

    def array_bytes(self, samples: NDArray[np.void], tables: ManifestTables) -> NDArray[np.int64]:
        """The same for each sample."""
        assert tables.image_size is not None
        return np.full(len(samples), 3 * tables.image_size**2, dtype=np.int64)
