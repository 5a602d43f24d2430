"""``indexed``: grids of palette indices, without loss. Layouts and palettes are shared by the whole dataset.

Packing proves twice that an image is lossless: it compares the image's pixels with a rendering of its own grid, and
again with one of its final grid on the shared layout and palette.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quaclrs.errors import DataError, ShardError
from quaclrs.imaging.indexed import IndexedImage, NotIndexable, decode, encode, recode
from quaclrs.imaging.layout import Layout
from quaclrs.imaging.png import decode_png
from quaclrs.imaging.shared_layouts import Facts, SharedLayouts, image_facts, share_layouts
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import (
    ArrayEncoding,
    Content,
    EncodedImage,
    ExaminedImage,
    Finding,
    ManifestTables,
    Record,
    SharedTables,
    TwoPassEncoding,
    encode_png,
)


class IndexedEncoding(ArrayEncoding, TwoPassEncoding):
    """Payload: (rows, columns) uint8, the image's grid of palette indices."""

    name = "indexed"
    content = Content.GRIDS
    arrays_kept = 4

    def examine(self, png: bytes, name: str) -> ExaminedImage:
        """The image's own grid, palette and edges, and their :class:`Facts` as finding."""
        decoded, facts = decode_png(png, name)
        rgb = np.asarray(decoded)
        try:
            image = encode(rgb)
        except NotIndexable as error:
            raise DataError(
                f"{name}: {error}; pack with --encoding png or rgb, or leave it out with --on_error skip"
            ) from None
        edges = (np.array(image.layout.row_edges, np.int32), np.array(image.layout.column_edges, np.int32))
        return ExaminedImage(
            facts=facts,
            arrays=(image.grid, image.palette, *edges),
            pixels=fmt.pixel_digest(rgb),
            finding=image_facts(image),
        )

    def share(self, findings: set[Finding]) -> SharedTables:
        """The few layouts and palettes of the dataset, see :mod:`quaclrs.imaging.shared_layouts`."""
        return share_layouts(Facts(*cast("Any", finding)) for finding in findings)

    def encode_shared(self, examined: ExaminedImage, shared: SharedTables) -> EncodedImage:
        """The grid on the cheapest layout and the smallest palette that fit."""
        assert isinstance(shared, SharedLayouts)
        image = _indexed_image(examined)
        layout, palette = shared.choose(image_facts(image))
        final = recode(image, shared.layouts[layout], shared.palettes[palette])
        if fmt.pixel_digest(decode(final)) != examined.pixels:
            raise RuntimeError(
                "an image on a shared layout differs from its pixels: a bug in quaclrs.imaging; please report it"
            )
        return EncodedImage(
            payload=fmt.npy_bytes(final.grid),
            facts=examined.facts,
            layout=layout,
            palette=palette,
            pixels=examined.pixels,
        )

    def image(self, record: Record) -> NDArray[np.uint8]:
        """The original image, rendered from its grid."""
        palette = record.tables.palettes[int(record.fields["palette"])]
        layout = record.tables.layouts[int(record.fields["layout"])]
        return decode(IndexedImage(self.array(record), palette, layout))

    def shape(self, fields: Any, tables: ManifestTables) -> tuple[int, ...]:
        """(rows, columns) of the record's layout."""
        layout = tables.layouts[int(fields["layout"])]
        return (layout.rows, layout.columns)

    def array_bytes(self, samples: NDArray[np.void], tables: ManifestTables) -> NDArray[np.int64]:
        """One byte a cell."""
        cells = np.array([layout.cells for layout in tables.layouts], dtype=np.int64)
        return cells.take(samples["layout"])

    def verify(self, record: Record) -> None:
        """The grid has its layout's shape and its palette's colours, and renders to the original's pixels."""
        super().verify(record)
        highest = int(self.array(record).max())
        if highest >= len(record.tables.palettes[int(record.fields["palette"])]):
            raise ShardError(f"{record.name}: names colour {highest}, which its palette does not have; pack anew")
        if fmt.pixel_digest(self.image(record)) != int(record.fields["pixels"]):
            raise ShardError(f"{record.name}: rendered, its pixels are not the original's; pack anew")

    def export(self, record: Record) -> bytes:
        """A PNG of the original pixels; opaque RGBA where the original had an alpha channel."""
        image = Image.fromarray(self.image(record))
        if record.fields["flags"] & fmt.FLAG_ALPHA:
            image.putalpha(255)
        return encode_png(image)


def _indexed_image(examined: ExaminedImage) -> IndexedImage:
    grid, palette, rows, columns = examined.arrays
    layout = Layout(
        height=examined.facts.height,
        width=examined.facts.width,
        row_edges=tuple(rows.tolist()),
        column_edges=tuple(columns.tolist()),
    )
    return IndexedImage(grid, palette, layout)
