"""Pillow and DataLoader: the original's way, on any machine, and the oracle for every other loader.

Images come from the PNG tree or from shards; both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from quaclrs.errors import DataError, QuaclrsError
from quaclrs.imaging.normalise import normalise
from quaclrs.imaging.png import decode_png, resize_rgb, to_rgb
from quaclrs.loaders.base import Batch, Labels, LoaderConfig
from quaclrs.loaders.rendering import check_image_size
from quaclrs.shards.reader import ShardSet


class Images(Protocol):
    """Where images come from; picklable, for worker processes."""

    def image(self, number: int) -> np.ndarray:
        """(S, S, 3) uint8 of sample ``number``, resized as Pillow does."""
        ...


class TreeImages:
    """The PNG tree. ``paths[number]`` is sample ``number``'s file; nothing has checked it before, so it is checked in
    full here.
    """

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self._paths = paths
        self._size = image_size

    def image(self, number: int) -> np.ndarray:
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

    def image(self, number: int) -> np.ndarray:
        """As :class:`Images`."""
        if self._shards.encoding == "rgb":
            return self._shards.array(number)
        if self._shards.encoding == "indexed":
            image = self._shards.image(number)
        else:
            image = to_rgb(self._shards.payload(number).tobytes(), self._shards.name(number))
        return resize_rgb(Image.fromarray(image), self._size)


class FilesLoader:
    """Batches made by Pillow in DataLoader's worker processes, which live from the first epoch to :meth:`close`."""

    name = "files"
    pixels = "Pillow"
    replicated = True

    def __init__(self, images: Images, labels: np.ndarray, config: LoaderConfig) -> None:
        self._config = config
        self._labels = Labels(labels, config.device)
        self._plan = _Plan()
        self._epoch: Iterator[torch.Tensor | QuaclrsError] | None = None
        self._loader: DataLoader[torch.Tensor | QuaclrsError] | None = DataLoader(
            _ImageBatches(images),
            sampler=self._plan,
            batch_size=None,  # each element of the plan is a whole batch already
            num_workers=config.num_workers,
            persistent_workers=config.num_workers > 0,
            prefetch_factor=config.prefetch if config.num_workers > 0 else None,  # of each worker
            pin_memory=config.device.type == "cuda",
            # it draws a seed for its workers, which must not come out of the training's random numbers
            generator=torch.Generator(),
        )

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        if self._loader is None:
            raise ValueError("the loader is closed")
        self._plan.batches = batches
        self._epoch = iter(self._loader)
        for numbers in batches:
            yield self._batch(self._next_images(), numbers)

    def close(self) -> None:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        self._loader = self._epoch = None  # the worker processes end with the iterator, of which nobody else knows

    def _next_images(self) -> torch.Tensor:
        if self._epoch is None:
            raise ValueError("the loader is closed")
        try:
            images = next(self._epoch)
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rstrip(" .")
            if not reason.startswith("DataLoader worker (pid"):
                raise
            self.close()
            raise QuaclrsError(
                f"a process that reads images died (out of memory?): {reason}; run the same command again, with fewer "
                "--num_workers"
            ) from None
        if isinstance(images, QuaclrsError):
            raise images
        return images

    def _batch(self, pixels: torch.Tensor, numbers: np.ndarray) -> Batch:
        if self._config.device.type == "cuda":  # pinned by the DataLoader: no host synchronisation
            pixels = pixels.to(self._config.device, non_blocking=True)
        if self._config.dtype == torch.uint8:
            return self._labels.batch(pixels.permute(0, 3, 1, 2), numbers)
        return self._labels.batch(normalise(pixels, self._config.dtype), numbers)


class _Plan(Sampler[np.ndarray]):
    """The batches of the epoch to come; DataLoader asks again each time it is iterated."""

    def __init__(self) -> None:
        self.batches: Sequence[np.ndarray] = ()

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _ImageBatches(Dataset["torch.Tensor | QuaclrsError"]):
    """Maps an array of sample numbers to their images."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitem__(self, numbers: np.ndarray) -> torch.Tensor | QuaclrsError:
        """(B, S, S, 3) uint8; an error of the data is returned, since DataLoader would wrap a raised one in a
        traceback's text.
        """
        try:
            return torch.from_numpy(np.stack([self._images.image(int(number)) for number in numbers]))
        except QuaclrsError as error:
            return error
