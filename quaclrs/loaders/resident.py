"""All samples in device memory, once for all folds and epochs: a batch is a gather and a render on the device.

The host sends only sample numbers. ``indexed`` shards are kept as grids (2.8 GB for 57,918 spectrograms), ``rgb``
shards as pixels. Payloads that must be decoded, such as ``png``, are decoded once by another loader and kept as pixels
of one size. Several ranks can divide the data: each rank then keeps its own part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from quaclrs.data.sampling import evaluation_batches
from quaclrs.errors import ShardError, UsageError
from quaclrs.imaging.render import Grids, check_grids
from quaclrs.loaders.base import Batch, BatchMemory, Loader, LoaderConfig, prefetch_to_device, to_device
from quaclrs.loaders.rendering import GridRenderer, PixelNormaliser, check_image_size
from quaclrs.shards.encodings.base import Content
from quaclrs.shards.reader import ShardSet
from quaclrs.system.environment import free_memory
from quaclrs.system.threads import parallel_for

FREE_SHARE = 0.9
"""Share of the free device memory that the data may take; the model needs the rest, and more."""


class ResidentLoader:
    """Batches from device memory, with the bits of Pillow's path; with a ``decoder``, with the bits of its batches.

    ``decoder`` makes the uint8 batches of shards whose payloads are no arrays; the loader reads it once and closes it.
    Raises :class:`UsageError` when the data do not fit in the device's free memory, :class:`ShardError` when a shard
    does not match the manifest.
    """

    name = "resident"

    def __init__(
        self, shards: ShardSet, labels: NDArray[np.int64], config: LoaderConfig, decoder: Loader | None = None
    ) -> None:
        check_image_size(shards, config.image_size)
        content = shards.encoding.content
        assert content.is_array != (decoder is not None)
        self.pixels = "Pillow" if decoder is None else decoder.pixels
        self._config = config
        self._shards = shards
        rank, ranks = config.part
        self.replicated = ranks == 1
        held = np.arange(rank, len(shards), ranks)
        self._labels = torch.from_numpy(np.ascontiguousarray(labels[held], dtype=np.int64)).to(config.device)
        self._pixels = PixelNormaliser(config)
        self._pixel_memory = BatchMemory(config.image_size, torch.uint8)
        needed = shards.memory_bytes(config.image_size) // ranks
        _refuse_too_little_memory(needed, config.device, alternative="mapped" if decoder is None else decoder.name)
        self._grids: Grids | None = None
        self._renderer: GridRenderer | None = None
        self._decoded: torch.Tensor | None = None
        if decoder is not None:
            self._decoded = _decode_all(held, decoder, config)
        elif content is Content.PIXELS:
            size = config.image_size
            self._decoded = _load_all(shards, held, config).view(-1, size, size, 3)
        else:
            self._load_grids(shards, held)

    def load(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """As :class:`~quaclrs.loaders.base.Loader`; ValueError for a sample of another rank's part."""
        if self._grids is None and self._decoded is None:
            raise ValueError("the loader is closed")
        rank, ranks = self._config.part
        if any((numbers % ranks != rank).any() for numbers in batches):
            raise ValueError(
                f"this loader holds the samples whose number leaves {rank} when divided by {ranks}, and no others"
            )
        return prefetch_to_device(self._make, batches, self._config.device)

    def close(self) -> None:
        """As :class:`~quaclrs.loaders.base.Loader`."""
        if self._config.device.type == "cuda":
            torch.cuda.synchronize(self._config.device)  # an unused prefetched batch may still read the data
        self._grids = self._decoded = self._renderer = None

    def _load_grids(self, shards: ShardSet, held: NDArray[np.int64]) -> None:
        device = self._config.device
        self._renderer = GridRenderer(shards, self._config)
        sizes = shards.array_bytes()[held]
        offsets = torch.from_numpy(np.cumsum(sizes) - sizes)
        flat = _load_all(shards, held, self._config)
        layouts, palettes = self._renderer.layouts[held], self._renderer.palettes[held]
        self._grids = Grids(flat, offsets.to(device), layouts.to(device), palettes.to(device))
        check_grids(self._grids, self._renderer.tables)  # once here instead of in every batch

    def resize(self, config: LoaderConfig) -> bool:
        """Switch to images of ``config.image_size`` without reloading; returns False if the loaded data are pixels.

        The rest of ``config`` must be unchanged. No iterator of the old size may be in use.
        """
        if self._grids is None:
            return False
        self._config = config
        self._renderer = GridRenderer(self._shards, config)
        return True

    def on_device(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :class:`~quaclrs.loaders.base.DeviceLoader`."""
        place = index if self.replicated else torch.div(index, self._config.part[1], rounding_mode="floor")
        return self._images(place), self._labels[place]

    def _make(self, numbers: NDArray[np.int64]) -> Batch:
        requested = torch.from_numpy(np.array(numbers, dtype=np.int64))
        return Batch(*self.on_device(to_device(requested, self._config.device)), requested)

    def _images(self, index: torch.Tensor) -> torch.Tensor:
        if self._grids is not None and self._renderer is not None:
            return self._renderer.render(self._grids, index)
        if self._decoded is None:
            raise ValueError("the loader is closed")
        if self._config.device.type == "cpu":
            gathered = self._pixel_memory.take(len(index)).permute(0, 2, 3, 1)
            source, target, numbers = self._decoded.numpy(), gathered.numpy(), index.numpy()

            def gather(start: int, stop: int) -> None:
                # with "clip" NumPy copies straight to `out`; a number out of range fails at its label instead
                np.take(source, numbers[start:stop], axis=0, out=target[start:stop], mode="clip")

            parallel_for(gather, len(numbers))
        else:
            gathered = self._decoded[index]
        return self._pixels.normalise(gathered)


def _refuse_too_little_memory(needed: int, device: torch.device, alternative: str) -> None:
    free = free_memory(device)
    if free is not None and needed > FREE_SHARE * free:
        raise UsageError(
            f"--loader resident: the data take {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free; use "
            f"--loader {alternative}"
        )


def _load_all(shards: ShardSet, held: NDArray[np.int64], config: LoaderConfig) -> torch.Tensor:
    """(bytes,) uint8 on the device: the arrays of the samples ``held``, one after another.

    Reads whole shards to check their hashes; a rank that keeps a part of each shard also reads all of it.
    """
    sizes = shards.array_bytes()[held]
    ends = np.cumsum(sizes)
    flat = torch.empty(int(ends[-1]), dtype=torch.uint8, device=config.device)
    first = np.searchsorted(shards.samples["shard"][held], np.arange(len(shards.manifest.shards) + 1))

    def load(shard: int) -> int:
        places = slice(int(first[shard]), int(first[shard + 1]))
        stop = int(ends[places.stop - 1]) if places.stop else 0
        start = stop - int(sizes[places].sum())
        target = (
            flat[start:stop]
            if config.device.type == "cpu"
            else torch.empty(stop - start, dtype=torch.uint8, pin_memory=True)
        )
        _read_shard(shards, shard, held[places], sizes[places], target.numpy())
        if config.device.type != "cpu":
            flat[start:stop].copy_(target)
        return stop - start

    progress = tqdm(total=len(flat), unit="B", unit_scale=True, desc="loading", disable=None)
    with ThreadPoolExecutor(max(config.num_workers, 1), thread_name_prefix="quaclrs-load") as threads, progress:
        for loaded in threads.map(load, range(len(shards.manifest.shards))):
            progress.update(loaded)
    return flat


def _read_shard(
    shards: ShardSet, shard: int, numbers: NDArray[np.int64], sizes: NDArray[np.int64], target: NDArray[np.uint8]
) -> None:
    """Copy the arrays of the samples ``numbers`` of ``shard`` into ``target``, one after another.

    ``sizes`` are their bytes. Raises :class:`ShardError` when the tar's hash is not the manifest's.
    """
    entry = shards.manifest.shards[shard]
    path = shards.root / entry.file
    try:
        tar = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); restore it or pack anew") from None
    if hashlib.sha256(tar.data).hexdigest() != entry.sha256:
        raise ShardError(f"{path}: SHA-256 differs from the manifest's, the file has changed; restore it or pack anew")
    position = 0
    for number, size in zip(numbers, sizes.tolist(), strict=True):
        fields = shards.samples[number]
        end = int(fields["offset"]) + int(fields["size"])
        target[position : position + size] = tar[end - size : end]
        position += size


def _decode_all(held: NDArray[np.int64], decoder: Loader, config: LoaderConfig) -> torch.Tensor:
    """(len(held), S, S, 3) uint8 on the device: the images of the samples ``held``; closes ``decoder``."""
    size, done = config.image_size, 0
    images = torch.empty((len(held), size, size, 3), dtype=torch.uint8, device=config.device)
    try:
        with tqdm(total=len(held), unit="image", desc="decoding", disable=None) as progress:
            for batch in decoder.load(evaluation_batches(held, config.max_batch)):
                images[done : done + len(batch)] = batch.images.permute(0, 2, 3, 1)
                done += len(batch)
                progress.update(len(batch))
    finally:
        decoder.close()
    return images
