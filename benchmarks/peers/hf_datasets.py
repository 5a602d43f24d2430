#!/usr/bin/env python3
"""Peer: Hugging Face datasets, an Arrow dataset on disk, in an environment over ours
(requirements-litdata-datasets.txt).

--stored png: the Image feature with the files' own bytes, decoded by Pillow; the original trainer's transforms in
set_transform, as in its manual. Every value is checked: equal to Pillow's.
--stored raw: the Array3D feature with ready pixels in the format "numpy" (uint8), read as whole batches with a
BatchSampler, which is 1.5 times as fast as sample by sample. Every value is checked: equal to Pillow's.

A DataLoader reads the memory-mapped dataset in the sampler's shuffled order, with persistent workers.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from peers.images import collate, make_pillow_transform
from peers.serving import Delivery, make_loader_options, make_parser, parse, read_image_files, serve_epochs


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--stored", choices=("png", "raw"), default="raw")
    options = parse(parser)
    pixels = np.load(options.pixels, mmap_mode="r")
    size = pixels.shape[1]
    png = options.stored == "png"
    store = options.work_dir / (f"datasets_png_{len(pixels)}" if png else f"datasets_raw_{len(pixels)}x{size}")
    if not store.is_dir():
        _write(store, options, png)
    dataset = datasets.load_from_disk(str(store))
    if png:
        dataset.set_transform(_Transform(make_pillow_transform(size, options.dtype)))
    else:
        dataset = dataset.with_format("numpy", columns=["image"], output_all_columns=True, dtype=np.uint8)
    torch.manual_seed(options.seed)
    if png:
        loader = DataLoader(dataset, shuffle=True, collate_fn=_collate, **make_loader_options(options))
    else:
        batches = BatchSampler(RandomSampler(dataset), options.batch_size, drop_last=False)
        loader = DataLoader(dataset, sampler=batches, **(make_loader_options(options) | {"batch_size": None}))
    delivery = Delivery(options, size)

    def epoch() -> Iterator[tuple[torch.Tensor, Any]]:
        for batch in loader:
            if png:
                yield delivery.images(batch[0]), batch[1]
            else:
                yield delivery.pixels(batch["image"]), batch["number"]

    serve_epochs(epoch, options, ("datasets", "Pillow", "pyarrow", "torch"), stored=[store])


class _Transform:
    """A transform for set_transform: takes and returns a batch of columns."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | {"image": [self.transform(image.convert("RGB")) for image in batch["image"]]}


def _collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, list[Any]]:
    return collate([(sample["image"], sample["number"]) for sample in samples])


def _write(store: Path, options: argparse.Namespace, png: bool) -> None:
    unfinished, cache = (store.with_name(store.name + ending) for ending in (".unfinished", ".cache"))
    pixels = np.load(options.pixels, mmap_mode="r")
    image = datasets.Image() if png else datasets.Array3D(shape=pixels.shape[1:], dtype="uint8")
    features = datasets.Features({"image": image, "number": datasets.Value("int64")})
    # datasets would take a list for shards
    sources = {"images": str(options.images)} if png else {"pixels": str(options.pixels)}
    dataset = datasets.Dataset.from_generator(_samples, features=features, cache_dir=str(cache), gen_kwargs=sources)
    dataset.save_to_disk(str(unfinished))
    del dataset
    unfinished.rename(store)
    shutil.rmtree(cache)


def _samples(images: str | None = None, pixels: str | None = None) -> Iterator[dict[str, Any]]:
    if images is not None:
        for number, file in enumerate(read_image_files(Path(images))):
            yield {"image": {"bytes": Path(file).read_bytes(), "path": None}, "number": number}
    elif pixels is not None:
        for number, image in enumerate(np.load(pixels, mmap_mode="r")):
            yield {"image": np.array(image), "number": number}


if __name__ == "__main__":
    main()
