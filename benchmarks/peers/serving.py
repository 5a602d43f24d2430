"""What all peer scripts share: arguments, the check of their pixels, and the protocol. Imports in any environment.

The protocol is JSON lines on the script's stdout:

    {"ready": true, "versions": {...}, "check": {...}, "stored": {...}}
        once, when the peer's store is written, its pixels are checked and it is warm
    {"images": n, "first_batch_s": ..., "device_s": ...}
        after one shuffled epoch over all samples, for each line "run" on stdin
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
"""Copied from quaclrs/imaging/normalise.py: a peer's environment does not have quaclrs."""

ROUNDING = 1e-5
"""Allowed difference of normalised values from float64's when pixels must be equal; one level of a pixel is 0.017."""

Epoch = Callable[[], Iterator[tuple[Any, Any]]]
"""Starts a shuffled epoch of (images, numbers) batches.

Images are (B, 3, S, S) as :func:`check_batch` expects them; numbers may have any type.
"""


@dataclass(frozen=True)
class Tolerance:
    """How far a peer's pixels may be from Pillow's, in levels of 255; (0, 0) means equal."""

    most: float = 0
    """The largest difference of one value."""
    mean: float = 0
    """The mean difference over a batch."""


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
    """Return the options. From here on stdout is redirected to stderr, so that a library's prints are no answers."""
    options = parser.parse_args()
    options.answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if on_gpu(options):
        import torch

        if not torch.cuda.is_available():
            sys.exit("RuntimeError: the torch of this environment has no GPU to use")
    return options


def read_image_files(path: Path) -> list[str]:
    """Return the PNG file of each sample, in order of sample number."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row["file"] for row in csv.DictReader(file)]


def read_sample_numbers(tars: list[str]) -> dict[str, int]:
    """Return sample numbers by key, from the shards' index files: samples are numbered in the order of the shards."""
    lines = [line for tar in tars for line in Path(tar).with_suffix(".idx").read_text().splitlines()[1:]]
    return {line.split()[3].partition(".")[0]: number for number, line in enumerate(lines)}


def count_cores() -> int:
    """Return the number of usable cores, for writing stores, which is not timed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def make_loader_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of torch's DataLoader for every peer: persistent workers, and pinned memory for a GPU."""
    return {
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "persistent_workers": options.num_workers > 0,
        "pin_memory": on_gpu(options),
    }


def on_gpu(options: argparse.Namespace) -> bool:
    """Return whether batches must be on a CUDA device."""
    return str(options.device).startswith("cuda")


class DeviceClock:
    """Times a block with two CUDA events, recorded before and after it; call :meth:`seconds` after the block."""

    def __init__(self, device: Any) -> None:
        self._events: list[Any] = []
        if str(device).startswith("cuda"):
            import torch

            event: Any = torch.cuda.Event  # torch leaves it untyped
            self._events = [event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> DeviceClock:
        for event in self._events[:1]:
            event.record()
        return self

    def __exit__(self, *error: object) -> None:
        for event in self._events[1:]:
            event.record()

    def seconds(self) -> float | None:
        """Wait for the device and return the seconds between the events; None on the CPU."""
        if not self._events:
            return None
        start, stop = self._events
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def count_bytes_on_disk(paths: Iterable[Path]) -> int:
    """Return the size of ``paths``: of files, each counted once, and of all files in folders."""
    files = {file for path in set(paths) for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()}
    return sum(file.stat().st_size for file in files)


class ReusedBuffer:
    """ImageNet normalisation by torch into one buffer: each batch overwrites the one before.

    This is the fastest that plain torch can do on a CPU: no fresh pages, and whole rows instead of a broadcast over
    three channels.
    """

    def __init__(self, batch_size: int, size: int) -> None:
        import torch

        self._values = torch.empty(batch_size, size, 3 * size)
        self._scale, self._bias = (torch.tensor(values).repeat(size) for values in scale_and_bias())

    def normalise(self, images: Any) -> Any:
        """Return ``images``, (B, S, S, 3) uint8, normalised in float32."""
        import torch

        rows = self._values[: len(images)]
        rows.copy_(images.reshape(rows.shape))
        return torch.addcmul(self._bias, rows, self._scale, out=rows).view(images.shape)


def scale_and_bias() -> tuple[list[float], list[float]]:
    """Return scale and bias per channel, so that ``level * scale + bias`` normalises a level of 0..255."""
    scale = [1 / (255 * std) for std in IMAGENET_STD]
    return scale, [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]


class Delivery:
    """The main process's part: moves a worker's batch to the device, in channels_last memory, normalised if float32.

    Ready pixels are normalised here, on a GPU by the GPU: workers that normalise would send four times the bytes.
    """

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        import torch

        self._device = torch.device(options.device)
        self._normalise = options.dtype == "float32"
        self._reused = ReusedBuffer(options.batch_size, size) if self._normalise and not on_gpu(options) else None
        self._scale, self._bias = (
            torch.tensor(values, device=self._device)[:, None, None] for values in scale_and_bias()
        )

    def pixels(self, values: Any) -> Any:
        """Return ready pixels, (B, S, S, 3) uint8 on the CPU, as a batch (B, 3, S, S)."""
        import torch

        if self._reused is not None:
            return self._reused.normalise(values).permute(0, 3, 1, 2)
        images = values.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return torch.addcmul(self._bias, images.to(torch.float32), self._scale) if self._normalise else images

    def images(self, images: Any) -> Any:
        """Return a batch (B, 3, S, S) that workers have finished, on the device."""
        return images.to(self._device, non_blocking=True)


def check_batch(batch: Any, pixels: np.ndarray, dtype: str, tolerance: Tolerance = EXACT) -> tuple[float, float]:
    """Return the largest and the mean difference, in levels, between ``batch`` and ``pixels`` (B, S, S, 3) uint8.

    Exits with a ``ValueError`` line unless ``batch`` is a (B, 3, S, S) tensor of ``dtype`` in channels_last memory,
    normalised if float32, and within ``tolerance``.
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
    """Return the differences from ``pixels`` in the first and the last batch of an epoch.

    Exits with a ``ValueError`` line unless the epoch has every sample once and both batches pass :func:`check_batch`.
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
    """Check one epoch, then serve epochs until stdin ends.

    ``number_of`` turns what ``epoch`` yields beside the images into sample numbers; ``stored`` are the files and
    folders that the peer reads.
    """
    pixels = np.load(options.pixels, mmap_mode="r")
    check = check_epoch(epoch, pixels, options.dtype, tolerance, number_of)

    def run() -> dict[str, Any]:
        count, first = 0, None
        started = time.perf_counter()
        with DeviceClock(options.device) as clock:
            for images, _ in epoch():
                first = first or time.perf_counter()
                count += len(images)
                images[:, 0, 0, 0].sum()  # reads one value of each image, so that a lazy loader gains nothing
        return {"images": count, "first_batch_s": first and first - started, "device_s": clock.seconds()}

    serve(run, options, packages, check, {"bytes_per_image": count_bytes_on_disk(stored) / len(pixels)})


def serve(
    run: Callable[[], dict[str, Any]],
    options: argparse.Namespace,
    packages: tuple[str, ...],
    check: dict[str, float] | None = None,
    stored: dict[str, float] | None = None,
) -> None:
    """Say that all is ready, then call ``run`` for each line "run" until stdin ends.

    The versions of ``packages`` are part of the first answer.
    """

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=options.answers, flush=True)

    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    answer(ready=True, versions=versions, check=check or {}, stored=stored or {})
    for line in sys.stdin:
        if line.strip() != "run":
            sys.exit(f"ValueError: {line.strip()!r} is not something to do; only 'run' is")
        answer(**run())
