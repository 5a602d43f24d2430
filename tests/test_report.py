"""Contract of report/: correct numbers, images that open, and Grad-CAM for every architecture, frozen or not."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional

from quaclrs.errors import StorageError, TrainingError
from quaclrs.imaging.normalise import normalise
from quaclrs.report import gradcam, plots
from quaclrs.report.metrics import MAX_CURVE_POINTS, compute_metrics, roc_curves
from quaclrs.training import models
from quaclrs.training.architectures import ARCHITECTURES
from quaclrs.training.records import EpochRecord

CLASS_NAMES = [
    *("air_conditioner", "ambulance", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling"),
    *("firetruck", "gun_shot", "jackhammer", "police", "street_music", "traffic"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small batches gain nothing from a second thread, and lose much when another process has its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(samples: int = 400, classes: int = 13, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities of a fair classifier, and which rows are originals."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, samples)
    scores = random.normal(size=(samples, classes))
    scores[np.arange(samples), labels] += 1.5
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return labels, probabilities.astype(np.float32), random.random(samples) < 0.2


def test_numbers_agree_with_counting() -> None:
    labels, probabilities, is_original = example()
    metrics = compute_metrics(labels, probabilities, CLASS_NAMES, is_original)
    predictions = probabilities.argmax(axis=1)
    right = predictions == labels
    assert metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-12)
    assert metrics["accuracy_originals"] == pytest.approx(right[is_original].mean(), abs=1e-12)
    assert (metrics["num_samples"], metrics["num_originals"]) == (400, is_original.sum())
    scores = []
    for label, name in enumerate(CLASS_NAMES):
        hits = np.sum(right & (labels == label))
        precision, recall = hits / np.sum(predictions == label), hits / np.sum(labels == label)
        scores.append(2 * precision * recall / (precision + recall))
        assert metrics["classification_report"][name]["recall"] == pytest.approx(recall)
        for guess in range(13):
            assert metrics["confusion_matrix"][label][guess] == np.sum((labels == label) & (predictions == guess))
    assert metrics["macro_f1"] == pytest.approx(np.mean(scores))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_areas_agree_with_counting_pairs() -> None:
    """AUC is the share of (positive, negative) pairs in the right order, ties counting half (Hanley and
    McNeil 1982).
    """
    labels, probabilities, _ = example()
    probabilities = probabilities.round(2)  # makes ties
    roc = roc_curves(labels, probabilities, CLASS_NAMES)
    areas = []
    for label, name in enumerate(CLASS_NAMES):
        positive, negative = probabilities[labels == label, label], probabilities[labels != label, label]
        difference = positive[:, np.newaxis] - negative
        areas.append(np.mean(difference > 0) + np.mean(difference == 0) / 2)
        assert roc["classes"][name]["auc"] == pytest.approx(areas[-1], abs=1e-9)
    assert roc["macro"]["auc"] == pytest.approx(np.mean(areas), abs=1e-9)
    assert roc["micro"]["auc"] == pytest.approx(roc_auc_score(np.eye(13)[labels].ravel(), probabilities.ravel()))


def test_kept_points_lie_on_the_curve() -> None:
    labels, probabilities, _ = example(samples=5000, classes=2)
    roc = roc_curves(labels, probabilities, ["a", "b"])
    for curve in (roc["classes"]["a"], roc["micro"], roc["macro"]):
        fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
        assert 100 < len(fpr) <= MAX_CURVE_POINTS
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert (np.diff(fpr) >= 0).all()
        assert (np.diff(tpr) >= 0).all()
        area = np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2)
        assert area == pytest.approx(curve["auc"], abs=2e-3)


def test_a_class_that_is_absent() -> None:
    labels, probabilities, _ = example()
    present = labels != 4
    metrics = compute_metrics(labels[present], probabilities[present], CLASS_NAMES)
    assert metrics["classification_report"]["dog_bark"]["support"] == 0
    assert metrics["classification_report"]["dog_bark"]["f1-score"] == 0
    assert np.array(metrics["confusion_matrix"]).shape == (13, 13)
    assert metrics["roc"]["classes"]["dog_bark"] == {"auc": None, "fpr": [], "tpr": []}
    others = [curve["auc"] for name, curve in metrics["roc"]["classes"].items() if name != "dog_bark"]
    assert metrics["roc"]["macro"]["auc"] == pytest.approx(np.mean(others))
    json.dumps(metrics, allow_nan=False)


def test_classes_named_like_an_average_stay_in_the_report() -> None:
    names = ["accuracy", "accuracy (class)", "dog_bark", "macro avg", "micro avg", "weighted avg"]
    labels, probabilities, _ = example(classes=6)
    report = compute_metrics(labels, probabilities, names)["classification_report"]
    plain = compute_metrics(labels, probabilities, list("abcdef"))["classification_report"]
    averages = ["accuracy", "macro avg", "weighted avg"]
    assert [report[key] for key in averages] == [plain[key] for key in averages]
    assert {key: value for key, value in report.items() if key not in averages} == {
        "accuracy (class) (class)": plain["a"],
        "accuracy (class)": plain["b"],
        "dog_bark": plain["c"],
        "macro avg (class)": plain["d"],
        "micro avg": plain["e"],
        "weighted avg (class)": plain["f"],
    }


def test_one_sample_of_one_class() -> None:
    metrics = compute_metrics([1], [[0.2, 0.8]], ["a", "b"], [False])
    assert metrics["accuracy"] == metrics["macro_f1"] == 1
    assert (metrics["num_originals"], metrics["accuracy_originals"]) == (0, None)
    assert metrics["roc"]["macro"]["auc"] is None
    assert metrics["roc"]["micro"]["auc"] == 1
    assert compute_metrics([1], [[0.2, 0.8]], ["a", "b"])["num_originals"] is None


def test_refused_predictions() -> None:
    with pytest.raises(TrainingError, match="1 of 2 predictions are not finite"):
        compute_metrics([0, 1], [[0.5, 0.5], [math.nan, 0.5]], ["a", "b"])
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 classes"):
        compute_metrics([0, 2], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"])
    with pytest.raises(ValueError, match="do not fit 2 classes"):
        compute_metrics([], np.zeros((0, 2)), ["a", "b"])


def record(epoch: int, **values: float) -> EpochRecord:
    figures = {"train_loss": 2.0, "train_accuracy": 0.2, "val_loss": 2.2, "val_accuracy": 0.2, "learning_rate": 1e-3}
    times = dict.fromkeys(("seconds", "images_per_s", "data_wait"), 1.0)
    times = {f"{phase}_{name}": value for phase in ("train", "val") for name, value in times.items()}
    return EpochRecord.from_json({"epoch": epoch, **figures, **times, **values})


def history(epochs: int) -> list[EpochRecord]:
    return [
        record(
            epoch,
            train_loss=2 / epoch,
            train_accuracy=1 - 0.8 / epoch,
            val_loss=2.2 / epoch,
            val_accuracy=0.8 - 0.6 / epoch,
        )
        for epoch in range(1, epochs + 1)
    ]


def check_png(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        opened.load()
        assert opened.format == "PNG"
        image: Image.Image = opened.convert("RGB")
        return image


def test_the_four_plots(tmp_path: Path) -> None:
    labels, probabilities, _ = example()
    present = labels != 4
    metrics = compute_metrics(labels[present], probabilities[present], CLASS_NAMES)
    paths = plots.write_plots(tmp_path / "plots", history(9), metrics)
    assert [path.name for path in paths] == [
        "loss_curves.png",
        "accuracy_curves.png",
        "confusion_matrix.png",
        "roc_curves.png",
    ]
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)  # no temporary file is left
    for path in paths:
        assert min(check_png(path).size) > 400


def test_plots_of_odd_runs(tmp_path: Path) -> None:
    """One epoch, values that are NaN, and class names that matplotlib would read as something else."""
    names = ["_hidden", "$not math$", "犬", "b" * 60]
    metrics = compute_metrics([0, 1, 1, 3], np.eye(4)[[0, 1, 2, 3]], names)
    odd = record(1, train_loss=math.nan, val_loss=math.nan, val_accuracy=math.nan, learning_rate=0.0)
    for number, epochs in enumerate(([odd], [])):
        for path in plots.write_plots(tmp_path / str(number), epochs, metrics):
            check_png(path)
    legend = plots.draw_roc_curves(metrics).axes[0].get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "1.000  _hidden"


def test_curves_say_that_best_is_the_best_validation_accuracy() -> None:
    """Also where the loss of another epoch is lower."""
    epochs = [record(1, val_loss=0.5), record(2, val_loss=0.75, val_accuracy=0.6), record(3, val_accuracy=0.5)]
    for draw, value in ((plots.draw_losses, "loss 0.750"), (plots.draw_accuracies, "60.0%")):
        legend = draw(epochs).axes[0].get_legend()
        assert legend is not None
        assert legend.get_texts()[-1].get_text() == f"best validation accuracy, epoch 2: {value}"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("classes", "letter"), [(2, "a"), (13, "a"), (20, "W"), (21, "a"), (264, "W")])
def test_plots_of_few_and_many_classes(classes: int, letter: str) -> None:
    """Legend and names lie within the figure; no two listed curves look alike; all curves are drawn."""
    names = [f"{number:03d}{letter * 60}" for number in range(classes)]
    labels, probabilities, _ = example(samples=8 * classes, classes=classes)
    metrics = compute_metrics(labels, probabilities, names)
    figure = plots.draw_roc_curves(metrics)
    figure.draw_without_rendering()
    axes, legend = figure.axes[0], figure.axes[0].get_legend()
    assert legend is not None
    box, width, height = legend.get_window_extent(), *figure.canvas.get_width_height()
    assert axes.get_window_extent().x1 < box.x0 < box.x1 < width
    assert 0 < box.y0 < box.y1 < height
    assert axes.get_window_extent().width > 400
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.split("  ")[-1] for text in texts[-2:]] == ["macro average", "micro average"]
    areas = sorted(curve["auc"] for curve in metrics["roc"]["classes"].values() if curve["auc"] is not None)
    if classes > 20:
        assert texts[0] == f"{classes - 10} other classes"
        assert [text.split()[0] for text in texts[1:-2]] == [f"{area:.3f}" for area in areas[:10]]
    else:
        assert len(texts) == classes + 2
    assert len(axes.get_lines()) == classes + 3
    looks = [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in legend.get_lines()]
    assert len(set(looks)) == len(looks)
    matrix = plots.draw_confusion_matrix(metrics)
    matrix.draw_without_rendering()
    rows = [text.get_window_extent() for text in matrix.axes[0].get_yticklabels()]
    assert all(lower.y1 <= upper.y0 + 1 for upper, lower in itertools.pairwise(rows))
    columns = [text.get_window_extent() for text in matrix.axes[0].get_xticklabels()]
    assert min(column.y0 for column in columns) >= 0 <= min(row.x0 for row in rows)


def test_plots_name_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    metrics = compute_metrics([0, 1], np.eye(2), ["a", "b"])
    with pytest.raises(StorageError, match=r"cannot write .*file.plots.loss_curves\.png"):
        plots.write_plots(tmp_path / "file" / "plots", history(2), metrics)


def test_pick_samples() -> None:
    labels = np.array([1, 0, 1, 1, 0, 1, 1])
    assert gradcam.pick_samples(labels, per_class=2).tolist() == [1, 4, 0, 2]
    originals = np.array([0, 0, 0, 1, 1, 0, 1], bool)
    assert gradcam.pick_samples(labels, is_original=originals, per_class=3).tolist() == [4, 1, 3, 6, 0]
    predictions = np.array([1, 0, 1, 1, 1, 0, 0])  # of class 1: right 0, 2, 3, wrong 5, 6
    assert gradcam.pick_samples(labels, predictions, per_class=4).tolist() == [1, 4, 0, 5, 2, 6]
    assert gradcam.pick_samples(labels, predictions, originals, per_class=4).tolist() == [4, 1, 3, 6, 0, 5]
    assert gradcam.pick_samples([], per_class=4).tolist() == []


def test_file_stems_are_safe_and_differ() -> None:
    stems = gradcam.safe_file_stems(["dog_bark", "../a/b", "Dog_Bark", "a b", "a?b", "..", "é" * 300])
    assert stems[:6] == ["dog_bark", "_a_b", "Dog_Bark-2", "a_b", "a_b-4", "class"]
    assert len(stems[6].encode()) <= 200


def image_batch(size: int, count: int = 2) -> tuple[torch.Tensor, np.ndarray]:
    """Smooth blobs, since noise gives flat heat maps: (count, 3, size, size) float32 and the 8-bit images."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 3, 4, 4), generator=random)
    smooth = functional.interpolate(coarse, (size, size), mode="bilinear")
    pixels = (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return normalise(pixels), pixels.numpy()


def test_images_come_back_exactly() -> None:
    images, pixels = image_batch(40)
    assert np.array_equal(gradcam.to_pixels(images), pixels)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that Grad-CAM must not change."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if parameter.grad is None else parameter.grad.sum() for parameter in model.parameters()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "values": {key: value.double().sum() for key, value in model.state_dict().items()},
    }


SLOW = ("vgg16", "convnext")
"""Only in the exhaustive run: built like alexnet and efficientnet, but larger."""


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.exhaustive if name in SLOW else ()) for name in ARCHITECTURES]
)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, models.build_model(request.param, 3)


def test_gradcam_of_every_network(network: tuple[str, nn.Module], tmp_path: Path) -> None:
    """Frozen and unfrozen give the same maps, and leave the model as it was."""
    name, model = network
    images, pixels = image_batch(160 if name == "inception" else 96)
    model.get_submodule(ARCHITECTURES[name].heads[0]).weight.grad = None
    model.get_submodule(ARCHITECTURES[name].heads[0]).eval()  # a mixture of modes must survive as well
    every_target = torch.arange(3).repeat_interleave(2)
    maps = []
    for freeze in (False, True):
        if freeze:
            models._freeze_all_but(model, ARCHITECTURES[name].trainable)
        before = state_of(model)
        maps.append(gradcam.heat_maps(model, name, images.repeat(3, 1, 1, 1), every_target))
        assert state_of(model) == before
    assert np.array_equal(maps[0], maps[1])
    assert maps[0].shape == (6, *images.shape[2:])
    assert maps[0].dtype == np.float32
    assert maps[0].min() >= 0
    assert maps[0].max() == pytest.approx(1)
    assert maps[0].std(axis=(1, 2)).max() > 0.01  # of three classes at least one has something in its favour
    paths = gradcam.write_gradcams(model, name, images, [2, 2], [2, 0], ["a", "b", "c/d"], tmp_path, pixels)
    assert [path.name for path in paths] == ["gradcam_c_d_0.png", "gradcam_c_d_1.png"]
    for path, pixels_of_one in zip(paths, pixels, strict=True):
        drawn = np.asarray(check_png(path))
        factor = -(-gradcam.MIN_PANEL // len(pixels_of_one))
        assert (drawn == pixels_of_one[len(pixels_of_one) // 2, 0]).all(axis=2).any()
        assert drawn.shape[1] > 2 * factor * len(pixels_of_one)


def test_gradcam_agrees_with_the_papers_formula() -> None:
    """Channel weights are the mean gradients; the map is the rectified weighted sum (Selvaraju et al. 2017, eq. 1 and
    2).
    """
    torch.manual_seed(0)
    model = models.build_model("resnet18", 3).eval()
    images, _ = image_batch(96)
    targets = torch.tensor([2, 0])
    features = nn.Sequential(*list(model.children())[:-2])(images).detach().requires_grad_()
    scores = model.get_submodule("fc")(features.mean(dim=(2, 3)))
    (gradients,) = torch.autograd.grad(scores.gather(1, targets[:, None]).sum(), features)
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    expected = functional.relu((weights * features).sum(dim=1, keepdim=True)).detach()
    expected = functional.interpolate(expected, (96, 96), mode="bilinear")[:, 0]
    expected = expected / expected.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    assert expected.max() == 1
    found = gradcam.heat_maps(model, "resnet18", images, targets)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_gradcam_inside_inference_mode_and_of_no_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.build_model("resnet18", 3)
    images, _ = image_batch(64)
    expected = gradcam.heat_maps(model, "resnet18", images, torch.tensor([0, 1]))
    with torch.inference_mode():
        inside = images * 1  # an inference tensor, as a loader driven by evaluation makes them
        assert np.array_equal(gradcam.heat_maps(model, "resnet18", inside, torch.tensor([0, 1])), expected)
    assert gradcam.write_gradcams(model, "resnet18", images[:0], [], [], ["a", "b", "c"], tmp_path) == []


@pytest.mark.parametrize("limit_bytes", [0, 1000, 9000])
def test_a_full_disk_at_a_plot_or_a_gradcam_is_one_line(limit_bytes: int, tmp_path: Path) -> None:
    labels, probabilities, _ = example()
    metrics = compute_metrics(labels, probabilities, CLASS_NAMES)
    model = models.build_model("mobilenet", 13)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 64, 64))).float()
    writers: tuple[Callable[[], object], ...] = (
        lambda: plots.write_plots(tmp_path, history(3), metrics),
        lambda: gradcam.write_gradcams(model, "mobilenet", noise, [0], [1], CLASS_NAMES, tmp_path),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in writers:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))  # the kernel refuses as a full disk would
        try:
            with pytest.raises(StorageError, match=r"^cannot write [^\n]*png: File too large; free some space[^\n]*$"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# --- the environment of the process ---

IMPORT_ALL = """
import sys
from quaclrs.report import gradcam, plots
from quaclrs.synthesize import palette
import matplotlib, os
palette()
print(matplotlib.get_backend(auto_select=False), os.environ["MPLBACKEND"])
"""


@pytest.mark.parametrize(
    ("variable", "backend"),
    [
        ("module://matplotlib_inline.backend_inline", None),
        ("no such backend", None),
        ("svg", "svg"),
        ("", None),
    ],
)
def test_mplbackend_of_a_notebook_is_ignored_where_it_cannot_be_had(variable: str, backend: str | None) -> None:
    for code in (IMPORT_ALL, "from quaclrs.synthesize import palette; palette()\n" + IMPORT_ALL):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MPLBACKEND": variable},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        if not variable.startswith("module:"):  # present where matplotlib_inline is installed
            assert done.stdout.strip() == f"{backend} {variable}".strip()


def test_a_users_matplotlibrc_does_not_reach_into_the_plots(tmp_path: Path) -> None:
    labels, probabilities, _ = example()
    metrics = compute_metrics(labels, probabilities, CLASS_NAMES)
    plain = plots.write_plots(tmp_path / "plain", history(3), metrics)
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 30}):
        styled = plots.write_plots(tmp_path / "styled", history(3), metrics)
        assert mpl.rcParams["font.size"] == 30
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in styled]
