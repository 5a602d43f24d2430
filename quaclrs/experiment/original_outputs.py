"""The original trainer's documents, for scripts that read its result tree: its keys and its units.

``original_metrics.json`` of a fold and ``original_summary.json`` of a model. Accuracies are percentages here, and
epochs count from 0. Paths are those of our files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quaclrs.experiment.results import FoldResult, read_document
from quaclrs.report.metrics import to_json_safe
from quaclrs.training.checkpoint import BEST_MODEL_FILE

ORIGINAL_METRICS_FILE = "original_metrics.json"
ORIGINAL_SUMMARY_FILE = "original_summary.json"
REPORT_FILE = "classification_report.json"
ORIGINAL_FLAGS = (
    *("csv_file", "spectrograms_dir", "model_name", "pretrained", "freeze_features", "batch_size", "num_workers"),
    *("epochs", "patience", "learning_rate", "weight_decay", "scheduler", "use_amp", "device", "distributed"),
    *("output_dir", "fold"),
)
"""The 17 flags of the original trainer; ``args`` has their values."""


def original_metrics(result: FoldResult, folder: Path, read_from: Path | None = None) -> dict[str, Any]:
    """The original's ``metrics.json`` of the fold whose files are in ``folder``, or will be: then in ``read_from`` now.

    Training and validation figures are those of the best epoch. ``classification_report`` is scikit-learn's, read from
    ``classification_report.json``; empty if somebody deleted that file.
    """
    best, report = result.best, (read_from or folder) / REPORT_FILE
    document = {
        "fold": result.fold,
        "best_epoch": result.best_epoch - 1,
        "train_loss": best.train_loss,
        "val_loss": best.val_loss,
        "test_loss": result.test_loss,
        "train_accuracy": 100 * best.train_accuracy,
        "val_accuracy": 100 * best.val_accuracy,
        "test_accuracy": 100 * result.test_accuracy,
        "classification_report": read_document(report) if report.is_file() else {},
        "paths": {
            "best_model": str(folder / BEST_MODEL_FILE),
            "confusion_matrix": str(folder / "plots" / "confusion_matrix.png"),
            "roc_curves": str(folder / "plots" / "roc_curves.png"),
            "classification_report": str(folder / REPORT_FILE),
            "grad_cam_dir": str(folder / "grad_cam"),
        },
    }
    return {key: to_json_safe(value) for key, value in document.items()}


def original_summary(results: Iterable[FoldResult], model_folder: Path) -> dict[str, Any]:
    """The original's ``summary.json`` over ``results``, one or more folds of one model, by number."""
    folds = [original_metrics(result, model_folder / f"fold_{result.fold}") for result in results]
    *_, last = results
    settings = last.provenance.config | {"distributed": last.provenance.processes > 1}
    return {
        "model_name": last.model_name,
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "average_test_accuracy": sum(fold["test_accuracy"] for fold in folds) / len(folds),
        "fold_accuracies": {f"fold_{fold['fold']}": fold["test_accuracy"] for fold in folds},
        "args": {flag: settings[flag] for flag in ORIGINAL_FLAGS},
        "fold_results": folds,
    }
