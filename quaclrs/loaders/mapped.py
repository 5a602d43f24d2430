"""``indexed`` or ``rgb`` shards of any size: records are read where they lie when their batch comes, nothing is kept.

Records are read by position (``preadv``), which like a memory map is a copy out of the page cache, but lets the
process's memory stay the same however much of the data it has seen. On a GPU, threads read the next batches into pinned
memory while the device works, and copy and render run on a stream of their own; on the CPU a batch is read and drawn
when it is asked for.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from quaclrs.errors import UsageError
from quaclrs.imaging.render import Grids
from quaclrs.loaders.base import Batch, BatchMemory, Labels, LoaderConfig, prefetch_to_device, to_device
from quaclrs.loaders.rendering import GridRenderer, PixelNormaliser, array_bytes, check_image_size
from quaclrs.shards.reader import ShardSet

_MIN_PER_THREAD = 8
"""Records; fewer are not worth waking a thread."""


@dataclass
class _Buffer:
    """Host memory for one batch's records."""

    memory: torch.Tensor
    """(bytes,) uint8, pinned for a GPU."""
    copied: torch.cuda.Event | None = None
    """The copy to the device that must be over before the memory is written again."""


@dataclass(frozen=True)
class _Records:
    """The records of one batch, as read."""

    buffer: _Buffer = field(repr=False)
    offsets: np.ndarray
    """(B + 1,) int64: where in the buffer each record begins; the last one's end."""


def refuse_encoded(encoding: str | None, where: str) -> None:
    """Raise :class:`UsageError` for images that must be decoded (``png`` shards or a PNG tree) at ``where``."""
    if encoding not in ("indexed", "rgb"):
        raise UsageError(
            f"--loader mapped: {where} holds PNGs, which must be decoded; use --loader dali or files, or pack with "
            "--encoding indexed"
        )


class MappedLoader:
    """Batches from ``indexed`` or ``rgb`` shards, with the bits of Pillow's path.

    Raises :class:`UsageError` for ``png`` shards, and for ``rgb`` shards of another size.
    """

    name = "mapped"
    pixels = "Pillow"
    replicated = True

    def __init__(self, shards: ShardSet, labels: np.ndarray, config: LoaderConfig) -> None:
        refuse_encoded(shards.encoding, str(shards.root))
        check_image_size(shards, config.image_size)
        self._shards = shards
        self._config = config
        self._labels = Labels(labels, config.device)
        self._bytes = array_bytes(shards)
        self._grids = GridRenderer(shards, config) if shards.encoding == "indexed" else None
        self._pixels = PixelNormaliser(config)
        self._pixel_memory = BatchMemory(config.image_size, torch.uint8)
        on_gpu = config.device.type == "cuda"
        self._ahead = config.prefetch + 1  # read, or being read, while one is copied to the GPU
        most = int(self._bytes.max()) * config.max_batch
        self._buffers = deque(
            _Buffer(torch.empty(most, dtype=torch.uint8, pin_memory=on_gpu))
            for _ in range(self._ahead + 2 if on_gpu else 1)
        )
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(
            max(config.num_workers, 1), thread_name_prefix="quaclrs-read"
        )
        self._batch_thread = ThreadPoolExecutor(1, thread_name_prefix="quaclrs-batch") if on_gpu else None

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
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

    def _make_on_cpu(self, numbers: np.ndarray) -> Batch:
        if self._threads is None:
            raise ValueError("the loader is closed")
        if self._grids is None:
            pixels = self._pixel_memory.take(len(numbers))
            self._read_into(numbers, pixels.permute(0, 2, 3, 1).numpy().reshape(-1), self._offsets(numbers))
            return self._labels.batch(self._pixels.draw(pixels.permute(0, 2, 3, 1)), numbers)
        records = self._read(numbers)
        return self._labels.batch(self._draw_grids(records, records.buffer.memory, numbers), numbers)

    def _make_on_gpu(self, records: _Records, numbers: np.ndarray) -> Batch:
        """On the current stream; returns before the device has done anything."""
        used = records.buffer.memory[: int(records.offsets[-1])]
        on_device = used.to(self._config.device, non_blocking=True)
        records.buffer.copied = torch.cuda.current_stream(self._config.device).record_event()
        if self._grids is not None:
            return self._labels.batch(self._draw_grids(records, on_device, numbers), numbers)
        size = self._config.image_size
        return self._labels.batch(self._pixels.draw(on_device.view(-1, size, size, 3)), numbers)

    def _draw_grids(self, records: _Records, flat: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        assert self._grids is not None
        index, device = torch.from_numpy(np.asarray(numbers, dtype=np.int64)), self._config.device
        grids = Grids(
            flat,
            to_device(torch.from_numpy(records.offsets[:-1]), device),
            to_device(self._grids.layouts[index], device),
            to_device(self._grids.palettes[index], device),
        )
        return self._grids.draw(grids, torch.arange(len(numbers), device=device))

    def _read_ahead(self, batches: Sequence[np.ndarray]) -> Iterator[_Records]:
        assert self._batch_thread is not None
        reading: deque[Future[_Records]] = deque()
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

    def _read(self, numbers: np.ndarray) -> _Records:
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        if buffer.copied is not None:
            buffer.copied.synchronize()  # in the reading thread: the training thread does not wait
        records = _Records(buffer, self._offsets(numbers))
        self._read_into(numbers, buffer.memory.numpy(), records.offsets)
        return records

    def _offsets(self, numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._bytes[numbers])])

    def _read_into(self, numbers: np.ndarray, target: np.ndarray, offsets: np.ndarray) -> None:
        assert self._threads is not None
        view, asked, ends = target.data, numbers.tolist(), offsets[1:].tolist()
        parts = max(1, min(self._config.num_workers, len(numbers) // _MIN_PER_THREAD))
        bounds = [len(numbers) * part // parts for part in range(parts + 1)]

        def read(start: int, stop: int) -> None:
            begin = int(offsets[start])
            self._shards.read_arrays_into(asked[start:stop], view[begin:], [end - begin for end in ends[start:stop]])

        helpers = [self._threads.submit(read, start, stop) for start, stop in itertools.pairwise(bounds[1:])]
        try:
            read(0, bounds[1])
        finally:
            for helper in helpers:
                helper.result()
