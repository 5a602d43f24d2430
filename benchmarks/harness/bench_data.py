"""The data that benchmarks run on: a synthetic PNG tree and its shards, kept in a work folder between runs."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.contender import Options
from quaclrs.cli.arguments import columns_of
from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, PackConfig, TrainConfig

if TYPE_CHECKING:  # spawned workers import these modules anew and must not wait for torch
    from quaclrs.loaders.dataset import Dataset
    from quaclrs.synthesize import SynthesisSummary


def synthesize(
    folder: Path, *, samples_per_class: int, num_workers: int, folds: int = 10, progress: bool = False
) -> SynthesisSummary:
    """Draw a synthetic dataset into ``folder``, unless one is there."""
    from quaclrs.synthesize import SynthesisConfig, synthesize_dataset

    config = SynthesisConfig(
        output_dir=folder, samples_per_class=samples_per_class, folds=folds, num_workers=num_workers
    )
    return synthesize_dataset(config, progress=progress)


def use_synthetic_data(options: Options, folder: Path) -> None:
    """Synthesise a dataset in ``folder`` and point ``options`` at it."""
    synthesize(folder, samples_per_class=options.samples_per_class, num_workers=options.num_workers, progress=True)
    options.csv_file, options.spectrograms_dir = folder / DEFAULT_CSV_FILE, folder / DEFAULT_SPECTROGRAMS_DIR


def use_fewer_images(options: Options, most: int, folder: Path) -> Options:
    """Return ``options`` with a CSV of at most ``most`` rows, evenly spaced: decoding all images takes minutes."""
    lines = options.csv_file.read_text(encoding="utf-8").splitlines(keepends=True)
    step = -(-(len(lines) - 1) // most)
    folder.mkdir(parents=True, exist_ok=True)
    csv_file = folder / options.csv_file.name
    csv_file.write_text("".join([lines[0], *lines[1::step]]), encoding="utf-8")
    return argparse.Namespace(**vars(options) | {"csv_file": csv_file})


def make_pack_config(options: Options, output_dir: Path, encoding: str) -> PackConfig:
    """Return the configuration that packs the dataset of ``options``."""
    return PackConfig(
        csv_file=options.csv_file,
        spectrograms_dir=options.spectrograms_dir,
        output_dir=output_dir,
        encoding=encoding,
        image_size=options.image_size,
        num_workers=options.num_workers,
        columns=columns_of(options),
    )


def open_shards(options: Options, work_dir: Path, encoding: str) -> Dataset:
    """Return the dataset as shards of ``encoding`` below ``work_dir``; packs them unless they are there."""
    from quaclrs.loaders.dataset import open_dataset
    from quaclrs.shards.packing.pack import pack

    output_dir = work_dir / f"shards-{encoding}"
    pack(make_pack_config(options, output_dir, encoding), progress=True)
    return open_dataset(TrainConfig(shards=output_dir), want_shards=True, log=options.log)


def open_png_tree(options: Options) -> Dataset:
    """Return the dataset as its PNG tree, with the same sample numbers as the shards."""
    from quaclrs.loaders.dataset import open_dataset

    config = TrainConfig(
        csv_file=options.csv_file, spectrograms_dir=options.spectrograms_dir, columns=columns_of(options)
    )
    return open_dataset(config, want_shards=False, log=options.log)


def write_pixels(rgb: Dataset, work_dir: Path) -> Path:
    """Write the images of the ``rgb`` shards to an .npy of (N, S, S, 3) uint8, resized by Pillow; return its path."""
    assert rgb.shards is not None
    shape = (len(rgb), *rgb.shards.array(0).shape)
    path = work_dir / f"pixels_{shape[0]}x{shape[1]}.npy"
    if not path.exists():
        unfinished = path.with_name("unfinished.npy")
        pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
        for number in range(len(rgb)):
            pixels[number] = rgb.shards.array(number)
        pixels.flush()
        unfinished.rename(path)
    return path


def write_image_list(tree: Dataset, work_dir: Path) -> Path:
    """Write a CSV of each sample's number and PNG file; return its path."""
    assert tree.paths is not None
    path = work_dir / "images.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "file"])
        writer.writerows(enumerate(map(str, (image.resolve() for image in tree.paths))))
    return path
