#!/usr/bin/env python3
"""Peer: the original trainer's way. A PNG tree, Pillow and torchvision's transforms in the DataLoader's workers.

convert("RGB"), Resize, ToTensor and Normalize for each image; batches are collated in the worker, channels_last.
Workers are persistent. Every value is checked: equal to Pillow's.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from peers.images import collate, make_pillow_transform
from peers.serving import Delivery, make_loader_options, make_parser, parse, read_image_files, serve_epochs


class Images(Dataset[tuple[torch.Tensor, int]]):
    """The PNG tree. The label is the sample number, so that batches can be checked."""

    def __init__(self, files: list[str], transform: Any) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[number]) as image:
            return self.transform(image.convert("RGB")), number


def main() -> None:
    options = parse(make_parser(__doc__))
    size = np.load(options.pixels, mmap_mode="r").shape[1]
    dataset = Images(read_image_files(options.images), make_pillow_transform(size, options.dtype))
    torch.manual_seed(options.seed)
    loader = DataLoader(dataset, shuffle=True, collate_fn=collate, **make_loader_options(options))
    delivery = Delivery(options, size)

    def epoch() -> Iterator[tuple[torch.Tensor, list[int]]]:
        for images, numbers in loader:
            yield delivery.images(images), numbers

    serve_epochs(epoch, options, ("Pillow", "torch", "torchvision"), stored=map(Path, dataset.files))


if __name__ == "__main__":
    main()
