"""Chooses the tile size of the Triton render: the part of an image that one program renders.

A tile may have any number of output rows and columns; padding rounds its lanes up to a power of two. The neighbouring
tiles compute the outer cells at a tile's upper and lower edge again. :func:`choose_tile` therefore weighs padding
against recomputation, with an estimate of the work and no measurement. Pure arithmetic: needs neither Triton nor a GPU.
:mod:`quaclrs.imaging.render` explains inner and outer axis.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from quaclrs.imaging.render import Axis, Passes, RenderTables
from quaclrs.imaging.resample import cell_filter_weights

MAX_LANES = 4096
"""Most lanes of a tile. Each value per lane then takes 32 registers per thread at 128 threads, 16 at 256."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The part of an image that one program renders."""

    rows: int
    """Output rows, along the second pass."""
    columns: int
    """Output columns, along the first pass."""
    outer_cells: int
    """Most outer cells that ``rows`` output rows are made of, in any layout."""
    warps: int

    @property
    def source_lanes(self) -> int:
        """Lanes of the first pass: a power of two."""
        return _power_of_two(self.outer_cells * self.columns)

    @property
    def lanes(self) -> int:
        """Lanes of the second pass: a power of two."""
        return _power_of_two(self.rows * self.columns)


def choose_tile(tables: RenderTables, rows: int | None = None, columns: int | None = None) -> Tile:
    """The tile with the least estimated work over all layouts of ``tables``; ``rows`` and ``columns`` fix one side.

    The estimate is a rough count of the instructions of both passes per lane.
    """
    axes = tuple(dict.fromkeys(Passes.of(layout, tables.size).outer for layout in tables.layouts))
    return _choose_tile(axes, tables.size, tables.inner_weights.shape[1], tables.outer_weights.shape[1], rows, columns)


@functools.lru_cache(maxsize=64)
def _choose_tile(
    axes: tuple[Axis, ...],
    size: int,
    inner_weights: int,
    outer_weights: int,
    rows: int | None,
    columns: int | None,
) -> Tile:
    def work(tile: Tile) -> int:
        first_pass = tile.source_lanes * (12 + 10 * inner_weights)
        second_pass = tile.lanes * (40 + 10 * outer_weights)
        return -(-size // tile.rows) * -(-size // tile.columns) * (first_pass + second_pass + 8192)

    candidates = []
    row_choices = [rows] if rows else sorted({min(side, size) for side in (1, 2, *range(4, 257, 4))})
    # at least 32 columns, so that a row of a tile fills whole sectors of memory
    column_choices = [columns] if columns else sorted({min(side, size) for side in (32, 48, 56, 64, 96, 112, 128)})
    for one_rows in row_choices:
        outer_cells = max(_most_outer_cells(axis, size, one_rows) for axis in axes)
        for one_columns in column_choices:
            lanes = _power_of_two(max(one_rows, outer_cells) * one_columns)
            warps = min(max(lanes // 512, 1), 8)
            candidates.append(Tile(rows=one_rows, columns=one_columns, outer_cells=outer_cells, warps=warps))
    small = [tile for tile in candidates if max(tile.lanes, tile.source_lanes) <= MAX_LANES]
    return min(small or candidates, key=work)


def _most_outer_cells(axis: Axis, size: int, tile_rows: int) -> int:
    """Most outer cells that any tile of ``tile_rows`` output rows is made of."""
    edges, pixels = axis
    outer = cell_filter_weights(edges, pixels, size)
    # (S,) one past the last cell with a weight that is not 0
    stop = outer.first + outer.weights.shape[1] - (outer.weights[:, ::-1] != 0).argmax(axis=1)
    tops = np.arange(0, size, tile_rows)
    return int((np.maximum.reduceat(stop, tops) - outer.first[tops]).max())


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
