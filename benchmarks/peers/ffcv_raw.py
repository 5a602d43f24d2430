#!/usr/bin/env python3
"""Peer: FFCV with raw pixels (RGBImageField, write_mode="raw"), in its own environment (requirements-ffcv.txt).

Speaks as serving.py says; started by client.py, which sets the PYTHONPATH.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from peers.serving import IMAGENET_MEAN, IMAGENET_STD, check_batch, parse_arguments, serve

PAGE_SIZE = 8 * 2**20
"""FFCV's default; it must hold a whole picture."""


class Pictures:
    """The .npy as FFCV's writer wants it: (picture, label) by number. The number is the label, so that batches can be checked."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return np.array(self.pixels[number]), int(number)


def main() -> None:
    options = parse_arguments(__doc__)
    pixels = np.load(options.pixels, mmap_mode="r")
    beton = options.work_dir / f"raw_{len(pixels)}x{pixels.shape[1]}.beton"
    if not beton.is_file():
        _write(beton, pixels, options.num_workers)
    loader = _loader(beton, options)
    _check(loader, pixels, options, beton)

    def run() -> int:
        images = 0
        for batch, _ in loader:
            images += len(batch)
            batch[:, 0, 0, 0].sum()
        return images

    serve(run, ("ffcv", "numba", "numpy", "torch"))


def _write(beton: Path, pixels: np.ndarray, num_workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw", max_resolution=pixels.shape[1]), "label": IntField()}
    beton.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beton.with_suffix(".unfinished")
    page_size = max(PAGE_SIZE, 1 << int(pixels[0].nbytes).bit_length())
    DatasetWriter(str(unfinished), fields, page_size=page_size, num_workers=num_workers).from_indexed_dataset(Pictures(pixels))
    unfinished.rename(beton)


def _loader(beton: Path, options: Any) -> Any:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, Squeeze, ToTensor, ToTorchImage

    image = [SimpleRGBImageDecoder()]
    if options.dtype == "float32":
        mean, std = (255 * np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        image.append(NormalizeImage(mean, std, np.float32))
    return Loader(
        str(beton),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=options.seed,
        drop_last=False,
        pipelines={
            "image": [*image, ToTensor(), ToTorchImage(channels_last=True)],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
        },
    )


def _check(loader: Any, pixels: np.ndarray, options: Any, beton: Path) -> None:
    """One epoch, in which FFCV also compiles: every picture once, the first and the last batch as they have to be."""
    seen = []
    for number, (batch, labels) in enumerate(loader):
        seen.append(labels.numpy().copy())  # FFCV uses its buffers again
        if number in (0, len(loader) - 1):
            try:
                check_batch(batch, pixels[seen[-1]], options.dtype)
            except SystemExit as stop:
                sys.exit(f"{stop} ({beton}: if it was written from another .npy, delete it)")
    if not np.array_equal(np.sort(np.concatenate(seen)), np.arange(len(pixels))):
        sys.exit(f"ValueError: {beton}: an epoch does not have every picture of the .npy once; delete the file")


if __name__ == "__main__":
    main()
