"""Host memory for batches."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64
"""Bytes: a cache line, and enough for any vector store that goes past the caches."""
_INTEGER_OF_SIZE = {1: np.uint8, 2: np.int16, 4: np.int32}


def batch_bytes(images: int, size: int, dtype: torch.dtype) -> int:
    """What a batch needs, the search for a cache line included."""
    return images * size * size * 3 * dtype.itemsize + _ALIGNMENT


def host_bytes(images: int, size: int, dtype: torch.dtype) -> NDArray[np.uint8]:
    """Memory of undefined content that :func:`as_batch` can make a batch of. NumPy asks the kernel for huge pages,
    torch does not.
    """
    return np.empty(batch_bytes(images, size, dtype), np.uint8)


def as_batch(memory: NDArray[np.uint8], images: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(images, 3, size, size) ``dtype``, channels_last, in ``memory``, beginning on a cache line."""
    shape = (images, size, size, 3)
    start = -memory.ctypes.data % _ALIGNMENT
    values = (
        memory[start : start + math.prod(shape) * dtype.itemsize].view(_INTEGER_OF_SIZE[dtype.itemsize]).reshape(shape)
    )
    return torch.from_numpy(values).view(dtype).permute(0, 3, 1, 2)  # NumPy has no bfloat16
