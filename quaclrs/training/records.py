"""The figures of one epoch: an entry of the history in checkpoints and in ``metrics.json``. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One finished epoch: training, then validation."""

    epoch: int
    """From 1."""
    learning_rate: float
    """In effect during the epoch."""
    train_loss: float
    """Mean over samples of the minimised loss, including the auxiliary loss."""
    train_accuracy: float
    """Fraction."""
    val_loss: float
    """Class-weighted cross-entropy: Σ w·loss / Σ w."""
    val_accuracy: float
    """Fraction."""
    train_seconds: float
    val_seconds: float
    train_images_per_s: float
    val_images_per_s: float
    train_data_wait: float
    """Fraction of ``train_seconds`` in which the training thread had no batch."""
    val_data_wait: float

    def to_json(self) -> dict[str, Any]:
        """The entry of ``history`` in metrics.json. A value that is not finite becomes None, since JSON has no NaN."""
        return {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> EpochRecord:
        """The inverse of :meth:`to_json`: None becomes NaN. Raises TypeError for missing or unknown keys."""
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in document.items()}
        return cls(**values)
