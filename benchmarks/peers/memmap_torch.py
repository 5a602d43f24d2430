#!/usr/bin/env python3
"""Peer: one memory-mapped array of all pictures, gathered by NumPy and normalised by torch. What a user writes in ten lines.

Speaks as serving.py says; started by client.py, which sets the PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from peers.serving import IMAGENET_MEAN, IMAGENET_STD, check_batch, parse_arguments, serve


def main() -> None:
    options = parse_arguments(__doc__)
    torch.set_num_threads(options.num_workers)
    pixels = np.load(options.pixels, mmap_mode="r")
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    random = np.random.default_rng(options.seed)

    def batches(order: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(order), options.batch_size):
            batch = torch.from_numpy(pixels[order[start : start + options.batch_size]])
            if options.dtype == "float32":
                batch = batch.to(torch.float32).div_(255).sub_(mean).div_(std)
            yield batch.permute(0, 3, 1, 2)

    def run() -> int:
        images = 0
        for batch in batches(random.permutation(len(pixels))):
            images += len(batch)
            batch[:, 0, 0, 0].sum()
        return images

    sample = random.permutation(len(pixels))[: options.batch_size]
    check_batch(next(batches(sample)), pixels[sample], options.dtype)
    serve(run, ("numpy", "torch"))


if __name__ == "__main__":
    main()
