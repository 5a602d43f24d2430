"""What all peers' scripts share: arguments, the check of their pixels, and serving runs. Must import in any peer's
environment.

{"ready": true, "versions": {...}, "check": {...}, "stored": {...}}    printed once all is made, checked and warm run
->  {"images": n, "first_batch_s": ..., "device_s": ...}          for each such line of the input: one shuffled epoch
over everything
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""As in quaclrs/imaging/normalise.py, which a peer's environment does not have."""

ROUNDING = 1e-5
"""How far normalised values may be from float64's where pixels have to be equal; a level of a pixel is 0.017."""

Epoch = Callable[[], Iterator[tuple[Any, Any]]]
"""Starts a shuffled epoch: (images, numbers) batches, images (B, 3, S, S) as :func:`check_batch` wants them, numbers of
any kind.
"""


@dataclass(frozen=True)
class Tolerance:
    """How far a peer's pixels may be from Pillow's, in levels of 255; (0, 0) where they have to be equal."""

    most: float = 0
    """Of one value."""
    mean: float = 0
    """Over a batch."""


EXACT = Tolerance()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pixels", type=Path, required=True, help="(N, S, S, 3) uint8 .npy, all images as Pillow resizes them"
    )
    parser.add_argument("--images", type=Path, help="CSV of the PNG tree: number and file of each sample, in order")
    parser.add_argument("--shards", type=Path, help="png shards of the same samples in the same order")
    parser.add_argument("--work_dir", type=Path, required=True, help="for the peer's own files; kept from run to run")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("uint8", "float32"), default="float32", help="float32: with ImageNet normalisation"
    )
    parser.add_argument("--device", default="cpu", help="where the batches have to be")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; from here on what a library prints goes to stderr and is not taken for an answer."""
    options = parser.parse_args()
    options.answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if on_gpu(options):
        import torch

        if not torch.cuda.is_available():
            sys.exit("RuntimeError: the torch of this environment has no GPU to use")
    return options


def read_images(path: Path) -> list[str]:
    """The PNG file of each sample, by sample number."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row["file"] for row in csv.DictReader(file)]


def shard_numbers(tars: list[str]) -> dict[str, int]:
    """The number of each sample by its key, from the shards' index files: samples are numbered in the shards' order."""
    lines = [line for tar in tars for line in Path(tar).with_suffix(".idx").read_text().splitlines()[1:]]
    return {line.split()[3].partition(".")[0]: number for number, line in enumerate(lines)}


def cores() -> int:
    """For writing, which is not timed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def loader_options(options: argparse.Namespace) -> dict[str, Any]:
    """What everybody gives torch's DataLoader: workers that stay, and pinned memory where it goes to a GPU."""
    return {
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "persistent_workers": options.num_workers > 0,
        "pin_memory": on_gpu(options),
    }


def on_gpu(options: argparse.Namespace) -> bool:
    return str(options.device).startswith("cuda")


class DeviceClock:
    """The seconds between two CUDA events recorded before and after a block, None on the CPU; asked for when the block
    is over.
    """

    def __init__(self, device: Any) -> None:
        self._events: list[Any] = []
        if str(device).startswith("cuda"):
            import torch

            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> DeviceClock:
        for event in self._events[:1]:
            event.record()
        return self

    def __exit__(self, *error: object) -> None:
        for event in self._events[1:]:
            event.record()

    def seconds(self) -> float | None:
        """Waits for the device."""
        if not self._events:
            return None
        start, stop = self._events
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def bytes_on_disk(paths: Iterable[Path]) -> int:
    """Of files, each counted once, and of all files in folders."""
    files = {file for path in set(paths) for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()}
    return sum(file.stat().st_size for file in files)


class KeptBuffer:
    """ImageNet normalisation by torch into one buffer used again for every batch: each batch is overwritten by the
    next.

    The fastest that plain torch has on a CPU: no fresh pages, and whole rows instead of three channels to broadcast.
    """

    def __init__(self, batch_size: int, size: int) -> None:
        import torch

        self._values = torch.empty(batch_size, size, 3 * size)
        self._scale, self._bias = (torch.tensor(values).repeat(size) for values in scale_and_bias())

    def normalise(self, images: Any) -> Any:
        """(B, S, S, 3) uint8 to the same in float32."""
        import torch

        rows = self._values[: len(images)]
        rows.copy_(images.reshape(rows.shape))
        return torch.addcmul(self._bias, rows, self._scale, out=rows).view(images.shape)


def scale_and_bias() -> tuple[list[float], list[float]]:
    """Normalisation of a level of 0..255 as one multiplication and one addition, per channel."""
    scale = [1 / (255 * std) for std in IMAGENET_STD]
    return scale, [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]


class Delivery:
    """The main process's part: a batch that workers made, on the device, in channels_last memory, normalised if
    float32.

    Ready pixels are normalised here and not by the workers: these would send four times the bytes. On a GPU the GPU
    does it.
    """

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        import torch

        self._device = torch.device(options.device)
        self._normalise = options.dtype == "float32"
        self._kept = KeptBuffer(options.batch_size, size) if self._normalise and not on_gpu(options) else None
        self._scale, self._bias = (
            torch.tensor(values, device=self._device)[:, None, None] for values in scale_and_bias()
        )

    def pixels(self, values: Any) -> Any:
        """(B, S, S, 3) uint8 on the CPU to (B, 3, S, S)."""
        import torch

        if self._kept is not None:
            return self._kept.normalise(values).permute(0, 3, 1, 2)
        images = values.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return torch.addcmul(self._bias, images.to(torch.float32), self._scale) if self._normalise else images

    def images(self, images: Any) -> Any:
        """(B, 3, S, S), finished by the workers but for the device."""
        return images.to(self._device, non_blocking=True)


def check_batch(batch: Any, pixels: np.ndarray, dtype: str, tolerance: Tolerance = EXACT) -> tuple[float, float]:
    """Exit unless ``batch``, a (B, 3, S, S) tensor in channels_last memory, holds ``pixels`` (B, S, S, 3), normalised
    if float32.

    Returns the largest and the mean difference, in levels.
    """
    served = batch.permute(0, 2, 3, 1)
    if not served.is_contiguous():
        sys.exit("ValueError: the batch is not in channels_last memory")
    if str(batch.dtype) != f"torch.{dtype}":
        sys.exit(f"ValueError: the batch is {batch.dtype}, not {dtype}")
    if served.shape != pixels.shape:
        sys.exit(f"ValueError: the batch is {tuple(served.shape)}, not {pixels.shape}")
    values = served.cpu().numpy().astype(np.float64)
    rounding = 0.0
    if dtype == "float32":
        values = (values * IMAGENET_STD + IMAGENET_MEAN) * 255
        rounding = ROUNDING * 255 * max(IMAGENET_STD)
    difference = np.abs(values - pixels)
    most, mean = float(difference.max()), float(difference.mean())
    if not (most <= tolerance.most + rounding and mean <= tolerance.mean + rounding):
        sys.exit(
            f"ValueError: the batch differs from Pillow's pixels by up to {most:.3g} levels, {mean:.3g} in the mean; "
            f"allowed are {tolerance.most:g} and {tolerance.mean:g}"
        )
    return (most, mean) if most > rounding else (0.0, 0.0)


def check_epoch(
    epoch: Epoch, pixels: np.ndarray, dtype: str, tolerance: Tolerance, number_of: Callable[[Any], Any]
) -> dict[str, float]:
    """Exit unless an epoch has every sample of ``pixels`` once, and its first and last batch the pixels
    it should have.
    """
    seen: list[np.ndarray] = []
    checked: list[tuple[float, float]] = []
    count = 0
    for images, which in epoch():
        seen.append(np.array(number_of(which)))
        count += len(images)
        if len(seen) == 1 or count == len(pixels):
            checked.append(check_batch(images, pixels[seen[-1]], dtype, tolerance))
    numbers = np.sort(np.concatenate(seen)) if seen else np.zeros(0, dtype=int)
    if not np.array_equal(numbers, np.arange(len(pixels))):
        sys.exit(
            f"ValueError: an epoch has {count} samples, {len(np.unique(numbers))} of them different, where there are "
            f"{len(pixels)}; "
            "if a file in the work folder was written from other data, delete it"
        )
    return {
        "most_levels_from_pillow": max(most for most, _ in checked),
        "mean_levels_from_pillow": max(mean for _, mean in checked),
    }


def serve_epochs(
    epoch: Epoch,
    options: argparse.Namespace,
    packages: tuple[str, ...],
    *,
    stored: Iterable[Path],
    tolerance: Tolerance = EXACT,
    number_of: Callable[[Any], Any] = np.asarray,
) -> None:
    """Check one epoch, then serve others; ``number_of`` makes sample numbers of what ``epoch`` gives beside the images,
    and ``stored`` are the files and folders that it reads."""
    pixels = np.load(options.pixels, mmap_mode="r")
    check = check_epoch(epoch, pixels, options.dtype, tolerance, number_of)

    def run() -> dict[str, Any]:
        count, first = 0, None
        started = time.perf_counter()
        with DeviceClock(options.device) as clock:
            for images, _ in epoch():
                first = first or time.perf_counter()
                count += len(images)
                images[
                    :, 0, 0, 0
                ].sum()  # one value of each image: a loader that only promises its batches gains nothing
        return {"images": count, "first_batch_s": first and first - started, "device_s": clock.seconds()}

    serve(run, options, packages, check, {"bytes_per_image": bytes_on_disk(stored) / len(pixels)})


def serve(
    run: Callable[[], dict[str, Any]],
    options: argparse.Namespace,
    packages: tuple[str, ...],
    check: dict[str, float] | None = None,
    stored: dict[str, float] | None = None,
) -> None:
    """Say that all is ready, then ``run`` for each line "run" until the input ends; ``packages``: whose versions to
    tell.
    """

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=options.answers, flush=True)

    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    answer(ready=True, versions=versions, check=check or {}, stored=stored or {})
    for line in sys.stdin:
        if line.strip() != "run":
            sys.exit(f"ValueError: {line.strip()!r} is not something to do; only 'run' is")
        answer(**run())
