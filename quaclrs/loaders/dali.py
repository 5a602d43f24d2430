"""NVIDIA DALI: PNG records → decode, drop alpha, antialiased resize, normalise. Only this file imports ``nvidia.dali``.

``external_source`` feeds DALI the samples in our order. One pipeline is built per run and serves all folds, epochs and
phases. On a GPU everything after entropy decoding runs there; without one (``device_id=None``) the same graph runs on
the CPU.
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
from numpy.typing import NDArray
from PIL import Image
from torch.utils.dlpack import from_dlpack

from quaclrs.errors import DataError, MissingDependencyError, QuaclrsError, ShardError
from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD
from quaclrs.imaging.png import check_png, to_rgb
from quaclrs.loaders.base import Batch, Labels, LoaderConfig
from quaclrs.shards.encodings.base import Content
from quaclrs.shards.format import FLAG_NOT_PLAIN
from quaclrs.shards.reader import ShardSet

INNER_DIFFERENCE = 1 / 255
BORDER_DIFFERENCE = 64 / 255
"""How far DALI's resize may differ from Pillow's at a value of any image, before normalisation (0 to 1): inside, and in
the outermost row or column of pixels on each side.

A filter reaches over the image's border only there. DALI repeats the border's pixels beyond it, Pillow leaves them out:
when shrinking, 1/8 of the filter's weight along an axis, 1 − (7/8)² = 0.23 in a corner. The most is for a thin bright
or dark line at the border, such as the frame of axes.
"""

_READ_AHEAD = 2
"""Batches read from disk ahead of DALI's queue."""


def dali_missing() -> str | None:
    """Why DALI cannot be imported, in a few words; None when it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"nvidia-dali-cuda120 cannot be imported ({error})"
    return None


def require_dali() -> None:
    """Raise :class:`MissingDependencyError` saying what to install where DALI cannot be imported."""
    reason = dali_missing()
    if reason is not None:
        raise MissingDependencyError(
            f"--loader dali: {reason}; pip install nvidia-dali-cuda120 (Linux), or use --loader files"
        )


class DaliLoader:
    """Batches made by DALI from ``png`` shards.

    DALI's resize is not Pillow's: see :data:`INNER_DIFFERENCE` and :data:`BORDER_DIFFERENCE`. Raises
    :class:`MissingDependencyError` where DALI cannot be imported.
    """

    name = "dali"
    pixels = "DALI"
    replicated = True

    def __init__(self, shards: ShardSet, labels: NDArray[np.int64], config: LoaderConfig) -> None:
        require_dali()
        assert shards.encoding.content is Content.PNGS
        self._shards = shards
        self._config = config
        self._labels = Labels(labels, config.device)
        self._reader = _ReadAhead(shards, max(config.num_workers, 1), config.prefetch + _READ_AHEAD)
        self._pipeline: Any = _build_pipeline(config, self._reader.next_batch)

    def load(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
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

    def _run(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """(B, S, S, 3), normalised: the next batch. A view of DALI's buffer, which lives as long as the tensor."""
        stream = torch.cuda.current_stream(self._config.device) if self._config.device.type == "cuda" else None
        try:
            (output,) = self._pipeline.run(stream)
            return from_dlpack(output.as_tensor())
        except StopIteration:
            assert self._reader.failure is not None  # without a failure there is one batch per entry of `batches`
            failure = self._reader.failure
        except RuntimeError as error:  # DALI's pipeline is unusable after such an error
            self._pipeline = None
            damaged = self._name_damaged(numbers)
            failure = ShardError(
                f"{damaged}: DALI cannot decode it ({_gist(error)}); check with quaclrs-inspect verify"
            )
        raise failure  # outside `except`: as its context, DALI's error would keep the pipeline and its threads alive

    def _name_damaged(self, numbers: NDArray[np.int64]) -> str:
        """The damaged sample of a batch, for messages: DALI's own error does not say which it is."""
        for number in numbers:
            name = self._shards.name(int(number))
            try:
                check_png(self._shards.payload(int(number)).tobytes(), name)
            except DataError:
                return name
        return str(self._shards.root)

    def _batch(self, images: torch.Tensor, numbers: NDArray[np.int64]) -> Batch:
        return self._labels.batch(images.to(self._config.dtype).permute(0, 3, 1, 2), numbers)

    def _drain(self) -> None:
        """Run DALI until its queue is empty, so that the next epoch does not start with batches of this one."""
        self._reader.stop()
        if self._pipeline is None:
            return
        try:
            with contextlib.suppress(StopIteration):
                while True:
                    self._pipeline.run()
            self._pipeline.reset()
        except RuntimeError:  # a damaged image in a batch that nothing will use
            self._pipeline = _build_pipeline(self._config, self._reader.next_batch)


class _ReadAhead:
    """Reads the payloads of the next batches in threads, so that the training thread does not wait for the disk."""

    def __init__(self, shards: ShardSet, num_threads: int, ahead: int) -> None:
        self._shards = shards
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="quaclrs-read")
        self._waiting: Iterator[NDArray[np.int64]] = iter(())
        self._reading: deque[Future[list[NDArray[np.uint8]]]] = deque()
        self.failure: QuaclrsError | None = None
        """The error that ended the batches early. DALI still delivers the batches before it."""

    def start(self, batches: Sequence[NDArray[np.int64]]) -> None:
        self._waiting = iter(batches)
        self._reading.clear()
        self.failure = None
        for _ in range(self._ahead):
            self._submit()

    def next_batch(self) -> list[NDArray[np.uint8]]:
        """The payloads of the next batch, each (bytes,) uint8; StopIteration after the last, as DALI requires."""
        if not self._reading:
            raise StopIteration
        self._submit()
        try:
            return self._reading.popleft().result()
        except QuaclrsError as error:
            self.failure = error.with_traceback(None)  # the frames of its traceback would keep the pipeline alive
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

    def _read(self, numbers: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self._read_payload(int(number)) for number in numbers]

    def _read_payload(self, number: int) -> NDArray[np.uint8]:
        payload = self._shards.payload(number)
        if self._shards.samples["flags"][number] & FLAG_NOT_PLAIN:
            return _as_plain_png(payload.tobytes(), self._shards.name(number))
        return np.array(payload)  # reads the pages of the memory map from disk, in this thread


def _as_plain_png(data: bytes, name: str) -> NDArray[np.uint8]:
    """A palette, grey or 16-bit PNG as 8-bit RGB PNG, as all loaders decode it: DALI would convert some differently."""
    buffer = io.BytesIO()
    Image.fromarray(to_rgb(data, name)).save(buffer, "PNG", compress_level=1)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _build_pipeline(config: LoaderConfig, source: Any) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = config.device.type == "cuda"

    def images() -> Any:
        encoded = fn.external_source(source=source, dtype=types.UINT8, ndim=1, batch=True)
        # output_type RGB drops alpha without blending, as Pillow's convert("RGB") does
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

    make_pipeline: Any = pipeline_def(
        batch_size=config.max_batch,
        num_threads=max(config.num_workers, 1),
        device_id=(config.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
    )(images)
    pipeline = make_pipeline()
    pipeline.build()
    return pipeline


def _gist(error: Exception) -> str:
    """DALI's description of an error, without its operator stack."""
    lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()]
    if "encountered" in lines[:-1]:
        return lines[lines.index("encountered") + 1]
    return lines[0] if lines else "unknown error"
