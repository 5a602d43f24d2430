"""Pillow and torch's DataLoader: works on any machine, as the original trainer did; the reference for other loaders.

Images come from the PNG tree or from shards of any encoding. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from quaclrs.errors import DataError, QuaclrsError
from quaclrs.imaging.normalise import normalise
from quaclrs.imaging.png import decode_png, resize_rgb
from quaclrs.loaders.base import Batch, Labels, LoaderConfig
from quaclrs.loaders.rendering import check_image_size
from quaclrs.shards.reader import ShardSet

_WITHOUT_PROCESSES = "--num_workers 0, which needs no /dev/shm (docker run --shm-size=1g makes it larger)"


class Images(Protocol):
    """A source of images. Must be picklable, for worker processes."""

    def image(self, number: int) -> NDArray[np.uint8]:
        """(S, S, 3) uint8 of sample ``number``, resized as Pillow does."""
        ...


class TreeImages:
    """The PNG tree; ``paths[number]`` is the file of sample ``number``.

    Nothing has checked these files before, so each read checks the whole file.
    """

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self._paths = paths
        self._size = image_size

    def image(self, number: int) -> NDArray[np.uint8]:
        """As :class:`Images`; raises :class:`DataError` naming the file when it cannot be read or is not a good PNG."""
        path = self._paths[number]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the file ({error.strerror}); restore it or take its row out of the CSV"
            ) from None
        image, _ = decode_png(data, str(path))
        return resize_rgb(image, self._size)


class ShardImages:
    """Shards of any encoding."""

    def __init__(self, shards: ShardSet, image_size: int) -> None:
        check_image_size(shards, image_size)
        self._shards = shards
        self._size = image_size

    def image(self, number: int) -> NDArray[np.uint8]:
        """As :class:`Images`."""
        image = self._shards.image(number)
        if image.shape[:2] == (self._size, self._size):
            return image
        return resize_rgb(Image.fromarray(image), self._size)


class FilesLoader:
    """Batches made by Pillow in DataLoader's worker processes, which live from the first epoch to :meth:`close`."""

    name = "files"
    pixels = "Pillow"
    replicated = True

    def __init__(self, images: Images, labels: NDArray[np.int64], config: LoaderConfig) -> None:
        self._config = config
        self._labels = Labels(labels, config.device)
        self._sampler = _BatchSampler()
        self._epoch: Iterator[torch.Tensor | QuaclrsError] | None = None
        self._loader: DataLoader[torch.Tensor | QuaclrsError] | None = DataLoader(
            _ImageBatches(images),
            sampler=self._sampler,
            batch_size=None,  # each element of the sampler is a whole batch already
            num_workers=config.num_workers,
            persistent_workers=config.num_workers > 0,
            prefetch_factor=config.prefetch if config.num_workers > 0 else None,  # of each worker
            pin_memory=config.device.type == "cuda",
            # DataLoader draws a seed for its workers: by default from torch's global generator, which training uses
            generator=torch.Generator(),
        )

    def load(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        if self._loader is None:
            raise ValueError("the loader is closed")
        self._sampler.batches = batches
        self._epoch = iter(self._loader)
        for numbers in batches:
            yield self._batch(self._next_images(), numbers)

    def close(self) -> None:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        self._loader = self._epoch = None  # dropping the last reference to the iterator ends its worker processes

    def _next_images(self) -> torch.Tensor:
        if self._epoch is None:
            raise ValueError("the loader is closed")
        try:
            with dead_readers_named():
                images = next(self._epoch)
        except QuaclrsError:
            self.close()
            raise
        if isinstance(images, QuaclrsError):
            raise images
        return images

    def _batch(self, pixels: torch.Tensor, numbers: NDArray[np.int64]) -> Batch:
        if self._config.device.type == "cuda":  # from pinned memory, so without host synchronisation
            pixels = pixels.to(self._config.device, non_blocking=True)
        if self._config.dtype == torch.uint8:
            return self._labels.batch(pixels.permute(0, 3, 1, 2), numbers)
        return self._labels.batch(normalise(pixels, self._config.dtype), numbers)


@contextmanager
def dead_readers_named() -> Iterator[None]:
    """Turn torch's error about a DataLoader process that died into a :class:`QuaclrsError` of one line.

    torch raises it from a signal handler, so at any moment, such as within a step.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(" .")
        if not reason.startswith("DataLoader worker (pid"):
            raise
        raise QuaclrsError(
            f"a process that reads images died (out of memory?): {reason}; run the same command again, with fewer "
            f"--num_workers, or {_WITHOUT_PROCESSES}"
        ) from None


class _BatchSampler(Sampler[NDArray[np.int64]]):
    """The batches of the next epoch; DataLoader iterates over it once per epoch."""

    def __init__(self) -> None:
        self.batches: Sequence[NDArray[np.int64]] = ()

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _ImageBatches(Dataset["torch.Tensor | QuaclrsError"]):
    """Maps an array of sample numbers to the images of the batch."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitem__(self, numbers: NDArray[np.int64]) -> torch.Tensor | QuaclrsError:
        """(B, S, S, 3) uint8. An error of the data is returned, not raised: DataLoader would turn it into its text."""
        try:
            images = torch.from_numpy(np.stack([self._images.image(int(number)) for number in numbers]))
        except QuaclrsError as error:
            return error.with_traceback(None)  # the frames of its traceback would keep a memory map open
        if get_worker_info() is None:
            return images
        try:  # here, because DataLoader would do it in a thread whose errors nobody gets
            images.share_memory_()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            return QuaclrsError(
                f"a process that reads images cannot hand over a batch of {images.nbytes / 1e6:.1f} MB in shared "
                f"memory ({reason}); lower --prefetch or --num_workers, or give {_WITHOUT_PROCESSES}"
            )
        return images
