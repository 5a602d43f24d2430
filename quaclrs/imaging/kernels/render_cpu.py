"""The render on the CPU: :func:`quaclrs.imaging.render.render_reference`, bit for bit, at the speed of vector
instructions. Needs numba.

Why it looks as it does, with times per 128×376 grid at 224 pixels on one core of an AMD EPYC at 2.45 GHz:

- Colours are looked up once per cell, into a buffer transposed: of four neighbours, one load each, and a load
  and a store
  (18 µs). A tap of the first pass then is one multiplication over a run of 128 lines of cells, which the compiler turns
  into vector instructions; no tap gathers anything (21 µs).
- The first pass leaves pixels as one integer each, still on their side. Two of them at a time, eight bytes of which six
  count, are
  written to where they belong: a sixth of the stores that single channels would need (9 µs).
- Taps of the second pass run along whole lines of 3·S bytes, again vectors; of two lines, the usual case, in 16-bit
  arithmetic, where
  it has been proven to give the same bits (14 µs).
- Normalised float32 values are computed and written past the caches, line by line (30 µs); others are looked up: see
  :mod:`quaclrs.imaging.kernels.normalise_cpu`.
- Python threads share a batch out, as the kernel releases the GIL. numba's own threads would outlive the batch, do not
  survive a
  fork, and abort when two threads of the process use them at once. Starting a thread takes 0.1 ms, a batch of 64 takes
  3.

``numba`` is imported here at the top; import this module only where it is wanted.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quaclrs.imaging.kernels.intrinsics import blend, compiled, load_four_bytes, store_eight_bytes
from quaclrs.imaging.kernels.normalise_cpu import (
    can_stream,
    look_up_rows,
    normalisation_factors,
    normalise_rows,
    pixels_of,
    stream_row,
    table_of,
)
from quaclrs.imaging.render import Grids, RenderTables, check_grids, checked_out
from quaclrs.imaging.resample import HALF, WEIGHT_BITS
from quaclrs.system.threads import parallel_for

_BLOCK_ROWS = 128
"""Lines of cells on their side at once: a cell of all of them is 512 bytes."""
_STRIP = 16
"""Columns of the first pass that are turned upright together: 8 KB, at home in a first-level cache."""

_HALF = np.int32(HALF)
_SHIFT = np.uint32(WEIGHT_BITS)
_GREEN_SHIFT, _BLUE_SHIFT = np.uint32(WEIGHT_BITS - 8), np.uint32(WEIGHT_BITS - 16)
_GREEN, _BLUE = np.uint32(0xFF00), np.uint32(0xFF0000)
_PIXEL_BITS = np.uint64(24)


def render_cpu(
    grids: Grids,
    index: torch.Tensor,
    tables: RenderTables,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`quaclrs.imaging.render.render_reference`, on ``torch.get_num_threads()`` threads.

    The first call in a process loads the compiled kernel, and the first one on a machine compiles it, which takes
    seconds.
    """
    batch = Grids(grids.flat, grids.offsets[index], grids.layouts[index], grids.palettes[index])
    check_grids(batch, tables)  # of the batch alone: some 50 µs, and no index can make the kernel read wild memory
    out = checked_out(out, len(batch), tables, dtype)
    pixels = pixels_of(out).reshape(len(batch), tables.size, 3 * tables.size)
    cell_data = tuple(tensor.numpy() for tensor in (batch.flat, batch.offsets, batch.layouts, batch.palettes))
    cpu_tables = _cpu_tables(tables)
    if dtype == torch.uint8:
        parallel_for(lambda start, stop: _render_levels(start, stop, cell_data, cpu_tables, pixels), len(batch))
    elif dtype == torch.float32:
        factors, stream = normalisation_factors(tables.size), can_stream(pixels)
        parallel_for(
            lambda start, stop: _render_floats(start, stop, cell_data, cpu_tables, factors, stream, pixels), len(batch)
        )
    else:
        values = table_of(dtype)
        parallel_for(lambda start, stop: _render_16_bit(start, stop, cell_data, cpu_tables, values, pixels), len(batch))
    return out


class _Tables(NamedTuple):
    """A :class:`RenderTables` as the kernel wants it. L layouts, P palettes; taps are padded with weights of 0."""

    outer_cells: NDArray[np.int32]
    inner_cells: NDArray[np.int32]
    outer_stride: NDArray[np.int32]
    inner_stride: NDArray[np.int32]
    transposed: NDArray[np.int32]
    palettes: NDArray[np.int32]
    """(P, 256)"""
    inner_first: NDArray[np.int32]
    """(L, S)"""
    inner_weights: NDArray[np.int32]
    """(L, K, S), K at least 4 and even."""
    inner_weights_used: NDArray[np.int32]
    """(L,) even numbers of taps, at least 4, that hold each layout's weights."""
    outer_first: NDArray[np.int32]
    outer_weights: NDArray[np.int32]
    """(L, K, S), K even."""
    two_rows: NDArray[np.bool_]
    """(L, S): the output line is made of two lines at most, and :func:`~quaclrs.imaging.kernels.intrinsics.blend` gives
    its bits.
    """
    blend_high: NDArray[np.int16]
    """(L, S): of the second line's weight the upper bits, for ``blend``."""
    blend_low: NDArray[np.int16]


@functools.lru_cache(maxsize=8)
def _cpu_tables(tables: RenderTables) -> _Tables:
    """Made once for a loader's tables, which are told apart by identity."""
    inner_weights, outer_weights = _padded(tables.inner_weights.numpy(), 4), _padded(tables.outer_weights.numpy(), 2)
    second = outer_weights[:, 1]  # (L, S)
    low = second.astype(np.int16)  # the lower 16 bits, with a sign
    return _Tables(
        outer_cells=tables.outer_cells.numpy(),
        inner_cells=tables.inner_cells.numpy(),
        outer_stride=tables.outer_stride.numpy(),
        inner_stride=tables.inner_stride.numpy(),
        transposed=tables.transposed.numpy(),
        palettes=tables.palettes.numpy(),
        inner_first=tables.inner_first.numpy(),
        inner_weights=inner_weights,
        inner_weights_used=np.array([_weights_used(weights) for weights in inner_weights], np.int32),
        outer_first=tables.outer_first.numpy(),
        outer_weights=outer_weights,
        two_rows=np.stack([_blends_exactly(weights) for weights in outer_weights]),
        blend_high=((second - low) >> 16).astype(np.int16),
        blend_low=low,
    )


def _padded(weights: NDArray[np.int32], least: int) -> NDArray[np.int32]:
    """(L, K, S) with K even and at least ``least``."""
    count = weights.shape[1]
    return np.pad(weights, ((0, 0), (0, max(least, count + count % 2) - count), (0, 0)))


def _weights_used(weights: NDArray[np.int32]) -> int:
    """Even and at least 4, of the (K, S) ``weights`` of one layout."""
    used = int(np.flatnonzero(weights.any(axis=1)).max()) + 1
    return max(4, used + used % 2)


def _blends_exactly(weights: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(S,) for the (K, S) ``weights`` of one layout: whether two lines suffice, and the first may be taken to weigh
    2^22 less the second.

    Rounding lets two weights sum to 2^22 + e. With d = b − a, a·w + b·v is then a·2^22 + d·v + a·e, and the last term
    counts only where it carries the sum over a multiple of 2^22. It is monotone in a, which lies in max(0,
    −d)..min(255, 255 − d): both ends of all 511 d tell.
    """
    difference = np.arange(-255, 256)[:, None]  # (511, 1) int64
    blended = (difference * weights[1] + HALF) >> WEIGHT_BITS  # (511, S)
    excess = weights[:2].sum(axis=0) - (1 << WEIGHT_BITS)
    equal: NDArray[np.bool_] = np.logical_not(weights[2:].any(axis=0))
    for level in (np.maximum(0, -difference), np.minimum(255, 255 - difference)):
        equal &= ((difference * weights[1] + level * excess + HALF) >> WEIGHT_BITS == blended).all(axis=0)
    return equal


# Integers: numba widens every sum to 64 bits, and LLVM narrows it again only where the result is cut to 32 bits before
# it is used, hence the int32 buffers and the np.uint32(...) ahead of each shift. Half the vector lanes hang on it.
# Arrays: inner functions take whole arrays and row numbers, since each slice costs two atomic instructions of reference
# counting.


@compiled
def _render_levels(start, stop, grids, tables, out):  # type: ignore[no-untyped-def]
    """Draw images ``start`` to ``stop`` into ``out`` (B, S, 3·S) uint8; ``grids`` and ``tables`` as in
    :func:`render_cpu`.
    """
    buffers = _buffers(tables)
    for image in range(start, stop):
        layout = _run_first_pass(image, grids, tables, buffers)
        _run_second_pass(layout, tables, buffers, out[image])


@compiled
def _render_floats(start, stop, grids, tables, factors, stream, out):  # type: ignore[no-untyped-def]
    """The same, normalised, into ``out`` (B, S, 3·S) float32."""
    buffers = _buffers(tables)
    levels = np.empty(out.shape[1:], np.uint8)
    for image in range(start, stop):
        layout = _run_first_pass(image, grids, tables, buffers)
        if stream and not tables.transposed[layout]:
            _stream_second_pass(layout, tables, buffers, levels, factors, out[image])
        else:
            _run_second_pass(layout, tables, buffers, levels)
            normalise_rows(levels, factors, out[image], 0, stream)


@compiled
def _render_16_bit(start, stop, grids, tables, values, out):  # type: ignore[no-untyped-def]
    """The same, with each level's value from ``values`` (3, 256), into ``out`` (B, S, 3·S) of its dtype."""
    buffers = _buffers(tables)
    levels = np.empty(out.shape[1:], np.uint8)
    for image in range(start, stop):
        layout = _run_first_pass(image, grids, tables, buffers)
        _run_second_pass(layout, tables, buffers, levels)
        look_up_rows(levels, values, out[image], 0)


@compiled
def _buffers(tables):  # type: ignore[no-untyped-def]
    """(colours, strip, cell sums, lines, line sums, transposed image): what drawing needs besides its output, used for
    all images.

    Taps come in pairs, so the last may reach past the cells or lines: with weight 0, into memory that only has to
    exist. Lines and columns are turned upright in whole blocks and strips, so lines have room for those, and for the
    last eight bytes that are stored.
    """
    size = tables.inner_first.shape[1]
    colours = np.zeros((tables.inner_cells.max() + tables.inner_weights.shape[1], _BLOCK_ROWS), np.int32)
    strip, cell_sums = np.zeros((_STRIP, _BLOCK_ROWS), np.uint32), np.zeros((3, _BLOCK_ROWS), np.int32)
    lines = np.zeros(
        (tables.outer_cells.max() + tables.outer_weights.shape[1] + _BLOCK_ROWS, 3 * (size + _STRIP) + 2), np.uint8
    )
    return colours, strip, cell_sums, lines, np.zeros(3 * size, np.int32), np.zeros((size, 3 * size), np.uint8)


@compiled
def _run_first_pass(image, grids, tables, buffers):  # type: ignore[no-untyped-def]
    """Do one image's first pass; returns its layout."""
    flat, offsets, layouts, palettes = grids
    colours, strip, sums, lines, _, _ = buffers
    layout, palette = layouts[image], tables.palettes[palettes[image]]
    number, outer_stride = tables.outer_cells[layout], tables.outer_stride[layout]
    for top in range(0, number, _BLOCK_ROWS):
        corner = offsets[image] + top * outer_stride
        _look_up_colours(flat, corner, min(_BLOCK_ROWS, number - top), layout, palette, tables, colours)
        _first_pass(colours, layout, tables, strip, sums, lines[top:])
    return layout


@compiled
def _run_second_pass(layout, tables, buffers, out):  # type: ignore[no-untyped-def]
    """Second pass of the image whose first one is done: its levels, (S, 3·S) uint8."""
    _, _, _, lines, sums, transposed_image = buffers
    if tables.transposed[layout]:
        _second_pass(lines, layout, tables, sums, transposed_image)
        _transpose_image(transposed_image, out)
    else:
        _second_pass(lines, layout, tables, sums, out)


@compiled
def _stream_second_pass(layout, tables, buffers, levels, factors, out):  # type: ignore[no-untyped-def]
    """The same, normalised into ``out`` line by line, so that the arithmetic of a line hides the writing of the last
    one.
    """
    _, _, _, lines, sums, _ = buffers
    first, weights = tables.outer_first[layout], tables.outer_weights[layout]
    two_rows, high, low = tables.two_rows[layout], tables.blend_high[layout], tables.blend_low[layout]
    for o in range(len(out)):
        if two_rows[o]:
            _blend_two_rows(lines, first[o], high[o], low[o], levels, 0)
        else:
            _weigh_rows(lines, first[o], weights, o, sums, levels, 0)
        stream_row(levels, 0, factors, out, o)


@compiled
def _look_up_colours(flat, corner, number, layout, palette, tables, colours):  # type: ignore[no-untyped-def]
    """colours[c, r] = colour of cell c in line r, for a block of ``number`` lines whose first cell is at ``corner`` of
    ``flat``.
    """
    cells, outer_stride, inner_stride = (
        tables.inner_cells[layout],
        tables.outer_stride[layout],
        tables.inner_stride[layout],
    )
    by_four = cells // 4 * 4 if inner_stride == 1 else 0
    for c in range(0, by_four, 4):
        _look_up_four(flat, corner + c, number, outer_stride, palette, colours, c)
    for c in range(by_four, cells):
        _look_up_one(flat, corner + c * inner_stride, number, outer_stride, palette, colours, c)


@compiled
def _look_up_one(flat, corner, number, stride, palette, colours, c):  # type: ignore[no-untyped-def]
    position, step = np.uintp(corner), np.uintp(stride)  # unsigned: a negative index would mean something else to numba
    for r in range(number):
        colours[c, r] = palette[flat[position]]
        position += step


@compiled
def _look_up_four(flat, corner, number, stride, palette, colours, c):  # type: ignore[no-untyped-def]
    """Cells c to c + 3 of each line, which lie side by side."""
    position, step = np.uintp(corner), np.uintp(stride)
    for r in range(number):
        cells = load_four_bytes(flat, position)
        colours[c, r] = palette[np.uint8(cells)]
        colours[c + 1, r] = palette[np.uint8(cells >> np.uint32(8))]
        colours[c + 2, r] = palette[np.uint8(cells >> np.uint32(16))]
        colours[c + 3, r] = palette[cells >> np.uint32(24)]
        position += step


@compiled
def _first_pass(colours, layout, tables, strip, sums, lines):  # type: ignore[no-untyped-def]
    """lines[r, 3·i + channel] for all output values i of a block of lines r."""
    first, weights, used = tables.inner_first[layout], tables.inner_weights[layout], tables.inner_weights_used[layout]
    for left in range(0, len(first), _STRIP):
        for i in range(left, min(left + _STRIP, len(first))):
            if used == 4:
                _weigh_four_cells(
                    colours, first[i], weights[0, i], weights[1, i], weights[2, i], weights[3, i], strip, i - left
                )
            else:
                _weigh_cells(colours, first[i], weights, i, used, sums, strip, i - left)
        _transpose_strip(strip, 3 * left, lines)


@compiled
def _weigh_four_cells(colours, c, weight_a, weight_b, weight_c, weight_d, strip, column):  # type: ignore[no-untyped-def]
    """As :func:`_weigh_cells` of four, which is what most images here are drawn from: nothing but
    registers in between.
    """
    for r in range(_BLOCK_ROWS):
        p, q, s, t = colours[c, r], colours[c + 1, r], colours[c + 2, r], colours[c + 3, r]
        red = _HALF + (p & 255) * weight_a + (q & 255) * weight_b + (s & 255) * weight_c + (t & 255) * weight_d
        green = (
            (p >> 8 & 255) * weight_a
            + (q >> 8 & 255) * weight_b
            + (s >> 8 & 255) * weight_c
            + (t >> 8 & 255) * weight_d
        )
        blue = _HALF + (p >> 16) * weight_a + (q >> 16) * weight_b + (s >> 16) * weight_c + (t >> 16) * weight_d
        strip[column, r] = _pixel(np.uint32(red), np.uint32(_HALF + green), np.uint32(blue))


@compiled
def _weigh_cells(colours, c, weights, i, used, sums, strip, column):  # type: ignore[no-untyped-def]
    """strip[column, r] = R | G << 8 | B << 16 of output value ``i``, made of the cells from c on, for all lines r."""
    sums[:] = _HALF
    for k in range(0, used, 2):
        _add_two_cells(colours, c + k, weights[k, i], weights[k + 1, i], sums)
    for r in range(_BLOCK_ROWS):
        strip[column, r] = _pixel(np.uint32(sums[0, r]), np.uint32(sums[1, r]), np.uint32(sums[2, r]))


@compiled
def _add_two_cells(colours, c, weight, next_weight, sums):  # type: ignore[no-untyped-def]
    for r in range(_BLOCK_ROWS):
        a, b = colours[c, r], colours[c + 1, r]
        sums[0, r] += (a & 255) * weight + (b & 255) * next_weight
        sums[1, r] += ((a >> 8) & 255) * weight + ((b >> 8) & 255) * next_weight
        sums[2, r] += (a >> 16) * weight + (b >> 16) * next_weight


@compiled
def _pixel(red, green, blue):  # type: ignore[no-untyped-def]
    """Three uint32 sums, rounded to levels, in one integer."""
    return (red >> _SHIFT) | ((green >> _GREEN_SHIFT) & _GREEN) | ((blue >> _BLUE_SHIFT) & _BLUE)


@compiled
def _transpose_strip(strip, left, lines):  # type: ignore[no-untyped-def]
    """lines[r, left + 3·c + channel] = the channels of strip[c, r]: always for all c and r, whether or not they mean
    anything.

    Numbers known beforehand halve the time.
    """
    flat, stride = lines.reshape(lines.size), np.uintp(lines.shape[1])
    for column in range(0, _STRIP, 2):
        position = np.uintp(left + 3 * column)
        for r in range(_BLOCK_ROWS):
            store_eight_bytes(
                flat, position, np.uint64(strip[column, r]) | np.uint64(strip[column + 1, r]) << _PIXEL_BITS
            )
            position += stride


@compiled
def _second_pass(lines, layout, tables, sums, out):  # type: ignore[no-untyped-def]
    """out[o, i] for all output lines o and all values i of a line."""
    first, weights = tables.outer_first[layout], tables.outer_weights[layout]
    two_rows, high, low = tables.two_rows[layout], tables.blend_high[layout], tables.blend_low[layout]
    for o in range(len(out)):
        if two_rows[o]:
            _blend_two_rows(lines, first[o], high[o], low[o], out, o)
        else:
            _weigh_rows(lines, first[o], weights, o, sums, out, o)


@compiled
def _weigh_rows(lines, line, weights, o, sums, out, row):  # type: ignore[no-untyped-def]
    sums[:] = _HALF
    for k in range(0, len(weights), 2):
        _add_two_rows(lines, line + k, weights[k, o], weights[k + 1, o], sums)
    for i in range(len(sums)):
        out[row, i] = np.uint32(sums[i]) >> _SHIFT


@compiled
def _blend_two_rows(lines, line, high, low, out, row):  # type: ignore[no-untyped-def]
    for i in range(out.shape[1]):
        out[row, i] = blend(lines[line, i], lines[line + 1, i], high, low)


@compiled
def _add_two_rows(lines, line, weight, next_weight, sums):  # type: ignore[no-untyped-def]
    for i in range(len(sums)):
        sums[i] += lines[line, i] * weight + lines[line + 1, i] * next_weight


@compiled
def _transpose_image(levels, out):  # type: ignore[no-untyped-def]
    """out[y, x] = levels[x, y], three channels each."""
    for y in range(len(out)):
        for x in range(len(out)):
            for channel in range(3):
                out[y, 3 * x + channel] = levels[x, 3 * y + channel]
