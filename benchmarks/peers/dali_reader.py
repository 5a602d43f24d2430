#!/usr/bin/env python3
"""Peer: a bare DALI pipeline with DALI's own WebDataset reader on our png shards and their index files.

The pipeline follows DALI's manual: decoding ("mixed" on a GPU), linear antialiased resize, normalisation. Batches are
handed over by DLPack, without a copy. DALI keeps two batches prepared, also between epochs. Its threads are the
workers; it needs at least one. Every value is checked: DALI's own resize may differ from Pillow's by up to 16 levels at
an image's border, and by half a level in the mean.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch.utils.dlpack import from_dlpack

from peers.serving import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Tolerance,
    make_parser,
    on_gpu,
    parse,
    read_sample_numbers,
    serve_epochs,
)

TOLERANCE = Tolerance(most=16, mean=0.5)
DALI_PACKAGE = "nvidia-dali-cuda120"


def main() -> None:
    options = parse(make_parser(__doc__))
    pixels = np.load(options.pixels, mmap_mode="r")
    tars = sorted(str(tar) for tar in options.shards.glob("*/*.tar"))
    pipeline = _pipeline(tars, options, pixels.shape[1])
    pipeline.build()
    samples, batch_size = len(pixels), options.batch_size

    def epoch() -> Iterator[tuple[torch.Tensor, Any]]:
        for start in range(0, samples, batch_size):
            output, _, sources = pipeline.run()
            images = from_dlpack(output.as_tensor())
            images = images[: samples - start]  # DALI fills the last batch with repeated samples
            yield images.permute(0, 3, 1, 2), (sources, len(images))

    number = read_sample_numbers(tars)

    def numbers_of(sources: tuple[Any, int]) -> list[int]:
        files, count = sources  # per sample: its tar, its offset there and its file name
        return [number[bytes(files.at(i)).decode().rpartition(":")[2].partition(".")[0]] for i in range(count)]

    serve_epochs(
        epoch, options, (DALI_PACKAGE, "torch"), stored=map(Path, tars), tolerance=TOLERANCE, number_of=numbers_of
    )


def _pipeline(tars: list[str], options: argparse.Namespace, size: int) -> Any:
    """Return a pipeline of images (B, S, S, 3), labels, and the source of each sample."""
    gpu = on_gpu(options)

    def define() -> Any:
        readers: Any = fn.readers  # DALI's type stub says that a reader returns nothing
        encoded, label = readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["png", "cls"],
            random_shuffle=True,
            seed=1 + options.seed,
            pad_last_batch=True,  # an epoch then has each sample once, and repeats fill only its last batch
        )
        source = fn.get_property(encoded, key="source_info")
        decoded = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        images = fn.resize(decoded, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        if options.dtype == "float32":
            mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
            images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std)
        return images, label, source

    definition: Any = pipeline_def(  # DALI leaves its decorator untyped
        batch_size=options.batch_size,
        num_threads=options.num_workers,
        device_id=(torch.device(options.device).index or 0) if gpu else None,
    )
    return definition(define)()


if __name__ == "__main__":
    main()
