"""Host memory for batches, aligned for the CPU kernels.

A batch is channels_last and starts on a cache line. NumPy allocates the memory because it asks the operating system for
huge pages, which torch does not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64
"""Bytes: one cache line, which is enough for any vector store that bypasses the caches."""
_INTEGER_OF_SIZE = {1: np.uint8, 2: np.int16, 4: np.int32}


def batch_bytes(images: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of memory for a batch, including room to align it."""
    return images * size * size * 3 * dtype.itemsize + _ALIGNMENT


def allocate_batch_memory(images: int, size: int, dtype: torch.dtype) -> NDArray[np.uint8]:
    """Uninitialised memory for one batch; pass it to :func:`as_batch`."""
    return np.empty(batch_bytes(images, size, dtype), np.uint8)


def as_batch(memory: NDArray[np.uint8], images: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A batch (images, 3, size, size) of ``dtype``, channels_last, in ``memory``, aligned to a cache line."""
    shape = (images, size, size, 3)
    start = -memory.ctypes.data % _ALIGNMENT
    values = (
        memory[start : start + math.prod(shape) * dtype.itemsize].view(_INTEGER_OF_SIZE[dtype.itemsize]).reshape(shape)
    )
    return torch.from_numpy(values).view(dtype).permute(0, 3, 1, 2)  # NumPy has no bfloat16
