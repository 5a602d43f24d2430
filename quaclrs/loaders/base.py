"""What a loader is: sample numbers in, batches on the device out. The caller decides the order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quaclrs.imaging.memory import as_batch, batch_bytes, host_bytes


@dataclass(frozen=True)
class Batch:
    """One batch on the device."""

    images: torch.Tensor
    """(B, 3, S, S) float32, float16 or bfloat16, ImageNet-normalised, channels_last."""
    labels: torch.Tensor
    """(B,) int64"""
    index: torch.Tensor
    """(B,) int64, on the CPU: the sample numbers."""

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What batches to make, and how much to work ahead; the same for every loader."""

    image_size: int
    """S, in pixels."""
    device: torch.device
    dtype: torch.dtype
    """float32, float16 or bfloat16; uint8 gives pixels that are not normalised (for caches and benchmarks)."""
    max_batch: int
    """The largest batch that will be requested."""
    num_workers: int
    """Processes or threads that read and decode; with 0 the caller's thread does it."""
    prefetch: int = 2
    """Batches made ahead of the one in use, by loaders that read from disk; each takes memory."""
    part: tuple[int, int] = (0, 1)
    """(r, W): the resident loader keeps the samples with ``number % W == r``; (0, 1) keeps all."""


class Loader(Protocol):
    """Makes batches of one dataset. One object serves all folds, epochs and phases of a run."""

    name: str
    pixels: str
    """Which resize the images have: ``Pillow``'s, bit for bit, or ``DALI``'s."""
    replicated: bool
    """False where each rank holds only its own part of the samples, see quaclrs.data.sampling."""

    def load(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """One :class:`Batch` for each array of sample numbers, in that order.

        The caller may drop the iterator at any point and call ``load`` again; only one iterator is in use at a time. An
        error in a background thread or process is raised by the ``next`` that should have returned its batch.
        """
        ...

    def close(self) -> None:
        """End all processes and threads and close all files. The loader cannot be used afterwards."""
        ...


class DeviceLoader(Loader, Protocol):
    """A loader that keeps all its data on the device."""

    def on_device(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels, as in :class:`Batch`, of the samples ``index``: (B,) int64 on the device.

        Queues all work on the current stream without host synchronisation, so that a CUDA graph can capture it.
        """
        ...


class Labels:
    """The labels of all samples; adds them to images to make a :class:`Batch`."""

    def __init__(self, labels: NDArray[np.int64], device: torch.device) -> None:
        self._labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
        self._device = device

    def batch(self, images: torch.Tensor, numbers: NDArray[np.int64]) -> Batch:
        """A batch of ``images`` of the samples ``numbers``; copies labels to the device without waiting for it."""
        index = torch.from_numpy(np.array(numbers, dtype=np.int64))
        return Batch(images, to_device(self._labels[index], self._device), index)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``tensor`` from the CPU to ``device``; to a GPU from pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


_new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream  # torch does not annotate its constructor


def prefetch_to_device(
    make: Callable[[NDArray[np.int64]], Batch], batches: Sequence[NDArray[np.int64]], device: torch.device
) -> Iterator[Batch]:
    """``make(numbers)`` for each of ``batches``. On a GPU: one batch ahead of the caller, on a stream of its own."""
    if device.type != "cuda":
        yield from map(make, batches)
        return
    stream, waiting = _new_stream(device), iter(batches)
    stream.wait_stream(torch.cuda.current_stream(device))  # the data may still be in a copy on the current stream
    ready: deque[tuple[Batch, torch.cuda.Event] | Exception] = deque()

    def start_next() -> None:
        numbers = next(waiting, None)
        if numbers is not None:
            try:
                with torch.cuda.stream(stream):
                    batch = make(numbers)
                    ready.append((batch, stream.record_event()))
            except Exception as error:  # to be raised for its own batch, not for the one before
                ready.append(error)

    start_next()
    while ready:
        start_next()
        result = ready.popleft()
        if isinstance(result, Exception):
            raise result
        batch, made = result
        current = torch.cuda.current_stream(device)
        current.wait_event(made)  # the device waits, the host does not
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(current)  # torch must not reuse its memory before the caller's work on it is done
        yield batch


class BatchMemory:
    """CPU memory for batches, reused once no tensor refers to it any more.

    The first access to fresh pages takes more time than rendering a batch into them.
    """

    def __init__(self, image_size: int, dtype: torch.dtype) -> None:
        self._size = image_size
        self._dtype = dtype
        self._arrays: list[NDArray[np.uint8]] = []

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
"""Batches whose memory is kept for reuse. A caller that holds more batches gets fresh pages for the rest."""


def _references(arrays: list[NDArray[np.uint8]], i: int) -> int:
    return sys.getrefcount(arrays[i])


_REFERENCES_WHEN_FREE = _references([np.empty(1, np.uint8)], 0)
"""Measured, since it differs between Python versions. A tensor that uses the array's memory adds a reference."""


def _is_free(arrays: list[NDArray[np.uint8]], i: int) -> bool:
    return _references(arrays, i) <= _REFERENCES_WHEN_FREE
