"""Lossless conversion: RGB image ↔ (grid of palette indices, palette, layout).

A colour-mapped matrix drawn as an image is its grid, enlarged by repeating pixels. Equal neighbouring pixel rows
(columns) belong to one row (column) of cells. So comparing neighbours finds the grid, without any assumption about how
the image was drawn. A row or column of cells that equals its neighbour everywhere is merged with it: the grid that is
*seen* may be coarser than the grid that was drawn.

An image that does not convert exactly raises :class:`NotIndexable` with the reason.
:mod:`quaclrs.imaging.shared_layouts` finds layouts and palettes for many images; :func:`recode` converts an image to
them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quaclrs.errors import DataError
from quaclrs.imaging.layout import Layout
from quaclrs.imaging.resample import MAX_SIDE

MAX_COLOURS = 256
"""Most colours of a palette, because an index is one byte."""


class NotIndexable(DataError):
    """The image is not a grid of at most 256 colours, or does not fit the given layout or palette.

    The message says which, and by how much.
    """


@dataclass(frozen=True, eq=False)
class IndexedImage:
    """A losslessly indexed image: pixel (y, x) is ``palette[grid[row of y, column of x]]``."""

    grid: NDArray[np.uint8]
    """(layout.rows, layout.columns), C-contiguous."""
    palette: NDArray[np.uint8]
    """(1..256, 3) RGB."""
    layout: Layout


def find_cells(rgb: NDArray[np.uint8]) -> IndexedImage:
    """Index ``rgb`` (H, W, 3) uint8 on the coarsest layout that fits, with its colours in ascending RGB order.

    Raises :class:`NotIndexable` for more than 256 colours (with their number) and for a side above 16384 pixels, and
    ``ValueError`` for another shape or dtype.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"an image must be (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
    height, width, _ = rgb.shape
    if max(height, width) > MAX_SIDE:
        raise NotIndexable(f"the image is {width}×{height} pixels; an indexed image has at most {MAX_SIDE} a side")
    words = _widest_words(rgb)
    row_edges = _run_starts((words[1:] != words[:-1]).any(axis=1))
    codes = pack_colours(rgb[row_edges])  # (rows, W) uint32; from here on one pixel row per row of cells
    column_edges = _run_starts((codes[:, 1:] != codes[:, :-1]).any(axis=0))
    codes = codes[:, column_edges]  # (rows, columns) uint32
    palette_codes = _distinct(codes)
    if len(palette_codes) > MAX_COLOURS:
        raise NotIndexable(f"the image has {len(palette_codes):,} colours; an indexed image has at most {MAX_COLOURS}")
    layout = Layout(
        height=height, width=width, row_edges=tuple(row_edges.tolist()), column_edges=tuple(column_edges.tolist())
    )
    return IndexedImage(_positions(codes, palette_codes), unpack_colours(palette_codes), layout)


def encode(
    rgb: NDArray[np.uint8], layout: Layout | None = None, palette: NDArray[np.uint8] | None = None
) -> IndexedImage:
    """Index ``rgb`` (H, W, 3) uint8, on ``layout`` and ``palette`` if given, and verify every decoded pixel.

    Raises :class:`NotIndexable` as :func:`find_cells` does, and if the image does not fit the layout or the palette.
    """
    image = find_cells(rgb)
    image = recode(image, layout or image.layout, image.palette if palette is None else palette)
    if not np.array_equal(decode(image), rgb):
        raise RuntimeError(
            "an indexed image differs from its pixels: a bug in quaclrs.imaging.indexed; please report it"
        )
    return image


def decode(image: IndexedImage) -> NDArray[np.uint8]:
    """The image's pixels, (H, W, 3) uint8."""
    layout = image.layout
    heights = np.diff(layout.row_edges, append=layout.height)
    widths = np.diff(layout.column_edges, append=layout.width)
    wide = np.repeat(image.palette[image.grid], widths, axis=1)  # (rows, W, 3); widening first copies less
    return np.repeat(wide, heights, axis=0)


def recode(image: IndexedImage, layout: Layout, palette: NDArray[np.uint8]) -> IndexedImage:
    """The same pixels on a finer ``layout`` (equal cells repeated) and another ``palette`` (1..256, 3) uint8.

    Raises :class:`NotIndexable` if the sizes differ, the layout lacks an edge of the image, or the palette lacks a
    colour.
    """
    if layout == image.layout:
        grid = image.grid
    else:
        if layout.size != image.layout.size:
            raise NotIndexable(f"the image is {_size(image.layout)} pixels, the layout {_size(layout)}")
        rows = _coarse_cells("row", image.layout.row_edges, layout.row_edges)
        columns = _coarse_cells("column", image.layout.column_edges, layout.column_edges)
        grid = image.grid[rows][:, columns]
    if not np.array_equal(palette, image.palette):
        grid = _positions_in_palette(image.palette, palette)[grid]
    return IndexedImage(np.ascontiguousarray(grid), palette, layout)


def pack_colours(rgb: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(..., 3) uint8 → (...) uint32 ``R << 16 | G << 8 | B``."""
    codes: NDArray[np.uint32] = rgb[..., 0].astype(np.uint32)
    codes <<= 8
    codes |= rgb[..., 1]
    codes <<= 8
    codes |= rgb[..., 2]
    return codes


def unpack_colours(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The inverse of :func:`pack_colours`: (N,) uint32 → (N, 3) uint8."""
    return np.stack([codes >> 16, codes >> 8, codes], axis=-1).astype(np.uint8)


def _widest_words(rgb: NDArray[np.uint8]) -> NDArray[np.generic]:
    """(H, n) view of the pixel rows in the largest words that divide a row: 1/8 of the comparisons at 64 bits."""
    rows = np.ascontiguousarray(rgb).reshape(len(rgb), -1)
    word = next(
        word for word in (np.uint64, np.uint32, np.uint16, np.uint8) if rows.shape[1] % np.dtype(word).itemsize == 0
    )
    return rows.view(word)


def _run_starts(changed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """First position of each run. ``changed[i]`` says whether position i + 1 differs from position i."""
    return np.flatnonzero(np.concatenate([[True], changed]))


def _distinct(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The distinct ``codes``, ascending. NumPy 2.3's unique() hashes and takes 40 times as long on a photograph."""
    ordered: NDArray[np.uint32] = np.sort(codes, axis=None)
    distinct: NDArray[np.uint32] = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    return distinct


_scratch = threading.local()


def _positions(codes: NDArray[np.uint32], palette_codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The position of each of ``codes`` in ``palette_codes``, which must contain all of them.

    A look-up in a table of all 2^24 colours, six times as fast as a binary search. Each thread keeps one table; the few
    pages in use stay in the cache.
    """
    if not hasattr(_scratch, "table"):
        _scratch.table = np.empty(1 << 24, np.uint8)
    _scratch.table[palette_codes] = np.arange(len(palette_codes), dtype=np.uint8)
    positions: NDArray[np.uint8] = _scratch.table[codes]
    return positions


def _positions_in_palette(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(len(source),) uint8: the position in ``target`` of each colour of ``source``."""
    source_codes, target_codes = pack_colours(source), pack_colours(target)
    missing = np.setdiff1d(source_codes, target_codes)
    if missing.size:
        raise NotIndexable(
            f"{missing.size} of the image's {len(source)} colours are not in the palette, e.g. #{missing[0]:06x}"
        )
    order = np.argsort(target_codes, kind="stable")
    return order[np.searchsorted(target_codes[order], source_codes)].astype(np.uint8)


def _coarse_cells(axis: str, seen: tuple[int, ...], finer: tuple[int, ...]) -> NDArray[np.intp]:
    """(len(finer),) the seen cell that contains each finer cell."""
    missing = sorted(set(seen).difference(finer))
    if missing:
        raise NotIndexable(f"{len(missing)} of the image's {axis} edges are not in the layout, e.g. pixel {missing[0]}")
    return np.searchsorted(seen, finer, side="right") - 1


def _size(layout: Layout) -> str:
    return f"{layout.width}×{layout.height}"
