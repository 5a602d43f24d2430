"""Metrics of an evaluation's predictions, by scikit-learn, as plain values for JSON.

Pure functions of labels and probabilities. Accuracies and all other shares are fractions, 0 to 1.

To add a metric, write a function of :class:`Predictions` with the decorator :func:`metric` here. Nothing else changes:
its value goes to ``metrics.json`` and, with ``summarise=True``, its mean and standard deviation to ``summary.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, auc, classification_report, confusion_matrix, f1_score, roc_curve

from quaclrs.errors import TrainingError

MAX_CURVE_POINTS = 201
"""Most points kept of a ROC curve: more cannot be seen, and 13 curves of some thousand points swell ``metrics.json``.
"""

REPORT_AVERAGES = ("accuracy", "macro avg", "weighted avg")
"""Keys of scikit-learn's classification report beside those of the classes; it writes them over a class's."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What metrics are computed from."""

    labels: IntArray
    """(N,) in 0..C-1"""
    probabilities: FloatArray
    """(N, C), finite"""
    class_names: Sequence[str]
    is_original: npt.NDArray[np.bool_] | None
    """(N,): which samples are no augmented copies; None if unknown."""

    @cached_property
    def predicted(self) -> IntArray:
        """(N,): the class of the largest probability, the first of equal ones."""
        predicted: IntArray = self.probabilities.argmax(axis=1)
        return predicted

    @cached_property
    def roc(self) -> dict[str, Any]:
        """See :func:`roc_curves`."""
        return roc_curves(self.labels, self.probabilities, self.class_names)


Score = float | int | None
"""Value of a metric; None where it is undefined."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One registered metric."""

    compute: Callable[[Predictions], Score]
    key: str
    """Its key in ``metrics.json`` and, after ``mean_`` and ``std_``, in ``summary.json``."""
    summarise: bool
    """Whether ``summary.json`` has its mean and standard deviation over the folds."""


METRICS: dict[str, Metric] = {}
"""All metrics by their key in :func:`compute_metrics`, in the order of ``metrics.json``."""


def metric(
    *, key: str | None = None, summarise: bool = False
) -> Callable[[Callable[[Predictions], Score]], Callable[[Predictions], Score]]:
    """Decorator: register a function in :data:`METRICS` under its name; ``key`` is the name in files if it differs."""

    def register(compute: Callable[[Predictions], Score]) -> Callable[[Predictions], Score]:
        METRICS[compute.__name__] = Metric(compute=compute, key=key or compute.__name__, summarise=summarise)
        return compute

    return register


@metric(key="test_accuracy", summarise=True)
def accuracy(predictions: Predictions) -> Score:
    """Fraction of correct predictions."""
    return float(accuracy_score(predictions.labels, predictions.predicted))


@metric(key="test_accuracy_originals", summarise=True)
def accuracy_originals(predictions: Predictions) -> Score:
    """Accuracy over the samples that are no augmented copies; None without such samples."""
    chosen = predictions.is_original
    if chosen is None or not chosen.any():
        return None
    return float(accuracy_score(predictions.labels[chosen], predictions.predicted[chosen]))


@metric(key="num_test_originals")
def num_originals(predictions: Predictions) -> Score:
    """Number of samples that are no augmented copies."""
    return None if predictions.is_original is None else int(predictions.is_original.sum())


@metric(summarise=True)
def macro_f1(predictions: Predictions) -> Score:
    """Mean F1 of the classes that occur among labels or predictions."""
    return float(f1_score(predictions.labels, predictions.predicted, average="macro", zero_division=0))


@metric()
def macro_auc(predictions: Predictions) -> Score:
    """Mean area under the one-vs-rest ROC curves of the classes that have one."""
    area: float | None = predictions.roc["macro"]["auc"]
    return area


def scores_for_results(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """The registered metrics of :func:`compute_metrics`'s result, by their keys in ``metrics.json``."""
    return {registered.key: metrics[name] for name, registered in METRICS.items()}


def summarised_keys() -> list[str]:
    """Keys of the metrics that ``summary.json`` has the mean and standard deviation of."""
    return [registered.key for registered in METRICS.values() if registered.summarise]


def report_keys(class_names: Sequence[str]) -> list[str]:
    """Each class's key in the classification report: its name, with `` (class)`` where an average has that key."""
    taken, keys = {*REPORT_AVERAGES, *class_names}, []
    for name in class_names:
        key = name
        while key in REPORT_AVERAGES or (key != name and key in taken):
            key += " (class)"
        keys.append(key)
        taken.add(key)
    return keys


def compute_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    class_names: Sequence[str],
    is_original: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """Compute everything that the report says about an evaluation's predictions.

    ``labels`` (N,) int in 0..C-1; ``probabilities`` (N, C), each row's largest value is the prediction (the first of
    equal ones); ``is_original`` (N,) bool marks the rows that are no augmented copies, None if that is not known.

    Returns a dict that ``json.dump(..., allow_nan=False)`` accepts:

    - ``class_names``, ``num_samples``
    - each of :data:`METRICS` by its function's name
    - ``confusion_matrix``: C × C counts, row = label, column = prediction
    - ``classification_report``: scikit-learn's, with every class (see :func:`report_keys`); undefined values are 0
    - ``roc``: see :func:`roc_curves`

    Raises ``ValueError`` for arrays that do not fit each other and :class:`TrainingError` for probabilities that are
    not finite.
    """
    truth, scores = _check_arrays(labels, probabilities, len(class_names))
    originals = None if is_original is None else np.asarray(is_original, dtype=bool)
    if originals is not None and originals.shape != truth.shape:
        raise ValueError(f"is_original has shape {originals.shape}, labels {truth.shape}")
    predictions = Predictions(labels=truth, probabilities=scores, class_names=list(class_names), is_original=originals)
    every_class = np.arange(len(class_names))
    metrics = {
        "class_names": list(class_names),
        "num_samples": len(truth),
        **{name: registered.compute(predictions) for name, registered in METRICS.items()},
        "confusion_matrix": confusion_matrix(truth, predictions.predicted, labels=every_class),
        "classification_report": classification_report(
            truth,
            predictions.predicted,
            labels=every_class,
            target_names=report_keys(class_names),
            output_dict=True,
            zero_division=0,
        ),
        "roc": predictions.roc,
    }
    return {key: to_json_safe(value) for key, value in metrics.items()}


def roc_curves(labels: npt.ArrayLike, probabilities: npt.ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    """One-vs-rest ROC curves for JSON: ``{"classes": {name: curve}, "micro": curve, "macro": curve}``.

    A curve is ``{"auc": float | None, "fpr": list, "tpr": list}``. A class without positive or without negative rows
    has no curve: empty lists, ``auc`` None, and it does not count in the macro average. ``micro`` pools all
    (row, class) pairs. ``macro`` is the mean curve of the classes, and its ``auc`` the mean of theirs, as in
    ``roc_auc_score(average="macro", multi_class="ovr")``. Method: scikit-learn's example "Multiclass Receiver
    Operating Characteristic". The points are a subset of the exact curve's corners; ``auc`` is that of the exact curve.
    """
    truth, scores = _check_arrays(labels, probabilities, len(class_names))
    positives = truth[:, np.newaxis] == np.arange(len(class_names))  # (N, C) bool
    curves = [_compute_curve(positives[:, label], scores[:, label]) for label in range(len(class_names))]
    entries = {
        "classes": {name: _curve_to_json(curve) for name, curve in zip(class_names, curves, strict=True)},
        "micro": _curve_to_json(_compute_curve(positives.ravel(), scores.ravel())),
        "macro": _average_curves([curve for curve in curves if curve is not None]),
    }
    return {key: to_json_safe(entry) for key, entry in entries.items()}


def to_json_safe(value: Any) -> Any:
    """Convert NumPy's numbers and arrays to Python's, and NaN and infinities, which JSON lacks, to None."""
    if isinstance(value, dict):
        return {key: to_json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_safe(item) for item in value]
    if isinstance(value, np.ndarray):
        return to_json_safe(value.tolist())
    if isinstance(value, np.generic):
        return to_json_safe(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _check_arrays(labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_classes: int) -> tuple[IntArray, FloatArray]:
    truth = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 1 or scores.shape != (len(truth), num_classes) or len(truth) == 0:
        raise ValueError(f"labels {truth.shape} and probabilities {scores.shape} do not fit {num_classes} classes")
    if truth.min() < 0 or truth.max() >= num_classes:
        raise ValueError(f"labels run from {truth.min()} to {truth.max()}, but there are {num_classes} classes")
    bad_rows = np.count_nonzero(~np.isfinite(scores).all(axis=1))
    if bad_rows:
        raise TrainingError(
            f"{bad_rows} of {len(truth)} predictions are not finite: training diverged; try a smaller --learning_rate"
        )
    return truth, scores


def _compute_curve(positive: npt.NDArray[np.bool_], scores: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """All corners (fpr, tpr), or None without positive or without negative rows."""
    if positive.all() or not positive.any():
        return None  # scikit-learn would warn and return NaN
    fpr, tpr, _ = roc_curve(positive, scores)
    return fpr, tpr


def _curve_to_json(curve: tuple[FloatArray, FloatArray] | None, area: float | None = None) -> dict[str, Any]:
    if curve is None:
        return {"auc": None, "fpr": [], "tpr": []}
    fpr, tpr = curve
    kept = np.arange(len(fpr))
    if len(fpr) > MAX_CURVE_POINTS:
        # corners evenly spaced along the curve: fpr + tpr grows from 0 to 2 without ever falling
        kept = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, fpr[-1] + tpr[-1], MAX_CURVE_POINTS)))
    return {"auc": auc(fpr, tpr) if area is None else area, "fpr": fpr[kept], "tpr": tpr[kept]}


def _average_curves(curves: list[tuple[FloatArray, FloatArray]]) -> dict[str, Any]:
    if not curves:
        return _curve_to_json(None)
    grid = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    mean_tpr = np.mean([np.interp(grid, fpr, tpr) for fpr, tpr in curves], axis=0)
    # a curve may rise vertically at fpr 0; the mean curve must still start at (0, 0)
    corner = (np.concatenate([[0.0], grid]), np.concatenate([[0.0], mean_tpr]))
    return _curve_to_json(corner, float(np.mean([auc(fpr, tpr) for fpr, tpr in curves])))
