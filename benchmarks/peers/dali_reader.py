#!/usr/bin/env python3
"""Peer: a bare DALI pipeline with DALI's own WebDataset reader on our png shards and their index files, as its manual
has it.

Decoding ("mixed" where there is a GPU), linear antialiased resize, normalisation in the pipeline; batches are handed
over by DLPack, which copies nothing. DALI keeps two batches prepared, also between epochs. Threads are its workers: at
least one. Compared: every value, which by DALI's resize may be up to 16 levels off Pillow's at an image's border, and
in the mean half a level.

Speaks as serving.py says; started by harness/peer_process.py, which sets the PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from peers.serving import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Tolerance,
    make_parser,
    on_gpu,
    parse,
    serve_epochs,
    shard_numbers,
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
            images = torch.from_dlpack(output.as_tensor())[
                : samples - start
            ]  # the last batch repeats samples to be whole
            yield images.permute(0, 3, 1, 2), (sources, len(images))

    number = shard_numbers(tars)

    def numbers_of(sources: tuple[Any, int]) -> list[int]:
        files, count = sources  # of each sample: its tar, its offset and its name there
        return [number[bytes(files.at(i)).decode().rpartition(":")[2].partition(".")[0]] for i in range(count)]

    serve_epochs(
        epoch, options, (DALI_PACKAGE, "torch"), stored=map(Path, tars), tolerance=TOLERANCE, number_of=numbers_of
    )


def _pipeline(tars: list[str], options: Any, size: int) -> Any:
    """Images (B, S, S, 3), labels, and where each sample came from."""
    gpu = on_gpu(options)

    @pipeline_def(
        batch_size=options.batch_size,
        num_threads=options.num_workers,
        device_id=(torch.device(options.device).index or 0) if gpu else None,
    )
    def pipeline() -> Any:
        readers: Any = fn.readers  # its type stub says that a reader returns nothing
        encoded, label = readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["png", "cls"],
            random_shuffle=True,
            seed=1 + options.seed,
            pad_last_batch=True,  # so that an epoch has each sample once, but for those that fill its last batch
        )
        source = fn.get_property(encoded, key="source_info")
        decoded = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
        images = fn.resize(decoded, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        if options.dtype == "float32":
            mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
            images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std)
        return images, label, source

    return pipeline()


if __name__ == "__main__":
    main()
