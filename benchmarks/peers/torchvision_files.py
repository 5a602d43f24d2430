#!/usr/bin/env python3
"""Peer: torchvision alone. A PNG tree, decode_image and the v2 transforms in the DataLoader's workers.

decode_image(mode=RGB) returns channels-last memory. v2's resize (antialiased, on uint8) and all later transforms keep
that layout, so batches are stacked without a conversion. Every value is checked: v2's resize may differ from Pillow's
by one level, and by 0.05 in the mean.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image

from peers.images import collate, make_tensor_transform
from peers.serving import Delivery, Tolerance, make_loader_options, make_parser, parse, read_image_files, serve_epochs

TOLERANCE = Tolerance(most=1, mean=0.05)


class Images(Dataset[tuple[torch.Tensor, int]]):
    """The PNG tree. The label is the sample number, so that batches can be checked."""

    def __init__(self, files: list[str], transform: Any) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.transform(decode_image(self.files[number], ImageReadMode.RGB)), number


def main() -> None:
    options = parse(make_parser(__doc__))
    # decode_image is deprecated since torchvision 0.29, but it is the decoder to be measured
    warnings.filterwarnings("ignore", message=".*TorchCodec")
    size = np.load(options.pixels, mmap_mode="r").shape[1]
    dataset = Images(read_image_files(options.images), make_tensor_transform(size, options.dtype))
    torch.manual_seed(options.seed)
    loader = DataLoader(dataset, shuffle=True, collate_fn=collate, **make_loader_options(options))
    delivery = Delivery(options, size)

    def epoch() -> Iterator[tuple[torch.Tensor, list[int]]]:
        for images, numbers in loader:
            yield delivery.images(images), numbers

    serve_epochs(epoch, options, ("torch", "torchvision"), stored=map(Path, dataset.files), tolerance=TOLERANCE)


if __name__ == "__main__":
    main()
