"""Normalisation on the CPU: the bits of :func:`quaclrs.imaging.normalise.normalise`, at the speed of memory.

float32 values are computed in vector instructions. torchvision divides twice: by 255 and by std. Here a quotient x / d
takes two instructions. The kernel keeps 1 / d as two floats, head = float(1 / d) and tail = float(1 / d − head), and
``fma(x, head, x · tail)`` is the rounded quotient for every level and channel (the tests compare all 768). A look-up
table would need two loads and a store per value and take 2.5 times as long.

numba has no arithmetic for the 16-bit types. Their values come from a table. The file imports ``numba``, so import it
only where a kernel is used.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quaclrs.imaging.kernels.intrinsics import LANES, STREAM_ALIGNMENT, compiled, fused_multiply_add, stream_normalised
from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD, normalisation_table
from quaclrs.system.threads import parallel_for


def normalise_cpu(levels: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Normalise ``levels`` (B, S, S, 3) uint8 into ``out`` (B, 3, S, S) channels_last, and return ``out``."""
    rows, size = levels.shape[0] * levels.shape[1], levels.shape[2]
    sources, targets = levels.numpy().reshape(rows, 3 * size), pixels_of(out).reshape(rows, 3 * size)
    if out.dtype == torch.float32:
        factors, stream = normalisation_factors(size), can_stream(targets)
        parallel_for(lambda start, stop: normalise_rows(sources[start:stop], factors, targets, start, stream), rows)
    else:
        values = table_of(out.dtype)
        parallel_for(lambda start, stop: look_up_rows(sources[start:stop], values, targets, start), rows)
    return out


def pixels_of(batch: torch.Tensor) -> NDArray[Any]:
    """``batch`` (B, 3, S, S) channels_last as an array (B, S, S, 3) on the same memory; 16-bit dtypes as int16."""
    pixels = batch.permute(0, 2, 3, 1)
    return (pixels.view(torch.int16) if batch.dtype.itemsize == 2 else pixels).numpy()  # NumPy has no bfloat16


def table_of(dtype: torch.dtype) -> NDArray[np.int16]:
    """(3, 256) int16: the bits of each channel's 256 normalised values in a 16-bit ``dtype``."""
    table: NDArray[np.int16] = normalisation_table().to(dtype).view(torch.int16).numpy()
    return table


@functools.cache
def normalisation_factors(size: int) -> NDArray[np.float32]:
    """(3, 3 · ``size``) float32: mean, head of 1 / std, tail of 1 / std; for each value of a row of ``size`` pixels."""
    mean, std = (np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return np.stack([np.tile(part, size) for part in (mean, *_reciprocal(std))])


def _reciprocal(divisor: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(head, tail) float32: the float nearest to 1 / ``divisor``, and the rounded rest."""
    exact = 1 / divisor.astype(np.float64)
    head = exact.astype(np.float32)
    return head, (exact - head).astype(np.float32)


_HEAD, _TAIL = (part[0] for part in _reciprocal(np.array([255], np.float32)))


_BY_255 = (_HEAD, _TAIL)


def can_stream(out: NDArray[np.float32]) -> bool:
    """Whether :func:`~quaclrs.imaging.kernels.intrinsics.stream_normalised` may write the rows of ``out``.

    Each row must start on a multiple of STREAM_ALIGNMENT bytes and have a multiple of LANES values.
    """
    return out.ctypes.data % STREAM_ALIGNMENT == 0 and out.shape[-1] % LANES == 0


@compiled
def normalise_rows(levels, factors, out, start, stream):  # type: ignore[no-untyped-def]
    """Normalise the rows of ``levels`` (rows, 3·S) uint8 into the rows of ``out`` float32 from ``start`` on.

    ``factors`` come from :func:`normalisation_factors`. ``stream`` is :func:`can_stream`'s answer; streaming takes two
    thirds of the time.
    """
    for row in range(len(levels)):
        if stream:
            stream_row(levels, row, factors, out, start + row)
        else:
            for i in range(levels.shape[1]):
                level = np.float32(np.int32(levels[row, i]))
                shifted = fused_multiply_add(level, _HEAD, level * _TAIL) - factors[0, i]
                out[start + row, i] = fused_multiply_add(shifted, factors[1, i], shifted * factors[2, i])


@compiled
def stream_row(levels, row, factors, out, out_row):  # type: ignore[no-untyped-def]
    """Normalise one row of ``levels`` into row ``out_row`` of ``out``, past the caches. Needs :func:`can_stream`."""
    sources, all_factors, targets = levels.reshape(levels.size), factors.reshape(factors.size), out.reshape(out.size)
    width = np.uintp(levels.shape[1])
    source, target = np.uintp(row) * width, np.uintp(out_row) * width
    for i in range(0, levels.shape[1], LANES):
        i = np.uintp(i)
        stream_normalised(sources, source + i, all_factors, i, width, _BY_255, targets, target + i)


@compiled
def look_up_rows(levels, values, out, start):  # type: ignore[no-untyped-def]
    """Look the rows of ``levels`` up in ``values`` (3, 256), into the rows of ``out`` from ``start`` on."""
    for row in range(len(levels)):
        _look_up_row(levels[row], values[0], values[1], values[2], out[start + row])


@compiled
def _look_up_row(levels, red, green, blue, out):  # type: ignore[no-untyped-def]
    for x in range(len(levels) // 3):
        out[3 * x] = red[levels[3 * x]]
        out[3 * x + 1] = green[levels[3 * x + 1]]
        out[3 * x + 2] = blue[levels[3 * x + 2]]
