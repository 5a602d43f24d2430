#!/usr/bin/env python3
"""Peer: one memory-mapped array of all pictures, gathered by NumPy and normalised by torch. What a user writes in ten lines.

Speaks as serving.py says; started by client.py, which sets the PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from peers.serving import IMAGENET_MEAN, IMAGENET_STD, KeptBuffer, check_batch, make_parser, serve


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--keep_buffer", action="store_true", help="float32: normalise into one buffer, by rows; 2 to 4 times faster"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.num_workers)
    pixels = np.load(options.pixels, mmap_mode="r")
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    kept = KeptBuffer(options.batch_size, pixels.shape[1]) if options.keep_buffer else None
    random = np.random.default_rng(options.seed)

    def batches(order: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(order), options.batch_size):
            batch = torch.from_numpy(pixels[order[start : start + options.batch_size]])
            if options.dtype == "float32" and kept is not None:
                batch = kept.normalise(batch)
            elif options.dtype == "float32":
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
