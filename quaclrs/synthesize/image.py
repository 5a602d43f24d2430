"""A grid of decibels → the image that matplotlib would save, without matplotlib's renderer.

The result equals, pixel by pixel, ``pcolormesh(grid, cmap="magma")`` on axes that fill a 10×4 inch figure at 100 dpi.
Each value is scaled to an index into magma's 256 colours, and each cell is repeated over its pixels: cell i of n starts
at pixel ``floor(i · pixels / n + 0.5)``. matplotlib supplies only the colour table.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quaclrs.system.matplotlib_import import import_matplotlib

WIDTH = 1000
HEIGHT = 400
_COLOURS = 256

_COMPRESS_LEVEL = 3
"""zlib's level. Level 6, which matplotlib uses, takes nearly twice the time for files that are 6 % smaller."""


@cache
def palette() -> NDArray[np.uint8]:
    """(256, 4) uint8 RGBA: magma, rounded as Agg rounds colours. (``Colormap(..., bytes=True)`` truncates instead.)"""
    import_matplotlib()
    import matplotlib as mpl

    colours = mpl.colormaps["magma"](np.arange(_COLOURS))  # (256, 4) float64 in [0, 1]
    return np.floor(colours * 255 + 0.5).astype(np.uint8)


def colour_indices(grid: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Indices into :func:`palette`, uint8, in the shape and orientation of ``grid``.

    ``min(floor((grid − low) / (high − low) · 256), 255)``, with the operations in the order of matplotlib's
    ``Normalize`` and ``Colormap``. Another order rounds differently and changes single cells by one colour.
    """
    low, high = grid.min(), grid.max()
    if low == high:
        return np.zeros(grid.shape, np.uint8)
    scaled = grid - low
    scaled /= high - low
    scaled *= _COLOURS
    indices: NDArray[np.uint8] = np.minimum(scaled, _COLOURS - 1).astype(np.uint8)  # the cast truncates
    return indices


@cache
def _cell_of_pixel(cells: int, pixels: int) -> NDArray[np.intp]:
    """(pixels,) the cell of each pixel: cell i starts at pixel ``floor(i · pixels / cells + 0.5)``."""
    starts = (2 * np.arange(cells + 1) * pixels + cells) // (2 * cells)  # exact: integers only
    return np.repeat(np.arange(cells), np.diff(starts))


def draw(grid: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, cols) float64 with row 0 the lowest frequency → (400, 1000, 4) uint8 RGBA with row 0 at the bottom.

    The rows are flipped before they are enlarged, because pixel edges count from the top.
    """
    rows, cols = grid.shape
    colours = palette().view(np.uint32)[:, 0]  # one integer per RGBA pixel: a quarter of the copies
    cells = colours[colour_indices(grid)[::-1]]  # (rows, cols) uint32
    wide = cells.take(_cell_of_pixel(cols, WIDTH), axis=1)
    return wide.take(_cell_of_pixel(rows, HEIGHT), axis=0).view(np.uint8).reshape(HEIGHT, WIDTH, 4)


def png_bytes(grid: NDArray[np.float64]) -> bytes:
    """``grid`` drawn, as an 8-bit RGBA PNG. The same grid gives the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(draw(grid)).save(buffer, "png", compress_level=_COMPRESS_LEVEL)
    return buffer.getvalue()
