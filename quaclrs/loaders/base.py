"""What a loader is: sample numbers in, batches on the device out. It decides nothing about order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from quaclrs.imaging.memory import as_batch, batch_bytes, host_bytes


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
    """float32, float16 or bfloat16; uint8 gives the pixels themselves, not normalised (for caches and benchmarks)."""
    max_batch: int
    """The largest batch that will be asked for."""
    num_workers: int
    """Processes or threads that read and decode; 0 does it in the caller."""
    prefetch: int = 2
    """Batches made ahead of the one in use, where a loader reads from disk; more need more memory."""
    part: tuple[int, int] = (0, 1)
    """(r, W): the resident loader keeps the samples whose number leaves r when divided by W; (0, 1) keeps all."""


class Loader(Protocol):
    """Makes batches of one dataset; lives as long as the run, over all folds, epochs and phases."""

    name: str
    pixels: str
    """Whose resize the images have: ``Pillow``, bit for bit, or ``DALI``."""
    replicated: bool
    """False where each rank can only give the samples of its own part, see quaclrs.data.sampling."""

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One :class:`Batch` for each array of sample numbers, in that order.

        The iterator may be dropped at any point and ``load`` called again; only one is in use at a time. Errors of
        background work are raised by the ``next`` that would have returned their batch.
        """
        ...

    def close(self) -> None:
        """Give back every process, thread and file; the loader cannot be used afterwards."""
        ...


class DeviceLoader(Loader, Protocol):
    """A loader whose data are on the device already, all of them."""

    def on_device(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels, as :class:`Batch` has them, of the samples ``index`` (B,) int64 on the device.

        All work is queued on the current stream and nothing is waited for, so that it can be captured in a CUDA graph.
        """
        ...


class Labels:
    """The labels of all samples, (N,) int64; makes a :class:`Batch` of images."""

    def __init__(self, labels: np.ndarray, device: torch.device) -> None:
        self._labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
        self._device = device

    def batch(self, images: torch.Tensor, numbers: np.ndarray) -> Batch:
        """``images`` with the labels of the samples ``numbers``, on the device without waiting for it."""
        index = torch.from_numpy(np.array(numbers, dtype=np.int64))
        return Batch(images, to_device(self._labels[index], self._device), index)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` from the CPU on ``device``; to a GPU through pinned memory, so that the host need not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def prefetch_to_device(
    make: Callable[[np.ndarray], Batch], batches: Sequence[np.ndarray], device: torch.device
) -> Iterator[Batch]:
    """``make`` each batch; on a GPU on a stream of its own, the next one while the last one is in use."""
    if device.type != "cuda":
        yield from map(make, batches)
        return
    stream, waiting = torch.cuda.Stream(device), iter(batches)
    stream.wait_stream(torch.cuda.current_stream(device))  # the data may still be on their way
    ready: deque[tuple[Batch, torch.cuda.Event] | Exception] = deque()

    def start_next() -> None:
        numbers = next(waiting, None)
        if numbers is not None:
            try:
                with torch.cuda.stream(stream):
                    batch = make(numbers)
                    ready.append((batch, stream.record_event()))
            except Exception as error:  # raised when its batch is asked for, not with the one before
                ready.append(error)

    start_next()
    while ready:
        start_next()
        begun = ready.popleft()
        if isinstance(begun, Exception):
            raise begun
        batch, made = begun
        current = torch.cuda.current_stream(device)
        current.wait_event(made)  # on the device; the host goes on
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(current)  # its memory is not reused before the consumer's work on it is done
        yield batch


class BatchMemory:
    """CPU memory for batches, taken again once nobody holds the batch that had it.

    Fresh pages cost more to touch for the first time than a batch costs to draw.
    """

    def __init__(self, image_size: int, dtype: torch.dtype) -> None:
        self._size = image_size
        self._dtype = dtype
        self._arrays: list[np.ndarray] = []

    def take(self, images: int) -> torch.Tensor:
        """(images, 3, S, S), channels_last, of undefined content."""
        free = [i for i in range(len(self._arrays)) if _is_free(self._arrays, i)]
        large_enough = [i for i in free if len(self._arrays[i]) >= batch_bytes(images, self._size, self._dtype)]
        if large_enough:
            array = self._arrays[large_enough[0]]
        else:
            self._arrays = [array for i, array in enumerate(self._arrays) if i not in free]
            array = host_bytes(images, self._size, self._dtype)
            if len(self._arrays) < _MOST_KEPT:
                self._arrays.append(array)
        return as_batch(array, images, self._size, self._dtype)


_MOST_KEPT = 8
"""Batches whose memory is kept for reuse; a consumer that holds on to more pays for fresh pages."""


def _references(arrays: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(arrays[i])


_REFERENCES_WHEN_FREE = _references([np.empty(1)], 0)
"""Measured, since Python versions differ; a tensor that uses the array's memory adds to it."""


def _is_free(arrays: list[np.ndarray], i: int) -> bool:
    return _references(arrays, i) <= _REFERENCES_WHEN_FREE
