"""Contract of training: the original's protocol and result tree, the same numbers as a hand-written loop, and the same
results after resuming.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from png_trees import PngTree, make_rows, write_csv, write_tree
from resuming import TinyNetwork
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torchvision import models as torchvision_models
from torchvision import transforms

from quaclrs.cli.train import main
from quaclrs.config import TrainConfig
from quaclrs.data.sampling import epoch_order, step_seeds
from quaclrs.errors import StorageError, TrainingError
from quaclrs.experiment import fold as fold_module
from quaclrs.experiment.cross_validation import run_cross_validation
from quaclrs.experiment.results import FoldResult, Summary
from quaclrs.loaders.base import Batch
from quaclrs.loaders.dataset import open_dataset
from quaclrs.report import metrics as metrics_module
from quaclrs.report.metrics import compute_metrics
from quaclrs.settings import setting
from quaclrs.training import checkpoint, loop, trainer
from quaclrs.training.architectures import ARCHITECTURES
from quaclrs.training.progress import StepMeter, epoch_line
from quaclrs.training.records import EpochRecord
from quaclrs.training.running_metrics import RunningMetrics
from quaclrs.training.state import TrainState
from quaclrs.training.trainer import Hooks

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)  # from 3.12

CLASSES = ("dog_bark", "drilling", "traffic")
SIZES = {name: max(row.min_input_size, 32) for name, row in ARCHITECTURES.items()}
SMALL = 32
"""Side of the images in pixels where the network does not matter. Not fewer: torch's bfloat16 gradients on the CPU hold
uninitialised memory for strided convolutions over a single pixel."""

HISTORY = {
    *("epoch", "learning_rate", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),
    *("train_seconds", "val_seconds", "train_images_per_s", "val_images_per_s", "train_data_wait", "val_data_wait"),
}
TIMES = {name for name in HISTORY if name.endswith(("seconds", "per_s", "wait"))}
PROVENANCE = ["config", "processes", "global_batch", "loader", "image_size", "data", "environment"]
METRICS = [
    *("model_name", "test_accuracy", "test_loss", "test_accuracy_originals", "num_test_originals", "macro_f1"),
    *("macro_auc", "best_epoch", "best_val_accuracy", "best_val_loss", "epochs_run", "num_samples"),
    *("train_images_per_s", "train_data_wait", "test_images_per_s", "class_names", "confusion_matrix", "history"),
    *PROVENANCE,
    *("fold", "stopped_early", "seconds", "run"),
]
"""Keys of metrics.json, in order."""
SUMMARY = [
    *("model_name", "num_folds", "mean_test_accuracy", "std_test_accuracy", "mean_test_accuracy_originals"),
    *("std_test_accuracy_originals", "mean_macro_f1", "std_macro_f1", "std_ddof", "fold_accuracies"),
    *("folds", "seconds", "train_images_per_s", *PROVENANCE),
]
MODEL_FILES = ("summary.json", "original_summary.json", "run_status.json")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Three classes, three folds of seven rows (two of each class, one more dog_bark that shares its
    file). Read only.
    """
    return write_tree(tmp_path_factory.mktemp("train"), make_rows(CLASSES, (1, 2, 3)))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model_name tiny``, for tests in which the network does not matter."""
    mobilenet = ARCHITECTURES["mobilenet"]
    row = dataclasses.replace(mobilenet, constructor=TinyNetwork, gradcam_layer="features.2")
    monkeypatch.setitem(ARCHITECTURES, "tiny", row)


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    """Checkpoints are large (VGG16 with Adam: 1.6 GB), and pytest would keep those of its last three runs."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests look at numbers, and matplotlib takes longer than the training."""
    monkeypatch.setattr(fold_module, "write_plots", lambda *_: [])


def flags(tree: PngTree, output_dir: Path, *more: object) -> list[str]:
    common = f"--loader files --num_workers 0 --num_folds 3 --batch_size 8 --model_name tiny --image_size {SMALL}"
    paths = ["--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir, "--output_dir", output_dir]
    return [str(flag) for flag in (*paths, *common.split(), *more)]


def config_for(tree: PngTree, output_dir: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        **{"csv_file": tree.csv_file, "spectrograms_dir": tree.spectrograms_dir, "output_dir": output_dir},
        **{"loader": "files", "num_workers": 0, "num_folds": 3, "fold": 1, "batch_size": 8, "device": "cpu"},
        **{"model_name": "tiny", "image_size": SMALL, "gradcam_per_class": 0, "epochs": 2},
    }
    return TrainConfig(**defaults | options)


def train(config: TrainConfig, hooks: Hooks | None = None) -> tuple[dict[str, Any], list[str]]:
    """Train; returns fold 1's metrics.json and the log."""
    log: list[str] = []
    run_cross_validation(config, log.append, hooks)
    return read_json(config.output_dir / config.model_name / f"fold_{config.fold}" / "metrics.json"), log


def read_json(path: Path) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(f"{path}: {name} is not JSON")

    return json.loads(path.read_text(), parse_constant=no_constant)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in history]


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files, without the locks."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")
    }


# --- the whole road, for every architecture ---


def fold_files(per_class: dict[str, int], epochs: int) -> set[str]:
    """The original's names, with the last checkpoint only."""
    return {
        *("run.json", "best_model.pth", f"checkpoint_epoch_{epochs}.pth", "metrics.json", "original_metrics.json"),
        "classification_report.json",
        *(f"plots/{name}.png" for name in ("loss_curves", "accuracy_curves", "confusion_matrix", "roc_curves")),
        *(f"grad_cam/gradcam_{name}_{i}.png" for name, count in per_class.items() for i in range(count)),
    }


QUICK = {
    *(("resnet18", True), ("mobilenet", False)),
    *(("inception", True), ("efficientnet", False), ("convnext", True)),
}
"""Architecture and use_amp of the default run. Not AlexNet and VGG16, which write 0.7 and 1.6 GB."""


@pytest.mark.parametrize(
    ("name", "use_amp"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.exhaustive, id=f"{case[0]}-{kind}")
        for name in SIZES
        for case, kind in (((name, False), "float32"), ((name, True), "amp"))
    ],
)
def test_every_architecture_leaves_the_full_result_tree(
    name: str, use_amp: bool, tree: PngTree, tmp_path: Path
) -> None:
    amp = ["--use_amp"] if use_amp else []
    more = [
        "--model_name",
        name,
        "--image_size",
        SIZES[name],
        "--fold",
        1,
        "--epochs",
        1,
        "--gradcam_per_class",
        2,
        *amp,
    ]
    assert main(flags(tree, tmp_path, *more)) == 0
    root = tmp_path / name
    expected = {f"fold_1/{file}" for file in fold_files(dict.fromkeys(CLASSES, 2), epochs=1)}
    assert files_below(tmp_path) == {f"{name}/{file}" for file in (*expected, *MODEL_FILES)}
    metrics, summary = read_json(root / "fold_1" / "metrics.json"), read_json(root / "summary.json")
    assert list(metrics) == METRICS
    assert list(summary) == SUMMARY
    assert (metrics["model_name"], metrics["fold"], metrics["config"]["use_amp"]) == (name, 1, use_amp)
    assert summary["fold_accuracies"] == {"fold_1": metrics["test_accuracy"]}
    (entry,) = metrics["history"]
    assert set(entry) == HISTORY
    assert all(math.isfinite(value) for value in entry.values())
    report = read_json(root / "fold_1" / "classification_report.json")
    assert {name: report[name]["support"] for name in CLASSES} == {"dog_bark": 3, "drilling": 2, "traffic": 2}
    weights = torch.load(root / "fold_1" / "best_model.pth", weights_only=True)
    assert all(isinstance(value, torch.Tensor) and not value.isnan().any() for value in weights.values())
    assert {value.dtype for value in weights.values()} <= {
        torch.float32,
        torch.int64,
    }  # AMP computes, but does not keep
    for image in root.rglob("*.png"):
        with Image.open(image) as opened:
            opened.verify()


@pytest.mark.usefixtures("no_plots")
def test_all_folds_and_their_summary(tree: PngTree, tmp_path: Path) -> None:
    assert main(flags(tree, tmp_path, "--epochs", 1, "--gradcam_per_class", 0)) == 0
    summary = read_json(tmp_path / "tiny" / "summary.json")
    metrics = [read_json(tmp_path / "tiny" / f"fold_{fold}" / "metrics.json") for fold in (1, 2, 3)]
    assert [entry["fold"] for entry in metrics] == [1, 2, 3]
    assert summary["num_folds"] == 3
    for name in ("test_accuracy", "test_accuracy_originals", "macro_f1"):
        values = [entry[name] for entry in metrics]
        assert summary[f"mean_{name}"] == pytest.approx(np.mean(values), abs=1e-12)
        assert summary[f"std_{name}"] == pytest.approx(np.std(values, ddof=summary["std_ddof"]), abs=1e-12)
        if name != "test_accuracy_originals":
            assert len(set(values)) > 1  # or the standard deviation shows nothing
        assert [fold[name] for fold in summary["folds"]] == values
    assert summary["fold_accuracies"] == {
        f"fold_{fold}": entry["test_accuracy"] for fold, entry in zip((1, 2, 3), metrics, strict=True)
    }
    assert summary["seconds"] == pytest.approx(sum(entry["seconds"] for entry in metrics))


@pytest.fixture
def own_metrics() -> Iterator[None]:
    """Metrics that the test registers are removed again."""
    before = dict(metrics_module.METRICS)
    yield
    metrics_module.METRICS.clear()
    metrics_module.METRICS.update(before)


@pytest.mark.usefixtures("no_plots")
def test_a_metric_is_added_by_one_function(
    tree: PngTree, tmp_path: Path, own_metrics: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Registered in report/metrics.py, it reaches metrics.json and summary.json; with ``--resume``, from files too."""
    options = ["--epochs", 1, "--gradcam_per_class", 0]
    assert main(flags(tree, tmp_path, *options, "--fold", 1)) == 0

    @metrics_module.metric(summarise=True)
    def mean_confidence(predictions: metrics_module.Predictions) -> metrics_module.Score:
        return float(predictions.probabilities.max(axis=1).mean())

    @metrics_module.metric(key="test_size")
    def size(predictions: metrics_module.Predictions) -> metrics_module.Score:
        return len(predictions.labels)

    for fold in (2, 3):
        assert main(flags(tree, tmp_path, *options, "--fold", fold)) == 0
    assert main(flags(tree, tmp_path, *options, "--resume")) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    metrics = [read_json(tmp_path / "tiny" / f"fold_{fold}" / "metrics.json") for fold in (1, 2, 3)]
    assert [entry.get("test_size") for entry in metrics] == [None, 7, 7]
    confidences = [entry["mean_confidence"] for entry in metrics[1:]]
    assert all(1 / 3 < confidence < 1 for confidence in confidences)
    summary = read_json(tmp_path / "tiny" / "summary.json")
    assert summary["mean_mean_confidence"] == pytest.approx(np.mean(confidences))
    assert summary["std_mean_confidence"] == pytest.approx(np.std(confidences, ddof=1))
    assert [fold["mean_confidence"] for fold in summary["folds"]] == [None, *confidences]  # the first had none yet
    assert "mean_test_size" not in summary


@pytest.mark.usefixtures("no_plots")
def test_results_survive_their_documents(tree: PngTree, tmp_path: Path) -> None:
    """Keys and order of metrics.json and summary.json are those that scripts read; both can be read back."""
    metrics, _ = train(config_for(tree, tmp_path, epochs=2))
    summary = read_json(tmp_path / "tiny" / "summary.json")
    assert list(metrics) == METRICS
    assert list(summary) == SUMMARY
    assert FoldResult.from_json(metrics).to_json() == metrics
    text = (tmp_path / "tiny" / "fold_1" / "metrics.json").read_text()
    assert json.loads(text) == metrics
    for row in metrics["confusion_matrix"]:
        assert f"\n    [{', '.join(map(str, row))}]" in text
    assert Summary.from_json(summary).to_json() == summary
    path = tmp_path / "tiny" / "fold_1" / "metrics.json"
    path.write_text(json.dumps({key: value for key, value in metrics.items() if key != "history"}))
    with pytest.raises(TrainingError, match=r"metrics\.json: cannot be read \(it has no 'history'\); delete it"):
        train(config_for(tree, tmp_path, epochs=2, resume=True))


@pytest.mark.usefixtures("no_plots")
def test_folds_run_one_by_one_make_the_same_summary(tree: PngTree, tmp_path: Path) -> None:
    """A fold's result does not depend on what ran before; a fold with other settings is left out of the summary."""
    common = ["--epochs", 1, "--gradcam_per_class", 0]
    assert main(flags(tree, tmp_path / "together", *common)) == 0
    for fold in (3, 1, 2):
        rate = ["--learning_rate", 0.5] if fold == 2 else []
        assert main(flags(tree, tmp_path / "apart", *common, *rate, "--fold", fold)) == 0
    apart = read_json(tmp_path / "apart" / "tiny" / "summary.json")
    assert list(apart["fold_accuracies"]) == ["fold_2"]
    assert apart["std_test_accuracy"] is None
    assert main(flags(tree, tmp_path / "apart", *common, "--fold", 2)) == 0
    apart, together = (read_json(tmp_path / name / "tiny" / "summary.json") for name in ("apart", "together"))
    assert list(apart["fold_accuracies"]) == ["fold_1", "fold_2", "fold_3"]
    for name in ("mean_test_accuracy", "std_test_accuracy", "fold_accuracies", "mean_macro_f1"):
        assert apart[name] == together[name]


# --- independent oracles ---


def rows_of_folds(tree: PngTree, *folds: int) -> list[dict[str, str]]:
    with tree.csv_file.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["fold"]) in folds]


def load_rows(tree: PngTree, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels by Pillow and torchvision, from the CSV alone."""
    prepare = transforms.Compose(
        [
            transforms.Resize((SMALL, SMALL), transforms.InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = []
    for row in rows:
        with Image.open(tree.spectrograms_dir / f"fold{row['fold']}" / row["spec_file_name"]) as image:
            images.append(prepare(image.convert("RGB")))
    return torch.stack(images), torch.tensor([CLASSES.index(row["class"]) for row in rows])


def balanced_weights(labels: torch.Tensor) -> torch.Tensor:
    return torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy()), dtype=torch.float32)


@pytest.mark.usefixtures("no_plots")
def test_the_best_weights_give_the_reported_test_result(tree: PngTree, tmp_path: Path) -> None:
    """``best_model.pth`` is a plain state dict of torchvision's network; a loop of a few lines finds the
    same numbers.
    """
    metrics, _ = train(config_for(tree, tmp_path, model_name="mobilenet", epochs=4, batch_size=3, learning_rate=3e-3))
    state = torch.load(tmp_path / "mobilenet" / "fold_1" / "best_model.pth", weights_only=True)
    model = torchvision_models.mobilenet_v2(num_classes=3)
    model.load_state_dict(state)
    model.eval()
    rows = rows_of_folds(tree, 1)
    images, labels = load_rows(tree, rows)
    with torch.no_grad():
        logits = model(images).double()
    predictions = logits.argmax(1)
    weights = balanced_weights(load_rows(tree, rows_of_folds(tree, 2))[1]).double()
    losses = logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]
    expected_loss = (weights[labels] * losses).sum() / weights[labels].sum()
    original = np.array([row["augmentation"] == "original" for row in rows])
    assert metrics["test_loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert metrics["test_accuracy"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    assert metrics["test_accuracy_originals"] == pytest.approx(
        accuracy_score(labels[original], predictions[original]), abs=1e-12
    )
    assert metrics["num_test_originals"] == original.sum() == 4
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"), abs=1e-12)
    assert metrics["confusion_matrix"] == confusion_matrix(labels, predictions, labels=[0, 1, 2]).tolist()
    assert metrics["num_samples"] == {"train": 7, "validation": 7, "test": 7}
    assert np.sum(metrics["confusion_matrix"]) == 7  # each row once, in batches of 3, 3 and 1


@pytest.mark.usefixtures("no_plots")
def test_training_is_what_a_hand_written_loop_does(tree: PngTree, tmp_path: Path) -> None:
    """Fresh weights from the seed, balanced cross-entropy, Adam with weight decay, the best epoch's weights kept."""
    options = {"epochs": 3, "batch_size": 4, "learning_rate": 2e-3, "weight_decay": 1e-2, "scheduler": "none"}
    config = config_for(tree, tmp_path, model_name="mobilenet", **options)
    metrics, _ = train(config)

    dataset = open_dataset(config, want_shards=False, log=print)
    paths = dataset.paths
    assert paths is not None
    rows = {
        path: row
        for row in rows_of_folds(tree, 2)
        for path in [tree.spectrograms_dir / "fold2" / row["spec_file_name"]]
    }
    numbers = np.array([number for number, path in enumerate(paths) if path in rows])
    torch.manual_seed(int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0]))
    model = torchvision_models.mobilenet_v2(weights=None)
    model.classifier[1] = nn.Linear(model.last_channel, 3)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    weights = balanced_weights(load_rows(tree, rows_of_folds(tree, 2))[1])
    criterion = nn.CrossEntropyLoss(weights)
    summed = nn.CrossEntropyLoss(weights, reduction="sum")
    val_images, val_labels = load_rows(tree, rows_of_folds(tree, 3))
    best, best_state = -1.0, {}
    for epoch in (1, 2, 3):
        order = epoch_order(numbers, config.seed, epoch)
        model.train()
        total = correct = 0.0
        for batch, dropout_seed in zip((order[:4], order[4:]), step_seeds(2, config.seed, epoch), strict=True):
            torch.manual_seed(int(dropout_seed))
            images, labels = load_rows(tree, [rows[paths[number]] for number in batch])
            optimizer.zero_grad()
            logits = model(images.contiguous(memory_format=torch.channels_last))
            # the weighted mean, rounded as the engine does it: the last digit of a step is the second one of the next
            # epoch
            loss = summed(logits, labels) * (1 / weights.double()[labels].sum()).float()
            torch.testing.assert_close(loss, criterion(logits, labels))
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
            correct += (logits.argmax(1) == labels).sum().item()
        model.eval()
        with torch.no_grad():
            val_logits = model(val_images.contiguous(memory_format=torch.channels_last))
            accuracy = accuracy_score(val_labels, val_logits.argmax(1))
        entry = metrics["history"][epoch - 1]
        assert entry["train_loss"] == pytest.approx(total / 7, rel=1e-4)
        assert entry["train_accuracy"] == pytest.approx(correct / 7, abs=1e-12)
        assert entry["val_accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert entry["val_loss"] == pytest.approx(criterion(val_logits, val_labels).item(), rel=1e-3)
        if accuracy > best:
            best, best_state = accuracy, {name: value.clone() for name, value in model.state_dict().items()}
            assert metrics["best_epoch"] <= 3
    found = torch.load(tmp_path / "mobilenet" / "fold_1" / "best_model.pth", weights_only=True)
    assert found.keys() == best_state.keys()
    for name, value in best_state.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


class _TwoHeads(nn.Module):
    """Like InceptionV3, a model with an auxiliary head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aux = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> Any:
        flat = images.flatten(1)
        return (self.main(flat), self.aux(flat)) if self.training else self.main(flat)


class _Given:
    """A loader over tensors."""

    name = "given"
    pixels = "given"
    replicated = True

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def load(self, batches: Any) -> Iterator[Batch]:
        for numbers in batches:
            yield Batch(self.images[numbers], self.labels[numbers], torch.from_numpy(numbers))

    def close(self) -> None:
        pass


def test_the_auxiliary_loss_counts_two_fifths_in_training_only() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 2, 2), torch.tensor([0, 1, 2, 0, 0, 0, 1, 2])
    weights = np.array([0.5, 1.0, 2.5], np.float32)
    model = _TwoHeads()
    criterion = nn.CrossEntropyLoss(weight=torch.from_numpy(weights))
    with torch.no_grad():
        main_loss, aux_loss = (
            criterion(model.main(images.flatten(1)), labels),
            criterion(model.aux(images.flatten(1)), labels),
        )
    config = TrainConfig(learning_rate=1e-30, weight_decay=0.0)
    training = TrainState.create(model, weights, torch.device("cpu"), config)
    loader, everything = _Given(images, labels), np.arange(8)
    plan = loop.plan_epoch(training, everything, labels.numpy(), global_batch=8, seed=0, epoch=1)
    assert loop.train_epoch(training, loader, plan).loss == pytest.approx((main_loss + 0.4 * aux_loss).item(), rel=1e-6)
    for batch_size in (8, 5):  # the mean does not depend on how it is cut
        found = loop.evaluate(
            training.model, loader, everything, global_batch=batch_size, class_weights=training.class_weights
        )
        assert found.loss == pytest.approx(main_loss.item(), rel=1e-6)


# --- schedules and early stopping ---


def plateau_rates(first: float, accuracies: list[float]) -> list[float]:
    """The rate is halved after more than three epochs in a row without an improvement of one in ten thousand."""
    rates, best, bad, rate = [], -math.inf, 0, first
    for accuracy in accuracies:
        rates.append(rate)
        if accuracy > best * (1 + 1e-4) if best > 0 else accuracy > best:
            best, bad = accuracy, 0
        else:
            bad += 1
        if bad > 3:
            rate, bad = rate / 2, 0
    return rates


@pytest.mark.usefixtures("no_plots")
def test_plateau(tree: PngTree, tmp_path: Path) -> None:
    metrics, _ = train(config_for(tree, tmp_path, scheduler="plateau", epochs=11, patience=99))
    rates = [entry["learning_rate"] for entry in metrics["history"]]
    assert rates == plateau_rates(1e-3, [entry["val_accuracy"] for entry in metrics["history"]])
    assert len(set(rates)) > 1
    assert metrics["stopped_early"] is False
    assert metrics["epochs_run"] == 11


@pytest.mark.usefixtures("no_plots")
def test_cosine_and_none(tree: PngTree, tmp_path: Path) -> None:
    metrics, _ = train(config_for(tree, tmp_path / "cosine", scheduler="cosine", epochs=5))
    expected = [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]
    assert [entry["learning_rate"] for entry in metrics["history"]] == pytest.approx(expected, rel=1e-9)
    metrics, _ = train(config_for(tree, tmp_path / "none", scheduler="none", epochs=2))
    assert [entry["learning_rate"] for entry in metrics["history"]] == [1e-3, 1e-3]


def first_best(accuracies: list[float]) -> int:
    return accuracies.index(max(accuracies)) + 1


@pytest.mark.usefixtures("no_plots")
def test_early_stopping(tree: PngTree, tmp_path: Path) -> None:
    metrics, _ = train(config_for(tree, tmp_path, epochs=30, patience=2))
    accuracies = [entry["val_accuracy"] for entry in metrics["history"]]
    stops = [epoch for epoch in range(1, len(accuracies) + 1) if epoch - first_best(accuracies[:epoch]) >= 2]
    assert stops == [len(accuracies)]  # at the first occasion, and not before
    assert len(accuracies) < 30
    assert metrics["stopped_early"] is True
    assert metrics["epochs_run"] == len(accuracies)
    best = metrics["best_epoch"]
    assert best == first_best(accuracies)
    assert (metrics["best_val_accuracy"], metrics["best_val_loss"]) == (
        max(accuracies),
        metrics["history"][best - 1]["val_loss"],
    )


# --- checkpoints, determinism, resuming ---


@pytest.mark.parametrize(("keep", "left"), [(1, {3}), (2, {2, 3}), (9, {1, 2, 3})])
@pytest.mark.usefixtures("no_plots")
def test_keep_checkpoints(keep: int, left: set[int], tree: PngTree, tmp_path: Path) -> None:
    train(config_for(tree, tmp_path, epochs=3, keep_checkpoints=keep))
    assert {path.name for path in (tmp_path / "tiny" / "fold_1").glob("*.pth")} == {
        "best_model.pth",
        *(f"checkpoint_epoch_{epoch}.pth" for epoch in left),
    }


Weights = dict[str, torch.Tensor]


def final_weights(output_dir: Path) -> Weights:
    (last,) = (output_dir / "tiny" / "fold_1").glob("checkpoint_epoch_*.pth")
    weights: Weights = torch.load(last, weights_only=True)["state"]["model"]
    return weights


def assert_same_run(one: Path, other: Path) -> None:
    """Equal bit for bit, except for times."""
    ours, theirs = (read_json(folder / "tiny" / "fold_1" / "metrics.json") for folder in (one, other))
    assert without_times(ours["history"]) == without_times(theirs["history"])
    for name in ("test_loss", "test_accuracy", "macro_f1", "confusion_matrix", "best_epoch", "stopped_early"):
        assert ours[name] == theirs[name]
    for weights in ((final_weights(one), final_weights(other)), *[[load_best(folder) for folder in (one, other)]]):
        assert weights[0].keys() == weights[1].keys()
        differ = {
            name: (value - weights[1][name]).abs().max().item()
            for name, value in weights[0].items()
            if not torch.equal(value, weights[1][name])
        }
        assert not differ


def load_best(output_dir: Path) -> Weights:
    weights: Weights = torch.load(output_dir / "tiny" / "fold_1" / "best_model.pth", weights_only=True)
    return weights


@pytest.mark.usefixtures("no_plots")
def test_the_seed_decides_everything(tree: PngTree, tmp_path: Path) -> None:
    first, _ = train(config_for(tree, tmp_path / "first", seed=7))
    train(config_for(tree, tmp_path / "again", seed=7))
    assert_same_run(tmp_path / "first", tmp_path / "again")
    other, _ = train(config_for(tree, tmp_path / "other", seed=8))
    assert without_times(other["history"]) != without_times(first["history"])


class _Interrupted(Exception):
    pass


def interrupt_after_epoch(epoch: int) -> Hooks:
    def epoch_done(record: EpochRecord) -> None:
        if record.epoch == epoch:
            raise _Interrupted

    return Hooks(epoch_done=epoch_done)


def interrupt_within(phase: str, epoch: int) -> Hooks:
    """Interrupt after a step of the phase, when weights and random state have changed."""

    def step_meter(now: str, number: int, samples: int) -> Callable[..., None]:
        def on_step(*_: object) -> None:
            if (now, number) == (phase, epoch):
                raise _Interrupted

        return on_step

    return Hooks(step_meter=step_meter)


INTERRUPTIONS = {
    "after epoch 1": interrupt_after_epoch(1),
    "after epoch 3": interrupt_after_epoch(3),
    "after the last epoch": interrupt_after_epoch(4),
    "in training": interrupt_within("train", 3),
    "in validation": interrupt_within("validate", 2),
}


@pytest.fixture(scope="module")
def uninterrupted(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Output folder of an uninterrupted run of 4 epochs with the given options; made once for equal options."""
    made: dict[str, Path] = {}

    def output_dir(options: dict[str, Any]) -> Path:
        key = str(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted")
            train(config_for(tree, made[key], **options))
        return made[key]

    return output_dir


RUNS: dict[str, dict[str, Any]] = {
    "plateau": {"epochs": 4, "batch_size": 4, "scheduler": "plateau"},
    "plateau until halved": {"epochs": 9, "scheduler": "plateau", "patience": 99},
    "cosine-amp": {"epochs": 4, "batch_size": 4, "scheduler": "cosine", "use_amp": True},
    "workers": {"epochs": 4, "batch_size": 4, "num_workers": 2},
}


@pytest.mark.parametrize(
    ("run", "where"),
    [
        *itertools.product(["plateau"], INTERRUPTIONS),
        ("plateau until halved", "after epoch 3"),
        ("cosine-amp", "after epoch 1"),
        ("workers", "after epoch 3"),
    ],
)
@pytest.mark.usefixtures("no_plots")
def test_resume_leaves_no_trace(
    run: str, where: str, tree: PngTree, tmp_path: Path, uninterrupted: Callable[[dict[str, Any]], Path]
) -> None:
    options = RUNS[run]
    with pytest.raises(_Interrupted):
        train(config_for(tree, tmp_path, **options), INTERRUPTIONS[where])
    torch.manual_seed(999)  # another process would not have this one's random state
    metrics, log = train(config_for(tree, tmp_path, **options, resume=True))
    done = {"after epoch 1": 1, "after epoch 3": 3, "after the last epoch": 4, "in training": 2, "in validation": 1}[
        where
    ]
    assert f"{tmp_path}/tiny/fold_1: resuming after epoch {done}" in log
    assert_same_run(tmp_path, uninterrupted(options))
    if run == "plateau until halved":
        assert len({entry["learning_rate"] for entry in metrics["history"]}) > 1


@pytest.mark.parametrize("function", ["save_checkpoint", "save"])
@pytest.mark.usefixtures("no_plots")
def test_resume_after_a_disk_error(
    function: str,
    tree: PngTree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[dict[str, Any]], Path],
) -> None:
    """A failure before best_model.pth is written, or before the checkpoint."""
    options = RUNS["plateau"]
    original, calls = getattr(checkpoint, function), []

    def fails_at_the_third(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise _Interrupted
        original(*arguments)

    monkeypatch.setattr(checkpoint, function, fails_at_the_third)
    with pytest.raises(_Interrupted):
        train(config_for(tree, tmp_path, **options))
    monkeypatch.setattr(checkpoint, function, original)
    train(config_for(tree, tmp_path, **options, resume=True))
    assert_same_run(tmp_path, uninterrupted(options))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.99, 1.0])
def test_a_disk_that_fills_within_a_checkpoint_leaves_the_earlier_one(share: float, tmp_path: Path) -> None:
    """The kernel lets no file grow beyond RLIMIT_FSIZE, as on a full disk; torch makes a RuntimeError of it."""
    path = tmp_path / "best_model.pth"
    checkpoint.save(path, {"layers": [torch.full((300,), float(i)) for i in range(40)], "large": torch.zeros(50_000)})
    earlier = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * (len(earlier) - 1)), hard))
    try:
        with pytest.raises(StorageError) as caught:
            checkpoint.save(
                path, {"layers": [torch.full((300,), float(i)) for i in range(40)], "large": torch.ones(50_000)}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"cannot write {path}: File too large; free some space and run the same command again; what is finished is kept"
    )
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], earlier)


@pytest.mark.usefixtures("no_plots")
def test_resume_in_the_middle_of_the_report(
    tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Callable[[dict[str, Any]], Path]
) -> None:
    options = RUNS["plateau"]

    def fails(*_: object) -> None:
        raise _Interrupted

    monkeypatch.setattr(fold_module, "compute_metrics", fails)
    with pytest.raises(_Interrupted):
        train(config_for(tree, tmp_path, **options))
    monkeypatch.setattr(fold_module, "compute_metrics", compute_metrics)
    train(config_for(tree, tmp_path, **options, resume=True))
    assert_same_run(tmp_path, uninterrupted(options))


@pytest.mark.usefixtures("no_plots")
def test_resume_of_another_run_is_refused(tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names what differs, for an interrupted and for a finished fold."""
    with pytest.raises(_Interrupted):
        train(config_for(tree, tmp_path, epochs=2), interrupt_after_epoch(1))
    for _ in range(2):
        for options, expected in (
            ({"learning_rate": 0.01}, "learning_rate was 0.001, now 0.01"),
            ({"weight_decay": 0.5, "seed": 1}, "seed was 42, now 1; weight_decay was 1e-05, now 0.5"),
            ({"scheduler": "cosine"}, "scheduler was 'plateau', now 'cosine'"),
        ):
            with pytest.raises(TrainingError, match=r"fold_1/\w+\.\w+: belongs to another run \(") as error:
                train(config_for(tree, tmp_path, **{"epochs": 2} | options, resume=True))
            assert expected in str(error.value)
            assert "use the same settings, or another --output_dir" in str(error.value)
        train(config_for(tree, tmp_path, epochs=2, resume=True))  # now it is finished
    copy = write_csv(tmp_path / "other.csv", tree.rows[:-1])
    assert main(flags(dataclasses.replace(tree, csv_file=copy), tmp_path, "--fold", 1, "--epochs", 2, "--resume")) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "data was '" in line


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Smoothed(TrainConfig):
    """What a later version adds."""

    label_smoothing: float = setting(0.0, affects_result=True)
    verbose: bool = setting(False, affects_result=False)


@pytest.mark.usefixtures("no_plots")
def test_resume_compares_a_field_that_was_added(tree: PngTree, tmp_path: Path) -> None:
    options = vars(config_for(tree, tmp_path, epochs=2))
    with pytest.raises(_Interrupted):
        train(_Smoothed(**options), interrupt_after_epoch(1))
    with pytest.raises(TrainingError, match=r"another run \(label_smoothing was 0.0, now 0.1\); use the same settings"):
        train(_Smoothed(**options | {"resume": True}, label_smoothing=0.1))
    metrics, _ = train(_Smoothed(**options | {"resume": True}, verbose=True))
    assert (metrics["run"]["label_smoothing"], metrics["config"]["verbose"]) == (0.0, True)
    assert "verbose" not in metrics["run"]


@pytest.mark.usefixtures("no_plots")
def test_resume_with_nothing_to_resume(tree: PngTree, tmp_path: Path) -> None:
    _, log = train(config_for(tree, tmp_path / "resumed", resume=True))
    assert f"{tmp_path}/resumed/tiny/fold_1: no checkpoint to resume from; starting at the beginning" in log
    train(config_for(tree, tmp_path / "fresh"))
    assert_same_run(tmp_path / "resumed", tmp_path / "fresh")


@pytest.mark.usefixtures("no_plots")
def test_a_damaged_checkpoint_is_named(tree: PngTree, tmp_path: Path) -> None:
    with pytest.raises(_Interrupted):
        train(config_for(tree, tmp_path), interrupt_after_epoch(1))
    path = tmp_path / "tiny" / "fold_1" / "checkpoint_epoch_1.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        TrainingError, match=r"checkpoint_epoch_1\.pth: cannot be loaded .*; delete it and run again"
    ) as error:
        train(config_for(tree, tmp_path, resume=True))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_plots")
def test_finished_folds_are_skipped(tree: PngTree, tmp_path: Path) -> None:
    metrics, _ = train(config_for(tree, tmp_path, epochs=1, fold=2))
    folder = tmp_path / "tiny" / "fold_2"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    log: list[str] = []
    summary = run_cross_validation(config_for(tree, tmp_path, epochs=1, fold=None, resume=True), log.append)["tiny"]
    assert f"fold 2: finished before, test accuracy {metrics['test_accuracy']:.2%}" in log
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [entry.fold for entry in summary.folds] == [1, 2, 3]
    assert summary.folds[1].scores["test_accuracy"] == metrics["test_accuracy"]
    assert read_json(tmp_path / "tiny" / "summary.json") == summary.to_json()


@pytest.mark.usefixtures("no_plots")
def test_an_earlier_run_is_set_aside(tree: PngTree, tmp_path: Path) -> None:
    """Without --resume, earlier results are renamed, not deleted."""
    root = tmp_path / "tiny"
    kept = []
    for run, rate in enumerate((1e-3, 2e-3, 3e-3)):
        metrics, log = train(config_for(tree, tmp_path, epochs=1, learning_rate=rate))
        kept.append(metrics)
        assert any("holds an earlier run, which is now" in line for line in log) == (run > 0)
    names = ("fold_1.previous", "fold_1.previous2", "fold_1")
    assert sorted(path.name for path in root.glob("[!.]*")) == sorted([*names, *MODEL_FILES])
    assert [read_json(root / name / "metrics.json") for name in names] == kept
    assert files_below(root / "fold_1.previous") == files_below(root / "fold_1")


# --- when training goes wrong ---


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--epochs", 3],
            "epoch 2: the training loss is nan; lower --learning_rate (now 1e+30); the checkpoint of the epoch before",
        ),
        (["--epochs", 1], "the validation loss of no epoch is finite; lower --learning_rate (now 1e+30)"),
        (["--epochs", 1, "--batch_size", 3], "epoch 1: the training loss is nan; lower --learning_rate (now 1e+30)"),
        (["--epochs", 1, "--batch_size", 3, "--use_amp"], "or train without --use_amp"),
    ],
)
def test_divergence(
    more: list[object], expected: str, tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tree, tmp_path, "--fold", 1, "--learning_rate", 1e30, *more)) == 2
    line = capsys.readouterr().err
    assert line.startswith("quaclrs-train: error: ")
    assert line.count("\n") == 1
    assert expected in line
    assert not (tmp_path / "tiny" / "fold_1" / "metrics.json").exists()


@pytest.mark.usefixtures("no_plots")
def test_an_epoch_without_finite_predictions_is_never_the_best(
    tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction from NaN scores is class 0, which can look better than real ones; and JSON has no NaN."""
    evaluate, calls = loop.evaluate, []

    def first_is_nan(*arguments: Any, **options: Any) -> loop.Evaluation:
        calls.append(arguments)
        found = evaluate(*arguments, **options)
        return dataclasses.replace(found, loss=math.nan, accuracy=1.0) if len(calls) == 1 else found

    monkeypatch.setattr(trainer, "evaluate", first_is_nan)
    metrics, _ = train(config_for(tree, tmp_path, epochs=2))
    assert metrics["best_epoch"] == 2
    assert [entry["val_loss"] is None for entry in metrics["history"]] == [True, False]


# --- options ---


@pytest.mark.usefixtures("no_plots")
def test_frozen_features_keep_their_bits(tree: PngTree, tmp_path: Path) -> None:
    train(config_for(tree, tmp_path, model_name="mobilenet", freeze_features=True, weight_decay=0.1))
    torch.manual_seed(int(np.random.SeedSequence([42, 1]).generate_state(1)[0]))
    fresh = torchvision_models.mobilenet_v2(weights=None)
    fresh.classifier[1] = nn.Linear(fresh.last_channel, 3)
    found = torch.load(tmp_path / "mobilenet" / "fold_1" / "best_model.pth", weights_only=True)
    for name, value in fresh.named_parameters():
        assert torch.equal(found[name], value) == (not name.startswith("classifier.1.")), name


@pytest.mark.parametrize("use_amp", [False, True], ids=["float32", "amp"])
@pytest.mark.usefixtures("no_plots")
def test_one_precision_for_training_validation_and_test(use_amp: bool, tree: PngTree, tmp_path: Path) -> None:
    """Also, every sample comes once in each phase, for any size of the last batch."""
    seen: dict[str, list[Batch]] = {}

    def step_meter(phase: str, epoch: int, samples: int) -> Callable[..., None]:
        assert (epoch, samples) == (1, 7)
        return lambda batch, totals, waited_s: seen.setdefault(phase, []).append(batch)

    train(config_for(tree, tmp_path, epochs=1, batch_size=3, use_amp=use_amp), Hooks(step_meter=step_meter))
    assert list(seen) == ["train", "validate", "test"]
    for batches in seen.values():
        assert {batch.images.dtype for batch in batches} == {torch.bfloat16 if use_amp else torch.float32}
        assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
        assert len({number for batch in batches for number in batch.index.tolist()}) == 7
    sizes = {phase: [len(batch) for batch in batches] for phase, batches in seen.items()}
    assert sizes == {"train": [3, 4], "validate": [3, 3, 1], "test": [3, 3, 1]}  # BatchNorm cannot train on one


@pytest.mark.usefixtures("no_plots")
def test_shards_and_tree_train_alike(tree: PngTree, tmp_path: Path) -> None:
    """Sample numbers do not depend on the storage, so order and weights are equal."""
    train(config_for(tree, tmp_path / "tree"))
    shards = open_dataset(config_for(tree, tmp_path), want_shards=True, log=lambda text: None).shards
    assert shards is not None
    try:
        metrics, _ = train(
            config_for(tree, tmp_path / "shards", shards=shards.root, csv_file=None, spectrograms_dir=None)
        )
    finally:
        shutil.rmtree(tree.csv_file.parent / "quaclrs_shards")
    assert metrics["data"]["encoding"] == "png"
    assert_same_run(tmp_path / "tree", tmp_path / "shards")


# --- what a person sees ---


def test_the_bar_shows_sums_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and accuracy are means over the same samples: 3 of 4 correct."""
    monkeypatch.setattr("quaclrs.training.progress._REFRESH_S", 0.0)
    shown: list[str] = []
    meter = StepMeter("train", 1, 2, samples=12)
    monkeypatch.setattr(meter._bar, "set_postfix_str", lambda text, refresh: shown.append(text))
    totals = RunningMetrics(torch.device("cpu"))
    for step in range(3):
        totals.add(torch.tensor(8.0 * (step + 1)), torch.tensor(4.0), torch.tensor(3), samples=4)
        batch = Batch(torch.zeros(4, 3, 1, 1), torch.zeros(4, dtype=torch.int64), torch.arange(4))
        meter(batch, totals, waited_s=0.0)
    assert [text.rpartition(",")[0] for text in shown] == ["loss 2.000, accuracy 75.0%", "loss 3.000, accuracy 75.0%"]


def test_the_line_of_an_epoch() -> None:
    shown = {"train_loss": 1.25, "train_accuracy": 0.5, "train_images_per_s": 1234.4, "train_data_wait": 0.125}
    validation = {"val_loss": 1.5, "val_accuracy": 0.25, "val_images_per_s": 9.0, "val_data_wait": 0.0}
    seconds = {"train_seconds": 2.0, "val_seconds": 1.0}
    record = EpochRecord.from_json({"epoch": 3, "learning_rate": 5e-4, **shown, **validation, **seconds})
    assert epoch_line(record, 30) == (
        "epoch 3/30: train loss 1.2500, accuracy 50.00%; validation loss 1.5000, accuracy 25.00%; 1234 images/s, "
        "waiting for data 12.5%; learning rate 0.0005"
    )
