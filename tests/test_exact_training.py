"""Contract of exact training: the loss history does not depend on loader or encoding, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import pack_tree
from png_trees import CLASSES, PngTree, make_rows, write_tree

from quaclrs.cli.train import main

SIZE = 40
MODEL = "mobilenet"
FLAGS = (
    *("--fold=2", "--num_folds=4", "--epochs=2", "--batch_size=7", "--num_workers=0", "--gradcam_per_class=0"),
    *(f"--model_name={MODEL}", f"--image_size={SIZE}"),
)
EXACT = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    return write_tree(tmp_path_factory.mktemp("tree"), make_rows(CLASSES[:3], (1, 2, 3, 4)))


def train(output_dir: Path, *flags: object) -> dict[str, Any]:
    """Two epochs on one thread, since sums of floats depend on how threads divide them; without plots. The metrics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quaclrs.experiment.fold.write_plots", lambda *arguments: None, raising=False)
        assert main([*FLAGS, f"--output_dir={output_dir}", *map(str, flags)]) == 0
    torch.set_num_threads(threads)
    metrics: dict[str, Any] = json.loads((output_dir / MODEL / "fold_2" / "metrics.json").read_text())
    return metrics


def exact(metrics: dict[str, Any]) -> list[Any]:
    return [[entry[name] for name in EXACT] for entry in metrics["history"]] + [
        metrics["test_loss"],
        metrics["confusion_matrix"],
    ]


@pytest.fixture(scope="module")
def from_the_tree(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = ("--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir)
    return train(tmp_path_factory.mktemp("files"), *data, "--loader", "files")


@pytest.fixture(scope="module", params=["indexed", "rgb"])
def shards(request: pytest.FixtureRequest, tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    pack_tree(tree, folder, encoding=request.param, image_size=SIZE)
    return folder


@pytest.mark.parametrize("loader", ["resident", "mapped", "files"])
def test_loss_history_is_that_of_the_files(
    loader: str, shards: Path, from_the_tree: dict[str, Any], tmp_path: Path
) -> None:
    metrics = train(tmp_path, "--shards", shards, "--loader", loader)
    assert metrics["loader"] == loader
    assert exact(metrics) == exact(from_the_tree)
    assert metrics["history"][0]["train_loss"] != metrics["history"][1]["train_loss"]  # something was learned
