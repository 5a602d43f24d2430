"""Shards of arrays (``indexed`` or ``rgb``) of any size: records are read from disk when their batch is needed.

Records are read with ``preadv``. Like a memory map this copies out of the page cache, but the memory of the process
does not grow with the data it has read. On a GPU, threads read the next batches into pinned memory while the device
works; copy and render run on a stream of their own. On the CPU, a batch is read and rendered when it is requested.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from quaclrs.imaging.render import Grids
from quaclrs.loaders.base import Batch, BatchMemory, Labels, LoaderConfig, prefetch_to_device, to_device
from quaclrs.loaders.rendering import GridRenderer, PixelNormaliser, check_image_size
from quaclrs.shards.encodings.base import Content
from quaclrs.shards.reader import ShardSet

_MIN_RECORDS_PER_THREAD = 8
"""Reading fewer takes less time than waking a thread."""


@dataclass
class _Buffer:
    """Host memory for the records of one batch."""

    memory: torch.Tensor
    """(bytes,) uint8, pinned for a GPU."""
    copied: torch.cuda.Event | None = None
    """Marks the end of the copy to the device; do not write to the memory before it."""


@dataclass(frozen=True)
class _BatchRecords:
    """The records of one batch, read into a buffer."""

    buffer: _Buffer = field(repr=False)
    offsets: NDArray[np.int64]
    """(B + 1,): where in the buffer each record begins, and where the last one ends."""


class MappedLoader:
    """Batches from shards of arrays, bit for bit as Pillow's path.

    Raises :class:`UsageError` for ``rgb`` shards of another size.
    """

    name = "mapped"
    pixels = "Pillow"
    replicated = True

    def __init__(self, shards: ShardSet, labels: NDArray[np.int64], config: LoaderConfig) -> None:
        check_image_size(shards, config.image_size)
        self._shards = shards
        self._config = config
        self._labels = Labels(labels, config.device)
        self._bytes = shards.array_bytes()
        self._grids = GridRenderer(shards, config) if shards.encoding.content is Content.GRIDS else None
        self._pixels = PixelNormaliser(config)
        self._pixel_memory = BatchMemory(config.image_size, torch.uint8)
        on_gpu = config.device.type == "cuda"
        self._ahead = config.prefetch + 1  # batches read or being read, while one more is copied to the GPU
        largest = int(self._bytes.max()) * config.max_batch
        self._buffers = deque(
            _Buffer(torch.empty(largest, dtype=torch.uint8, pin_memory=on_gpu))
            for _ in range(self._ahead + 2 if on_gpu else 1)
        )
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(
            max(config.num_workers, 1), thread_name_prefix="quaclrs-read"
        )
        self._batch_thread = ThreadPoolExecutor(1, thread_name_prefix="quaclrs-batch") if on_gpu else None

    def load(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        if self._threads is None:
            raise ValueError("the loader is closed")
        if self._batch_thread is None:
            return map(self._make_on_cpu, batches)
        records = self._read_ahead(batches)
        return prefetch_to_device(
            lambda numbers: self._make_on_gpu(next(records), numbers), batches, self._config.device
        )

    def close(self) -> None:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        for pool in (self._batch_thread, self._threads):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._threads = None
        self._buffers.clear()

    def _make_on_cpu(self, numbers: NDArray[np.int64]) -> Batch:
        if self._threads is None:
            raise ValueError("the loader is closed")
        if self._grids is None:
            pixels = self._pixel_memory.take(len(numbers))
            self._read_into(numbers, pixels.permute(0, 2, 3, 1).numpy().reshape(-1), self._offsets(numbers))
            return self._labels.batch(self._pixels.normalise(pixels.permute(0, 2, 3, 1)), numbers)
        records = self._read(numbers)
        return self._labels.batch(self._render(records, records.buffer.memory, numbers), numbers)

    def _make_on_gpu(self, records: _BatchRecords, numbers: NDArray[np.int64]) -> Batch:
        """Queue the work on the current stream and return without waiting for the device."""
        used = records.buffer.memory[: int(records.offsets[-1])]
        on_device = used.to(self._config.device, non_blocking=True)
        records.buffer.copied = torch.cuda.current_stream(self._config.device).record_event()
        if self._grids is not None:
            return self._labels.batch(self._render(records, on_device, numbers), numbers)
        size = self._config.image_size
        return self._labels.batch(self._pixels.normalise(on_device.view(-1, size, size, 3)), numbers)

    def _render(self, records: _BatchRecords, flat: torch.Tensor, numbers: NDArray[np.int64]) -> torch.Tensor:
        assert self._grids is not None
        index, device = torch.from_numpy(np.asarray(numbers, dtype=np.int64)), self._config.device
        grids = Grids(
            flat,
            to_device(torch.from_numpy(records.offsets[:-1]), device),
            to_device(self._grids.layouts[index], device),
            to_device(self._grids.palettes[index], device),
        )
        return self._grids.render(grids, torch.arange(len(numbers), device=device))

    def _read_ahead(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[_BatchRecords]:
        assert self._batch_thread is not None
        reading: deque[Future[_BatchRecords]] = deque()
        waiting = iter(batches)
        try:
            while True:
                while len(reading) < self._ahead and (numbers := next(waiting, None)) is not None:
                    reading.append(self._batch_thread.submit(self._read, numbers))
                if not reading:
                    return
                yield reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()

    def _read(self, numbers: NDArray[np.int64]) -> _BatchRecords:
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        if buffer.copied is not None:
            buffer.copied.synchronize()  # blocks the reading thread, not the training thread
        records = _BatchRecords(buffer, self._offsets(numbers))
        self._read_into(numbers, buffer.memory.numpy(), records.offsets)
        return records

    def _offsets(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self._bytes[numbers])])

    def _read_into(self, numbers: NDArray[np.int64], target: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """Read the records into ``target`` at ``offsets``; this thread and the pool's threads take one part each."""
        assert self._threads is not None
        view, requested, ends = target.data, numbers.tolist(), offsets[1:].tolist()
        parts = max(1, min(self._config.num_workers, len(numbers) // _MIN_RECORDS_PER_THREAD))
        bounds = [len(numbers) * part // parts for part in range(parts + 1)]

        def read(start: int, stop: int) -> None:
            begin = int(offsets[start])
            part_ends = [end - begin for end in ends[start:stop]]
            self._shards.read_arrays_into(requested[start:stop], view[begin:], part_ends)

        helpers = [self._threads.submit(read, start, stop) for start, stop in itertools.pairwise(bounds[1:])]
        try:
            read(0, bounds[1])
        finally:
            for helper in helpers:
                helper.result()
