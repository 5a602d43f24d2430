"""Tiny PNG trees with the structure of the real dataset: a CSV and ``spectrograms/fold{k}/`` with RGBA grids.

Imports only NumPy and Pillow.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = ("spec_file_name", "orig_file_name", "fsID", "fold", "classID", "class", "augmentation")
CLASSES = (
    "air_conditioner",
    "ambulance",
    "car_horn",
    "children_playing",
    "dog_bark",
    "drilling",
    "engine_idling",
    "firetruck",
    "gun_shot",
    "jackhammer",
    "police",
    "street_music",
    "traffic",
)
FOLDS = tuple(range(1, 11))
WIDTH, HEIGHT = 100, 40
CELL_PIXELS = 4
SHARED_CLASS = "dog_bark"
"""In each fold, one additional row of this class names the file of another row."""


@dataclass(frozen=True)
class PngTree:
    csv_file: Path
    spectrograms_dir: Path
    rows: list[dict[str, str]]
    """The rows of the CSV, in order."""

    def path(self, row: int) -> Path:
        return self.spectrograms_dir / f"fold{self.rows[row]['fold']}" / self.rows[row]["spec_file_name"]


def make_row(
    label: str, fold: int, tag: str = "orig", augmentation: str = "original", recording: int | None = None
) -> dict[str, str]:
    class_id = CLASSES.index(label)
    recording = 1000 * fold + class_id if recording is None else recording
    older_id = (class_id * 5 + 3) % 13  # real file names contain an older numbering, too
    return {
        "spec_file_name": f"{recording}-{older_id}-{tag}.png",
        "orig_file_name": f"{recording}-{older_id}-0-0.wav",
        "fsID": str(recording),
        "fold": str(fold),
        "classID": str(class_id),
        "class": label,
        "augmentation": augmentation,
    }


def make_rows(classes: tuple[str, ...] = CLASSES, folds: tuple[int, ...] = FOLDS) -> list[dict[str, str]]:
    """An original and an augmented row per class and fold, in random order: no reader may rely on sorted rows."""
    rows = []
    for label in classes:
        for fold in folds:
            rows += [make_row(label, fold), make_row(label, fold, "ts0", "timestretch_0.8")]
            if label == SHARED_CLASS:
                rows.append(make_row(label, fold) | {"orig_file_name": f"{fold}-another-slice.wav"})
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def grid_image(label: str, seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """An opaque RGBA grid of 4×4-pixel cells, with a bright band whose position depends on the class."""
    random = np.random.default_rng(seed)
    rows, columns = -(-height // CELL_PIXELS), -(-width // CELL_PIXELS)
    level = random.integers(0, 120, (rows, columns))
    level[CLASSES.index(label) * rows // len(CLASSES)] += 120  # levels: (rows, columns) in 0..239
    pixels = np.kron(level, np.ones((CELL_PIXELS, CELL_PIXELS), dtype=int))[:height, :width]
    colours = np.stack([np.arange(256), np.arange(256) ** 2 // 255, 255 - np.arange(256), np.full(256, 255)], axis=1)
    return Image.fromarray(colours.astype(np.uint8)[pixels])


def write_csv(csv_file: Path, rows: list[dict[str, str]]) -> Path:
    with csv_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return csv_file


def write_tree(folder: Path, rows: list[dict[str, str]]) -> PngTree:
    """Write ``folder/data.csv`` and ``folder/spectrograms/``, with one image per distinct file."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = PngTree(write_csv(folder / "data.csv", rows), folder / "spectrograms", rows)
    for number, row in enumerate(rows):
        path = tree.path(number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            grid_image(row["class"], seed=number).save(path)
    return tree
