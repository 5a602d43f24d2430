"""NVIDIA DALI: encoded PNG records → decode, drop alpha, antialiased resize, normalise. The only file that imports
``nvidia.dali``.

DALI gets its samples through ``external_source`` in our order. One pipeline is built per run and serves every fold,
epoch and phase. On a GPU everything after the entropy decoding runs there; without one (``device_id=None``) the same
graph runs on the CPU.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from quaclrs.errors import DataError, MissingDependencyError, QuaclrsError, ShardError, UsageError
from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD
from quaclrs.imaging.png import check_png, to_rgb
from quaclrs.loaders.base import Batch, Labels, LoaderConfig
from quaclrs.shards.format import FLAG_NOT_PLAIN
from quaclrs.shards.reader import ShardSet

_READ_AHEAD = 2
"""Batches read from disk ahead of DALI's queue."""


def dali_missing() -> str | None:
    """Why DALI cannot be used here, in a few words; None when it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"nvidia-dali-cuda120 cannot be imported ({error})"
    return None


def require_dali() -> None:
    """Raise :class:`MissingDependencyError` saying what to install where DALI cannot be used."""
    reason = dali_missing()
    if reason is not None:
        raise MissingDependencyError(
            f"--loader dali: {reason}; pip install nvidia-dali-cuda120 (Linux), or use --loader files"
        )


class DaliLoader:
    """Batches made by DALI from ``png`` shards.

    Its resize is not Pillow's: single values may differ by up to 12/255 (before normalisation; measured on the
    synthetic set), by 0.5/255 in the mean. Raises :class:`MissingDependencyError` without DALI, :class:`UsageError` for
    shards of another encoding.
    """

    name = "dali"
    pixels = "DALI"
    replicated = True

    def __init__(self, shards: ShardSet, labels: np.ndarray, config: LoaderConfig) -> None:
        require_dali()
        if shards.encoding != "png":
            raise UsageError(
                f"--loader dali: {shards.root} is encoded {shards.encoding}, which needs no decoder; use --loader "
                "mapped"
            )
        self._shards = shards
        self._config = config
        self._labels = Labels(labels, config.device)
        self._reader = _ReadAhead(shards, max(config.num_workers, 1), config.prefetch + _READ_AHEAD)
        self._pipeline: Any = _build_pipeline(config, self._reader.next_batch)

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        if self._pipeline is None:
            raise ValueError("the loader is closed")
        self._reader.start(batches)
        try:
            for numbers in batches:
                yield self._batch(self._run(numbers), numbers)
        finally:
            self._drain()

    def close(self) -> None:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        self._pipeline = None
        self._reader.close()

    def _run(self, numbers: np.ndarray) -> torch.Tensor:
        """(B, S, S, 3) normalised, of the next batch; it shares DALI's buffer, which lives as long as the tensor."""
        stream = torch.cuda.current_stream(self._config.device) if self._config.device.type == "cuda" else None
        try:
            (output,) = self._pipeline.run(stream)
            return torch.from_dlpack(output.as_tensor())
        except StopIteration:
            assert self._reader.failure is not None  # else there would be a batch
            failure = self._reader.failure
        except RuntimeError as error:  # DALI calls its pipeline invalid after such an error
            self._pipeline = None
            failure = ShardError(
                f"{self._guilty(numbers)}: DALI cannot decode it ({_gist(error)}); check with quaclrs-inspect verify"
            )
        raise failure  # out here: DALI's own error in its context would keep the pipeline and its threads alive

    def _guilty(self, numbers: np.ndarray) -> str:
        """The sample that DALI gave up on, which its own message does not name."""
        for number in numbers:
            name = self._shards.name(int(number))
            try:
                check_png(self._shards.payload(int(number)).tobytes(), name)
            except DataError:
                return name
        return str(self._shards.root)

    def _batch(self, images: torch.Tensor, numbers: np.ndarray) -> Batch:
        return self._labels.batch(images.to(self._config.dtype).permute(0, 3, 1, 2), numbers)

    def _drain(self) -> None:
        """Let DALI finish what it has begun, so that the next epoch starts with an empty queue."""
        self._reader.stop()
        if self._pipeline is None:
            return
        try:
            with contextlib.suppress(StopIteration):
                while True:
                    self._pipeline.run()
            self._pipeline.reset()
        except RuntimeError:  # a damaged image among those that nobody asks for any more
            self._pipeline = _build_pipeline(self._config, self._reader.next_batch)


class _ReadAhead:
    """Reads the encoded records of the next batches in threads, so that a slow disk does not hold up the training
    thread.
    """

    def __init__(self, shards: ShardSet, num_threads: int, ahead: int) -> None:
        self._shards = shards
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="quaclrs-read")
        self._waiting: Iterator[np.ndarray] = iter(())
        self._reading: deque[Future[list[np.ndarray]]] = deque()
        self.failure: QuaclrsError | None = None
        """Why the batches ended early; DALI still delivers those before."""

    def start(self, batches: Sequence[np.ndarray]) -> None:
        self._waiting = iter(batches)
        self._reading.clear()
        self.failure = None
        for _ in range(self._ahead):
            self._submit()

    def next_batch(self) -> list[np.ndarray]:
        """The records of the next batch, each (bytes,) uint8; StopIteration after the last (DALI's own protocol)."""
        if not self._reading:
            raise StopIteration
        self._submit()
        try:
            return self._reading.popleft().result()
        except QuaclrsError as error:
            self.failure = error.with_traceback(None)  # its frames lead to DALI's, and those to the pipeline
            self.stop()
            raise StopIteration from None

    def stop(self) -> None:
        self._waiting = iter(())
        while self._reading:
            self._reading.popleft().cancel()

    def close(self) -> None:
        self.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        numbers = next(self._waiting, None)
        if numbers is not None:
            self._reading.append(self._threads.submit(self._read, numbers))

    def _read(self, numbers: np.ndarray) -> list[np.ndarray]:
        return [self._record(int(number)) for number in numbers]

    def _record(self, number: int) -> np.ndarray:
        payload = self._shards.payload(number)
        if self._shards.samples["flags"][number] & FLAG_NOT_PLAIN:
            return _as_plain_png(payload.tobytes(), self._shards.name(number))
        return payload.copy()  # here, in this thread, the pages are read from disk


def _as_plain_png(data: bytes, name: str) -> np.ndarray:
    """A palette, grey or 16-bit PNG as 8-bit RGB: DALI scales those by rules of its own, the contract is Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(to_rgb(data, name)).save(buffer, "PNG", compress_level=1)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _build_pipeline(config: LoaderConfig, source: Any) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = config.device.type == "cuda"

    @pipeline_def(
        batch_size=config.max_batch,
        num_threads=max(config.num_workers, 1),
        device_id=(config.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
    )
    def images() -> Any:
        encoded = fn.external_source(source=source, dtype=types.UINT8, ndim=1, batch=True)
        # output_type RGB drops alpha as Pillow's convert("RGB") does: no blending
        decoded = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        size = (config.image_size, config.image_size)
        resized = fn.resize(decoded, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        if config.dtype == torch.uint8:
            return resized
        return fn.crop_mirror_normalize(
            resized,
            dtype=types.FLOAT16 if config.dtype == torch.float16 else types.FLOAT,  # DALI has no bfloat16 here
            output_layout="HWC",
            mean=[255 * value for value in IMAGENET_MEAN],
            std=[255 * value for value in IMAGENET_STD],
        )

    pipeline = images()
    pipeline.build()
    return pipeline


def _gist(error: Exception) -> str:
    """DALI's own words for what went wrong, without its operator stack."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    if "encountered" in lines[:-1]:
        return lines[lines.index("encountered") + 1]
    return lines[0] if lines else "unknown error"
