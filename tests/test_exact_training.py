"""Contract: the engine is exact. What the loss history is does not depend on the loader or the encoding, to the last
digit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packing import pack_tree
from png_trees import CLASSES, PngTree, make_rows, write_tree

from quaclrs.cli.train import main

SIZE = 40
EXACT = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    return write_tree(tmp_path_factory.mktemp("tree"), make_rows(CLASSES[:5], (1, 2, 3, 4)))


def train(output_dir: Path, *flags: object) -> dict[str, Any]:
    fixed = [
        "--fold",
        2,
        "--num_folds",
        4,
        "--epochs",
        2,
        "--batch_size",
        7,
        "--image_size",
        SIZE,
        "--gradcam_per_class",
        0,
    ]
    assert main([str(flag) for flag in (*fixed, "--output_dir", output_dir, *flags)]) == 0
    metrics: dict[str, Any] = json.loads((output_dir / "resnet18" / "fold_2" / "metrics.json").read_text())
    return metrics


def exact(metrics: dict[str, Any]) -> list[Any]:
    return [[entry[name] for name in EXACT] for entry in metrics["history"]] + [
        metrics["test_loss"],
        metrics["confusion_matrix"],
    ]


@pytest.fixture
def from_the_tree(tree: PngTree, one_torch_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With as many threads as the others: sums of floats depend on how they are shared out."""
    output_dir = tmp_path_factory.mktemp("files")
    flags = [
        "--csv_file",
        tree.csv_file,
        "--spectrograms_dir",
        tree.spectrograms_dir,
        "--loader",
        "files",
        "--num_workers",
        0,
    ]
    return train(output_dir, *flags)


@pytest.mark.parametrize("loader", ["resident", "mapped", "files"])
@pytest.mark.parametrize("encoding", ["indexed", "rgb"])
def test_loss_history_is_that_of_the_files(
    loader: str, encoding: str, tree: PngTree, from_the_tree: dict[str, Any], tmp_path: Path
) -> None:
    pack_tree(tree, tmp_path / "shards", encoding=encoding, image_size=SIZE)
    metrics = train(tmp_path / "results", "--shards", tmp_path / "shards", "--loader", loader, "--num_workers", 0)
    assert metrics["loader"] == loader
    assert exact(metrics) == exact(from_the_tree)
    assert metrics["history"][0]["train_loss"] != metrics["history"][1]["train_loss"]  # something was learned
