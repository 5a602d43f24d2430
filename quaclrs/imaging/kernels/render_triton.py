"""The render as one fused Triton kernel: palette indices in, normalised channels_last batch out.

The kernel writes no intermediate result to device memory. One program renders one tile of one image
(:mod:`quaclrs.imaging.kernels.triton_tiles`), so layouts and palettes mix freely in a batch.
:mod:`quaclrs.imaging.render` explains inner and outer axis. Each program runs three steps:

1. *First pass*, for the tile's output columns and the outer cells that its output rows are made of. For each filter
   weight, a lane loads one byte (neighbouring lanes read neighbouring cells) and looks its colour up in a copy of the
   palette in shared memory, three channels in one integer. Two neighbouring tiles both compute the outer cells at their
   common edge, which is cheaper than passing them through device memory.
2. *Second pass*. The results of step 1 belong to other lanes, so this is again a look-up in shared memory.
3. *Output*. One lane writes one value, so that a warp writes whole lines of memory although a pixel is three values
   wide. The kernel computes fp16 and bf16 as ``level · scale + shift`` if that gives the table's bits for all 768
   levels, with and without fused multiply-add (:func:`_affine` tests it). For float32 it does not, so float32 values
   come from the table.

Where the inner axis is vertical, the kernel reads the grid along columns and writes its output transposed. Those
accesses are strided: slower, with the same bits.

All sums are int32, as in Pillow: at most 255 · (2^22 + 8192) + 2^21 < 2^31, see ``MAX_SIDE``.

The file imports ``triton`` at the top. Import it only where there is a GPU, or with ``TRITON_INTERPRET=1`` for CPU
tensors.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from quaclrs.imaging.kernels.triton_tiles import Tile, choose_tile
from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD, normalisation_table
from quaclrs.imaging.render import Grids, RenderTables, checked_out
from quaclrs.imaging.resample import HALF, WEIGHT_BITS

MAX_UNROLLED = tl.constexpr(16)
"""Most filter weights for which the sum is unrolled. With more, as when S is small, it stays a loop."""

LEVELS, TABLE, AFFINE = 0, 1, 2
"""Modes: a value of the batch is the level itself, comes from a table, or is ``level · scale + shift``."""

_HALF = tl.constexpr(HALF)
_SHIFT = tl.constexpr(WEIGHT_BITS)


def render_triton(
    grids: Grids,
    index: torch.Tensor,
    tables: RenderTables,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """As :func:`quaclrs.imaging.render.render_reference`, in one kernel on the current stream.

    The call does not synchronise with the device, so it checks nothing in device memory: call
    :func:`quaclrs.imaging.render.check_grids` once per set of grids, and keep ``index`` within them. ``tile`` is for
    tuning; the default is :func:`~quaclrs.imaging.kernels.triton_tiles.choose_tile`.
    """
    out = checked_out(out, len(index), tables, dtype)
    if not len(index):
        return out
    tile = tile or choose_tile(tables)
    mode = _mode(dtype, interpreted=tables.device.type == "cpu")
    values = _values(mode, dtype, tables.device)
    tiles = -(-tables.size // tile.rows) * -(-tables.size // tile.columns)
    pointers = (index, grids.flat, grids.offsets, grids.layouts, grids.palettes, *_table_tensors(tables), values, out)
    # Fused multiply-add changes no result here, see _affine; without the argument Triton 3.9 warns.
    _render_tile[(len(index) * tiles,)](
        *pointers, **_constants(tables, tile, mode), num_warps=tile.warps, enable_fp_fusion=True
    )
    return out


def _table_tensors(tables: RenderTables) -> tuple[torch.Tensor, ...]:
    shapes = (tables.outer_cells, tables.inner_cells, tables.outer_stride, tables.inner_stride, tables.transposed)
    return (
        *shapes,
        tables.inner_first,
        tables.inner_weights,
        tables.outer_first,
        tables.outer_weights,
        tables.palettes,
    )


def _constants(tables: RenderTables, tile: Tile, mode: int) -> dict[str, int]:
    return {
        "SIZE": tables.size,
        "INNER_WEIGHTS": tables.inner_weights.shape[1],
        "OUTER_WEIGHTS": tables.outer_weights.shape[1],
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
        "TILE_OUTER_CELLS": tile.outer_cells,
        "SOURCE_LANES": tile.source_lanes,
        "LANES": tile.lanes,
        "MODE": mode,
    }


def _mode(dtype: torch.dtype, interpreted: bool) -> int:
    """LEVELS, AFFINE or TABLE.

    Triton's interpreter truncates to bfloat16 where GPUs round, so for bfloat16 it uses the table.
    """
    if dtype == torch.uint8:
        return LEVELS
    return TABLE if _affine(dtype) is None or (interpreted and dtype == torch.bfloat16) else AFFINE


@functools.lru_cache(maxsize=64)
def _values(mode: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The kernel's ``values`` argument for ``mode``, on ``device``."""
    affine = _affine(dtype)
    if mode == AFFINE and affine is not None:
        return affine.to(device)
    if mode == TABLE:
        return normalisation_table().to(dtype).to(device)
    return torch.zeros(1, device=device)  # LEVELS reads none


@functools.cache
def _affine(dtype: torch.dtype) -> torch.Tensor | None:
    """(2, 3) float32 scales and shifts of the channels; None unless they give the bits of all 768 normalised levels."""
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    scale, shift = (torch.from_numpy(value.astype(np.float32))[:, None] for value in (1 / (255 * std), -mean / std))
    levels = torch.arange(256, dtype=torch.float32)
    rounded_twice = levels * scale + shift
    rounded_once = (levels.double() * scale.double() + shift.double()).float()  # the product is exact in float64
    wanted = normalisation_table().to(dtype)
    exact = torch.equal(rounded_twice.to(dtype), wanted) and torch.equal(rounded_once.to(dtype), wanted)
    return torch.stack([scale[:, 0], shift[:, 0]]) if exact else None


@triton.jit
def _add_weighted(colour, weight, red, green, blue):  # type: ignore[no-untyped-def]
    """Add ``weight`` · ``colour`` to the sums of the three channels."""
    red += (colour & 255) * weight
    green += ((colour >> 8) & 255) * weight
    blue += (colour >> 16) * weight
    return red, green, blue


@triton.jit
def _add_weighted_cell(outer, cell, last_inner, inner_stride, palette, weight, red, green, blue):  # type: ignore[no-untyped-def]
    """Add one cell of the first pass. Beyond the last cell the weight is 0, so any cell may be read."""
    entry = tl.load(outer + tl.minimum(cell, last_inner) * inner_stride).to(tl.int32)
    return _add_weighted(tl.gather(palette, entry, 0), tl.load(weight), red, green, blue)


@triton.jit
def _rounded(red, green, blue):  # type: ignore[no-untyped-def]
    """Round three sums to levels and pack them as R | G << 8 | B << 16."""
    return (red >> _SHIFT) | ((green >> _SHIFT) << 8) | ((blue >> _SHIFT) << 16)


@triton.jit
def _render_tile(  # type: ignore[no-untyped-def]
    index,  # (B,) int64; the other inputs as in Grids and RenderTables
    flat,
    offsets,
    layouts,
    palettes,
    all_outer_cells,
    all_inner_cells,
    outer_strides,
    inner_strides,
    all_transposed,
    inner_first,
    inner_weights,
    outer_first,
    outer_weights,
    colours,
    values,  # (3, 256) of the batch's dtype, or (2, 3) float32 scales and shifts
    out,  # (B, S, S, 3)
    SIZE: tl.constexpr,
    INNER_WEIGHTS: tl.constexpr,
    OUTER_WEIGHTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_OUTER_CELLS: tl.constexpr,
    SOURCE_LANES: tl.constexpr,
    LANES: tl.constexpr,
    MODE: tl.constexpr,
):
    tiles_across: tl.constexpr = (SIZE + TILE_COLUMNS - 1) // TILE_COLUMNS
    tiles: tl.constexpr = tiles_across * ((SIZE + TILE_ROWS - 1) // TILE_ROWS)
    sample = tl.program_id(0) // tiles  # tiles of one image run side by side and share its indices in the cache
    tile = tl.program_id(0) % tiles
    top = tile // tiles_across * TILE_ROWS
    left = tile % tiles_across * TILE_COLUMNS

    image = tl.load(index + sample)
    layout = tl.load(layouts + image)
    grid = flat + tl.load(offsets + image)
    last_outer = tl.load(all_outer_cells + layout) - 1
    last_inner = tl.load(all_inner_cells + layout) - 1
    outer_stride = tl.load(outer_strides + layout)
    inner_stride = tl.load(inner_strides + layout)
    palette = tl.load(colours + tl.load(palettes + image) * 256 + tl.arange(0, 256))
    top_outer = tl.load(outer_first + layout * SIZE + top)  # the first outer cell that this tile needs

    # First pass. Lanes beyond the image repeat its edge. That is cheaper than masking each load, and nothing reads
    # them.
    lane = tl.arange(0, SOURCE_LANES)
    x = tl.minimum(left + lane % TILE_COLUMNS, SIZE - 1)
    outer = grid + tl.minimum(top_outer + lane // TILE_COLUMNS, last_outer) * outer_stride
    first = tl.load(inner_first + layout * SIZE + x)
    weights = inner_weights + layout * INNER_WEIGHTS * SIZE + x
    red = tl.full([SOURCE_LANES], _HALF, tl.int32)
    green = red
    blue = red
    if INNER_WEIGHTS <= MAX_UNROLLED:
        for k in tl.static_range(INNER_WEIGHTS):
            red, green, blue = _add_weighted_cell(
                outer, first + k, last_inner, inner_stride, palette, weights + k * SIZE, red, green, blue
            )
    else:
        for k in range(INNER_WEIGHTS):
            red, green, blue = _add_weighted_cell(
                outer, first + k, last_inner, inner_stride, palette, weights + k * SIZE, red, green, blue
            )
    resized = _rounded(red, green, blue)  # (SOURCE_LANES,)

    # Second pass.
    lane = tl.arange(0, LANES)
    y = tl.minimum(top + lane // TILE_COLUMNS, SIZE - 1)
    column = lane % TILE_COLUMNS
    first = tl.load(outer_first + layout * SIZE + y) - top_outer
    weights = outer_weights + layout * OUTER_WEIGHTS * SIZE + y
    red = tl.full([LANES], _HALF, tl.int32)
    green = red
    blue = red
    if OUTER_WEIGHTS <= MAX_UNROLLED:
        for k in tl.static_range(OUTER_WEIGHTS):
            source = tl.minimum(first + k, TILE_OUTER_CELLS - 1) * TILE_COLUMNS + column
            red, green, blue = _add_weighted(
                tl.gather(resized, source, 0), tl.load(weights + k * SIZE), red, green, blue
            )
    else:
        for k in range(OUTER_WEIGHTS):
            source = tl.minimum(first + k, TILE_OUTER_CELLS - 1) * TILE_COLUMNS + column
            red, green, blue = _add_weighted(
                tl.gather(resized, source, 0), tl.load(weights + k * SIZE), red, green, blue
            )
    pixels = _rounded(red, green, blue)  # (LANES,)

    # Output: 3 · LANES values, in the order of memory.
    transposed = tl.load(all_transposed + layout)
    row_stride = tl.where(transposed == 0, SIZE, 1)
    column_stride = tl.where(transposed == 0, 1, SIZE)
    for part in tl.static_range(3):
        value = part * LANES + lane
        pixel = value // 3
        channel = value % 3
        level = (tl.gather(pixels, pixel, 0) >> (channel * 8)) & 255
        y = top + pixel // TILE_COLUMNS
        x = left + pixel % TILE_COLUMNS
        inside = (pixel < TILE_ROWS * TILE_COLUMNS) & (y < SIZE) & (x < SIZE)
        target = out + sample.to(tl.int64) * (SIZE * SIZE * 3) + (y * row_stride + x * column_stride) * 3 + channel
        if MODE == 0:
            tl.store(target, level.to(tl.uint8), mask=inside)
        elif MODE == 1:
            tl.store(target, tl.load(values + channel * 256 + level), mask=inside)
        else:
            normalised = level.to(tl.float32) * tl.load(values + channel) + tl.load(values + 3 + channel)
            tl.store(target, normalised.to(out.dtype.element_ty), mask=inside)


def compile_for(capability: int, tables: RenderTables, dtype: torch.dtype) -> Any:
    """Triton's ``CompiledKernel`` for compute capability ``capability`` (75, 90, ...), compiled without a GPU.

    For tests, and for reading its PTX and cubin (``.asm``).
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    element = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}[dtype]
    mode = _mode(dtype, interpreted=False)
    constants: dict[str, int] = _constants(tables, choose_tile(tables), mode)
    inputs = [
        "*i64",
        "*u8",
        "*i64",
        "*i32",
        "*i32",
        *["*i32"] * 10,
        f"*{element}" if mode == TABLE else "*fp32",
        f"*{element}",
    ]
    names = itertools.chain(inputs, ["constexpr"] * len(constants))
    signature = dict(zip(_render_tile.arg_names, names, strict=True))
    source = ASTSource(_render_tile, signature, constexprs=constants)
    options = {"num_warps": choose_tile(tables).warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
