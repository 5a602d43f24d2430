"""Which sample comes when, by arithmetic alone: a pure function of (seed, epoch, step, world size, rank).

No loader decides anything about order; each is handed the sample numbers of its batches. So all loaders agree, a resume
is an (epoch, step) pair, and world sizes that divide the global batch see the same global batches.

A training epoch of 10 samples in global batches of 4 keeps its smaller last batch::

    world 1   | 7 2 9 0 | 4 1 8 3 | 6 5 |
    world 2   | 7 2 . . | 4 1 . . | 6 5 . . |   rank 0      a rank takes its contiguous slice of each batch
              | . . 9 0 | . . 8 3 | . . 7 2 |   rank 1      and the last batch wraps round to 7 2

The last batch wraps round to the epoch's start only as far as its division needs (two samples a rank at least, because
BatchNorm cannot train on one), and a last batch of a single sample joins its neighbour. Evaluation never wraps and
never pads: each sample exactly once.

Where the data are shared out because no rank can hold them all, rank r of W has the samples whose number leaves r when
divided by W, and permutes those alone: an epoch is then W permutations side by side, not one of everything
(:func:`rank_shard_batches`).
"""

from __future__ import annotations

import numpy as np

_STORAGE_STREAM, _EPOCH_STREAM, _STEP_STREAM, _PART_STREAM = 0, 1, 2, 3
"""Separate random streams, so that no epoch repeats the order on disk."""


def stable_permutation(n: int, *entropy: int) -> np.ndarray:
    """(n,) int64: a permutation of 0..n-1 that depends on ``entropy`` (non-negative integers) and nothing else.

    The raw output of a NumPy bit generator is guaranteed never to change (NEP 19), which ``Generator.permutation`` is
    not; so the keys are sorted here.
    """
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def storage_order(fold: np.ndarray, seed: int) -> np.ndarray:
    """(N,) int64 rows in the order of sample numbers: fold by fold ascending, shuffled inside each fold.

    A fold's order depends on its own rows only, so folds can be packed apart.
    """
    parts = []
    for k in np.unique(fold):
        rows = np.flatnonzero(fold == k)
        parts.append(rows[stable_permutation(len(rows), seed, _STORAGE_STREAM, int(k))])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def epoch_order(samples: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """``samples`` (N,) in the global order of ``epoch``: a true permutation over all of them."""
    return samples[stable_permutation(len(samples), seed, _EPOCH_STREAM, epoch)]


def train_batches(order: np.ndarray, global_batch: int, world: int = 1, rank: int = 0) -> list[np.ndarray]:
    """The batches of ``rank``: each an (up to global_batch / world,) slice of ``order``, equally long on all ranks.

    ``global_batch`` must be a multiple of ``world`` and ``order`` hold two samples at least (ValueError).
    """
    _check_world(world, rank)
    if global_batch < 1 or global_batch % world:
        raise ValueError(f"a global batch of {global_batch} cannot be divided among {world} ranks")
    if len(order) < 2:
        raise ValueError(f"training needs at least two samples, not {len(order)}")
    starts = list(range(0, len(order), global_batch))
    if len(order) - starts[-1] == 1 and len(starts) > 1 and global_batch > 1:
        starts.pop()  # a lone last sample joins its neighbour
    batches = []
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        per_rank = -(-(stop - start) // world)
        if global_batch > world:
            per_rank = max(per_rank, 2)
        first = start + rank * per_rank
        batches.append(order[np.arange(first, first + per_rank) % len(order)])
    return batches


def rank_shard_batches(
    samples: np.ndarray, global_batch: int, seed: int, epoch: int, world: int
) -> list[list[np.ndarray]]:
    """For each rank its batches of ``epoch`` from its own part of ``samples`` (N,), equally many and equally long on
    all ranks.

    Parts differ by a few samples; shorter ones wrap round to their own start. Raises ValueError when a part is empty.
    """
    parts = [samples[samples % world == rank] for rank in range(world)]
    if min(map(len, parts)) == 0:
        raise ValueError(f"{len(samples)} samples cannot be shared out to {world} ranks")
    longest, batches = max(map(len, parts)), []
    for rank, part in enumerate(parts):
        order = part[stable_permutation(len(part), seed, _PART_STREAM, epoch, rank)]
        batches.append(train_batches(order[np.arange(longest) % len(part)], global_batch // world))
    return batches


def step_seeds(steps: int, seed: int, epoch: int, rank: int = 0) -> np.ndarray:
    """(steps,) uint64: what to seed the device's random numbers (dropout) with before each training step of ``epoch``.

    So a resume needs no random state: the draws of a step do not depend on the steps before it. Ranks draw differently.
    """
    return np.random.Philox(np.random.SeedSequence((seed, _STEP_STREAM, epoch, rank))).random_raw(steps)


def evaluation_batches(samples: np.ndarray, global_batch: int, world: int = 1, rank: int = 0) -> list[np.ndarray]:
    """The batches of ``rank`` over ``samples`` (N,), each sample on exactly one rank exactly once; ranks may differ by
    a batch.
    """
    _check_world(world, rank)
    per_rank = max(global_batch // world, 1)
    starts = range(rank * per_rank, len(samples), per_rank * world)
    return [samples[start : start + per_rank] for start in starts]


def rank_shard_evaluation_batches(samples: np.ndarray, global_batch: int, world: int, rank: int) -> list[np.ndarray]:
    """Positions in ``samples`` (N,) of those that ``rank`` holds, in batches; each on exactly one rank exactly once."""
    _check_world(world, rank)
    return evaluation_batches(np.flatnonzero(samples % world == rank), max(global_batch // world, 1))


def _check_world(world: int, rank: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in a world of {world}")
