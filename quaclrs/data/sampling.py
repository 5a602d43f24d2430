"""Sample order: which sample comes when, as a pure function of (seed, epoch, step, world_size, rank).

No loader decides anything about order. Each receives the sample numbers of its batches. So all loaders agree, resuming
needs only (epoch, step), and all world sizes that divide the global batch see the same global batches.

An epoch of 10 samples in global batches of 4 keeps its smaller last batch::

    world_size 1   | 7 2 9 0 | 4 1 8 3 | 6 5 |
    world_size 2   | 7 2 . . | 4 1 . . | 6 5 . . |   rank 0    each rank takes a contiguous slice of each batch,
                   | . . 9 0 | . . 8 3 | . . 7 2 |   rank 1    and the last batch wraps around to 7 2

The last training batch wraps around to the start of the epoch only as far as needed: until all ranks have equally many
samples, and at least two each, because BatchNorm cannot train on one. A last batch of a single sample is merged into
the batch before it. Evaluation neither wraps nor pads: each sample occurs exactly once.

If no rank can hold all samples, rank r holds those with ``sample_number % world_size == r`` and permutes only them. An
epoch then consists of world_size permutations side by side instead of one global permutation
(:func:`rank_shard_batches`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
"""Rows or sample numbers."""

_STORAGE_STREAM, _EPOCH_STREAM, _STEP_STREAM, _PART_STREAM = 0, 1, 2, 3
"""Separate random streams, so that no epoch repeats the order on disk."""


def stable_permutation(n: int, *entropy: int) -> Numbers:
    """(n,) int64: a permutation of 0..n-1 that depends only on ``entropy`` (non-negative integers).

    It sorts raw output of a NumPy bit generator, which is guaranteed never to change (NEP 19).
    ``Generator.permutation`` has no such guarantee.
    """
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def storage_order(fold: Numbers, seed: int) -> Numbers:
    """(N,) int64: the row of each sample number, given each row's ``fold``.

    Folds ascend; the rows of each fold are shuffled. The order of a fold depends only on its own rows, so folds can be
    packed separately.
    """
    parts = []
    for k in np.unique(fold):
        rows = np.flatnonzero(fold == k)
        parts.append(rows[stable_permutation(len(rows), seed, _STORAGE_STREAM, int(k))])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def epoch_order(samples: Numbers, seed: int, epoch: int) -> Numbers:
    """``samples`` (N,) in the global order of ``epoch``: a permutation of all of them."""
    order: Numbers = samples[stable_permutation(len(samples), seed, _EPOCH_STREAM, epoch)]
    return order


def train_batches(order: Numbers, global_batch: int, world_size: int = 1, rank: int = 0) -> list[Numbers]:
    """The batches of ``rank``: slices of ``order``, each of up to ``global_batch / world_size`` samples.

    Every rank has equally many batches of equal lengths. Raises ``ValueError`` unless ``global_batch`` is a multiple of
    ``world_size`` and ``order`` has at least two samples.
    """
    _check_rank(world_size, rank)
    if global_batch < 1 or global_batch % world_size:
        raise ValueError(f"a global batch of {global_batch} cannot be divided among {world_size} ranks")
    if len(order) < 2:
        raise ValueError(f"training needs at least two samples, not {len(order)}")
    starts = list(range(0, len(order), global_batch))
    if len(order) - starts[-1] == 1 and len(starts) > 1 and global_batch > 1:
        starts.pop()  # merge a last batch of one sample into the batch before it
    batches = []
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        per_rank = -(-(stop - start) // world_size)
        if global_batch > world_size:
            per_rank = max(per_rank, 2)
        first = start + rank * per_rank
        batches.append(order[np.arange(first, first + per_rank) % len(order)])
    return batches


def rank_shard_batches(
    samples: Numbers, global_batch: int, seed: int, epoch: int, world_size: int
) -> list[list[Numbers]]:
    """The batches of every rank in ``epoch``, each rank from its own part of ``samples`` (N,).

    Every rank has equally many batches of equal lengths. Parts differ by a few samples; shorter ones wrap around to
    their own start. Raises ``ValueError`` if a part is empty.
    """
    parts = [samples[samples % world_size == rank] for rank in range(world_size)]
    if min(map(len, parts)) == 0:
        raise ValueError(f"{len(samples)} samples cannot be shared out to {world_size} ranks")
    longest, batches = max(map(len, parts)), []
    for rank, part in enumerate(parts):
        order = part[stable_permutation(len(part), seed, _PART_STREAM, epoch, rank)]
        batches.append(train_batches(order[np.arange(longest) % len(part)], global_batch // world_size))
    return batches


def step_seeds(steps: int, seed: int, epoch: int, rank: int = 0) -> NDArray[np.uint64]:
    """(steps,) uint64: the seed of the device's random numbers (dropout) for each training step of ``epoch``.

    The random numbers of a step do not depend on earlier steps, so resuming needs no random state. Ranks differ.
    """
    return np.random.Philox(np.random.SeedSequence((seed, _STEP_STREAM, epoch, rank))).random_raw(steps)


def evaluation_batches(samples: Numbers, global_batch: int, world_size: int = 1, rank: int = 0) -> list[Numbers]:
    """The batches of ``rank`` over ``samples`` (N,). Each sample is on exactly one rank, exactly once.

    The numbers of batches of two ranks differ by at most one.
    """
    _check_rank(world_size, rank)
    per_rank = max(global_batch // world_size, 1)
    starts = range(rank * per_rank, len(samples), per_rank * world_size)
    return [samples[start : start + per_rank] for start in starts]


def rank_shard_evaluation_batches(samples: Numbers, global_batch: int, world_size: int, rank: int) -> list[Numbers]:
    """Positions in ``samples`` (N,) of the samples that ``rank`` holds, in batches.

    Over all ranks, each position occurs exactly once.
    """
    _check_rank(world_size, rank)
    return evaluation_batches(np.flatnonzero(samples % world_size == rank), max(global_batch // world_size, 1))


def _check_rank(world_size: int, rank: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
