"""The results of a fold and of all folds of a model, and their documents ``metrics.json`` and ``summary.json``.

Accuracies and other shares are fractions, times are seconds, epochs count from 1.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quaclrs.errors import TrainingError
from quaclrs.report.metrics import METRICS, Score, summarised_keys, to_json_safe
from quaclrs.training.records import EpochRecord

METRICS_FILE = "metrics.json"
SUMMARY_FILE = "summary.json"
STD_DDOF = 1
"""Of every ``std_…`` in ``summary.json``, in NumPy's word: the sum of squares is divided by the number of folds − 1."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The settings, data and machine that a result was made with."""

    config: dict[str, Any]
    """Every field of TrainConfig."""
    processes: int
    global_batch: int
    loader: str
    image_size: int
    data: dict[str, Any]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the documents hold it, among their own keys."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Provenance:
        """The reverse of :meth:`to_json`; ignores the document's other keys. Raises KeyError for a missing one."""
        return cls(**{field.name: document[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class FoldFigures:
    """One fold's entry in ``folds`` of ``summary.json``."""

    fold: int
    scores: dict[str, Score]
    """The metrics that are summarised, ``test_accuracy`` among them."""
    test_loss: float | None
    best_epoch: int
    epochs_run: int
    train_images_per_s: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The entry, its scores among the other keys."""
        return {
            "fold": self.fold,
            "test_accuracy": self.scores["test_accuracy"],
            "test_loss": self.test_loss,
            **self.scores,
            "best_epoch": self.best_epoch,
            "epochs_run": self.epochs_run,
            "train_images_per_s": self.train_images_per_s,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> FoldFigures:
        """The reverse of :meth:`to_json`. Metrics that were added since are None. Raises KeyError for other keys."""
        values = {field.name: entry[field.name] for field in fields(cls) if field.name != "scores"}
        return cls(scores={key: entry.get(key) for key in summarised_keys()}, **values)


@dataclass(frozen=True, kw_only=True)
class FoldResult:
    """One fold, trained and tested."""

    model_name: str
    fold: int
    scores: dict[str, Score]
    """Every metric of report/metrics.py by its key, on the test samples."""
    test_loss: float
    """Class-weighted cross-entropy."""
    best_epoch: int
    """Whose weights were tested."""
    history: tuple[EpochRecord, ...]
    stopped_early: bool
    num_samples: dict[str, int]
    """Of ``train``, ``validation`` and ``test``."""
    test_images_per_s: float
    class_names: tuple[str, ...]
    confusion_matrix: list[list[int]]
    """(C, C) counts, row = label, column = prediction."""
    seconds: float
    """From the start, or the last resume, to the written report."""
    identity: dict[str, Any]
    """What a resume must agree with, see :meth:`quaclrs.experiment.run.Run.identity`."""
    provenance: Provenance

    @property
    def test_accuracy(self) -> float:
        """Fraction of correct predictions."""
        return float(self.scores["test_accuracy"] or 0.0)

    @property
    def best(self) -> EpochRecord:
        """The epoch whose weights were tested."""
        return self.history[self.best_epoch - 1]

    @property
    def figures(self) -> FoldFigures:
        """What ``summary.json`` says about the fold."""
        return FoldFigures(
            fold=self.fold,
            scores={key: self.scores[key] for key in summarised_keys()},
            test_loss=None if math.isnan(self.test_loss) else self.test_loss,
            best_epoch=self.best_epoch,
            epochs_run=len(self.history),
            train_images_per_s=statistics.median(record.train_images_per_s for record in self.history),
            seconds=self.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        document = {
            "model_name": self.model_name,
            "test_accuracy": self.test_accuracy,
            "test_loss": self.test_loss,
            **self.scores,
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best.val_accuracy,
            "best_val_loss": self.best.val_loss,
            "epochs_run": len(self.history),
            "num_samples": self.num_samples,
            "train_images_per_s": self.figures.train_images_per_s,
            "train_data_wait": statistics.median(record.train_data_wait for record in self.history),
            "test_images_per_s": self.test_images_per_s,
            "class_names": list(self.class_names),
            "confusion_matrix": self.confusion_matrix,
            "history": [record.to_json() for record in self.history],
            **self.provenance.to_json(),
            "fold": self.fold,
            "stopped_early": self.stopped_early,
            "seconds": self.seconds,
            "run": self.identity,
        }
        return {key: to_json_safe(value) for key, value in document.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> FoldResult:
        """The reverse of :meth:`to_json`. Metrics that were added since are None. Raises KeyError for other keys."""
        return cls(
            model_name=document["model_name"],
            fold=document["fold"],
            scores={metric.key: document.get(metric.key) for metric in METRICS.values()},
            test_loss=math.nan if document["test_loss"] is None else document["test_loss"],
            best_epoch=document["best_epoch"],
            history=tuple(EpochRecord.from_json(entry) for entry in document["history"]),
            stopped_early=document["stopped_early"],
            num_samples=document["num_samples"],
            test_images_per_s=document["test_images_per_s"],
            class_names=tuple(document["class_names"]),
            confusion_matrix=document["confusion_matrix"],
            seconds=document["seconds"],
            identity=document["run"],
            provenance=Provenance.from_json(document),
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All folds of one model that have results."""

    model_name: str
    folds: tuple[FoldFigures, ...]
    """By number."""
    provenance: Provenance
    """Of the fold that was finished last."""

    def mean(self, key: str) -> float | None:
        """Mean of a metric over the folds that have it; None without any."""
        values = self._values(key)
        return statistics.fmean(values) if values else None

    def std(self, key: str) -> float | None:
        """Sample standard deviation of a metric over the folds that have it; None for fewer than two."""
        values = self._values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, key: str) -> list[float]:
        return [value for fold in self.folds if (value := fold.scores.get(key)) is not None]

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        statistics_of = (("mean", self.mean), ("std", self.std))
        return {
            "model_name": self.model_name,
            "num_folds": len(self.folds),
            **{f"{name}_{key}": compute(key) for key in summarised_keys() for name, compute in statistics_of},
            "std_ddof": STD_DDOF,
            "fold_accuracies": {f"fold_{fold.fold}": fold.scores["test_accuracy"] for fold in self.folds},
            "folds": [fold.to_json() for fold in self.folds],
            "seconds": sum(fold.seconds for fold in self.folds),
            "train_images_per_s": statistics.median(fold.train_images_per_s for fold in self.folds),
            **self.provenance.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Summary:
        """The reverse of :meth:`to_json`. Raises KeyError for a missing key."""
        return cls(
            model_name=document["model_name"],
            folds=tuple(FoldFigures.from_json(entry) for entry in document["folds"]),
            provenance=Provenance.from_json(document),
        )


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object that a run left behind. Raises :class:`TrainingError` naming a file that cannot be read."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable_error(path, error) from None


def parse_fold_result(document: Mapping[str, Any], path: Path) -> FoldResult:
    """The result that :func:`read_document` read from ``path``. Raises :class:`TrainingError` for missing keys."""
    try:
        return FoldResult.from_json(document)
    except (KeyError, TypeError) as error:
        raise _unreadable_error(path, error) from None


def _unreadable_error(path: Path, error: Exception) -> TrainingError:
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return TrainingError(f"{path}: cannot be read ({reason}); delete it and run again")
