"""Contract of original_outputs.py: scripts that read the original trainer's files find its keys and its units."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
from png_trees import make_rows, write_tree
from resuming import TinyNetwork

from quaclrs.config import TrainConfig
from quaclrs.experiment import fold
from quaclrs.experiment.cross_validation import run_cross_validation
from quaclrs.experiment.original_outputs import original_metrics
from quaclrs.experiment.results import FoldResult
from quaclrs.training.architectures import ARCHITECTURES

METRICS = [
    *("fold", "best_epoch", "train_loss", "val_loss", "test_loss", "train_accuracy", "val_accuracy", "test_accuracy"),
    *("classification_report", "paths"),
]
PATHS = ["best_model", "confusion_matrix", "roc_curves", "classification_report", "grad_cam_dir"]
SUMMARY = ["model_name", "datetime", "average_test_accuracy", "fold_accuracies", "args", "fold_results"]
FLAGS = {
    *("csv_file", "spectrograms_dir", "model_name", "batch_size", "num_workers", "learning_rate", "weight_decay"),
    *("epochs", "patience", "scheduler", "device", "output_dir", "fold", "pretrained", "freeze_features", "use_amp"),
    "distributed",
}
"""All lists are those of the original's files."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model's three folds, trained for two epochs; plots are not drawn."""
    folder = tmp_path_factory.mktemp("original")
    tree = write_tree(folder, make_rows(("dog_bark", "drilling", "traffic"), (1, 2, 3)))
    row = dataclasses.replace(ARCHITECTURES["mobilenet"], constructor=TinyNetwork, gradcam_layer="features.2")
    config = TrainConfig(
        csv_file=tree.csv_file,
        spectrograms_dir=tree.spectrograms_dir,
        output_dir=folder / "results",
        model_name="tiny",
        image_size=32,
        epochs=2,
        num_folds=3,
        batch_size=4,
        device="cpu",
        loader="files",
        num_workers=0,
        gradcam_per_class=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", row)
        patch.setattr(fold, "write_plots", lambda *_: [])
        run_cross_validation(config, lambda text: None)
    return folder / "results" / "tiny"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_metrics_of_a_fold(number: int, root: Path) -> None:
    folder = root / f"fold_{number}"
    theirs, ours = read_json(folder / "original_metrics.json"), read_json(folder / "metrics.json")
    assert list(theirs) == METRICS
    assert (theirs["fold"], theirs["best_epoch"]) == (number, ours["best_epoch"] - 1)
    best = ours["history"][theirs["best_epoch"]]
    for part in ("train", "val"):
        assert theirs[f"{part}_loss"] == best[f"{part}_loss"]
        assert theirs[f"{part}_accuracy"] == pytest.approx(100 * best[f"{part}_accuracy"], abs=1e-9)
    assert theirs["test_loss"] == ours["test_loss"]
    assert theirs["test_accuracy"] == pytest.approx(100 * ours["test_accuracy"], abs=1e-9)
    report = theirs["classification_report"]
    assert report == read_json(folder / "classification_report.json")
    assert report["accuracy"] == ours["test_accuracy"]  # scikit-learn's own, a fraction
    assert list(theirs["paths"]) == PATHS
    assert Path(theirs["paths"]["best_model"]).is_file()
    assert Path(theirs["paths"]["classification_report"]).is_file()
    assert len(list(Path(theirs["paths"]["grad_cam_dir"]).iterdir())) == 3
    for name in ("confusion_matrix", "roc_curves"):
        assert theirs["paths"][name] == str(folder / "plots" / f"{name}.png")


def test_the_summary(root: Path) -> None:
    theirs, ours = read_json(root / "original_summary.json"), read_json(root / "summary.json")
    assert list(theirs) == SUMMARY
    assert theirs["model_name"] == "tiny"
    age = datetime.datetime.now().astimezone() - datetime.datetime.strptime(theirs["datetime"], "%Y-%m-%dT%H:%M:%S%z")
    assert -60 < age.total_seconds() < 3600
    assert theirs["average_test_accuracy"] == pytest.approx(100 * ours["mean_test_accuracy"], abs=1e-9)
    assert list(theirs["fold_accuracies"]) == ["fold_1", "fold_2", "fold_3"]
    for name, accuracy in theirs["fold_accuracies"].items():
        assert accuracy == pytest.approx(100 * ours["fold_accuracies"][name], abs=1e-9)
    assert set(theirs["args"]) == FLAGS
    assert len(theirs["args"]) == 17
    assert (theirs["args"]["epochs"], theirs["args"]["distributed"], theirs["args"]["fold"]) == (2, False, None)
    assert theirs["fold_results"] == [read_json(root / f"fold_{k}" / "original_metrics.json") for k in (1, 2, 3)]


def test_a_report_that_somebody_deleted(root: Path, tmp_path: Path) -> None:
    result = FoldResult.from_json(read_json(root / "fold_1" / "metrics.json"))
    document = original_metrics(dataclasses.replace(result, test_loss=math.nan), tmp_path)
    assert (document["classification_report"], document["test_loss"]) == ({}, None)
