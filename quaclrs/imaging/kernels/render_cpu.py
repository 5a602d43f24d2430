"""The render on the CPU: the bits of :func:`quaclrs.imaging.render.render_reference`, in vector instructions.

The steps below say how each part works and why, with the time per 128×376 grid at 224 pixels on one core of an AMD EPYC
at 2.45 GHz. :mod:`quaclrs.imaging.render` explains inner and outer axis.

1. *Look-up* (18 µs). Look up each cell's colour once and store it transposed: ``colours[inner cell, outer cell]``. Four
   neighbouring cells take one load of their indices, then a load and a store each.
2. *First pass* (21 µs). Because ``colours`` is transposed, a filter weight multiplies a run of 128 outer cells, which
   the compiler turns into vector instructions. Nothing has to be gathered. The result is one integer per pixel, still
   transposed.
3. *Transpose* (9 µs). Store two pixels at a time to ``resized[outer cell, 3 · column + channel]``: eight bytes, of
   which six count. That takes a sixth of the stores that single channels would need.
4. *Second pass* (14 µs). Filter weights multiply whole rows of 3·S bytes, again in vector instructions. A sum of two
   rows, the usual case, uses 16-bit arithmetic where that is proven to give the same bits
   (:func:`quaclrs.imaging.kernels.render_cpu_tables.blends_exactly`).
5. *Normalise* (30 µs). Compute float32 values and write them past the caches, row by row. Take 16-bit values from a
   table. See :mod:`quaclrs.imaging.kernels.normalise_cpu`.

Python threads divide a batch among them, because the kernel releases the GIL. numba's own threads would outlive the
batch, do not survive a fork, and abort when two threads of the process use them at once. Starting a thread takes
0.1 ms; a batch of 64 takes 3 ms.

The file imports ``numba`` at the top, so import it only where the kernel is used.
"""

from __future__ import annotations

import numpy as np
import torch

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
from quaclrs.imaging.kernels.render_cpu_tables import cpu_tables
from quaclrs.imaging.render import Grids, RenderTables, check_grids, checked_out
from quaclrs.imaging.resample import HALF, WEIGHT_BITS
from quaclrs.system.threads import parallel_for

_BLOCK = 128
"""Outer cells that the first pass handles at once: their colours at one inner cell take 512 bytes."""
_STRIP = 16
"""Output columns of the first pass that are transposed together: 8 KB, which fit in the first-level cache."""

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

    The first call on a machine compiles the kernel, which takes seconds. The first call in each later process loads it.
    """
    batch = Grids(grids.flat, grids.offsets[index], grids.layouts[index], grids.palettes[index])
    check_grids(batch, tables)  # 50 µs for the batch alone; no index can make the kernel read outside the buffer
    out = checked_out(out, len(batch), tables, dtype)
    pixels = pixels_of(out).reshape(len(batch), tables.size, 3 * tables.size)
    grid_arrays = tuple(part.numpy() for part in (batch.flat, batch.offsets, batch.layouts, batch.palettes))
    inputs = grid_arrays, cpu_tables(tables)
    if dtype == torch.uint8:
        parallel_for(lambda start, stop: _render_levels(start, stop, *inputs, pixels), len(batch))
    elif dtype == torch.float32:
        factors, stream = normalisation_factors(tables.size), can_stream(pixels)
        parallel_for(lambda start, stop: _render_floats(start, stop, *inputs, factors, stream, pixels), len(batch))
    else:
        values = table_of(dtype)
        parallel_for(lambda start, stop: _render_16_bit(start, stop, *inputs, values, pixels), len(batch))
    return out


# Two rules for everything below:
# - Integers. numba widens every sum to 64 bits. LLVM narrows it again only where the result is cut to 32 bits before it
#   is used. Hence the int32 buffers and the np.uint32(...) before each shift: without them a vector holds half as many
#   values.
# - Arrays. Inner functions take whole arrays and row numbers, because each slice costs two atomic instructions of
#   reference counting.
#
# ``grids`` is the tuple (flat, offsets, layouts, palettes) of Grids; ``tables`` is a CpuTables.


@compiled
def _render_levels(start, stop, grids, tables, out):  # type: ignore[no-untyped-def]
    """Render images ``start`` to ``stop`` into ``out`` (B, S, 3·S) uint8."""
    buffers = _buffers(tables)
    for image in range(start, stop):
        layout = _first_pass(image, grids, tables, buffers)
        _second_pass(layout, tables, buffers, out[image])


@compiled
def _render_floats(start, stop, grids, tables, factors, stream, out):  # type: ignore[no-untyped-def]
    """Render images ``start`` to ``stop``, normalised, into ``out`` (B, S, 3·S) float32."""
    buffers = _buffers(tables)
    levels = np.empty(out.shape[1:], np.uint8)
    for image in range(start, stop):
        layout = _first_pass(image, grids, tables, buffers)
        if stream and not tables.transposed[layout]:
            _second_pass_streamed(layout, tables, buffers, levels, factors, out[image])
        else:
            _second_pass(layout, tables, buffers, levels)
            normalise_rows(levels, factors, out[image], 0, stream)


@compiled
def _render_16_bit(start, stop, grids, tables, values, out):  # type: ignore[no-untyped-def]
    """Render images ``start`` to ``stop`` into ``out`` (B, S, 3·S) int16, with each level looked up in ``values``."""
    buffers = _buffers(tables)
    levels = np.empty(out.shape[1:], np.uint8)
    for image in range(start, stop):
        layout = _first_pass(image, grids, tables, buffers)
        _second_pass(layout, tables, buffers, levels)
        look_up_rows(levels, values, out[image], 0)


@compiled
def _buffers(tables):  # type: ignore[no-untyped-def]
    """The working memory of one thread, reused for all its images.

    (colours, strip, first-pass sums, resized, second-pass sums, transposed image). Weights are added in pairs, so the
    last weight of a pair may lie beyond the cells or rows: it is 0, but the memory must exist. Blocks and strips are
    written whole, so ``resized`` has room for one of each, and for the last store of eight bytes.
    """
    size = tables.inner_first.shape[1]
    colours = np.zeros((tables.inner_cells.max() + tables.inner_weights.shape[1], _BLOCK), np.int32)
    strip, pixel_sums = np.zeros((_STRIP, _BLOCK), np.uint32), np.zeros((3, _BLOCK), np.int32)
    resized = np.zeros(
        (tables.outer_cells.max() + tables.outer_weights.shape[1] + _BLOCK, 3 * (size + _STRIP) + 2), np.uint8
    )
    return colours, strip, pixel_sums, resized, np.zeros(3 * size, np.int32), np.zeros((size, 3 * size), np.uint8)


# --- look-up and first pass ---


@compiled
def _first_pass(image, grids, tables, buffers):  # type: ignore[no-untyped-def]
    """Fill ``resized`` with the first pass of one image; returns the image's layout."""
    flat, offsets, layouts, palettes = grids
    colours, strip, sums, resized, _, _ = buffers
    layout, palette = layouts[image], tables.palettes[palettes[image]]
    cells, stride = tables.outer_cells[layout], tables.outer_stride[layout]
    for top in range(0, cells, _BLOCK):
        corner = offsets[image] + top * stride
        _look_up_colours(flat, corner, min(_BLOCK, cells - top), layout, palette, tables, colours)
        _resize_block(colours, layout, tables, strip, sums, resized[top:])
    return layout


@compiled
def _look_up_colours(flat, corner, number, layout, palette, tables, colours):  # type: ignore[no-untyped-def]
    """colours[c, r] = colour of inner cell c, outer cell r, for ``number`` outer cells from ``flat[corner]`` on."""
    cells, outer_stride = tables.inner_cells[layout], tables.outer_stride[layout]
    inner_stride = tables.inner_stride[layout]
    by_four = cells // 4 * 4 if inner_stride == 1 else 0
    for c in range(0, by_four, 4):
        _look_up_four(flat, corner + c, number, outer_stride, palette, colours, c)
    for c in range(by_four, cells):
        _look_up_one(flat, corner + c * inner_stride, number, outer_stride, palette, colours, c)


@compiled
def _look_up_one(flat, corner, number, stride, palette, colours, c):  # type: ignore[no-untyped-def]
    position, step = np.uintp(corner), np.uintp(stride)  # unsigned, so that numba adds no test for negative indices
    for r in range(number):
        colours[c, r] = palette[flat[position]]
        position += step


@compiled
def _look_up_four(flat, corner, number, stride, palette, colours, c):  # type: ignore[no-untyped-def]
    """As :func:`_look_up_one` for the inner cells c to c + 3, which are neighbours in memory."""
    position, step = np.uintp(corner), np.uintp(stride)
    for r in range(number):
        cells = load_four_bytes(flat, position)
        colours[c, r] = palette[np.uint8(cells)]
        colours[c + 1, r] = palette[np.uint8(cells >> np.uint32(8))]
        colours[c + 2, r] = palette[np.uint8(cells >> np.uint32(16))]
        colours[c + 3, r] = palette[cells >> np.uint32(24)]
        position += step


@compiled
def _resize_block(colours, layout, tables, strip, sums, resized):  # type: ignore[no-untyped-def]
    """resized[r, 3·i + channel] for all output columns i and one block of outer cells r."""
    first, weights, used = tables.inner_first[layout], tables.inner_weights[layout], tables.inner_weights_used[layout]
    for left in range(0, len(first), _STRIP):
        for i in range(left, min(left + _STRIP, len(first))):
            if used == 4:
                four = weights[0, i], weights[1, i], weights[2, i], weights[3, i]
                _sum_four_cells(colours, first[i], four, strip, i - left)
            else:
                _sum_cells(colours, first[i], weights, i, used, sums, strip, i - left)
        _transpose_strip(strip, 3 * left, resized)


@compiled
def _sum_four_cells(colours, c, weights, strip, column):  # type: ignore[no-untyped-def]
    """As :func:`_sum_cells` with four weights, the most common number here. The sums stay in registers."""
    weight_a, weight_b, weight_c, weight_d = weights
    for r in range(_BLOCK):
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
def _sum_cells(colours, c, weights, i, used, sums, strip, column):  # type: ignore[no-untyped-def]
    """strip[column, r] = output column ``i`` of all outer cells r, from the inner cells c, c + 1, ..."""
    sums[:] = _HALF
    for k in range(0, used, 2):
        _add_two_cells(colours, c + k, weights[k, i], weights[k + 1, i], sums)
    for r in range(_BLOCK):
        strip[column, r] = _pixel(np.uint32(sums[0, r]), np.uint32(sums[1, r]), np.uint32(sums[2, r]))


@compiled
def _add_two_cells(colours, c, weight, next_weight, sums):  # type: ignore[no-untyped-def]
    for r in range(_BLOCK):
        a, b = colours[c, r], colours[c + 1, r]
        sums[0, r] += (a & 255) * weight + (b & 255) * next_weight
        sums[1, r] += ((a >> 8) & 255) * weight + ((b >> 8) & 255) * next_weight
        sums[2, r] += (a >> 16) * weight + (b >> 16) * next_weight


@compiled
def _pixel(red, green, blue):  # type: ignore[no-untyped-def]
    """Round three uint32 sums to levels and pack them as R | G << 8 | B << 16."""
    return (red >> _SHIFT) | ((green >> _GREEN_SHIFT) & _GREEN) | ((blue >> _BLUE_SHIFT) & _BLUE)


@compiled
def _transpose_strip(strip, left, resized):  # type: ignore[no-untyped-def]
    """resized[r, left + 3·c + channel] = the channels of strip[c, r].

    Always for all c and r of the strip, meaningful or not: loop bounds known to the compiler halve the time.
    """
    flat, stride = resized.reshape(resized.size), np.uintp(resized.shape[1])
    for column in range(0, _STRIP, 2):
        position = np.uintp(left + 3 * column)
        for r in range(_BLOCK):
            store_eight_bytes(
                flat, position, np.uint64(strip[column, r]) | np.uint64(strip[column + 1, r]) << _PIXEL_BITS
            )
            position += stride


# --- second pass ---


@compiled
def _second_pass(layout, tables, buffers, out):  # type: ignore[no-untyped-def]
    """``out`` (S, 3·S) uint8 = levels of the image whose first pass is in ``resized``."""
    _, _, _, resized, sums, transposed_image = buffers
    if tables.transposed[layout]:
        _resize_rows(resized, layout, tables, sums, transposed_image)
        _transpose_image(transposed_image, out)
    else:
        _resize_rows(resized, layout, tables, sums, out)


@compiled
def _second_pass_streamed(layout, tables, buffers, levels, factors, out):  # type: ignore[no-untyped-def]
    """The second pass, normalised into ``out`` (S, 3·S) float32 row by row.

    The arithmetic of each row overlaps with the writing of the row before.
    """
    _, _, _, resized, sums, _ = buffers
    first, weights = tables.outer_first[layout], tables.outer_weights[layout]
    blends, high, low = tables.blends[layout], tables.blend_high[layout], tables.blend_low[layout]
    for o in range(len(out)):
        if blends[o]:
            _blend_two_rows(resized, first[o], high[o], low[o], levels, 0)
        else:
            _sum_rows(resized, first[o], weights, o, sums, levels, 0)
        stream_row(levels, 0, factors, out, o)


@compiled
def _resize_rows(resized, layout, tables, sums, out):  # type: ignore[no-untyped-def]
    """out[o, i] for all output rows o and all values i of a row."""
    first, weights = tables.outer_first[layout], tables.outer_weights[layout]
    blends, high, low = tables.blends[layout], tables.blend_high[layout], tables.blend_low[layout]
    for o in range(len(out)):
        if blends[o]:
            _blend_two_rows(resized, first[o], high[o], low[o], out, o)
        else:
            _sum_rows(resized, first[o], weights, o, sums, out, o)


@compiled
def _sum_rows(resized, r, weights, o, sums, out, row):  # type: ignore[no-untyped-def]
    """out[row] = output row ``o``, the weighted sum of the rows r, r + 1, ... of ``resized``."""
    sums[:] = _HALF
    for k in range(0, len(weights), 2):
        _add_two_rows(resized, r + k, weights[k, o], weights[k + 1, o], sums)
    for i in range(len(sums)):
        out[row, i] = np.uint32(sums[i]) >> _SHIFT


@compiled
def _blend_two_rows(resized, r, high, low, out, row):  # type: ignore[no-untyped-def]
    for i in range(out.shape[1]):
        out[row, i] = blend(resized[r, i], resized[r + 1, i], high, low)


@compiled
def _add_two_rows(resized, r, weight, next_weight, sums):  # type: ignore[no-untyped-def]
    for i in range(len(sums)):
        sums[i] += resized[r, i] * weight + resized[r + 1, i] * next_weight


@compiled
def _transpose_image(levels, out):  # type: ignore[no-untyped-def]
    """out[y, x] = levels[x, y], three channels each."""
    for y in range(len(out)):
        for x in range(len(out)):
            for channel in range(3):
                out[y, 3 * x + channel] = levels[x, 3 * y + channel]
