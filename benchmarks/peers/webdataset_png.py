#!/usr/bin/env python3
"""Peer: webdataset on our own png shards, with the pipeline of its manual.

WebDataset(shardshuffle).shuffle(1000).decode("pil"), then the original trainer's transforms, batched in the workers;
WebLoader over that, with persistent workers. Each worker reads its own shards, so with more workers than shards some
are idle, and each worker ends an epoch with a smaller batch. The manual's optional second shuffle in the main process
would copy every sample, and is left out. Every value is checked: equal to Pillow's.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from peers.images import collate, make_pillow_transform
from peers.serving import Delivery, make_loader_options, make_parser, parse, read_sample_numbers, serve_epochs

SHUFFLE = 1000
"""Samples in the shuffle buffer, as in the manual's examples; they are still encoded there."""


def main() -> None:
    options = parse(make_parser(__doc__))
    size = np.load(options.pixels, mmap_mode="r").shape[1]
    tars = sorted(str(tar) for tar in options.shards.glob("*/*.tar"))
    dataset = (
        wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
        .shuffle(SHUFFLE)
        .decode("pil")
        .to_tuple("png", "__key__")
        .map_tuple(make_pillow_transform(size, options.dtype), str)
        .batched(options.batch_size, collation_fn=collate)
    )
    loader = wds.WebLoader(dataset, **(make_loader_options(options) | {"batch_size": None}))
    delivery = Delivery(options, size)

    def epoch() -> Iterator[tuple[torch.Tensor, list[str]]]:
        for images, keys in loader:
            yield delivery.images(images), keys

    number = read_sample_numbers(tars)

    def numbers_of(keys: Any) -> list[int]:
        return [number[key] for key in keys]

    serve_epochs(epoch, options, ("Pillow", "torch", "webdataset"), stored=map(Path, tars), number_of=numbers_of)


if __name__ == "__main__":
    main()
