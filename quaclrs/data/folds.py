"""The cross-validation protocol: which folds train, validate and test, and the class weights.

For test fold k of n, fold k − 1 validates (fold n for k = 1), and all others train.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quaclrs.errors import TrainingError, UsageError

DEFAULT_NUM_FOLDS = 10
_MOST_NAMED = 5
"""Classes named in one message."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The folds of one training. ``train`` has all folds other than ``validation`` and ``test``."""

    train: tuple[int, ...]
    validation: int
    test: int


class SampleSplit(NamedTuple):
    """Sample numbers (int64, ascending) of one training: those of its training, validation and test folds."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split_for(test_fold: int, num_folds: int = DEFAULT_NUM_FOLDS) -> Split:
    """The split of the original trainer: the fold before ``test_fold`` validates, where ``num_folds`` precedes 1.

    Raises :class:`UsageError` for a fold outside 1..num_folds, and for fewer than 3 folds.
    """
    if num_folds < 3:
        raise UsageError(f"--num_folds {num_folds}: training, validation and test need at least 3 folds")
    if not 1 <= test_fold <= num_folds:
        raise UsageError(f"--fold {test_fold}: there are folds 1 to {num_folds}; choose one of them (or --num_folds)")
    validation = test_fold - 1 or num_folds
    train = tuple(k for k in range(1, num_folds + 1) if k not in (test_fold, validation))
    return Split(train=train, validation=validation, test=test_fold)


def select(fold: NDArray[np.int64], split: Split) -> SampleSplit:
    """The sample numbers of training, validation and test, given each sample's ``fold`` (N,).

    Raises :class:`TrainingError` naming the fold if one of the three is empty.
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


def refuse_absent_classes(
    label: NDArray[np.int64], fold: NDArray[np.int64], classes: tuple[str, ...], split: Split, num_folds: int
) -> None:
    """Raise :class:`TrainingError` if a class has no sample in ``split``'s training folds.

    The message names the fold, the class, the folds that hold the class, and the folds that can be trained.
    ``label`` (N,) and ``fold`` (N,) are those of all samples.
    """
    counts = np.zeros((len(classes), num_folds + 1), np.int64)  # counts: (classes, folds), where fold 0 is empty
    np.add.at(counts, (label, fold), 1)
    absent = np.flatnonzero(counts[:, split.train].sum(axis=1) == 0).tolist()
    if not absent:
        return
    named = [f"{classes[i]} (rows in fold(s): {_listed(np.flatnonzero(counts[i]))})" for i in absent[:_MOST_NAMED]]
    more = f" and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
    trainable = [k for k in range(1, num_folds + 1) if _is_trainable(counts, split_for(k, num_folds))]
    others = "train the folds that have all classes (" + ", ".join(f"--fold {k}" for k in trainable) + "), "
    raise TrainingError(
        f"--fold {split.test}: no training rows for class {', '.join(named)}{more} in its training fold(s) "
        f"{_listed(split.train)}; {others if trainable else ''}add rows, or take the class out of the CSV"
    )


def _is_trainable(counts: NDArray[np.int64], split: Split) -> bool:
    """Whether each class of ``counts`` (classes, folds) has training samples, and the other two parts have some."""
    rows = counts.sum(axis=0)
    return bool(counts[:, split.train].sum(axis=1).all() and rows[split.validation] and rows[split.test])


def _listed(folds: Iterable[int]) -> str:
    return ", ".join(str(k) for k in folds) or "none"


def class_weights(labels: NDArray[np.int64], classes: tuple[str, ...]) -> NDArray[np.float32]:
    """(classes,) float32: ``N / (classes · count)``, from the training ``labels`` (N,) int64.

    Equal to scikit-learn's ``compute_class_weight("balanced")``. Raises :class:`TrainingError` naming the classes
    without rows.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        absent = ", ".join(classes[i] for i in np.flatnonzero(counts == 0))
        raise TrainingError(f"no training rows for class {absent}; add some, or take the class out of the CSV")
    weights: NDArray[np.float32] = (len(labels) / (len(classes) * counts)).astype(np.float32)
    return weights
