#!/usr/bin/env python3
"""Peer: LitData, optimize() and StreamingDataset, in an environment over ours (requirements-litdata-datasets.txt).

--stored png: litdata.Image(path=...), the files' own bytes, as its manual recommends. LitData decodes them with
torchvision, and v2 transforms follow in the workers. Every value is checked: v2's resize may differ from Pillow's by
one level, and by 0.05 in the mean.
--stored raw: tensors of ready pixels, (S, S, 3) uint8; workers only collate. Every value is checked: equal to Pillow's.

StreamingDataLoader with persistent workers, chunks of the default 64 MB, LitData's own shuffle. The folder is local and
read in place.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # the check would use the network

import litdata  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import torch

from peers.images import collate, make_tensor_transform
from peers.serving import (
    EXACT,
    Delivery,
    Tolerance,
    count_cores,
    make_loader_options,
    make_parser,
    parse,
    read_image_files,
    serve_epochs,
)

CHUNK_BYTES = "64MB"
RESIZE_TOLERANCE = Tolerance(most=1, mean=0.05)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--stored", choices=("png", "raw"), default="raw")
    options = parse(parser)
    pixels = np.load(options.pixels, mmap_mode="r")
    size = pixels.shape[1]
    png = options.stored == "png"
    store = options.work_dir / (f"litdata_png_{len(pixels)}" if png else f"litdata_raw_{len(pixels)}x{size}")
    if not store.is_dir():
        files = read_image_files(options.images) if png else None
        _write(store, len(pixels), partial(_from_file, files) if files else partial(_from_pixels, options.pixels))
    dataset = litdata.StreamingDataset(
        str(store),
        shuffle=True,
        drop_last=False,
        seed=42 + options.seed,
        transform=partial(_transformed, make_tensor_transform(size, options.dtype)) if png else None,
    )
    loader = litdata.StreamingDataLoader(dataset, collate_fn=collate if png else None, **make_loader_options(options))
    delivery = Delivery(options, size)

    def epoch() -> Iterator[tuple[torch.Tensor, Any]]:
        for batch in loader:
            if png:
                yield delivery.images(batch[0]), batch[1]
            else:
                yield delivery.pixels(batch["image"]), batch["number"]

    packages = ("litdata", "torch", "torchvision")
    serve_epochs(epoch, options, packages, stored=[store], tolerance=RESIZE_TOLERANCE if png else EXACT)


def _write(store: Path, samples: int, sample: Any) -> None:
    unfinished = store.with_name(store.name + ".unfinished")
    litdata.optimize(
        sample,
        list(range(samples)),
        str(unfinished),
        chunk_bytes=CHUNK_BYTES,
        num_workers=count_cores(),
        mode="overwrite",
        verbose=False,
    )
    unfinished.rename(store)


def _from_file(files: list[str], number: int) -> dict[str, Any]:
    return {"image": litdata.Image(path=files[number]), "number": number}


def _from_pixels(pixels: Path, number: int) -> dict[str, Any]:
    return {"image": torch.from_numpy(np.array(np.load(pixels, mmap_mode="r")[number])), "number": number}


def _transformed(transform: Any, sample: dict[str, Any], *arguments: Any, **keywords: Any) -> tuple[torch.Tensor, int]:
    return transform(sample["image"]), sample["number"]


if __name__ == "__main__":
    main()
