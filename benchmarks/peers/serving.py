"""What all peers' scripts share: arguments, the check of their pixels, and serving runs. Must import in any peer's environment.

{"ready": true, "versions": {...}}    printed once all is made, checked and warm
run  ->  {"images": n}                for each such line of the input: one shuffled epoch over everything
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""As in quaclrs/imaging/normalise.py, which a peer's environment does not have."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=Path, required=True, help="(N, S, S, 3) uint8 .npy, all pictures")
    parser.add_argument("--work_dir", type=Path, required=True, help="for the peer's own files; kept from run to run")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--dtype", choices=("uint8", "float32"), default="float32", help="float32: with ImageNet normalisation")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class KeptBuffer:
    """ImageNet normalisation by torch into one buffer used again for every batch: each batch is overwritten by the next.

    The fastest that plain torch has on a CPU: no fresh pages, and whole rows instead of three channels to broadcast.
    """

    def __init__(self, batch_size: int, size: int) -> None:
        import torch

        self._values = torch.empty(batch_size, size, 3 * size)
        self._mean, self._std = (torch.tensor(values).repeat(size) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def normalise(self, pictures: Any) -> Any:
        """(B, S, S, 3) uint8 to the same in float32."""
        rows = self._values[: len(pictures)]
        rows.copy_(pictures.view(rows.shape)).div_(255).sub_(self._mean).div_(self._std)
        return rows.view(pictures.shape)


def check_batch(batch: Any, pixels: np.ndarray, dtype: str) -> None:
    """Exit unless ``batch``, a (B, 3, S, S) tensor in channels_last memory, holds ``pixels`` (B, S, S, 3), normalised if float32."""
    served = batch.permute(0, 2, 3, 1)
    if not served.is_contiguous():
        sys.exit("ValueError: the batch is not in channels_last memory")
    if str(batch.dtype) != f"torch.{dtype}":
        sys.exit(f"ValueError: the batch is {batch.dtype}, not {dtype}")
    if served.shape != pixels.shape:
        sys.exit(f"ValueError: the batch is {tuple(served.shape)}, not {pixels.shape}")
    if dtype == "uint8":
        if not np.array_equal(served.numpy(), pixels):
            sys.exit("ValueError: the batch does not hold the pixels of the .npy")
    else:
        difference = np.abs(served.numpy() - (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).max()
        if not difference <= 1e-5:
            sys.exit(f"ValueError: the batch differs by {difference:.1g} from the normalised pixels of the .npy")


def serve(run: Callable[[], int], packages: tuple[str, ...]) -> None:
    """Say that all is ready, then ``run`` for each line "run" until the input ends; ``packages``: whose versions to tell."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints shall not be taken for an answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    answer(ready=True, versions=versions)
    for line in sys.stdin:
        if line.strip() != "run":
            sys.exit(f"ValueError: {line.strip()!r} is not something to do; only 'run' is")
        answer(images=run())
