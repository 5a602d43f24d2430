"""What a loader is: sample numbers in, batches on the device out. It decides nothing about order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """One batch on the device."""

    images: torch.Tensor
    """(B, 3, S, S) float32, float16 or bfloat16, ImageNet-normalised, channels_last."""
    labels: torch.Tensor
    """(B,) int64"""
    index: torch.Tensor
    """(B,) int64, on the CPU: the sample numbers asked for."""

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What every loader is asked for."""

    image_size: int
    """S, in pixels."""
    device: torch.device
    dtype: torch.dtype
    max_batch: int
    """The largest batch that will be asked for."""
    num_workers: int
    """Processes or threads that read and decode; 0 does it in the caller."""


class Loader(Protocol):
    """Makes batches of one dataset; lives as long as the run, over all folds, epochs and phases."""

    name: str

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One :class:`Batch` for each array of sample numbers, in that order.

        The iterator may be dropped at any point and ``load`` called again; only one is in use at a time. Errors of background work
        are raised by the ``next`` that would have returned their batch.
        """
        ...

    def close(self) -> None:
        """Give back every process, thread and file; the loader cannot be used afterwards."""
        ...
