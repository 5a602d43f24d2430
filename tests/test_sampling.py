"""Contract of data/sampling.py and data/folds.py: sample order and fold splits are right for every small world_size."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from quaclrs.data.folds import class_weights, refuse_absent_classes, select, split_for
from quaclrs.data.sampling import (
    epoch_order,
    evaluation_batches,
    rank_shard_batches,
    rank_shard_evaluation_batches,
    stable_permutation,
    step_seeds,
    storage_order,
    train_batches,
)
from quaclrs.errors import TrainingError, UsageError

SIZES = range(2, 28)
WORLDS = range(1, 6)
PER_RANK_BATCHES = (1, 2, 3, 4, 8)


def worlds() -> list[tuple[int, int, int]]:
    """(samples, world_size, global batch), all small ones."""
    return [(n, world, world * batch) for n, world, batch in itertools.product(SIZES, WORLDS, PER_RANK_BATCHES)]


def ranks(order: np.ndarray, global_batch: int, world: int) -> list[list[np.ndarray]]:
    """batches[rank][step]"""
    return [train_batches(order, global_batch, world, rank) for rank in range(world)]


def global_batches(order: np.ndarray, global_batch: int, world: int) -> list[list[int]]:
    """The samples that all ranks together train on in each step."""
    return [np.concatenate(step).tolist() for step in zip(*ranks(order, global_batch, world), strict=True)]


def shuffled(n: int) -> np.ndarray:
    return np.random.default_rng(n).permutation(n) + 100


def test_train_batches_are_equally_long_on_all_ranks() -> None:
    for n, world, global_batch in worlds():
        lengths = [[len(batch) for batch in batches] for batches in ranks(shuffled(n), global_batch, world)]
        assert all(rank == lengths[0] for rank in lengths), (n, world, global_batch)


def test_train_batches_are_the_epoch_in_order_and_wrap_only_at_its_end() -> None:
    for n, world, global_batch in worlds():
        order = shuffled(n)
        steps = global_batches(order, global_batch, world)
        case = (n, world, global_batch)
        assert all(len(step) == global_batch for step in steps[:-1]), case
        seen = list(itertools.chain.from_iterable(steps))
        assert seen[:n] == order.tolist(), case
        surplus = len(seen) - n
        assert seen[n:] == list(itertools.islice(itertools.cycle(order.tolist()), surplus)), case
        wanted = (
            max(math.ceil((n - len(steps[0]) * (len(steps) - 1)) / world), 2 if global_batch > world else 1) * world
        )
        assert len(steps[-1]) == wanted, case  # no more wrapping than dividing needs


def test_ranks_share_no_sample_of_a_step() -> None:
    for n, world, global_batch in worlds():
        steps = global_batches(shuffled(n), global_batch, world)
        for step in steps[:-1]:
            assert len(set(step)) == len(step), (n, world, global_batch)
        if n >= len(steps[-1]):
            assert len(set(steps[-1])) == len(steps[-1]), (n, world, global_batch)


def test_no_rank_trains_on_one_sample_where_it_can_be_avoided() -> None:
    for n, world, global_batch in worlds():
        if global_batch > world:
            for batches in ranks(shuffled(n), global_batch, world):
                assert min(len(batch) for batch in batches) >= 2, (n, world, global_batch)


def test_a_lone_last_sample_joins_its_neighbour() -> None:
    order = np.arange(9)
    assert [batch.tolist() for batch in train_batches(order, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert [batch.tolist() for batch in train_batches(order, 4, 2, 1)] == [[2, 3], [7, 8, 0]]


def test_the_drawing_in_the_docstring() -> None:
    order = np.array([7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
    assert [batch.tolist() for batch in train_batches(order, 4)] == [[7, 2, 9, 0], [4, 1, 8, 3], [6, 5]]
    # the last two samples make a step of two per rank, so it wraps round to 7 2
    assert [batch.tolist() for batch in train_batches(order, 4, 2, 0)] == [[7, 2], [4, 1], [6, 5]]
    assert [batch.tolist() for batch in train_batches(order, 4, 2, 1)] == [[9, 0], [8, 3], [7, 2]]


def test_every_world_size_sees_the_same_global_batches() -> None:
    for n, global_batch in itertools.product(SIZES, (2, 4, 6, 12, 60)):
        order = shuffled(n)
        alone = global_batches(order, global_batch, 1)
        for world in (world for world in WORLDS if global_batch % world == 0):
            together = global_batches(order, global_batch, world)
            assert len(together) == len(alone), (n, world, global_batch)
            assert together[:-1] == alone[:-1], (n, world, global_batch)
            assert together[-1][: len(alone[-1])] == alone[-1], (n, world, global_batch)


@pytest.mark.parametrize(("global_batch", "world"), [(5, 2), (0, 1), (1, 2), (-2, 1)])
def test_a_batch_that_cannot_be_divided_is_refused(global_batch: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"a global batch of {global_batch} cannot be divided among {world} ranks"):
        train_batches(np.arange(10), global_batch, world)


@pytest.mark.parametrize("n", [0, 1])
def test_training_on_fewer_than_two_samples_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least two samples, not {n}"):
        train_batches(np.arange(n), 4)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not in a world of 2"):
        train_batches(np.arange(8), 4, 2, rank)
    with pytest.raises(ValueError, match=f"rank {rank} is not in a world of 2"):
        evaluation_batches(np.arange(8), 4, 2, rank)


def test_evaluation_meets_each_sample_exactly_once() -> None:
    for n, world, global_batch in itertools.product((0, 1, *SIZES), WORLDS, (1, 3, 4, 8, 20)):
        samples = shuffled(n)
        batches = [evaluation_batches(samples, global_batch, world, rank) for rank in range(world)]
        seen = Counter(int(sample) for rank in batches for batch in rank for sample in batch)
        assert seen == Counter(samples.tolist()), (n, world, global_batch)
        assert all(1 <= len(batch) <= max(global_batch // world, 1) for rank in batches for batch in rank)
        counts = [len(rank) for rank in batches]
        assert max(counts) - min(counts) <= 1, (n, world, global_batch)


def test_evaluation_alone_keeps_the_order() -> None:
    samples = shuffled(11)
    assert np.concatenate(evaluation_batches(samples, 4)).tolist() == samples.tolist()


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        ((0,), [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]),
        ((42, 1, 0), [7, 3, 4, 2, 5, 9, 6, 8, 0, 1]),
        ((42, 1, 1), [5, 9, 6, 8, 4, 1, 0, 7, 2, 3]),
    ],
)
def test_permutations_never_change(entropy: tuple[int, ...], expected: list[int]) -> None:
    """Golden values: existing shards and runs depend on them."""
    assert stable_permutation(10, *entropy).tolist() == expected


def test_storage_order_never_changes() -> None:
    fold = np.array([2, 1, 2, 1, 2, 1, 2, 1, 3])
    assert storage_order(fold, 0).tolist() == [3, 5, 1, 7, 4, 6, 2, 0, 8]


def test_permutations_are_permutations() -> None:
    for n in (0, 1, 2, 3, 100, 5000):
        assert np.sort(stable_permutation(n, 7, n)).tolist() == list(range(n))


def test_permutations_are_uniform_enough() -> None:
    """Each of the six orders of three samples, over 6000 epochs: within five standard deviations of 1000."""
    counts = Counter(tuple(epoch_order(np.arange(3), 0, epoch).tolist()) for epoch in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * math.sqrt(1000 * 5 / 6) for count in counts.values())


def test_epochs_and_seeds_have_their_own_order() -> None:
    samples = np.arange(50) * 3
    orders = {tuple(epoch_order(samples, seed, epoch).tolist()) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100
    assert {tuple(sorted(order)) for order in orders} == {tuple(samples.tolist())}
    assert epoch_order(samples, 3, 4).tolist() == epoch_order(samples, 3, 4).tolist()


def test_no_epoch_repeats_the_order_on_disk() -> None:
    fold = np.ones(50, dtype=np.int64)
    on_disk = storage_order(fold, 1).tolist()
    assert all(epoch_order(np.arange(50), 1, epoch).tolist() != on_disk for epoch in range(20))


def test_storage_order_goes_fold_by_fold_and_shuffles_inside() -> None:
    fold = np.random.default_rng(0).integers(1, 11, 400)
    order = storage_order(fold, 0)
    assert np.sort(order).tolist() == list(range(400))
    assert (np.diff(fold[order]) >= 0).all()
    for k in range(1, 11):
        inside = order[fold[order] == k]
        assert inside.tolist() != sorted(inside.tolist())
    assert storage_order(fold, 1).tolist() != order.tolist()


def test_a_folds_storage_order_depends_on_its_own_rows_only() -> None:
    fold = np.repeat([1, 2, 3], 20)
    whole = storage_order(fold, 5)
    without_third = storage_order(fold[:40], 5)
    assert whole[:40].tolist() == without_third.tolist()
    other_first = storage_order(fold[20:], 5)
    assert (other_first + 20).tolist() == whole[20:].tolist()


def test_equal_folds_are_shuffled_differently() -> None:
    order = storage_order(np.repeat([1, 2], 30), 0)
    assert order[:30].tolist() != (order[30:] - 30).tolist()


def test_storage_order_of_nothing() -> None:
    assert storage_order(np.zeros(0, dtype=np.int64), 0).tolist() == []


@pytest.mark.parametrize(
    ("test_fold", "validation", "train"),
    [(1, 10, (2, 3, 4, 5, 6, 7, 8, 9)), (2, 1, (3, 4, 5, 6, 7, 8, 9, 10)), (10, 9, (1, 2, 3, 4, 5, 6, 7, 8))],
)
def test_the_originals_splits(test_fold: int, validation: int, train: tuple[int, ...]) -> None:
    split = split_for(test_fold)
    assert (split.test, split.validation, split.train) == (test_fold, validation, train)


@pytest.mark.parametrize("num_folds", range(3, 12))
def test_each_fold_is_tested_and_validated_once_and_never_trained_on_then(num_folds: int) -> None:
    splits = [split_for(fold, num_folds) for fold in range(1, num_folds + 1)]
    everything = set(range(1, num_folds + 1))
    assert {split.test for split in splits} == {split.validation for split in splits} == everything
    for split in splits:
        assert split.test != split.validation
        assert set(split.train) == everything - {split.test, split.validation}


@pytest.mark.parametrize("fold", [0, 11, -1])
def test_a_fold_outside_the_protocol_is_refused(fold: int) -> None:
    with pytest.raises(UsageError, match=f"--fold {fold}: there are folds 1 to 10; choose one of them"):
        split_for(fold)


def test_fewer_than_three_folds_are_refused() -> None:
    with pytest.raises(UsageError, match="--num_folds 2: training, validation and test need at least 3 folds"):
        split_for(1, 2)


def test_select_gives_sample_numbers() -> None:
    fold = np.array([3, 1, 2, 1, 3, 2, 4])
    train, validation, test = select(fold, split_for(1, 4))
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([0, 2, 4, 5], [6], [1, 3])


@pytest.mark.parametrize(
    ("folds", "test_fold", "part"),
    [([2, 4], 1, "test fold(s) 1 "), ([1, 2], 1, "validation fold(s) 4 "), ([1, 4], 1, "training fold(s) (2, 3) ")],
)
def test_a_split_without_rows_names_the_fold_and_those_there_are(folds: list[int], test_fold: int, part: str) -> None:
    with pytest.raises(TrainingError) as caught:
        select(np.array(folds), split_for(test_fold, 4))
    message = str(caught.value)
    assert part + "have no rows" in message
    assert f"folds with rows: {folds[0]}, {folds[1]}" in message
    assert "--num_folds" in message


def test_folds_that_are_not_asked_for_may_be_empty() -> None:
    train, validation, test = select(np.array([3, 2, 1]), split_for(3))
    assert (train.tolist(), validation.tolist(), test.tolist()) == ([2], [1], [0])


@pytest.mark.parametrize("counts", [(1, 1), (3, 1, 8), (420, 449, 432, 449), (1, 1000)])
def test_class_weights_are_scikit_learns(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    weights = class_weights(labels, tuple(f"class{i}" for i in range(len(counts))))
    assert weights.dtype == np.float32
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_classes_without_training_rows_are_named() -> None:
    with pytest.raises(
        TrainingError, match="no training rows for class cat, emu; add some, or take the class out of the CSV"
    ):
        class_weights(np.array([0, 2, 2]), ("ant", "cat", "dog", "emu"))


def test_a_class_without_training_rows_is_named_with_its_folds_and_the_way_out() -> None:
    """Class 1 lies in folds 2 and 3 of 4, which test and validate for test fold 3."""
    fold = np.array([1, 2, 3, 4, 2, 3])
    label = np.array([0, 0, 0, 0, 1, 1])
    for test_fold in (1, 2, 4):
        refuse_absent_classes(label, fold, ("ant", "bee"), split_for(test_fold, 4), 4)
    with pytest.raises(TrainingError) as caught:
        refuse_absent_classes(label, fold, ("ant", "bee"), split_for(3, 4), 4)
    assert str(caught.value) == (
        "--fold 3: no training rows for class bee (rows in fold(s): 2, 3) in its training fold(s) 1, 4; train the "
        "folds that have all classes (--fold 1, --fold 2, --fold 4), add rows, or take the class out of the CSV"
    )


def test_many_classes_without_training_rows_are_cut_and_no_way_is_named_that_does_not_exist() -> None:
    fold = np.array([1, 2, 3] + 7 * [3] + [1])
    label = np.array([0, 0, 0, *range(1, 8), 8])
    with pytest.raises(TrainingError) as caught:
        refuse_absent_classes(label, fold, tuple("abcdefghi"), split_for(3, 3), 3)
    assert str(caught.value) == (
        "--fold 3: no training rows for class b (rows in fold(s): 3), c (rows in fold(s): 3), d (rows in fold(s): 3), "
        "e (rows in fold(s): 3), f (rows in fold(s): 3) and 2 more in its training fold(s) 1; add rows, or take the "
        "class out of the CSV"
    )


# --- data divided among the ranks ---


@pytest.mark.parametrize("world", range(1, 7))
def test_parts_are_permuted_side_by_side(world: int) -> None:
    """Every rank sees each sample of its own part once; ranks with shorter parts see a few of theirs twice.

    Batches are equally long on all ranks.
    """
    samples = np.flatnonzero(np.arange(101) % 10 != 4)
    seen = []
    for epoch in (1, 2):
        of_ranks = rank_shard_batches(samples, 4 * world, 7, epoch, world)
        lengths = [[len(batch) for batch in batches] for batches in of_ranks]
        assert lengths == [lengths[0]] * world
        assert min(lengths[0]) >= 2
        longest = max(np.count_nonzero(samples % world == rank) for rank in range(world))
        for rank, batches in enumerate(of_ranks):
            own = np.concatenate(batches)
            assert set(own) == set(samples[samples % world == rank])
            assert len(own) == longest
        seen.append(np.concatenate([batch for batches in of_ranks for batch in batches]))
    assert not np.array_equal(seen[0], seen[1])


def test_a_rank_without_a_part_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 samples cannot be shared out to 3 ranks"):
        rank_shard_batches(np.array([0, 4]), 6, 0, 1, 3)


@pytest.mark.parametrize("world", range(1, 7))
def test_parts_are_evaluated_once(world: int) -> None:
    samples = np.array([3, 5, 6, 8, 20, 21, 22, 40])
    batches = [rank_shard_evaluation_batches(samples, 4, world, rank) for rank in range(world)]
    for rank, of_rank in enumerate(batches):
        assert all((samples[batch] % world == rank).all() and 0 < len(batch) <= max(4 // world, 1) for batch in of_rank)
    assert sorted(np.concatenate([batch for of_rank in batches for batch in of_rank])) == list(range(8))


@pytest.mark.parametrize("world", [1, 3])
def test_step_seeds_belong_to_their_step(world: int) -> None:
    """They do not depend on the number of steps, and differ for each step, epoch, seed and rank."""
    many = {
        (epoch, seed, rank): step_seeds(50, seed, epoch, rank)
        for epoch in (1, 2)
        for seed in (0, 1)
        for rank in range(world)
    }
    assert len({int(value) for seeds in many.values() for value in seeds}) == 50 * len(many)
    assert np.array_equal(step_seeds(7, 0, 1), many[1, 0, 0][:7])
    assert step_seeds(2, 42, 3, 1).tolist() == [14193243777150724812, 9438729582029806668]
