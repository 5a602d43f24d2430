#!/usr/bin/env python3
"""Peer: FFCV with raw pixels (RGBImageField, write_mode="raw"), in its own environment (requirements-ffcv.txt).

Speaks as serving.py says; started by client.py, which sets the PYTHONPATH.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers.serving import IMAGENET_MEAN, IMAGENET_STD, KeptBuffer, check_batch, make_parser, serve

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
    parser = make_parser(__doc__)
    # Measured on 2 shared cores, 2,080 pictures of 224 px, batch 64, 2 workers, images/s: median of several series (best pass).
    # FFCV's NormalizeImage 5,200 to 7,000 (11,400); torch into a kept buffer 1,900 to 4,000 (12,700), its threads and FFCV's
    # fighting for the cores; torch into fresh memory 1,150 (1,500). So FFCV's own is the default; race both where cores are quiet.
    parser.add_argument("--normalise", choices=("ffcv", "torch"), default="ffcv", help="float32: in FFCV's pipeline, or behind it")
    options = parser.parse_args()
    pixels = np.load(options.pixels, mmap_mode="r")
    beton = options.work_dir / f"raw_{len(pixels)}x{pixels.shape[1]}.beton"
    if not beton.is_file():
        _write(beton, pixels, options.num_workers)
    behind = options.dtype == "float32" and options.normalise == "torch"
    loader = _loader(beton, options, normalise=options.dtype == "float32" and not behind)
    kept = KeptBuffer(options.batch_size, pixels.shape[1])

    def epoch() -> Iterator[tuple[Any, Any]]:
        for batch, labels in loader:
            if behind:
                batch = kept.normalise(batch.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            yield batch, labels

    _check(epoch(), len(loader), pixels, options.dtype, beton)

    def run() -> int:
        images = 0
        for batch, _ in epoch():
            images += len(batch)
            batch[:, 0, 0, 0].sum()
        return images

    serve(run, ("ffcv", "numba", "numpy", "torch"))


def _write(beton: Path, pixels: np.ndarray, num_workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found, unused-ignore]
    from ffcv.writer import DatasetWriter  # type: ignore[import-not-found, unused-ignore]

    fields = {"image": RGBImageField(write_mode="raw", max_resolution=pixels.shape[1]), "label": IntField()}
    beton.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beton.with_suffix(".unfinished")
    page_size = max(PAGE_SIZE, 1 << int(pixels[0].nbytes).bit_length())
    DatasetWriter(str(unfinished), fields, page_size=page_size, num_workers=num_workers).from_indexed_dataset(Pictures(pixels))
    unfinished.rename(beton)


def _loader(beton: Path, options: Any, *, normalise: bool) -> Any:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder  # type: ignore[import-not-found, unused-ignore]
    from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found, unused-ignore]
    from ffcv.transforms import NormalizeImage, Squeeze, ToTensor, ToTorchImage  # type: ignore[import-not-found, unused-ignore]

    image = [SimpleRGBImageDecoder()]
    if normalise:
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


def _check(epoch: Iterator[tuple[Any, Any]], length: int, pixels: np.ndarray, dtype: str, beton: Path) -> None:
    """One epoch, in which FFCV also compiles: every picture once, the first and the last batch as they have to be."""
    seen = []
    for number, (batch, labels) in enumerate(epoch):
        seen.append(labels.numpy().copy())  # FFCV uses its buffers again
        if number in (0, length - 1):
            try:
                check_batch(batch, pixels[seen[-1]], dtype)
            except SystemExit as stop:
                sys.exit(f"{stop} ({beton}: if it was written from another .npy, delete it)")
    if not np.array_equal(np.sort(np.concatenate(seen)), np.arange(len(pixels))):
        sys.exit(f"ValueError: {beton}: an epoch does not have every picture of the .npy once; delete the file")


if __name__ == "__main__":
    main()
