"""How good the predictions are: scikit-learn's measures of one evaluation, ready for JSON.

Pure functions of labels and probabilities. Accuracies and all other shares are fractions, 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, auc, classification_report, confusion_matrix, f1_score, roc_curve

from quaclrs.errors import TrainingError

MAX_CURVE_POINTS = 201
"""Most points kept of a ROC curve: more cannot be seen, and 13 curves of some thousand points swell ``metrics.json``.
"""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def compute_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    class_names: Sequence[str],
    is_original: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """Everything that the report says about an evaluation's predictions.

    ``labels`` (N,) int in 0..C-1; ``probabilities`` (N, C), each row's largest value is the prediction (the first of
    equal ones); ``is_original`` (N,) bool marks the rows that are no augmented copies, None if that is not known.

    Returns a dict that ``json.dump(..., allow_nan=False)`` accepts:

    - ``class_names``; ``num_samples``, ``num_originals`` (None if not known)
    - ``accuracy``, ``accuracy_originals`` (None without such rows)
    - ``macro_f1``: mean F1 of the classes that occur among labels or predictions
    - ``confusion_matrix``: C × C counts, row = label, column = prediction
    - ``classification_report``: scikit-learn's, with every class; undefined values are 0
    - ``roc``: see :func:`roc_curves`

    Raises ``ValueError`` for arrays that do not fit each other and :class:`TrainingError` for probabilities that are
    not finite.
    """
    truth, scores = _checked(labels, probabilities, len(class_names))
    predictions = scores.argmax(axis=1)
    originals = None if is_original is None else np.asarray(is_original, dtype=bool)
    if originals is not None and originals.shape != truth.shape:
        raise ValueError(f"is_original has shape {originals.shape}, labels {truth.shape}")
    every_class = np.arange(len(class_names))
    metrics = {
        "class_names": list(class_names),
        "num_samples": len(truth),
        "num_originals": None if originals is None else originals.sum(),
        "accuracy": accuracy_score(truth, predictions),
        "accuracy_originals": _accuracy_of(originals, truth, predictions),
        "macro_f1": f1_score(truth, predictions, average="macro", zero_division=0),
        "confusion_matrix": confusion_matrix(truth, predictions, labels=every_class),
        "classification_report": classification_report(
            truth,
            predictions,
            labels=every_class,
            target_names=list(class_names),
            output_dict=True,
            zero_division=0,
        ),
        "roc": roc_curves(truth, scores, class_names),
    }
    return to_json_safe(metrics)


def roc_curves(labels: npt.ArrayLike, probabilities: npt.ArrayLike, class_names: Sequence[str]) -> dict[str, Any]:
    """One-vs-rest ROC curves: ``{"classes": {name: curve}, "micro": curve, "macro": curve}``, fit for JSON.

    A curve is ``{"auc": float | None, "fpr": list, "tpr": list}``. A class that has no positive or no negative rows has
    no curve: empty lists, ``auc`` None, and it does not count in the macro average. ``micro`` pools all (row, class)
    pairs. ``macro`` is the mean curve of the classes and its ``auc`` the mean of theirs, as
    ``roc_auc_score(average="macro", multi_class="ovr")`` has it. Method: scikit-learn's example "Multiclass Receiver
    Operating Characteristic". The points are a subset of the exact curve's corners; ``auc`` is that of the exact curve.
    """
    truth, scores = _checked(labels, probabilities, len(class_names))
    positives = truth[:, np.newaxis] == np.arange(len(class_names))  # (N, C) bool
    curves = [_exact_curve(positives[:, label], scores[:, label]) for label in range(len(class_names))]
    return to_json_safe(
        {
            "classes": {name: _as_entry(curve) for name, curve in zip(class_names, curves, strict=True)},
            "micro": _as_entry(_exact_curve(positives.ravel(), scores.ravel())),
            "macro": _macro_entry([curve for curve in curves if curve is not None]),
        }
    )


def to_json_safe(value: Any) -> Any:
    """``value`` with NumPy's numbers and arrays as Python's, and None for what JSON cannot say (NaN, infinities)."""
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


def _checked(labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_classes: int) -> tuple[IntArray, FloatArray]:
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


def _accuracy_of(chosen: npt.NDArray[np.bool_] | None, truth: IntArray, predictions: IntArray) -> float | None:
    if chosen is None or not chosen.any():
        return None
    return float(accuracy_score(truth[chosen], predictions[chosen]))


def _exact_curve(positive: npt.NDArray[np.bool_], scores: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """All corners (fpr, tpr), or None where one of the two kinds is missing."""
    if positive.all() or not positive.any():
        return None  # scikit-learn would warn and return NaN
    fpr, tpr, _ = roc_curve(positive, scores)
    return fpr, tpr


def _as_entry(curve: tuple[FloatArray, FloatArray] | None, area: float | None = None) -> dict[str, Any]:
    if curve is None:
        return {"auc": None, "fpr": [], "tpr": []}
    fpr, tpr = curve
    kept = np.arange(len(fpr))
    if len(fpr) > MAX_CURVE_POINTS:
        # corners evenly spaced along the curve: fpr + tpr grows from 0 to 2 without ever falling
        kept = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, fpr[-1] + tpr[-1], MAX_CURVE_POINTS)))
    return {"auc": auc(fpr, tpr) if area is None else area, "fpr": fpr[kept], "tpr": tpr[kept]}


def _macro_entry(curves: list[tuple[FloatArray, FloatArray]]) -> dict[str, Any]:
    if not curves:
        return _as_entry(None)
    grid = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    mean_tpr = np.mean([np.interp(grid, fpr, tpr) for fpr, tpr in curves], axis=0)
    # a curve that starts by going straight up is not at 0 any more at fpr 0; the mean must still start in the corner
    corner = (np.concatenate([[0.0], grid]), np.concatenate([[0.0], mean_tpr]))
    return _as_entry(corner, float(np.mean([auc(fpr, tpr) for fpr, tpr in curves])))
