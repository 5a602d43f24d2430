"""``png``: the original files, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quaclrs.errors import ShardError
from quaclrs.imaging.indexed import NotIndexable, find_cells
from quaclrs.imaging.png import check_png, to_rgb
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import Content, EncodedImage, Encoding, Record, size_text


class PngEncoding(Encoding):
    """Payload: the PNG file itself. Loaders decode it and resize to any size."""

    name = "png"
    extension = "png"
    content = Content.PNGS
    keeps_original_files = True

    def encode(self, png: bytes, name: str, image_size: int) -> EncodedImage:
        """The file, checked but unchanged."""
        return EncodedImage(payload=png, facts=check_png(png, name))

    def image(self, record: Record) -> NDArray[np.uint8]:
        """The image as Pillow's ``convert("RGB")`` gives it; 16-bit values as ``value >> 8``."""
        return to_rgb(record.payload.tobytes(), record.name)

    def verify(self, record: Record) -> None:
        """The PNG is undamaged, and its size, mode and transparency are those recorded."""
        fields, facts = record.fields, check_png(record.payload.tobytes(), record.name)
        if (facts.width, facts.height) != (int(fields["width"]), int(fields["height"])):
            raise ShardError(
                f"{record.name}: is {facts.width}x{facts.height}, not {fields['width']}x{fields['height']}; pack anew"
            )
        if fmt.flags_of(facts) != int(fields["flags"]):
            raise ShardError(
                f"{record.name}: mode {facts.mode} or its transparency is not what {fmt.SAMPLES_FILE} says; pack anew"
            )

    def is_made_from(self, record: Record, png: bytes, name: str, image_size: int) -> bool:
        """Equal bytes."""
        return png == record.payload.tobytes()

    def export(self, record: Record) -> bytes:
        """The original file."""
        return record.payload.tobytes()

    def advice(self, records: Sequence[Record], total_bytes: int, folder: Path) -> str | None:
        """Whether ``--encoding indexed`` could store the images, and how much smaller they would be."""
        grid_bytes = 0
        for record in records:
            try:
                grid_bytes += find_cells(self.image(record)).layout.cells
            except NotIndexable as error:
                return f"note: {record.name} is no colour-mapped grid ({error}); --encoding indexed would refuse it"
        share = grid_bytes / sum(len(record.payload) for record in records)
        return (
            f"note: all of {len(records)} images looked at are colour-mapped grids: --encoding indexed would keep them "
            f"without loss in about {size_text(int(share * total_bytes))} ({share:.0%} of the PNGs), with nothing left "
            f"to decode (--from_shards {folder})"
        )
