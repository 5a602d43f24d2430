"""The cross-validation protocol as arithmetic: which folds train, validate and test, and how classes are weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quaclrs.errors import TrainingError, UsageError

DEFAULT_NUM_FOLDS = 10


@dataclass(frozen=True, kw_only=True)
class Split:
    """The folds of one training: ``train`` are all but ``validation`` and ``test``."""

    train: tuple[int, ...]
    validation: int
    test: int


class SampleSplit(NamedTuple):
    """Sample numbers (int64, ascending) of one training: those of its training, validation and test folds."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_for(test_fold: int, num_folds: int = DEFAULT_NUM_FOLDS) -> Split:
    """The original's split: validation is the fold before the test fold, going round from 1 to ``num_folds``.

    Raises :class:`UsageError` for a fold outside 1..num_folds, or fewer than 3 folds.
    """
    if num_folds < 3:
        raise UsageError(f"--num_folds {num_folds}: training, validation and test need at least 3 folds")
    if not 1 <= test_fold <= num_folds:
        raise UsageError(f"--fold {test_fold}: there are folds 1 to {num_folds}; choose one of them (or --num_folds)")
    validation = test_fold - 1 or num_folds
    train = tuple(k for k in range(1, num_folds + 1) if k not in (test_fold, validation))
    return Split(train=train, validation=validation, test=test_fold)


def select(fold: np.ndarray, split: Split) -> SampleSplit:
    """Sample numbers (int64, ascending) for training, validation and test, given each sample's ``fold`` (N,).

    Raises :class:`TrainingError` naming the fold when one of the three has no samples.
    """
    parts = tuple(np.flatnonzero(np.isin(fold, chosen)) for chosen in (split.train, split.validation, split.test))
    present = ", ".join(str(k) for k in np.unique(fold))
    for part, name, chosen in zip(
        parts, ("training", "validation", "test"), (split.train, split.validation, split.test), strict=True
    ):
        if part.size == 0:
            raise TrainingError(
                f"--fold {split.test}: its {name} fold(s) {chosen} have no rows (folds with rows: {present}); "
                "choose another --fold, or say how many folds there are with --num_folds"
            )
    return SampleSplit(*parts)


def class_weights(labels: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """(classes,) float32: N / (classes · count), from the training ``labels`` (N,) int64.

    The same as scikit-learn's ``compute_class_weight("balanced")``. Raises :class:`TrainingError` naming a class
    without rows.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        absent = ", ".join(classes[i] for i in np.flatnonzero(counts == 0))
        raise TrainingError(f"no training rows for class {absent}; add some, or take the class out of the CSV")
    return (len(labels) / (len(classes) * counts)).astype(np.float32)
