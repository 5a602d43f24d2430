#!/usr/bin/env python3
"""Peer: one memory-mapped array of all images, gathered by NumPy and normalised by torch: ten lines of user code.

Its workers are torch's threads: at least one. With --keep_buffer, float32 goes into one buffer that every batch
overwrites, which saves the cost of fresh pages. Every value is checked: equal to Pillow's.

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from peers.serving import IMAGENET_MEAN, IMAGENET_STD, Delivery, make_parser, on_gpu, parse, serve_epochs


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--keep_buffer",
        action="store_true",
        help="float32: normalise into one reused buffer, by rows; 2 to 4 times as fast",
    )
    options = parse(parser)
    torch.set_num_threads(options.num_workers)
    pixels = np.load(options.pixels, mmap_mode="r")
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    delivery = Delivery(options, pixels.shape[1])
    plain = options.dtype == "float32" and not options.keep_buffer and not on_gpu(options)
    random = np.random.default_rng(options.seed)

    def epoch() -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        order = random.permutation(len(pixels))
        for start in range(0, len(order), options.batch_size):
            numbers = order[start : start + options.batch_size]
            batch = torch.from_numpy(pixels[numbers])
            if plain:
                yield batch.to(torch.float32).div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2), numbers
            else:
                yield delivery.pixels(batch.pin_memory() if on_gpu(options) else batch), numbers

    serve_epochs(epoch, options, ("numpy", "torch"), stored=[options.pixels])


if __name__ == "__main__":
    main()
