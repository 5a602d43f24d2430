"""The redraw on the CPU: :func:`quaclrs.imaging.redraw.redraw_reference`, bit for bit, a hundred times as fast. Needs numba.

Why it looks as it does, with times per 128×376 grid at 224 pixels on one core:

- Colours are looked up once per cell, into a buffer turned on its side (16 µs). A tap of the first pass then is one multiplication
  over a run of 128 lines of cells, which the compiler turns into vector instructions; no tap gathers anything (36 µs, with
  turning back).
- Taps of the second pass run along whole lines of 3·S bytes, again vectors (15 µs).
- Normalised values come from a table of 256 per channel (28 µs), copied as integers of their width: the kernel knows no floats, so
  it cannot round one, and float16 and bfloat16 need no support of numba's.
- Python threads share a batch out, as the kernel releases the GIL. numba's own threads would outlive the batch, do not survive a
  fork, and abort when two threads of the process use them at once. Starting a thread takes 0.1 ms, a batch of 64 takes 4.

``numba`` is imported here at the top; import this module only where it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from quaclrs.imaging.normalise import normalisation_table
from quaclrs.imaging.redraw import Grids, RedrawTables, check_grids, checked_out
from quaclrs.imaging.resample import HALF, WEIGHT_BITS
from quaclrs.imaging.threads import on_threads

_BLOCK_LINES = 128
"""Lines of cells on their side at once: 128 × 376 colours are 192 KB, at home in a second-level cache."""

_HALF = np.int32(HALF)
_SHIFT = np.uint32(WEIGHT_BITS)
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def redraw_cpu(
    grids: Grids, index: torch.Tensor, tables: RedrawTables, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`quaclrs.imaging.redraw.redraw_reference`, on ``torch.get_num_threads()`` threads.

    The first call in a process loads the compiled kernel, and the first one on a machine compiles it, which takes seconds.
    """
    batch = Grids(grids.flat, grids.offsets[index], grids.layouts[index], grids.palettes[index])
    check_grids(batch, tables)  # of the batch alone: some 50 µs, and no index can make the kernel read wild memory
    out = checked_out(out, len(batch), tables, dtype)
    pixels = out.permute(0, 2, 3, 1).view(_INTEGER_OF_SIZE[dtype.itemsize]).numpy()  # (B, S, S, 3)
    pixels = pixels.reshape(len(batch), tables.size, 3 * tables.size)
    cells = tuple(tensor.numpy() for tensor in (batch.flat, batch.offsets, batch.layouts, batch.palettes))
    shapes = (tables.lines, tables.cells, tables.line_stride, tables.cell_stride, tables.turned, tables.palettes)
    cell_taps = (tables.cell_first.numpy(), _in_pairs(tables.cell_weights.numpy()))
    line_taps = (tables.line_first.numpy(), _in_pairs(tables.line_weights.numpy()))
    taps = (*(tensor.numpy() for tensor in shapes), *cell_taps, *line_taps)
    if dtype == torch.uint8:
        on_threads(lambda start, stop: _draw_levels(start, stop, cells, taps, pixels), len(batch))
    else:
        values = normalisation_table().to(dtype).view(_INTEGER_OF_SIZE[dtype.itemsize]).numpy()
        on_threads(lambda start, stop: _draw_values(start, stop, cells, taps, values, pixels), len(batch))
    return out


def _in_pairs(weights: NDArray[np.int32]) -> NDArray[np.int32]:
    """(L, K, S) with K made even by a tap of weight 0."""
    return np.pad(weights, ((0, 0), (0, weights.shape[1] % 2), (0, 0)))


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the GIL; keep the result on disk where a place for it can be written to."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available", neither beside this file nor in the user's cache
        return numba.njit(nogil=True)(function)


# Integers: numba widens every sum to 64 bits, and LLVM narrows it again only where the result is cut to 32 bits before it is used,
# hence the int32 buffers and the np.uint32(...) ahead of each shift. Half the vector lanes hang on it.


@_compiled
def _draw_levels(start, stop, grids, tables, out):  # type: ignore[no-untyped-def]
    """Draw pictures ``start`` to ``stop`` into ``out`` (B, S, 3·S) uint8."""
    for picture in range(start, stop):
        _draw_picture(picture, grids, tables, out[picture])


@_compiled
def _draw_values(start, stop, grids, tables, values, out):  # type: ignore[no-untyped-def]
    """The same, and then each level's value from ``values`` (3, 256) into ``out`` (B, S, 3·S) of its dtype."""
    levels = np.empty(out.shape[1:], np.uint8)  # of one picture: it stays in the cache
    for picture in range(start, stop):
        _draw_picture(picture, grids, tables, levels)
        for y in range(out.shape[1]):
            _look_up(levels[y], values, out[picture, y])


@_compiled
def _draw_picture(picture, grids, tables, out):  # type: ignore[no-untyped-def]
    """One picture's levels, (S, 3·S) uint8; ``grids`` and ``tables`` as in :func:`redraw_cpu`."""
    flat, offsets, layouts, palettes = grids
    all_lines, all_cells, line_strides, cell_strides, turned, colours, cell_first, cell_weights, line_first, line_weights = tables
    layout, palette = layouts[picture], colours[palettes[picture]]
    number, cells, line_stride, cell_stride = all_lines[layout], all_cells[layout], line_strides[layout], cell_strides[layout]
    # Taps come in pairs, so the last may reach past the cells: with weight 0, into memory that only has to exist.
    side = np.empty((cells + cell_weights.shape[1] + 1, _BLOCK_LINES), np.int32)
    lines = np.empty((number + line_weights.shape[1] + 1, out.shape[1]), np.uint8)
    sums = np.empty((3, _BLOCK_LINES), np.int32)
    for top in range(0, number, _BLOCK_LINES):
        block = min(_BLOCK_LINES, number - top)
        corner = offsets[picture] + top * line_stride
        _colours_on_their_side(flat, corner, block, cells, line_stride, cell_stride, palette, side)
        _first_pass(side, block, cell_first[layout], cell_weights[layout], sums, lines[top:])
    if turned[layout]:
        levels = np.empty(out.shape, np.uint8)
        _second_pass(lines, line_first[layout], line_weights[layout], levels)
        _turn(levels, out)
    else:
        _second_pass(lines, line_first[layout], line_weights[layout], out)


@_compiled
def _colours_on_their_side(flat, corner, lines, cells, line_stride, cell_stride, palette, side):  # type: ignore[no-untyped-def]
    """side[c, r] = colour of cell c in line r, for a block of ``lines`` whose first index is at ``corner`` of ``flat``."""
    for c in range(cells):
        for r in range(lines):
            side[c, r] = palette[flat[corner + r * line_stride + c * cell_stride]]


@_compiled
def _first_pass(side, number, first, weights, sums, lines):  # type: ignore[no-untyped-def]
    """lines[r, 3·i + channel] for all output values i of a block of ``number`` lines of cells."""
    taps, size = weights.shape
    for i in range(size):
        sums[:] = _HALF
        for k in range(0, taps, 2):
            weight, next_weight = weights[k, i], weights[k + 1, i]
            left, right = side[first[i] + k], side[first[i] + k + 1]
            for r in range(number):
                a, b = left[r], right[r]
                sums[0, r] += (a & 255) * weight + (b & 255) * next_weight
                sums[1, r] += ((a >> 8) & 255) * weight + ((b >> 8) & 255) * next_weight
                sums[2, r] += (a >> 16) * weight + (b >> 16) * next_weight
        for r in range(number):
            lines[r, 3 * i] = np.uint32(sums[0, r]) >> _SHIFT
            lines[r, 3 * i + 1] = np.uint32(sums[1, r]) >> _SHIFT
            lines[r, 3 * i + 2] = np.uint32(sums[2, r]) >> _SHIFT


@_compiled
def _second_pass(lines, first, weights, out):  # type: ignore[no-untyped-def]
    """out[o, i] for all output lines o and all values i of a line."""
    taps, size = weights.shape
    sums = np.empty(out.shape[1], np.int32)
    for o in range(size):
        if taps == 2:  # as when enlarging, or with cells of 3 pixels at 224: from bytes to bytes
            _blend_two(lines[first[o]], lines[first[o] + 1], weights[0, o], weights[1, o], out[o])
            continue
        sums[:] = _HALF
        for k in range(0, taps, 2):
            _add_two(lines[first[o] + k], lines[first[o] + k + 1], weights[k, o], weights[k + 1, o], sums)
        _round(sums, out[o])


@_compiled
def _turn(levels, out):  # type: ignore[no-untyped-def]
    """out[y, x] = levels[x, y], three channels each."""
    size = len(levels)
    for y in range(size):
        for x in range(size):
            for channel in range(3):
                out[y, 3 * x + channel] = levels[x, 3 * y + channel]


@_compiled
def _blend_two(upper, lower, weight, next_weight, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        out[i] = np.uint32(_HALF + upper[i] * weight + lower[i] * next_weight) >> _SHIFT


@_compiled
def _add_two(upper, lower, weight, next_weight, sums):  # type: ignore[no-untyped-def]
    for i in range(len(sums)):
        sums[i] += upper[i] * weight + lower[i] * next_weight


@_compiled
def _round(sums, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        out[i] = np.uint32(sums[i]) >> _SHIFT


@_compiled
def _look_up(levels, values, out):  # type: ignore[no-untyped-def]
    """out = the values of ``levels``, three channels in turn."""
    red, green, blue = values[0], values[1], values[2]
    for x in range(len(levels) // 3):
        out[3 * x] = red[levels[3 * x]]
        out[3 * x + 1] = green[levels[3 * x + 1]]
        out[3 * x + 2] = blue[levels[3 * x + 2]]


def normalise_cpu(levels: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As :func:`quaclrs.imaging.normalise.normalise` of ``levels`` (B, S, S, 3) uint8, into ``out`` (B, 3, S, S) channels_last."""
    width = _INTEGER_OF_SIZE[out.dtype.itemsize]
    values = normalisation_table().to(out.dtype).view(width).numpy()
    sources = levels.numpy().reshape(len(levels), -1)
    targets = out.permute(0, 2, 3, 1).view(width).numpy().reshape(len(levels), -1)
    on_threads(lambda start, stop: _look_up_all(start, stop, sources, values, targets), len(levels))
    return out


@_compiled
def _look_up_all(start, stop, levels, values, out):  # type: ignore[no-untyped-def]
    for picture in range(start, stop):
        _look_up(levels[picture], values, out[picture])
