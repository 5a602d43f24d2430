"""The integer filter weights of Pillow's antialiased bilinear resize, for pixels and for cells.

Source of the formulas: Pillow's ``libImaging/Resample.c`` (``precompute_coeffs``, ``normalize_coeffs_8bpc``,
``ImagingResample``). Pillow resizes 8-bit channels in two passes, horizontal and vertical, in integer arithmetic. Each
output value of a pass is ``(Σ weight · source + 2^21) >> 22``.

The pixels of one cell share their value. So ``Σ weight · source`` over pixels equals the same sum over cells, with the
weights of each cell's pixels added up beforehand. Integer addition makes that exact. The first pass rounds its results,
so the order of the two passes matters: see :func:`vertical_first`.

Two details of Pillow need no code here:

- Pillow skips a pass whose size does not change. The filter then has one weight of 2^22, which returns each value
  unchanged.
- Pillow's horizontal pass computes only the rows that the vertical pass will read. That saves time and changes no
  value.

The float steps are IEEE doubles in Pillow's order. The integers are therefore equal wherever Pillow's compiler did not
fuse multiply and add. That holds on all of x86-64, where the tests compare every value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL
from numpy.typing import NDArray

WEIGHT_BITS = 22
"""Fractional bits of a weight: Pillow's PRECISION_BITS, 32 − 8 − 2."""

HALF = 1 << (WEIGHT_BITS - 1)
"""Added before the shift, so that the shift rounds to nearest."""

MAX_SIDE = 16384
"""Longest side of a source in pixels. Up to this side no render needs to clip, and every sum fits an int32.

Rounding lets the weights of one output value sum to 2^22 + e, where e is at most half the number of pixels. A value
needs Pillow's clip to 255 only if 255·e ≥ 2^21, that is e > 8224. A side of 16384 pixels gives e ≤ 8192.
"""


_PILLOW_CHOOSES_ORDER = int(PIL.__version__.partition(".")[0]) >= 13


def vertical_first(height: int, width: int, size: int) -> bool:
    """Whether the installed Pillow resizes an image to ``size`` × ``size`` vertically first.

    Since version 13 (pull request 9549), Pillow does where ``height − size > 2 · max(width − size, 0)``. The rule was
    found by comparing pixels with both orders, at 400 sizes. Older versions always start horizontally.
    """
    return _PILLOW_CHOOSES_ORDER and height - size > 2 * max(width - size, 0)


@dataclass(frozen=True)
class FilterWeights:
    """S weighted sums of neighbouring sources, one for each output value along an axis.

    Output i is the sum of ``weights[i, k] · source[first[i] + k]`` over k. An output with fewer than K sources has 0
    for its last weights, and ``first + k`` may lie beyond the last source.
    """

    first: NDArray[np.int32]
    """(S,) the first source; never decreases."""
    weights: NDArray[np.int32]
    """(S, K) for sources first, first + 1, ...; each row sums to about 2^22."""


def pixel_filter_weights(source: int, target: int) -> FilterWeights:
    """Filter weights of a resize from ``source`` to ``target`` pixels, up or down.

    Raises ``ValueError`` for sizes below 1 and for a source above MAX_SIDE.
    """
    if not (1 <= source <= MAX_SIDE and target >= 1):
        raise ValueError(f"cannot resize {source} to {target} pixels: sizes are at least 1, sources at most {MAX_SIDE}")
    scale = source / target
    support = max(scale, 1.0)  # of the triangle filter: radius 1, stretched when shrinking
    center = (np.arange(target) + 0.5) * scale  # (S,) float64
    # casts truncate towards zero, like C's (int)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), source) - first
    offsets = np.arange(count.max())
    distance = ((offsets + first[:, None]) - center[:, None] + 0.5) * (1.0 / support)
    weights = np.where(offsets < count[:, None], np.maximum(1.0 - np.abs(distance), 0.0), 0.0)  # (S, K) float64
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds from left to right as C does; sum() would not
    return FilterWeights(first.astype(np.int32), (weights * (1 << WEIGHT_BITS) + 0.5).astype(np.int32))


@functools.lru_cache(maxsize=256)
def cell_filter_weights(edges: tuple[int, ...], source: int, target: int) -> FilterWeights:
    """Filter weights over cells: the weights of each cell's pixels, added up.

    The axis has ``source`` pixels, is resized to ``target``, and ``edges[i]`` is the first pixel of cell i. The
    returned arrays are shared between callers and read-only.
    """
    pixels = pixel_filter_weights(source, target)
    steps = np.arange(pixels.weights.shape[1])
    position = np.minimum(pixels.first[:, None] + steps, source - 1)  # (S, K) pixel of each weight
    cell = cell_of_pixel(edges, source)[position]
    # Pixels of weight 0 at either end would only make K larger.
    nonzero = pixels.weights != 0
    first = cell[np.arange(target), nonzero.argmax(axis=1)]
    relative = np.where(nonzero, cell - first[:, None], 0)
    weights = np.zeros((target, int(relative.max()) + 1), np.int32)
    np.add.at(weights, (np.arange(target)[:, None], relative), pixels.weights)
    first = first.astype(np.int32)
    first.flags.writeable = weights.flags.writeable = False
    return FilterWeights(first, weights)


def cell_of_pixel(edges: Sequence[int], source: int) -> NDArray[np.intp]:
    """(source,) the cell of each pixel, where ``edges[i]`` is the first pixel of cell i."""
    return np.searchsorted(np.asarray(edges), np.arange(source), side="right") - 1
