"""The tables of the CPU render: :class:`quaclrs.imaging.render.RenderTables` in the form that the kernel reads.

The kernel adds filter weights in pairs, so the number of weights is padded to an even number with weights of 0. In the
second pass most output rows are a weighted sum of only two rows. For those the kernel has a 16-bit formula
(:func:`quaclrs.imaging.kernels.intrinsics.blend`); this module decides, per output row, whether the formula gives
Pillow's bits. NumPy only: nothing here is compiled.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quaclrs.imaging.render import RenderTables
from quaclrs.imaging.resample import HALF, WEIGHT_BITS


class CpuTables(NamedTuple):
    """The fields of :class:`RenderTables` as NumPy arrays, and what the kernel derives from them.

    L layouts, P palettes, S output values per axis, K filter weights.
    """

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
    """(L, K, S), K even and at least 4."""
    inner_weights_used: NDArray[np.int32]
    """(L,) how many of its K weights each layout uses, rounded up to an even number and to at least 4."""
    outer_first: NDArray[np.int32]
    """(L, S)"""
    outer_weights: NDArray[np.int32]
    """(L, K, S), K even."""
    blends: NDArray[np.bool_]
    """(L, S) whether the output row is a sum of at most two rows, for which ``blend`` gives Pillow's bits."""
    blend_high: NDArray[np.int16]
    """(L, S) the upper bits of the second row's weight, for ``blend``: weight = blend_high · 2^16 + blend_low."""
    blend_low: NDArray[np.int16]
    """(L, S)"""


@functools.lru_cache(maxsize=8)
def cpu_tables(tables: RenderTables) -> CpuTables:
    """The kernel's form of ``tables``, computed once per object (RenderTables compare by identity)."""
    inner_weights, outer_weights = _padded(tables.inner_weights.numpy(), 4), _padded(tables.outer_weights.numpy(), 2)
    second = outer_weights[:, 1]  # (L, S)
    low = second.astype(np.int16)  # the lower 16 bits, as a signed number
    return CpuTables(
        outer_cells=tables.outer_cells.numpy(),
        inner_cells=tables.inner_cells.numpy(),
        outer_stride=tables.outer_stride.numpy(),
        inner_stride=tables.inner_stride.numpy(),
        transposed=tables.transposed.numpy(),
        palettes=tables.palettes.numpy(),
        inner_first=tables.inner_first.numpy(),
        inner_weights=inner_weights,
        inner_weights_used=np.array([_count_used(weights) for weights in inner_weights], np.int32),
        outer_first=tables.outer_first.numpy(),
        outer_weights=outer_weights,
        blends=np.stack([blends_exactly(weights) for weights in outer_weights]),
        blend_high=((second - low) >> 16).astype(np.int16),
        blend_low=low,
    )


def _padded(weights: NDArray[np.int32], least: int) -> NDArray[np.int32]:
    """(L, K, S) ``weights`` with zeros appended until K is even and at least ``least``."""
    count = weights.shape[1]
    return np.pad(weights, ((0, 0), (0, max(least, count + count % 2) - count), (0, 0)))


def _count_used(weights: NDArray[np.int32]) -> int:
    """How many of the (K, S) ``weights`` of one layout are in use, rounded up to an even number and to at least 4."""
    used = int(np.flatnonzero(weights.any(axis=1)).max()) + 1
    return max(4, used + used % 2)


def blends_exactly(weights: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(S,) for the (K, S) ``weights`` of one layout: whether ``blend`` of two rows has the bits of the weighted sum.

    ``blend`` takes the first weight to be 2^22 − w, where w is the second. Rounding lets the two weights sum to
    2^22 + e instead. For levels a and b and d = b − a, the true sum is a·2^22 + d·w + a·e. The last term matters only
    where it carries the sum over a multiple of 2^22. It is monotone in a, and a lies in max(0, −d)..min(255, 255 − d).
    So comparing the results at both ends of that interval, for all 511 values of d, decides the question.
    """
    difference = np.arange(-255, 256)[:, None]  # (511, 1) int64
    blended = (difference * weights[1] + HALF) >> WEIGHT_BITS  # (511, S)
    excess = weights[:2].sum(axis=0) - (1 << WEIGHT_BITS)
    equal: NDArray[np.bool_] = np.logical_not(weights[2:].any(axis=0))
    for level in (np.maximum(0, -difference), np.minimum(255, 255 - difference)):
        equal &= ((difference * weights[1] + level * excess + HALF) >> WEIGHT_BITS == blended).all(axis=0)
    return equal
