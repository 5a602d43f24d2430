#!/usr/bin/env python3
"""Peer: FFCV with images of the final size, raw or as JPEG, in its own environment (requirements-ffcv.txt).

--stored raw (write_mode="raw"): ready pixels. Every value is checked: equal to Pillow's.
--stored jpeg (write_mode="jpg"): FFCV's default quality of 90, which is how FFCV keeps large datasets small; lossy.
Every value is checked: within what JPEG does to a spectrogram's hard edges.

In both, Pillow resizes the images before they are written, because FFCV's resizing decoders crop squares, which is
another task. It runs with os_cache, FFCV's compiled pipeline and its own threads; it needs at least one. On a GPU it
transfers uint8 and torch normalises there (FFCV's own way would need CuPy).

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peers.serving import (
    EXACT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Delivery,
    Tolerance,
    count_cores,
    make_parser,
    on_gpu,
    parse,
    serve_epochs,
)

PAGE_SIZE = 8 * 2**20
"""FFCV's default. A page must hold a whole image."""
WRITE_MODES = {"raw": "raw", "jpeg": "jpg"}
JPEG_TOLERANCE = Tolerance(most=160, mean=12)
"""Measured on synthetic spectrograms of 224 px: at most 80 levels, 5.1 in the mean."""


class Images:
    """The .npy as FFCV's writer expects it: (image, label) by index.

    The label is the sample number, so that batches can be checked.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return np.array(self.pixels[number]), int(number)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--stored", choices=WRITE_MODES, default="raw")
    # Measured on 2 shared cores with 2,080 images of 224 px, batch 64, 2 workers; images/s, median of several series
    # (best pass): FFCV's NormalizeImage 5,200 to 7,000 (11,400); torch into one reused buffer 1,900 to 4,000 (12,700),
    # because its threads compete with FFCV's for the cores; torch into fresh memory 1,150 (1,500). So FFCV's own is
    # the default; on a quiet machine race both.
    parser.add_argument(
        "--normalise",
        choices=("ffcv", "torch"),
        default="ffcv",
        help="float32: in FFCV's pipeline, or after it by torch",
    )
    options = parse(parser)
    pixels = np.load(options.pixels, mmap_mode="r")
    beton = options.work_dir / f"{options.stored}_{len(pixels)}x{pixels.shape[1]}.beton"
    if not beton.is_file():
        _write(beton, pixels, WRITE_MODES[options.stored])
    by_torch = on_gpu(options) or (options.dtype == "float32" and options.normalise == "torch")
    loader = _loader(beton, options, normalise=options.dtype == "float32" and not by_torch)
    delivery = Delivery(options, pixels.shape[1])

    def epoch() -> Iterator[tuple[Any, Any]]:  # the first epoch compiles; FFCV reuses its buffers
        for batch, numbers in loader:
            yield delivery.pixels(batch.permute(0, 2, 3, 1)) if by_torch else batch, numbers

    tolerance = JPEG_TOLERANCE if options.stored == "jpeg" else EXACT
    serve_epochs(epoch, options, ("ffcv", "numba", "numpy", "torch"), stored=[beton], tolerance=tolerance)


def _write(beton: Path, pixels: np.ndarray, write_mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found, unused-ignore]
    from ffcv.writer import DatasetWriter  # type: ignore[import-not-found, unused-ignore]

    fields = {"image": RGBImageField(write_mode=write_mode, max_resolution=pixels.shape[1]), "label": IntField()}
    beton.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beton.with_suffix(".unfinished")
    page_size = max(PAGE_SIZE, 1 << int(pixels[0].nbytes).bit_length())
    DatasetWriter(str(unfinished), fields, page_size=page_size, num_workers=count_cores()).from_indexed_dataset(
        Images(pixels)
    )
    unfinished.rename(beton)


def _loader(beton: Path, options: argparse.Namespace, *, normalise: bool) -> Any:
    import torch
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder  # type: ignore[import-not-found, unused-ignore]
    from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found, unused-ignore]
    from ffcv.transforms import (  # type: ignore[import-not-found, unused-ignore]
        NormalizeImage,
        Squeeze,
        ToDevice,
        ToTensor,
        ToTorchImage,
    )

    image = [SimpleRGBImageDecoder()]
    if normalise:
        mean, std = (255 * np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        image.append(NormalizeImage(mean, std, np.float32))
    image.append(ToTensor())
    if on_gpu(options):
        image.append(ToDevice(torch.device(options.device), non_blocking=True))
    return Loader(
        str(beton),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=options.seed,
        drop_last=False,
        pipelines={
            "image": [*image, ToTorchImage(channels_last=True)],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
        },
    )


if __name__ == "__main__":
    main()
