"""Reference render: grids of palette indices → resized, normalised batch, in plain torch, on any device.

For each image the render looks up the colour of each cell, resizes to S × S in two integer passes, and normalises. The
float32 result has the same bits as Pillow's ``resize((S, S), BILINEAR)`` followed by torchvision's ToTensor and
Normalize. :mod:`quaclrs.imaging.resample` derives the filter weights and explains why this is exact.

The two passes of a resize:

- The first pass runs along the *inner axis*. Each output value is a weighted sum of neighbouring inner cells.
- The second pass runs along the *outer axis*. Each output row is a weighted sum of neighbouring rows of the first pass.

Usually the inner axis is horizontal: the outer cells are the rows of the grid, the inner cells the cells of a row.
Where Pillow resizes vertically first (:func:`quaclrs.imaging.resample.vertical_first`), the inner axis is vertical. The
render then reads the grid column by column and transposes its result.

This file puts clarity before speed. :mod:`~quaclrs.imaging.kernels.render_cpu` and
:mod:`~quaclrs.imaging.kernels.render_triton` compute the same bits faster and are tested against it;
:mod:`~quaclrs.imaging.kernels.dispatch` picks one of the three.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quaclrs.imaging.indexed import MAX_COLOURS
from quaclrs.imaging.layout import Layout
from quaclrs.imaging.memory import allocate_batch_memory, as_batch
from quaclrs.imaging.normalise import normalise
from quaclrs.imaging.resample import HALF, WEIGHT_BITS, FilterWeights, cell_filter_weights, vertical_first

RENDER_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
"""Dtypes of a batch. uint8 holds the resized levels themselves, not normalised."""


@dataclass(frozen=True, eq=False)
class Grids:
    """N indexed images in one flat buffer, all tensors on one device. Widths, layouts and palettes mix freely.

    ``flat`` may be part of a memory map. Map it with ``mode="c"`` (copy on write), because torch warns about read-only
    memory. Raises ``ValueError`` for a wrong shape, dtype or device.
    """

    flat: torch.Tensor
    """(bytes,) uint8: the grids, each row by row."""
    offsets: torch.Tensor
    """(N,) int64: where in ``flat`` each grid starts."""
    layouts: torch.Tensor
    """(N,) int32: position in the tables' layouts."""
    palettes: torch.Tensor
    """(N,) int32: position in the tables' palettes."""

    def __post_init__(self) -> None:
        wanted = {"flat": torch.uint8, "offsets": torch.int64, "layouts": torch.int32, "palettes": torch.int32}
        for name, dtype in wanted.items():
            tensor: torch.Tensor = getattr(self, name)
            flat = tensor.ndim == 1 and tensor.is_contiguous()
            if tensor.dtype != dtype or not flat or tensor.device != self.flat.device:
                found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise ValueError(
                    f"{name} must be one-dimensional, contiguous {dtype} on {self.flat.device}, not {found}"
                )
        if not len(self.offsets) == len(self.layouts) == len(self.palettes):
            raise ValueError(
                f"{len(self.offsets)} offsets need as many layouts ({len(self.layouts)}) and palettes "
                f"({len(self.palettes)})"
            )

    def __len__(self) -> int:
        return len(self.offsets)


Axis = tuple[tuple[int, ...], int]
"""(edges, pixels): the first pixel of each cell along the axis, and the axis's length in pixels."""


class Passes(NamedTuple):
    """The axes of a layout in the order in which Pillow resizes them."""

    inner: Axis
    """The axis of the first pass."""
    outer: Axis
    """The axis of the second pass."""
    transposed: bool
    """Whether Pillow resizes vertically first, so that the inner axis is vertical."""

    @classmethod
    def of(cls, layout: Layout, size: int) -> Passes:
        """The passes of a resize of ``layout`` to ``size`` × ``size``."""
        horizontal, vertical = (layout.column_edges, layout.width), (layout.row_edges, layout.height)
        if vertical_first(layout.height, layout.width, size):
            return cls(inner=vertical, outer=horizontal, transposed=True)
        return cls(inner=horizontal, outer=vertical, transposed=False)


@dataclass(frozen=True, eq=False)
class RenderTables:
    """Everything that rendering needs besides the grids, for L layouts, P palettes and one output size S.

    A few 100 KB on one device. The filter weights come from :func:`quaclrs.imaging.resample.cell_filter_weights`. All
    layouts are padded with weights of 0 to the largest number K of weights, so ``first + k`` of a padded weight may lie
    beyond the last cell. Weights are stored as (L, K, S), so that neighbouring output values read neighbouring weights.
    """

    size: int
    layouts: tuple[Layout, ...]
    outer_cells: torch.Tensor
    """(L,) int32: number of cells along the outer axis; see the module docstring."""
    inner_cells: torch.Tensor
    """(L,) int32: number of cells along the inner axis."""
    outer_stride: torch.Tensor
    """(L,) int32: bytes of the grid from one outer cell to the next."""
    inner_stride: torch.Tensor
    """(L,) int32: bytes of the grid from one inner cell to the next."""
    transposed: torch.Tensor
    """(L,) int32: 1 where the inner axis is vertical and the result must be transposed, else 0."""
    inner_first: torch.Tensor
    """(L, S) int32: first inner cell of each output column (first pass)."""
    inner_weights: torch.Tensor
    """(L, K of the inner axis, S) int32."""
    outer_first: torch.Tensor
    """(L, S) int32: first outer cell of each output row (second pass)."""
    outer_weights: torch.Tensor
    """(L, K of the outer axis, S) int32."""
    palettes: torch.Tensor
    """(P, 256) int32 colours ``R | G << 8 | B << 16``; black beyond a palette's end."""

    @classmethod
    def build(
        cls,
        layouts: Sequence[Layout],
        palettes: Sequence[NDArray[np.uint8]],
        size: int,
        device: torch.device | str = "cpu",
    ) -> RenderTables:
        """Tables for ``layouts`` and ``palettes`` (each (1..256, 3) uint8) at ``size`` pixels a side, on ``device``."""
        if size < 1 or not layouts or not palettes:
            raise ValueError(f"cannot render {len(layouts)} layouts with {len(palettes)} palettes at size {size}")
        passes = [Passes.of(layout, size) for layout in layouts]
        inner_first, inner_weights = _stack([cell_filter_weights(*one.inner, size) for one in passes])
        outer_first, outer_weights = _stack([cell_filter_weights(*one.outer, size) for one in passes])
        strides = [
            (1, layout.columns) if one.transposed else (layout.columns, 1)
            for layout, one in zip(layouts, passes, strict=True)
        ]
        tables = cls(
            size=size,
            layouts=tuple(layouts),
            outer_cells=_int32(len(one.outer[0]) for one in passes),
            inner_cells=_int32(len(one.inner[0]) for one in passes),
            outer_stride=_int32(outer for outer, _ in strides),
            inner_stride=_int32(inner for _, inner in strides),
            transposed=_int32(one.transposed for one in passes),
            inner_first=inner_first,
            inner_weights=inner_weights,
            outer_first=outer_first,
            outer_weights=outer_weights,
            palettes=torch.stack([_packed(palette) for palette in palettes]),
        )
        return tables.to(device)

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self.palettes.device

    def to(self, device: torch.device | str) -> RenderTables:
        """The same tables on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def check_grids(grids: Grids, tables: RenderTables) -> None:
    """Raise ``ValueError`` if a grid leaves the buffer or names a layout or palette that the tables lack.

    The kernels do not check what they read, so call this once for each set of grids. On a GPU it synchronises with the
    device.
    """
    if grids.flat.device != tables.device:
        raise ValueError(f"the grids are on {grids.flat.device}, their tables on {tables.device}")
    if not len(grids):
        return
    for name, ids, known in (
        ("layout", grids.layouts, len(tables.layouts)),
        ("palette", grids.palettes, len(tables.palettes)),
    ):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= known:
            raise ValueError(f"a grid has {name} {low if low < 0 else high}, there are {known}")
    start = int(grids.offsets.min())
    end = int((grids.offsets + (tables.outer_cells * tables.inner_cells)[grids.layouts.long()]).max())
    if start < 0 or end > len(grids.flat):
        raise ValueError(f"grids lie at {start}..{end}, outside the buffer of {len(grids.flat)} bytes")


def render_reference(
    grids: Grids,
    index: torch.Tensor,
    tables: RenderTables,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Render the images ``index`` (B,) int64 of ``grids``: (B, 3, S, S) ``dtype``, channels_last, on their device.

    float32 values are bit-identical to torchvision's ToTensor + Normalize of Pillow's ``resize((S, S), BILINEAR)``.
    float16 and bfloat16 are the float32 values, rounded. uint8 are Pillow's levels. ``out``, if given, is a batch of
    this shape, dtype and memory format to write to.
    """
    check_grids(grids, tables)
    out = checked_out(out, len(index), tables, dtype)
    layouts = grids.layouts[index].long()  # (B,)
    levels = _second_pass(_first_pass(grids, index, layouts, tables), layouts, tables)
    transposed = tables.transposed[layouts].bool()[:, None, None, None]
    levels = torch.where(transposed, levels.transpose(1, 2), levels).to(torch.uint8)  # (B, S, S, 3)
    return out.copy_(levels.permute(0, 3, 1, 2) if dtype == torch.uint8 else normalise(levels, dtype))


def checked_out(out: torch.Tensor | None, images: int, tables: RenderTables, dtype: torch.dtype) -> torch.Tensor:
    """``out`` if it can take the batch, or a new batch (B, 3, S, S) if it is None. Raises ``ValueError``."""
    if dtype not in RENDER_DTYPES:
        raise ValueError(f"a batch is one of {', '.join(map(str, RENDER_DTYPES))}, not {dtype}")
    shape = (images, 3, tables.size, tables.size)
    if out is None:
        return _new_batch(images, tables, dtype)
    fits = out.shape == shape and out.dtype == dtype and out.device == tables.device
    if not (fits and out.is_contiguous(memory_format=torch.channels_last)):
        found = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise ValueError(f"out must be {shape} {dtype} on {tables.device}, channels_last, not {found}")
    return out


def _new_batch(images: int, tables: RenderTables, dtype: torch.dtype) -> torch.Tensor:
    if tables.device.type == "cpu":
        return as_batch(allocate_batch_memory(images, tables.size, dtype), images, tables.size, dtype)
    return torch.empty((images, tables.size, tables.size, 3), dtype=dtype, device=tables.device).permute(0, 3, 1, 2)


def _first_pass(grids: Grids, index: torch.Tensor, layouts: torch.Tensor, tables: RenderTables) -> torch.Tensor:
    """(B, N, S, 3) int32 levels: each outer cell resized to S values; N is the most outer cells of any layout.

    Outer cells that a smaller grid lacks repeat its last one.
    """
    last_outer, last_inner = (cells[layouts][:, None] - 1 for cells in (tables.outer_cells, tables.inner_cells))
    outer = torch.arange(int(tables.outer_cells.max()), device=tables.device).minimum(last_outer)  # (B, N)
    outer_start = grids.offsets[index][:, None] + outer * tables.outer_stride[layouts][:, None]
    inner_stride = tables.inner_stride[layouts][:, None]  # (B, 1)
    palettes = tables.palettes[grids.palettes[index].long()]  # (B, 256)
    image = torch.arange(len(index), device=tables.device)[:, None, None]
    first, weights = tables.inner_first[layouts], tables.inner_weights[layouts]  # (B, S), (B, K, S)

    sums = torch.full((*outer.shape, tables.size, 3), HALF, dtype=torch.int32, device=tables.device)
    for k in range(weights.shape[1]):
        inner = (first + k).minimum(last_inner) * inner_stride  # (B, S); the weight beyond the last cell is 0
        indices = grids.flat[outer_start[:, :, None] + inner[:, None, :]].long()  # (B, N, S)
        colour = palettes[image, indices]
        channels = torch.stack([colour & 255, colour >> 8 & 255, colour >> 16], dim=-1)  # (B, N, S, 3)
        sums += channels * weights[:, k, None, :, None]
    return sums >> WEIGHT_BITS


def _second_pass(resized: torch.Tensor, layouts: torch.Tensor, tables: RenderTables) -> torch.Tensor:
    """(B, S, S, 3) int32 levels of 0..255 from ``resized`` (B, N, S, 3) int32, the first pass's result.

    No level needs clipping, see :data:`~quaclrs.imaging.resample.MAX_SIDE`.
    """
    image = torch.arange(len(layouts), device=tables.device)[:, None]
    last_outer = tables.outer_cells[layouts][:, None] - 1
    first, weights = tables.outer_first[layouts], tables.outer_weights[layouts]  # (B, S), (B, K, S)

    sums = torch.full((len(layouts), tables.size, tables.size, 3), HALF, dtype=torch.int32, device=tables.device)
    for k in range(weights.shape[1]):
        outer = (first + k).minimum(last_outer)  # (B, S)
        sums += resized[image, outer] * weights[:, k, :, None, None]
    return sums >> WEIGHT_BITS


def _int32(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def _stack(filters: list[FilterWeights]) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, S) first cells and (L, K, S) weights of L layouts, padded with zeros to the largest K."""
    most = max(one.weights.shape[1] for one in filters)
    weights = [np.pad(one.weights, ((0, 0), (0, most - one.weights.shape[1]))).T for one in filters]
    # stack() alone would keep the transposed memory order, which the kernels do not expect
    contiguous = np.ascontiguousarray(np.stack(weights))
    return torch.from_numpy(np.stack([one.first for one in filters])), torch.from_numpy(contiguous)


def _packed(palette: NDArray[np.uint8]) -> torch.Tensor:
    """(256,) int32 ``R | G << 8 | B << 16``."""
    if palette.dtype != np.uint8 or palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= MAX_COLOURS:
        raise ValueError(f"a palette must be (1..{MAX_COLOURS}, 3) uint8, not {palette.shape} {palette.dtype}")
    colours = np.zeros(MAX_COLOURS, np.int32)
    colours[: len(palette)] = palette.astype(np.int32) @ (1, 1 << 8, 1 << 16)
    return torch.from_numpy(colours)
