"""Contract of the public API: it has the names that it lists, and gives the results of the command lines."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from packing import pack_tree
from png_trees import PngTree, make_rows, write_csv, write_tree

import quaclrs
from quaclrs import Dataset, batches, evaluate, make_loader, open_shards
from quaclrs.data.folds import select, split_for
from quaclrs.data.sampling import epoch_order, train_batches
from quaclrs.errors import QuaclrsError, ShardError, UsageError

SIZE = 32
LOADERS = (("png", "dali"), ("png", "files"), ("png", "resident"), ("rgb", "mapped"), ("rgb", "resident"))


@pytest.fixture(scope="module")
def shards_of(png_shards: Path, rgb_shards: Path) -> dict[str, Path]:
    return {"png": png_shards, "rgb": rgb_shards}


@pytest.fixture
def data(rgb_shards: Path) -> Iterator[Dataset]:
    opened = open_shards(rgb_shards)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    return write_tree(tmp_path_factory.mktemp("api"), make_rows(("dog_bark", "drilling"), (1, 2, 3)))


class Linear(torch.nn.Module):
    """A user's own model, with one weight per class and channel; it remembers how often it ran in training mode."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, classes)
        self.calls = {True: 0, False: 0}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls[self.training] += 1
        scores: torch.Tensor = self.head(images.mean((2, 3)))
        return scores


# --- names ---


def test_every_public_name_is_there() -> None:
    api = importlib.import_module("quaclrs.api")
    assert sorted({*api.__all__, "__version__"}) == sorted(quaclrs.__all__)
    assert set(quaclrs.__all__) <= set(dir(quaclrs))
    for name in api.__all__:
        assert getattr(quaclrs, name) is getattr(api, name)
        assert getattr(quaclrs, name).__doc__


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'quaclrs' has no attribute 'open_shard'"):
        getattr(quaclrs, "open_shard")  # noqa: B009  # mypy knows it too
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        exec("from quaclrs import no_such_name")


# --- reading ---


def test_splits_follow_the_protocol(data: Dataset) -> None:
    for test_fold in (1, 2, 10):
        split = data.split(test_fold)
        for ours, expected in zip(split, select(data.fold, split_for(test_fold, 10)), strict=True):
            np.testing.assert_array_equal(ours, expected)
        assert set(data.fold[split.test]) == {test_fold}
        assert set(data.fold[split.validation]) == {test_fold - 1 or 10}
        assert sum(map(len, split)) == len(data)
    with pytest.raises(UsageError, match="there are folds 1 to 10"):
        data.split(11)


@pytest.mark.parametrize(("encoding", "loader"), LOADERS)
def test_batches_come_as_the_trainer_takes_them(encoding: str, loader: str, shards_of: dict[str, Path]) -> None:
    """In the order of an epoch with ``epoch``, the smaller last batch kept; in the order given without."""
    data = open_shards(shards_of[encoding])
    samples = data.split(1).train[:33]  # in batches of 16: a single last sample joins its neighbour
    with make_loader(data, SIZE, batch_size=16, loader=loader, device="cpu", num_workers=1) as opened:
        assert opened.name == loader
        for epoch in (1, 2):
            found = [(batch.index, batch.labels) for batch in batches(opened, samples, epoch=epoch, seed=3)]
            expected = train_batches(epoch_order(samples, 3, epoch), 16)
            assert [len(index) for index, _ in found] == [16, 17]
            for (index, labels), numbers in zip(found, expected, strict=True):
                np.testing.assert_array_equal(index, numbers)
                np.testing.assert_array_equal(labels, data.label[numbers])
        in_order = list(batches(opened, samples, batch_size=10))
        assert [len(batch) for batch in in_order] == [10, 10, 10, 3]
        np.testing.assert_array_equal(torch.cat([batch.index for batch in in_order]), samples)
        images = next(batches(opened, samples)).images
        assert (images.shape, images.dtype) == ((16, 3, SIZE, SIZE), torch.float32)
    data.close()


def test_too_large_a_batch_is_refused(data: Dataset) -> None:
    with (
        make_loader(data, SIZE, batch_size=4, device="cpu") as loader,
        pytest.raises(ValueError, match="a batch of 8 samples from a loader made with batch_size=4"),
    ):
        batches(loader, np.arange(16), batch_size=8)


def test_a_loader_is_chosen_and_refused_as_by_the_command(data: Dataset) -> None:
    with make_loader(data, SIZE, device="cpu", dtype=torch.uint8) as loader:
        assert (loader.name, loader.device.type) == ("mapped", "cpu")
        assert next(batches(loader, np.arange(3))).images.dtype == torch.uint8
    with pytest.raises(UsageError, match="--loader best: choose one of auto, resident"):
        make_loader(data, SIZE, loader="best")
    with pytest.raises(QuaclrsError, match="already resized to 32"):
        make_loader(data, 64, device="cpu")


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest.json: no such file; make shards with quaclrs-pack"):
        open_shards(str(tmp_path / "nowhere"))


def test_what_to_know_about_the_data_is_logged(
    small_tree: PngTree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A leak as a warning, which Python shows unless told otherwise; what is merely worth knowing as information."""
    rows = [dict(row) for row in small_tree.rows]
    rows[0]["fsID"] = next(row["fsID"] for row in rows if row["fold"] != rows[0]["fold"])
    leaking = PngTree(write_csv(tmp_path / "data.csv", [*rows, rows[1]]), small_tree.spectrograms_dir, rows)
    pack_tree(leaking, tmp_path / "shards")
    with caplog.at_level(logging.INFO, "quaclrs"):
        open_shards(tmp_path / "shards").close()
    assert any("lie in more than one fold, which leaks" in record.message for record in caplog.records)
    for record in caplog.records:
        assert (record.levelno == logging.INFO) == ("rows share their image" in record.message)


# --- scoring ---


def test_an_evaluation_is_torchs_own(data: Dataset) -> None:
    """Against the same sums over one batch of everything, with and without class weights."""
    samples = data.split(2).test
    model = Linear(len(data.classes))
    weights = quaclrs.class_weights(data.label[data.split(2).train], data.classes)
    with make_loader(data, SIZE, batch_size=7, device="cpu") as loader:
        images = torch.cat([batch.images for batch in batches(loader, samples)])
        labels = torch.from_numpy(data.label[samples])
        with torch.no_grad():
            scores = model(images)
        for given in (None, weights * np.arange(1, 14, dtype=np.float32)):
            found = evaluate(model, loader, samples, class_weights=given)
            weight = None if given is None else torch.from_numpy(given)
            expected = float(torch.nn.functional.cross_entropy(scores, labels, weight))
            assert found.loss == pytest.approx(expected, rel=1e-5)
            assert found.accuracy == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
            np.testing.assert_allclose(found.probabilities, scores.softmax(1).numpy(), rtol=1e-4)
            np.testing.assert_array_equal(found.index, samples)
        unlabelled = evaluate(model, loader, samples, labelled=False)
        np.testing.assert_array_equal(unlabelled.probabilities, found.probabilities)
        assert math.isnan(unlabelled.loss)
        assert math.isnan(unlabelled.accuracy)


def test_an_evaluation_leaves_the_model_as_it_was(data: Dataset) -> None:
    model = Linear(len(data.classes))
    with make_loader(data, SIZE, batch_size=16, device="cpu") as loader:
        for training in (True, False):
            model.train(training)
            model.calls = {True: 0, False: 0}
            evaluate(model, loader, np.arange(20))
            assert model.calls == {True: 0, False: 2}
            assert model.training is training
        with pytest.raises(ValueError, match="no samples to evaluate"):
            evaluate(model, loader, np.arange(0))


# --- packing and training ---


def test_packing_and_training_in_python(small_tree: PngTree, tmp_path: Path) -> None:
    """The settings are the flags, paths may be strings, and what would be printed goes to ``log``."""
    shards = tmp_path / "shards"
    packed = quaclrs.pack(
        csv_file=str(small_tree.csv_file),
        spectrograms_dir=str(small_tree.spectrograms_dir),
        output_dir=str(shards),
        encoding="indexed",
        num_workers=1,
    )
    assert packed.missing_folds == ()
    lines: list[str] = []
    summaries = quaclrs.train(
        shards=str(shards),
        model_name="mobilenet",
        num_folds=3,
        fold=2,
        epochs=1,
        batch_size=8,
        image_size=16,
        gradcam_per_class=0,
        device="cpu",
        output_dir=str(tmp_path / "results"),
        log=lines.append,
    )
    assert list(summaries) == ["mobilenet"]
    assert (tmp_path / "results" / "mobilenet" / "fold_2" / "metrics.json").is_file()
    assert any(line.startswith("fold 2: test accuracy") for line in lines)


def test_a_setting_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="batchsize"):
        quaclrs.train(batchsize=3)
    with pytest.raises(UsageError, match="--epochs 0: at least 1"):
        quaclrs.train(epochs=0)
