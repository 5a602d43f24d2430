"""Contract of several ranks: they count each sample once, take the steps of one rank, decide alike and never hang."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from png_trees import PngTree, make_rows, write_csv, write_tree
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.nn import functional
from torchvision import models as torchvision_models
from torchvision import transforms

from quaclrs.cli.train import main
from quaclrs.config import TrainConfig
from quaclrs.data.sampling import epoch_order, train_batches
from quaclrs.errors import Interrupted, UsageError, raised_on_every_rank
from quaclrs.experiment import fold
from quaclrs.experiment.cross_validation import run_cross_validation
from quaclrs.loaders.base import Batch
from quaclrs.loaders.dataset import open_dataset
from quaclrs.system.signals import SignalHandler
from quaclrs.training import checkpoint, loop, trainer
from quaclrs.training.device import pick_device
from quaclrs.training.distributed import AsyncConsensus, World, joined_world, run_rank
from quaclrs.training.state import TrainState
from quaclrs.training.trainer import FoldSamples, Hooks

CLASSES = ("dog_bark", "drilling", "traffic")
SMALL = 32
"""Pixels of MobileNetV2's images."""
SIZES = (1, 2, 3, 4)
DEADLINE_S = 120
"""Of everything, so that a hang is a failure."""
END_S = 30
"""From the end of the first rank to that of the last."""
CPU = torch.device("cpu")
WEIGHTS = np.array([0.5, 1.0, 2.5], np.float32)

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch", "torchvision", "sklearn.metrics", "pytest", "quaclrs.cli.train", "quaclrs.experiment.cross_validation"]
)


# --- ranks as processes ---


class Ranks:
    """``job(*arguments[rank])`` in one process per rank, started as torchrun would but from one that has torch loaded
    already.
    """

    def __init__(
        self, folder: Path, job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], local_size: int = 0
    ) -> None:
        self.folder, size = folder, len(arguments)
        # the launcher's part: a store for them to meet at, on a port that the system chooses
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            **{
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local_size or size), "GLOO_SOCKET_IFNAME": "lo"},
        }
        self.processes = []
        for rank, given in enumerate(arguments):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % (local_size or size))}
            process = _processes.Process(target=_be_rank, args=(environment, folder, job, given))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int | None]:
        """Their exit codes, once all have ended by themselves."""
        deadline, left = time.monotonic() + DEADLINE_S, {process.sentinel for process in self.processes}
        try:
            while left:
                ended = wait(left, timeout=max(0.0, deadline - time.monotonic()))
                assert ended, f"ranks hang: {[self.stderr(rank) for rank in range(len(self.processes))]}"
                left.difference_update(ended)
                deadline = min(deadline, time.monotonic() + END_S)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def results(self) -> list[Any]:
        """What ``job`` returned on each rank."""
        codes = self.wait()
        assert codes == [0] * len(codes), [self.stderr(rank) for rank in range(len(codes))]
        return [pickle.loads((self.folder / f"result{rank}").read_bytes()) for rank in range(len(codes))]

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr{rank}").read_text()

    def stdout(self, rank: int) -> str:
        return (self.folder / f"stdout{rank}").read_text()


def _be_rank(environment: dict[str, str], folder: Path, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    (folder / f"result{rank}").write_bytes(pickle.dumps(job(*arguments)))


# --- what is trained on ---


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Folds of 3, 7 and 5 rows, with three classes in each. Read only."""
    kept: list[dict[str, str]] = []
    for number, size in ((1, 3), (2, 7), (3, 5)):
        rows = [row for row in make_rows(CLASSES, (1, 2, 3)) if row["fold"] == str(number)]
        first_of_each = [next(row for row in rows if row["class"] == name) for name in CLASSES]
        kept += [*first_of_each, *(row for row in rows if row not in first_of_each)][:size]
    return write_tree(tmp_path_factory.mktemp("distributed"), kept)


def flags(tree: PngTree, output_dir: Path, *more: object) -> list[str]:
    common = (
        "--loader files --num_workers 0 --num_folds 3 --fold 1 --batch_size 2 "
        f"--model_name mobilenet --image_size {SMALL}"
    )
    paths = ["--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir, "--output_dir", output_dir]
    return [
        str(flag)
        for flag in (*paths, *common.split(), "--device", "cpu", "--gradcam_per_class", 0, "--epochs", 3, *more)
    ]


def config_for(tree: PngTree, output_dir: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        **{"csv_file": tree.csv_file, "spectrograms_dir": tree.spectrograms_dir, "output_dir": output_dir},
        **{"loader": "files", "num_workers": 0, "num_folds": 3, "fold": 1, "batch_size": 2, "device": "cpu"},
        **{"model_name": "mobilenet", "image_size": SMALL, "gradcam_per_class": 0, "epochs": 3},
    }
    return TrainConfig(**defaults | options)


class _Given:
    """A loader over tensors."""

    name = pixels = "given"

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, replicated: bool = True) -> None:
        self.images, self.labels, self.replicated = images, labels, replicated

    def load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        for numbers in batches:
            yield Batch(self.images[numbers], self.labels[numbers], torch.from_numpy(numbers))

    def close(self) -> None:
        pass


def noise(samples: int, replicated: bool = True) -> _Given:
    """Images of nothing, so that learning them does not help with others."""
    generator = torch.Generator().manual_seed(5)
    images, labels = (
        torch.randn(samples, 3, 4, 4, generator=generator),
        torch.randint(3, (samples,), generator=generator),
    )
    return _Given(images, labels, replicated)


class _FrozenBatchNorm(nn.BatchNorm2d):
    """Keeps its statistics in training too; over a part of the batch they would be others than over the whole."""

    def train(self, mode: bool = True) -> _FrozenBatchNorm:
        super().train(False)
        return self


class _TwoHeads(nn.Module):
    """As InceptionV3: an auxiliary head while training."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), _FrozenBatchNorm(8), nn.ReLU(), nn.Flatten())
        self.main, self.aux = nn.Linear(32, 3), nn.Linear(32, 3)

    def forward(self, images: torch.Tensor) -> Any:
        features = self.body(images)
        return (self.main(features), self.aux(features)) if self.training else self.main(features)


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(("seconds", "per_s", "wait"))}


# --- what the ranks of one world do, all in one start ---


def work_of_a_rank(folder: Path, tree: PngTree) -> dict[str, Any]:
    """Every part that needs no failure; each rank has an output folder of its own, in which only rank 0 may write."""
    with joined_world("cpu") as world:
        own = folder / f"rank{world.rank}"
        take_turns(world, folder / "turns")
        return {
            "run": train_mobilenet(world, config_for(tree, own / "run")),
            "evaluations": {case: evaluate_numbers(world, *case) for case in EVALUATED},
            "gradients": train_and_keep_gradients(world),
            "uninterrupted": fit(world, own / "uninterrupted"),
            "interrupted": {case: fit_with_signal(world, own / case, *INTERRUPTIONS[case]) for case in INTERRUPTIONS},
            "agreed": agree(world, folder),
            "written": sorted(path.name for path in own.rglob("*") if path.is_file()) if own.exists() else [],
        }


def train_mobilenet(world: World, config: TrainConfig) -> dict[str, Any]:
    log: list[str] = []
    entries: list[dict[str, Any]] = []
    setattr(fold, "write_plots", lambda *_: [])  # noqa: B010  (a private use of a name that fold imports)  # matplotlib takes longer than the training
    run_cross_validation(
        config, log.append, Hooks(epoch_done=lambda entry: entries.append(without_times(entry.to_json()))), world
    )
    return {"log": log, "entries": entries}


EVALUATED = tuple(itertools.product((1, 2, 5, 7, 13), (True, False)))
"""Numbers of samples, some of which leave ranks without a batch; and whether each rank has all data, or those of its
own numbers.
"""


def evaluate_numbers(world: World, samples: int, replicated: bool) -> dict[str, Any]:
    loader = noise(20, replicated)
    numbers = np.random.default_rng(samples).permutation(20)[:samples]
    # each rank begins with other weights and other statistics: rank 0's are the ones that count
    training = TrainState.create(small_network(seed=world.rank), WEIGHTS, CPU, TrainConfig(), world)
    training.model[1].running_mean.fill_(0.1 * world.rank)  # type: ignore[index]
    seen: list[list[int]] = []
    calls: list[None] = []
    found = loop.evaluate(
        training.model,
        loader,
        numbers,
        global_batch=2 * world.size,
        class_weights=training.class_weights,
        world=world,
        on_step=lambda batch, metrics, waited_s: seen.append(batch.index.tolist()),
        after_step=lambda: calls.append(None),
    )
    values = {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "index": found.index,
        "probabilities": found.probabilities,
    }
    return {"found": values, "seen": seen, "calls": len(calls)}


GLOBAL_BATCH, LEARNED = 24, 53
"""The last batch, of 5, wraps round."""


def train_and_keep_gradients(world: World) -> dict[str, Any]:
    loader = noise(LEARNED)
    config = TrainConfig(
        learning_rate=1e-30, weight_decay=0.0
    )  # the weights stay, so that each step can be checked by itself
    training = TrainState.create(_TwoHeads(seed=world.rank), WEIGHTS, CPU, config, world)
    plan = loop.plan_epoch(training, np.arange(LEARNED), loader.labels.numpy(), GLOBAL_BATCH, seed=3, epoch=2)
    steps: list[tuple[list[int], dict[str, torch.Tensor]]] = []

    def keep(batch: Batch, *_: object) -> None:
        gradients = {
            name: value.grad.clone() for name, value in training.model.named_parameters() if value.grad is not None
        }
        steps.append((batch.index.tolist(), gradients))

    trained = loop.train_epoch(training, loader, plan, keep)
    return {"steps": steps, "loss": trained.loss, "accuracy": trained.accuracy, "samples": trained.samples}


FIT = TrainConfig(epochs=30, patience=6, learning_rate=0.03, scheduler="plateau", seed=1)
NUMBERS = FoldSamples(
    train=np.arange(13), validation=np.arange(13, 32), test=np.arange(32, 39), label=noise(39).labels.numpy()
)
PER_RANK = 4


def fitting(
    world: World, folder: Path, watch: SignalHandler | None = None, hooks: Hooks | None = None
) -> tuple[TrainState, trainer.Trainer]:
    training = TrainState.create(small_network(seed=world.rank), WEIGHTS, CPU, FIT, world)
    global_batch = PER_RANK * world.size
    return training, trainer.Trainer(training, noise(39), NUMBERS, FIT, global_batch, folder, {"fold": 1}, watch, hooks)


def outcome(training: TrainState, stopped_early: bool, tested: loop.Evaluation) -> dict[str, Any]:
    return {
        "stopped_early": stopped_early,
        "history": [without_times(record.to_json()) for record in training.history],
        "best": (training.best_epoch, training.best_val_accuracy),
        "scheduler": training.scheduler.state_dict() if training.scheduler else None,
        "weights": {name: value.numpy() for name, value in training.model.state_dict().items()},
        "tested": (tested.loss, tested.accuracy, tested.probabilities),
    }


def fit(world: World, folder: Path) -> dict[str, Any]:
    training, fitted = fitting(world, folder)
    return outcome(training, fitted.fit(), fitted.test())


INTERRUPTIONS = {
    "after the first step": ("train", 2, 1, "epoch 2, after step {second}"),
    "after the last step": ("train", 2, -1, "epoch 2, after step {last}"),
    "in validation": ("validate", 2, 1, "epoch 2, after step {last}"),
    "in the test": ("test", 0, 1, "its test"),
}
"""Phase, epoch and step that one rank gets a signal in, and where all stop: one step later, if there is one."""


def fit_with_signal(world: World, folder: Path, phase: str, epoch: int, step: int, _: str) -> dict[str, Any]:
    """Where it stopped; and then resumed, its outcome."""
    steps = len(train_batches(NUMBERS.train, PER_RANK * world.size, world.size))
    sender = min(1, world.size - 1)

    def step_meter(now: str, number: int, samples: int) -> loop.OnStep:
        done = itertools.count(1)

        def on_step(*_: object) -> None:
            wanted = step if step > 0 else steps
            if world.rank == sender and now == phase and (number == epoch or phase == "test") and next(done) == wanted:
                os.kill(os.getpid(), signal.SIGTERM)

        return on_step

    training, fitted = fitting(world, folder, watch := SignalHandler(), Hooks(step_meter=step_meter))
    where = ""
    with watch:
        try:
            fitted.fit()
            fitted.test()
        except Interrupted as error:
            where = str(error)
    state = world.broadcast_object(checkpoint.load_checkpoint(folder, {"fold": 1}) if world.is_main else None)
    training, fitted = fitting(world, folder)
    assert state is not None
    training.load_state_dict(state)
    return {"where": where, "resumed": outcome(training, fitted.fit(), fitted.test())}


def take_turns(world: World, file: Path) -> None:
    def say(what: str) -> None:
        with file.open("a") as written:
            written.write(f"{what}{world.rank} ")

    with world.main_process_first():
        say("+")
        time.sleep(0.05)
        say("-")


REQUESTS = (
    (0, 0, 0, 0),
    (0, 1, 0, 0),
    (2, 0, 0, 0),
    (0, 0, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 2),
    (0, 0, 0, 0),
    (0, 0, 0, 0),
    (1, 2, 1, 0),
)
"""By step, of each rank."""
AGREED = [0, 0, 1, 0, 0, 1, 0, 0, 0, 2]
"""After each step and at the end. A rank whose request meets another one that is being granted must ask again, as the 2
of the third step does not.
"""


def agree(world: World, folder: Path) -> dict[str, Any]:
    consensus, told = AsyncConsensus(world), folder / "rank 0 has gone on"
    if world.is_main:
        heard = [consensus.exchange(REQUESTS[0][0])]  # comes back although no other rank has come so far
        told.touch()
    else:
        while not told.exists():
            time.sleep(0.01)
        heard = [consensus.exchange(REQUESTS[0][world.rank])]
    heard += [consensus.exchange(requests[world.rank]) for requests in REQUESTS[1:]]
    heard.append(consensus.settle())
    return {
        "heard": heard,
        "later": [consensus.settle(), consensus.exchange(0), consensus.settle()],
        "all": world.gather(world.rank),
    }


ALWAYS = (2, 4)
"""Two ranks, whose sums have one order, and four, of which some evaluate nothing. Other worlds are exhaustive."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n in ALWAYS else pytest.mark.exhaustive, id=f"{n}_ranks") for n in SIZES],
)
def done(
    request: pytest.FixtureRequest, tree: PngTree, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[Any]]]:
    """The folder, and by rank what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    size = request.param
    local_size = 2 if size == 4 else size  # four ranks are on two machines
    yield folder, Ranks(folder, work_of_a_rank, [(folder, tree)] * size, local_size).results()
    shutil.rmtree(folder)  # checkpoints are large, and pytest would keep those of its last three runs


Done = tuple[Path, list[Any]]


# --- evaluation ---


def rows_of_fold(tree: PngTree, number: int) -> list[dict[str, str]]:
    with tree.csv_file.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["fold"]) == number]


def logits_of(model: nn.Module, tree: PngTree, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, by Pillow and torchvision from the CSV alone, and labels."""
    prepare = transforms.Compose(
        [
            transforms.Resize((SMALL, SMALL), transforms.InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    rows, images = rows_of_fold(tree, number), []
    for row in rows:
        with Image.open(tree.spectrograms_dir / f"fold{number}" / row["spec_file_name"]) as image:
            images.append(prepare(image.convert("RGB")))
    with torch.no_grad():
        return model(torch.stack(images)).double(), torch.tensor([CLASSES.index(row["class"]) for row in rows])


def test_each_sample_is_tested_exactly_once(done: Done, tree: PngTree) -> None:
    """All figures are those of one process with the same weights, also where ranks have nothing to test (4 ranks, 3
    samples).
    """
    folder, ranks = done
    results = folder / "rank0" / "run" / "mobilenet" / "fold_1"
    metrics = json.loads((results / "metrics.json").read_text())
    model = torchvision_models.mobilenet_v2(num_classes=3)
    model.load_state_dict(torch.load(results / "best_model.pth", weights_only=True))
    model.eval()
    counts = torch.bincount(torch.tensor([CLASSES.index(row["class"]) for row in rows_of_fold(tree, 2)]))
    weights = 7 / (3 * counts.double())
    logits, labels = logits_of(model, tree, 1)
    predictions = logits.argmax(1)
    assert metrics["test_loss"] == pytest.approx(functional.cross_entropy(logits, labels, weights).item(), rel=1e-5)
    assert metrics["test_accuracy"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"), abs=1e-12)
    assert metrics["confusion_matrix"] == confusion_matrix(labels, predictions, labels=[0, 1, 2]).tolist()
    assert metrics["num_samples"] == {"train": 7, "validation": 5, "test": 3}
    report = json.loads((results / "classification_report.json").read_text())
    assert [report[name]["support"] for name in CLASSES] == [1, 1, 1]
    assert report["macro avg"]["support"] == 3
    assert (metrics["processes"], metrics["global_batch"]) == (len(ranks), 2 * len(ranks))
    val_logits, val_labels = logits_of(
        model, tree, 3
    )  # the same weights and statistics as after their epoch, on every rank
    assert metrics["best_val_loss"] == pytest.approx(
        functional.cross_entropy(val_logits, val_labels, weights).item(), rel=1e-5
    )
    assert metrics["best_val_accuracy"] == pytest.approx(accuracy_score(val_labels, val_logits.argmax(1)), abs=1e-12)


def test_probabilities_are_in_the_order_of_the_samples(done: Done) -> None:
    _, ranks = done
    loader, model = noise(20), small_network(seed=0).eval()
    for case in EVALUATED:
        samples, replicated = case
        numbers = np.random.default_rng(samples).permutation(20)[:samples]
        with torch.no_grad():
            logits = model(loader.images[numbers]).double()
        labels = loader.labels[numbers]
        expected_loss = functional.cross_entropy(logits, labels, torch.from_numpy(WEIGHTS).double())
        for rank in ranks:
            found = rank["evaluations"][case]["found"]
            assert found["index"].tolist() == numbers.tolist()
            np.testing.assert_allclose(found["probabilities"], logits.softmax(1), atol=1e-6)
            assert found["loss"] == pytest.approx(expected_loss.item(), rel=1e-6)
            assert found["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(1)), abs=1e-12)
            first = ranks[0]["evaluations"][case]["found"]
            assert (found["loss"], found["accuracy"]) == (first["loss"], first["accuracy"])  # the same bits
            assert np.array_equal(found["probabilities"], first["probabilities"])
        seen = [list(itertools.chain(*rank["evaluations"][case]["seen"])) for rank in ranks]
        assert sorted(itertools.chain(*seen)) == sorted(numbers.tolist())
        steps = {rank["evaluations"][case]["calls"] for rank in ranks}
        if replicated:
            assert steps == {math.ceil(samples / (2 * len(ranks)))}
        else:
            assert len(steps) == 1
            assert all(number % len(ranks) == rank for rank, own in enumerate(seen) for number in own)


# --- learning ---


def test_global_batches_and_gradients_are_those_of_one_process(done: Done) -> None:
    """And of plain torch: the class-weighted mean over the whole global batch, whoever has which part of it."""
    _, ranks = done
    loader, model = noise(LEARNED), _TwoHeads(seed=0)
    criterion = nn.CrossEntropyLoss(torch.from_numpy(WEIGHTS))
    order = epoch_order(np.arange(LEARNED), 3, 2).tolist()
    size, total, correct, samples = len(ranks), 0.0, 0, 0
    steps = list(zip(*(rank["gradients"]["steps"] for rank in ranks), strict=True))
    assert len(steps) == 3
    for number, step in enumerate(steps):
        batch = [index for numbers, _ in step for index in numbers]
        assert len({len(numbers) for numbers, _ in step}) == 1
        alone = order[number * GLOBAL_BATCH : (number + 1) * GLOBAL_BATCH]
        assert batch == alone + order[: len(batch) - len(alone)]
        assert len(batch) - len(alone) == ({1: 0, 2: 1, 3: 1, 4: 3}[size] if number == 2 else 0)
        model.train().zero_grad()
        logits, aux_logits = model(loader.images[batch])
        labels = loader.labels[batch]
        loss = criterion(logits, labels) + 0.4 * criterion(aux_logits, labels)
        loss.backward()
        total, samples = total + loss.item() * len(batch), samples + len(batch)
        correct += int((logits.argmax(1) == labels).sum())
        for name, value in model.named_parameters():
            assert value.grad is not None
            for _, gradients in step:
                torch.testing.assert_close(
                    gradients[name], value.grad, rtol=1e-5, atol=1e-6 * value.grad.abs().max().item()
                )
    for rank in ranks:
        assert rank["gradients"]["loss"] == pytest.approx(total / samples, rel=1e-6)
        assert rank["gradients"]["accuracy"] == correct / samples
        assert rank["gradients"]["samples"] == samples


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Bit for bit."""
    for name in ("stopped_early", "history", "best", "scheduler"):
        assert ours[name] == theirs[name], name
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, value in ours["weights"].items():
        assert np.array_equal(value, theirs["weights"][name]), name
    assert ours["tested"][:2] == theirs["tested"][:2]
    assert np.array_equal(ours["tested"][2], theirs["tested"][2])


def test_all_ranks_decide_alike(done: Done) -> None:
    """When to stop, what was best, and the learning rate; and all end with the best weights."""
    _, ranks = done
    first = ranks[0]["uninterrupted"]
    for rank in ranks[1:]:
        assert_same(rank["uninterrupted"], first)
        assert rank["run"]["entries"] == ranks[0]["run"]["entries"]
    accuracies = [entry["val_accuracy"] for entry in first["history"]]
    assert first["stopped_early"]
    assert first["best"] == (accuracies.index(max(accuracies)) + 1, max(accuracies))
    assert len(accuracies) - first["best"][0] == FIT.patience
    assert len({entry["learning_rate"] for entry in first["history"]}) > 1


def test_only_rank_0_writes_and_talks(done: Done) -> None:
    _, ranks = done
    assert {"metrics.json", "summary.json", "run_status.json", "best_model.pth", "run.json"} <= set(ranks[0]["written"])
    assert [rank["written"] for rank in ranks[1:]] == [[]] * (len(ranks) - 1)


def test_the_log_states_the_global_batch(done: Done) -> None:
    _, ranks = done
    size = len(ranks)
    line = f"mobilenet: {size} processes, global batch {2 * size} (2 samples of each)"
    assert ranks[0]["run"]["log"].count(line) == (size > 1)


# --- agreeing ---


def test_turns(done: Done) -> None:
    """Rank 0, then the first rank of the other machine, then the rest."""
    folder, ranks = done
    turns = (folder / "turns").read_text().split()
    if len(ranks) == 4:
        assert turns[:4] == ["+0", "-0", "+2", "-2"]
        assert sorted(turns[4:]) == ["+1", "+3", "-1", "-3"]
    else:
        assert turns[:2] == ["+0", "-0"]
        assert sorted(turns[2:]) == sorted(f"{sign}{rank}" for rank in range(1, len(ranks)) for sign in "+-")


def test_a_request_is_known_to_all_ranks_one_step_late(done: Done) -> None:
    _, ranks = done
    if len(ranks) == 4:
        assert [rank["agreed"]["heard"] for rank in ranks] == [AGREED] * 4
    if len(ranks) == 1:
        assert ranks[0]["agreed"]["heard"] == [*(requests[0] for requests in REQUESTS), 0]
    for rank in ranks:
        assert rank["agreed"]["heard"] == ranks[0]["agreed"]["heard"]
        assert rank["agreed"]["later"] == [0, 0, 0]  # nothing is pending
        assert rank["agreed"]["all"] == list(range(len(ranks)))


@pytest.mark.parametrize("case", INTERRUPTIONS)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(case: str, done: Done) -> None:
    """And what rank 0 has saved then leads all to the same end as without it."""
    _, ranks = done
    size = len(ranks)
    last = len(train_batches(NUMBERS.train, PER_RANK * size, size))
    second = 1 if size == 1 else min(2, last)
    expected = INTERRUPTIONS[case][3].format(second=second, last=last)
    for number, rank in enumerate(ranks):
        by = "SIGTERM" if number == min(1, size - 1) else "a signal"
        where = rank["interrupted"][case]["where"]
        assert where.startswith(f"stopped by {by} in fold 1, {expected};")
        assert_same(rank["interrupted"][case]["resumed"], ranks[0]["uninterrupted"])


# --- when one rank fails ---


def sabotage(what: str) -> None:
    """In the middle of the first epoch: for real, in a process of its own."""
    steps, step = itertools.count(1), TrainState.step

    def sabotaged(*arguments: Any) -> Any:
        if next(steps) == 2:
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a bug")
        return step(*arguments)

    TrainState.step = sabotaged  # type: ignore[assignment, method-assign]


def run_command_line(arguments: list[str], sabotaged: str) -> None:
    if sabotaged:
        sabotage(sabotaged)
    sys.exit(main(arguments))


def damaged(tree: PngTree, folder: Path, rank: int) -> tuple[PngTree, Path]:
    """A copy in which an image of ``rank``'s second batch is cut short."""
    shutil.copytree(tree.csv_file.parent, folder)
    copy = dataclasses.replace(tree, csv_file=folder / "data.csv", spectrograms_dir=folder / "spectrograms")
    dataset = open_dataset(config_for(copy, folder), want_shards=False, log=lambda text: None)
    assert dataset.paths is not None
    order = epoch_order(np.flatnonzero(dataset.fold == 2), TrainConfig.seed, 1)
    ours, others = (train_batches(order, 4, 2, number)[1] for number in (rank, 1 - rank))
    path = next(
        dataset.paths[number] for number in ours if dataset.paths[number] not in {dataset.paths[n] for n in others}
    )
    path.write_bytes(path.read_bytes()[:200])
    return copy, path


LOST = "quaclrs-train: rank {rank}: another rank has ended; see what it says\n"


@dataclasses.dataclass(kw_only=True)
class Fault:
    """What two ranks are told, and what becomes of them."""

    more: tuple[object, ...] = ()
    second: tuple[object, ...] = ()
    """More flags of rank 1 only."""
    sabotage: str = ""
    """Of rank 1."""
    codes: tuple[int, int] = (2, 2)
    says: tuple[str, str] = ("", "")
    """Patterns of what each rank prints to stderr."""


def alike(message: str, *more: object) -> Fault:
    """Both ranks meet it, and rank 0 tells."""
    return Fault(more=more, says=(f"quaclrs-train: error: {re.escape(message)}[^\n]*\n", ""))


FAULTS = {
    "no data on one machine": Fault(
        second=("--csv_file", "nowhere.csv"),
        codes=(1, 2),
        says=(LOST.format(rank=0), r"quaclrs-train: error: rank 1: nowhere\.csv: [^\n]+\n"),
    ),
    "other data on one machine": Fault(
        second=("--csv_file", "{other}"),
        says=(
            r"quaclrs-train: error: rank 0: [^\n]+data\.csv: rank 1 has other data there; give all machines the same\n",
            (
                r"quaclrs-train: error: rank 1: [^\n]+other\.csv: rank 0 has other "
                r"data there; give all machines the same\n"
            ),
        ),
    ),
    "an output folder that is a file": Fault(
        more=("--output_dir", "{other}"),
        codes=(2, 1),
        says=(r"quaclrs-train: error: rank 0: cannot write [^\n]+other\.csv[^\n]*\n", LOST.format(rank=1)),
    ),
    "a bug": Fault(
        sabotage="bug",
        codes=(1, 1),
        says=(LOST.format(rank=0), r"Traceback \(most recent call last\):\n.*\nZeroDivisionError: a bug\n"),
    ),
    "killed": Fault(sabotage="killed", codes=(1, -signal.SIGKILL), says=(LOST.format(rank=0), "")),
    "diverged": alike("epoch 1: the training loss is nan; lower --learning_rate (now 1e+30)", "--learning_rate", 1e30),
    "no such model": alike("--model_name nope: choose one of", "--model_name", "nope"),
    "no such fold": alike("--fold 4: its test fold(s) 4 have no rows", "--fold", 4, "--num_folds", 4),
    "sync_bn": alike("--sync_bn: torch synchronises BatchNorm between GPUs only; leave it out on the CPU", "--sync_bn"),
    "cudagraph": alike(
        "--compile cudagraph: captures the work of one GPU, and this is 2 processes", "--compile", "cudagraph"
    ),
    "parallel": alike(
        "--parallel folds: starts its own processes; run it without torchrun", "--parallel", "folds", "--nproc", 2
    ),
}


@pytest.fixture(scope="module")
def faults(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """All at once: they wait more than they work."""
    folder = tmp_path_factory.mktemp("faults")
    other = write_csv(folder / "other.csv", tree.rows[:-1])
    started = {}
    for name, fault in FAULTS.items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        given = [
            [flag.replace("{other}", str(other)) for flag in flags(tree, place / "results", *fault.more, *more)]
            for more in ((), fault.second)
        ]
        started[name] = Ranks(place, run_command_line, [(given[0], ""), (given[1], fault.sabotage)])
    return started


@pytest.mark.parametrize("name", FAULTS)
def test_all_ranks_end_and_the_guilty_one_says_why(name: str, faults: dict[str, Ranks]) -> None:
    """Without a launcher's help; and what all meet alike is said once."""
    fault, ranks = FAULTS[name], faults[name]
    assert tuple(ranks.wait()) == fault.codes
    for rank, says in enumerate(fault.says):
        assert re.fullmatch(says, ranks.stderr(rank), re.DOTALL), ranks.stderr(rank)


def fail_alike() -> None:
    def command() -> None:
        with joined_world("cpu") as world, raised_on_every_rank():
            time.sleep(2.0 if world.is_main else 0.0)
            raise UsageError("the same for all")

    sys.exit(run_rank(command, "test"))


def test_who_says_it_for_all_ends_first(tmp_path: Path) -> None:
    """A launcher that sees another rank end would end rank 0 before it has spoken, or has written its checkpoint."""
    ranks = Ranks(tmp_path, fail_alike, [()] * 2)
    first, second = (process.sentinel for process in ranks.processes)
    assert wait([second], DEADLINE_S)
    assert wait([first], 1.0)  # in case that it is heard of a little later
    assert ranks.wait() == [2, 2]
    assert (ranks.stderr(0), ranks.stderr(1)) == ("test: error: the same for all\n", "")


LAUNCHERS = {
    "--distributed": [sys.executable, "-m", "quaclrs.cli", "--distributed", "--nproc", "2"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "quaclrs.cli",
    ],
}


def launch(way: str, arguments: list[str], site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(site)} if site else {})
    command = [*LAUNCHERS[way], *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False)


def site_with(what: str, folder: Path) -> Path:
    """A folder for PYTHONPATH that sabotages rank 1."""
    imports = (
        "from __future__ import annotations\nimport itertools, os, "
        "signal\nfrom quaclrs.training.state import TrainState\n"
    )
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"{imports}\n{inspect.getsource(sabotage)}\nif os.environ.get('RANK') == '1':\n    sabotage({what!r})\n"
    )
    return folder


@pytest.mark.parametrize("way", ["torchrun", pytest.param("--distributed", marks=pytest.mark.exhaustive)])
def test_a_damaged_image_of_one_rank(way: str, tree: PngTree, tmp_path: Path) -> None:
    copy, path = damaged(tree, tmp_path / "tree", rank=1)
    ended = launch(way, flags(copy, tmp_path / "results"))
    lines = ended.stderr.splitlines()
    assert lines[0].startswith(f"quaclrs-train: error: rank 1: {path}: truncated or damaged")
    if way == "--distributed":
        assert ended.returncode == 2
        assert lines[1:] in ([], [LOST.format(rank=0).strip()])
    else:
        assert ended.returncode == 1
        assert re.search(r"^Root Cause[^\n]*\n\[0\]:\n[^\n]*\n[^\n]*\n\s+rank\s+: 1 ", ended.stderr, re.MULTILINE)
    assert not (tmp_path / "results" / "mobilenet" / "fold_1" / "metrics.json").exists()


def test_a_killed_rank_is_named_by_our_launcher(tree: PngTree, tmp_path: Path) -> None:
    ended = launch("--distributed", flags(tree, tmp_path / "results"), site_with("killed", tmp_path / "site"))
    assert ended.returncode == 128 + signal.SIGKILL
    lines = [line for line in ended.stderr.splitlines() if line != LOST.format(rank=0).strip()]
    assert lines == ["quaclrs-train: error: rank 1 was killed by SIGKILL (out of memory?); --resume goes on"]


@pytest.mark.exhaustive
def test_a_bug_of_one_rank_shows_its_traceback(tree: PngTree, tmp_path: Path) -> None:
    ended = launch("--distributed", flags(tree, tmp_path / "results"), site_with("bug", tmp_path / "site"))
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback (most recent call last)") == 1  # torch's launcher would add its own
    assert "\nZeroDivisionError: a bug\n" in ended.stderr


# --- flags that cannot work ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--distributed", "--distributed: no GPU to be used here; give --nproc N for N processes on the CPU"),
        ("--parallel folds", "--parallel folds: no GPU to be used here; give --nproc N for N processes on the CPU"),
        ("--nproc 2", "--nproc 2: is about --distributed or --parallel folds; give one of them"),
        (
            "--distributed --parallel folds --nproc 2",
            "--distributed --parallel folds: processes either share each fold, or take",
        ),
        ("--distributed --nproc 0", "--nproc 0: at least 1 process"),
        ("--sync_bn", "--sync_bn: torch synchronises BatchNorm between GPUs only; leave it out on the CPU"),
        ("--sync_bn --parallel folds --nproc 2", "--sync_bn: torch synchronises BatchNorm between GPUs only"),
        ("--compile cudagraph", "--compile cudagraph: captures the work of one GPU, and this is cpu"),
        ("--device cuda:1 --distributed", "--distributed: takes all GPUs, and --device cuda:1 names one"),
    ],
)
def test_flags_that_cannot_work(
    given: str, message: str, tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything is trained or written."""
    assert main(flags(tree, tmp_path / "results", *given.split())) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"quaclrs-train: error: {message}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("given", ["", "--distributed", "--distributed --nproc 2", "--parallel folds --nproc 2"])
def test_cuda_without_a_gpu(given: str, tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tree, tmp_path / "results", "--device", "cuda", *given.split())) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(
        r"quaclrs-train: error: --device cuda: torch sees [^\n]+ here; use --device auto or cpu\n", printed
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.exhaustive
def test_too_few_gpus_for_torchrun(tree: PngTree, tmp_path: Path) -> None:
    """Said by the first rank that gets none."""
    ended = launch("torchrun", flags(tree, tmp_path / "results", "--device", "cuda"))
    said = [line for line in ended.stderr.splitlines() if line.startswith("quaclrs-train")]
    expected = "rank 0: 2 processes on this machine, and torch sees 0 GPU(s); start one per GPU, or --device cpu"
    assert said == [f"quaclrs-train: error: {expected}"]


def test_one_gpu_named_for_several_ranks() -> None:
    with pytest.raises(UsageError, match="--device cuda:0: names one GPU, and 2 processes take one each"):
        pick_device("cuda:0", World(size=2))
