"""Grids → resized, normalised batch, with the bits of Pillow's resize and torchvision's ToTensor + Normalize: the
reference.

Written to be read, in plain torch, for any device. :mod:`~quaclrs.imaging.kernels.render_cpu` and
:mod:`~quaclrs.imaging.kernels.render_triton` do the same faster and are tested against it;
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
from quaclrs.imaging.memory import as_batch, host_bytes
from quaclrs.imaging.normalise import normalise
from quaclrs.imaging.resample import HALF, WEIGHT_BITS, FilterWeights, cell_filter_weights, vertical_first

RENDER_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
"""Of a batch. uint8 holds the resized levels themselves, not normalised."""


@dataclass(frozen=True, eq=False)
class Grids:
    """N indexed images in one flat buffer, all tensors on one device. Widths, layouts and palettes mix freely.

    ``flat`` may lie in a memory map. Map it with ``mode="c"`` (copy on write), for torch warns about read-only memory.
    Raises ``ValueError`` for a wrong shape, dtype or device.
    """

    flat: torch.Tensor
    """(bytes,) uint8: grids, each row by row."""
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
            if (
                tensor.dtype != dtype
                or tensor.ndim != 1
                or not tensor.is_contiguous()
                or tensor.device != self.flat.device
            ):
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


class Passes(NamedTuple):
    """The axes of a layout in the order in which Pillow resizes them, each as (edges, pixels)."""

    inner: tuple[tuple[int, ...], int]
    """The first pass blends the cells of each line."""
    outer: tuple[tuple[int, ...], int]
    """The second pass blends the lines."""
    transposed: bool
    """Lines are columns of cells, for Pillow resizes vertically first; usually they are rows."""

    @classmethod
    def of(cls, layout: Layout, size: int) -> Passes:
        """The passes of a resize of ``layout`` to ``size``."""
        columns, rows = (layout.column_edges, layout.width), (layout.row_edges, layout.height)
        transposed = vertical_first(layout.height, layout.width, size)
        return cls(rows, columns, True) if transposed else cls(columns, rows, False)


@dataclass(frozen=True, eq=False)
class RenderTables:
    """All that rendering needs besides the grids, for L layouts, P palettes and one output size S; a few 100 KB on one
    device.

    Each layout's taps (:func:`quaclrs.imaging.resample.cell_filter_weights`) are padded with weights of 0 to the most
    taps of any layout; a padded tap may point beyond the last cell. Tap-major, so that neighbouring output values read
    neighbouring weights.
    """

    size: int
    layouts: tuple[Layout, ...]
    outer_cells: torch.Tensor
    """(L,) int32: lines of cells, which the first pass works through; see :class:`Passes`."""
    inner_cells: torch.Tensor
    """(L,) int32: cells of one line."""
    outer_stride: torch.Tensor
    """(L,) int32: bytes of the grid from one line to the next."""
    inner_stride: torch.Tensor
    """(L,) int32: bytes from one cell of a line to the next."""
    transposed: torch.Tensor
    """(L,) int32: 1 where lines are columns, so that what the second pass makes is turned on its side; else 0."""
    inner_first: torch.Tensor
    """(L, S) int32: first pass, the first cell of each output value."""
    inner_weights: torch.Tensor
    """(L, cell taps, S) int32."""
    outer_first: torch.Tensor
    """(L, S) int32: second pass, the first line of each output line."""
    outer_weights: torch.Tensor
    """(L, line taps, S) int32."""
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
        """Where the tensors are."""
        return self.palettes.device

    def to(self, device: torch.device | str) -> RenderTables:
        """The same on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def check_grids(grids: Grids, tables: RenderTables) -> None:
    """Raise ``ValueError`` if a grid leaves the buffer or names a layout or palette that the tables lack.

    The kernels trust what they read, so each set of grids needs this once. On a GPU it waits for the device.
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
    """Draw the images ``index`` (B,) int64 of ``grids``: (B, 3, S, S) ``dtype``, channels_last, on their device.

    float32 values are bit-identical to torchvision's ToTensor + Normalize of Pillow's ``resize((S, S), BILINEAR)``;
    float16 and bfloat16 are those, rounded; uint8 are Pillow's levels. ``out``, if given, is such a batch to write to.
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
        return as_batch(host_bytes(images, tables.size, dtype), images, tables.size, dtype)
    return torch.empty((images, tables.size, tables.size, 3), dtype=dtype, device=tables.device).permute(0, 3, 1, 2)


def _first_pass(grids: Grids, index: torch.Tensor, layouts: torch.Tensor, tables: RenderTables) -> torch.Tensor:
    """Every line at S values: (B, most lines, S, 3) int32 levels. Lines that a smaller grid lacks repeat
    its last one.
    """
    last_line, last_cell = tables.outer_cells[layouts][:, None] - 1, tables.inner_cells[layouts][:, None] - 1  # (B, 1)
    line = torch.arange(int(tables.outer_cells.max()), device=tables.device).minimum(last_line)  # (B, N)
    line_start = grids.offsets[index][:, None] + line * tables.outer_stride[layouts][:, None]
    palettes = tables.palettes[grids.palettes[index].long()]  # (B, 256)
    image = torch.arange(len(index), device=tables.device)[:, None, None]
    first, weights = tables.inner_first[layouts], tables.inner_weights[layouts]  # (B, S), (B, K, S)

    sums = torch.full((*line.shape, tables.size, 3), HALF, dtype=torch.int32, device=tables.device)
    for k in range(weights.shape[1]):
        cell = (first + k).minimum(last_cell) * tables.inner_stride[layouts][
            :, None
        ]  # beyond the last cell the weight is 0
        indices = grids.flat[line_start[:, :, None] + cell[:, None, :]].long()  # (B, N, S)
        colour = palettes[image, indices]
        channels = torch.stack([colour & 255, colour >> 8 & 255, colour >> 16], dim=-1)  # (B, N, S, 3)
        sums += channels * weights[:, k, None, :, None]
    return sums >> WEIGHT_BITS


def _second_pass(lines: torch.Tensor, layouts: torch.Tensor, tables: RenderTables) -> torch.Tensor:
    """(B, N, S, 3) int32 lines to (B, S, S, 3) int32 levels of 0..255; they never need clipping, see MAX_SIDE."""
    image = torch.arange(len(layouts), device=tables.device)[:, None]
    last_line = tables.outer_cells[layouts][:, None] - 1
    first, weights = tables.outer_first[layouts], tables.outer_weights[layouts]  # (B, S), (B, K, S)

    sums = torch.full((len(layouts), tables.size, tables.size, 3), HALF, dtype=torch.int32, device=tables.device)
    for k in range(weights.shape[1]):
        line = (first + k).minimum(last_line)  # (B, S)
        sums += lines[image, line] * weights[:, k, :, None, None]
    return sums >> WEIGHT_BITS


def _int32(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def _stack(filters: list[FilterWeights]) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, S) first sources and (L, K, S) weights of L layouts, padded to the most taps."""
    most = max(one.weights.shape[1] for one in filters)
    weights = [np.pad(one.weights, ((0, 0), (0, most - one.weights.shape[1]))).T for one in filters]
    # stack() alone would keep the transposed memory order, which the kernels do not expect
    return torch.from_numpy(np.stack([one.first for one in filters])), torch.from_numpy(
        np.ascontiguousarray(np.stack(weights))
    )


def _packed(palette: NDArray[np.uint8]) -> torch.Tensor:
    """(256,) int32."""
    if palette.dtype != np.uint8 or palette.ndim != 2 or palette.shape[1] != 3 or not 1 <= len(palette) <= MAX_COLOURS:
        raise ValueError(f"a palette must be (1..{MAX_COLOURS}, 3) uint8, not {palette.shape} {palette.dtype}")
    colours = np.zeros(MAX_COLOURS, np.int32)
    colours[: len(palette)] = palette.astype(np.int32) @ (1, 1 << 8, 1 << 16)
    return torch.from_numpy(colours)
