"""Contract of ``--resume``, ``--checkpoint_minutes`` and signals: however a training ended, resuming it gives the same
results as an uninterrupted run.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import content_of, pack_tree
from png_trees import CLASSES, PngTree, make_rows, write_tree
from resuming import KILLED, TIMEOUT_S, UNDISTURBED, Disturbance, Job, Moment, Result, Step, start_server

from quaclrs.config import TrainConfig
from quaclrs.errors import TrainingError
from quaclrs.experiment.run import agreed_global_batch
from quaclrs.system.signals import SignalHandler
from quaclrs.training import checkpoint
from quaclrs.training.distributed import World

EVERY_STEP = ("--checkpoint_minutes", 1e-9)
"""A checkpoint after each step."""
TIMES = ("seconds", "per_s", "wait")
FREE = {
    *("pid", "since", "until", "datetime", "output_dir", "paths", "csv_file", "spectrograms_dir", "shards"),
    "checkpoint_minutes",
}
"""Keys that may differ between two runs of one training, beside times."""


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Three classes, three folds of six rows. Read only, like the shards packed from it."""
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    yield
    shutil.rmtree(tmp_path)


def make_tree(folder: Path) -> PngTree:
    return write_tree(folder, make_rows(CLASSES[:3], (1, 2, 3)))


def flags(tree: PngTree, output_dir: Path, *more: object) -> list[object]:
    """Flags of a training that packs, decodes all images into memory, and resumes if there is a checkpoint."""
    paths = ["--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir, "--output_dir", output_dir]
    network = ["--model_name", "tiny", "--image_size", 32, "--batch_size", 3, "--epochs", 2, "--learning_rate", 0.01]
    rest = ["--loader", "resident", "--num_workers", 0, "--num_folds", 3, "--gradcam_per_class", 0, "--resume"]
    return [*paths, *network, *rest, *more]


# --- what a run leaves ---


def what_counts(value: Any) -> Any:
    """``value`` without times and paths; tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {
            name: what_counts(part)
            for name, part in value.items()
            if not str(name).endswith(TIMES) and name not in FREE
        }
    if isinstance(value, list):
        return [what_counts(part) for part in value]
    return value


def results(folder: Path) -> dict[str, Any]:
    """The content of every file below ``folder``, reduced by :func:`what_counts`."""
    found: dict[str, Any] = {}
    for name, content in content_of(folder).items():
        if name.endswith(".pth"):
            found[name] = what_counts(torch.load(folder / name, weights_only=True))
        else:
            found[name] = what_counts(json.loads(content)) if name.endswith(".json") else content
    return found


def assert_same_results(folder: Path, expected: dict[str, Any]) -> None:
    found = results(folder)
    assert sorted(found) == sorted(expected)
    differ = [name for name in found if found[name] != expected[name]]
    assert not differ, {
        name: (found[name], expected[name]) for name in differ if not name.endswith((".pth", ".png"))
    } or differ


def assert_same_steps(steps: Sequence[Step], expected: Sequence[Step]) -> None:
    """Each step, done once or twice, had the same samples in the same order and the same sums, to the last bit."""
    promised = {step.where: step for step in expected}
    for step in steps:
        assert step == promised.get(step.where)
    assert {step.where for step in steps} == set(promised)


def finish(folder: Path, arguments: Sequence[object], disturbance: Disturbance = UNDISTURBED) -> Result:
    result = Job(folder, arguments, disturbance).result()
    assert (result.code, result.err) == (0, ""), result
    return result


class Whole:
    """An undisturbed training."""

    def __init__(self, folder: Path, tree: PngTree, *more: object, plots: bool = False) -> None:
        self.steps = finish(folder / "said", flags(tree, folder / "results", *more), Disturbance(plots=plots)).steps
        self.results = results(folder / "results")
        self.shards = content_of(tree.csv_file.parent / "quaclrs_shards")


@pytest.fixture(scope="module")
def whole(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """All three folds, with a checkpoint after each step."""
    found = Whole(tmp_path_factory.mktemp("whole"), tree, *EVERY_STEP)
    assert len([step for step in found.steps if step.phase == "train"]) == 3 * 2 * 2
    assert len({name.partition("/")[0] for name in found.shards}) == 1
    return found


# --- killed ---


def train_until_done(next_job: Callable[[int], Job]) -> tuple[int, list[Step]]:
    """Start jobs until one is not killed; returns the number of kills, and all steps of all processes."""
    steps: list[Step] = []
    for kills in range(1000):
        result = next_job(kills).result()
        steps += result.steps
        assert result.err == ""
        if result.code != KILLED:
            assert result.code == 0
            return kills, steps
    raise AssertionError("no end in sight")


@pytest.mark.parametrize("one_in", [6, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_at_every_flush_rename_and_deletion(one_in: int, whole: Whole, tmp_path: Path) -> None:
    """One job, killed at each event in turn, from the first shard to the summary; by default at one event in six."""
    tree, known = make_tree(tmp_path / "tree"), tmp_path / "known"
    known.touch()
    arguments = flags(tree, tmp_path / "results", *EVERY_STEP)
    disturbance = Disturbance(killed_at_a_new_event=known, one_in=one_in)
    kills, steps = train_until_done(lambda kills: Job(tmp_path / "said", arguments, disturbance))
    events = known.read_text().splitlines()
    assert kills == len(events) == len(set(events))
    assert kills > 60 / one_in
    if one_in == 1:
        assert_every_kind_of(events)
    assert_same_results(tmp_path / "results", whole.results)
    assert_same_steps(steps, whole.steps)
    # a process repeats no more than the step whose checkpoint it was killed in, or the evaluation
    trained = [step for step in steps if step.phase == "train"]
    assert len(trained) <= len([step for step in whole.steps if step.phase == "train"]) + kills
    assert content_of(tree.csv_file.parent / "quaclrs_shards") == whole.shards


def assert_every_kind_of(events: list[str]) -> None:
    """The files of a run all occur among the events."""
    in_fold = ("best_model.pth", "checkpoint_within_epoch.pth", "checkpoint_epoch_2.pth", "metrics.json", "run.json")
    in_model = ("run_status.json", "summary.json", "original_summary.json")
    for name in ("fold01-000000.tar", "manifest.json", *in_model, *in_fold, "original_metrics.json"):
        for kind in ("flush", "rename"):
            assert any(event.startswith(kind) and f"{name}.tmp " in event for event in events), (kind, name)
    for event in (
        "rename plots/confusion_matrix.png.tmp",
        "delete fold/checkpoint_within_epoch.pth",
        "flush tiny/fold ",
    ):
        assert any(known.startswith(event) for known in events), event


@pytest.mark.parametrize(
    "call",
    [
        1,
        pytest.param(2, marks=pytest.mark.exhaustive),
        pytest.param(3, marks=pytest.mark.exhaustive),
        4,
    ],
    ids=["within epoch", "after its last step", "after the epoch", "best model"],
)
def test_killed_in_the_middle_of_a_file(call: int, whole: Whole, tree: PngTree, tmp_path: Path) -> None:
    arguments = flags(tree, tmp_path / "results", *EVERY_STEP)
    assert Job(tmp_path / "said", arguments, Disturbance(killed_in_save=call)).result().code == KILLED
    (torn,) = (tmp_path / "results").rglob("*.tmp")
    assert not zipfile.is_zipfile(torn)
    # on another device the repeated epoch may give other weights, so no file may survive the epoch that it is from
    assert not (torn.parent / "best_model.pth").exists()
    finish(tmp_path / "said", flags(tree, tmp_path / "results"))  # without a checkpoint at every step
    assert_same_results(tmp_path / "results", whole.results)


MOBILENET = ("--model_name", "mobilenet", "--fold", 2, "--gradcam_per_class", 1, *EVERY_STEP)


@pytest.mark.parametrize(
    ("more", "plots", "seconds", "moments"),
    [
        pytest.param(EVERY_STEP, False, 0.2, 4, id="all folds"),
        pytest.param(EVERY_STEP, False, 0.2, 20, marks=pytest.mark.exhaustive, id="all folds, more often"),
        pytest.param(MOBILENET, True, 0.7, 5, marks=pytest.mark.exhaustive, id="a real network with all its plots"),
    ],
)
def test_killed_at_random_moments(
    more: Sequence[object], plots: bool, seconds: float, moments: int, tree: PngTree, tmp_path: Path
) -> None:
    """MobileNetV2 has dropout too, and its checkpoints take longer to write."""
    whole = Whole(tmp_path / "whole", tree, *more, plots=plots)
    assert len([name for name in whole.results if name.endswith(".png")]) == (4 + 3 if plots else 3 * 2)
    seed, kills = 1, 0
    dice = random.Random(seed)
    print(f"seed {seed}")
    for trial in range(moments):
        folder = tmp_path / str(trial)
        own_tree = make_tree(folder / "tree")
        arguments = flags(own_tree, folder / "results", *more)

        def next_job(
            killed: int, folder: Path = folder, arguments: Sequence[object] = arguments, before: int = kills
        ) -> Job:
            job = Job(folder / "said", arguments, Disturbance(plots=plots))
            if before + killed < moments:
                while not job.has_begun():
                    time.sleep(0.001)
                delay_s = dice.uniform(0, seconds)
                print(f"{delay_s:.4f} s")
                job.kill_after(delay_s)
            return job

        killed, steps = train_until_done(next_job)
        assert_same_results(folder / "results", whole.results)
        assert_same_steps(steps, whole.steps)
        assert content_of(own_tree.csv_file.parent / "quaclrs_shards") == whole.shards
        kills += killed
        if kills >= moments:
            return
    raise AssertionError(f"{kills} kills only")


# --- signals ---

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
MIDDLE, LAST = Moment("train", 1), Moment("train", 2)
WHERE = {
    MIDDLE: "fold 1, epoch 1, after step 1",
    LAST: "fold 1, epoch 1, after step 2",
    Moment("validate", 1): "fold 1, epoch 1, after step 2",
    Moment("test", 2, 2): "fold 2, its test",
}


def stopped(number: int, where: str) -> str:
    name = signal.Signals(number).name
    return f"quaclrs-train: stopped by {name} in {where}; the same command with --resume goes on from there\n"


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        # by default, the signals take turns
        pytest.param(
            moment, *case, marks=() if (i + j) % len(SIGNALS) == 0 else pytest.mark.exhaustive, id=f"{moment}-{case[1]}"
        )
        for i, moment in enumerate(WHERE)
        for j, case in enumerate(SIGNALS)
    ],
)
def test_a_signal_saves_at_the_next_step(
    moment: Moment, number: int, code: int, whole: Whole, tree: PngTree, tmp_path: Path
) -> None:
    """Also without --checkpoint_minutes. No training step is done twice; only an evaluation is repeated."""
    arguments = flags(tree, tmp_path / "results")
    first = Job(tmp_path / "said", arguments, Disturbance(signals={moment: [(0, number)]})).result()
    assert (first.code, first.err) == (code, stopped(number, WHERE[moment]))
    status = json.loads((tmp_path / "results" / "tiny" / "run_status.json").read_text())
    assert status[f"fold_{moment.fold}"]["state"] == "interrupted"
    second = finish(tmp_path / "said", arguments)
    if moment.phase == "train":
        assert f"resuming after epoch 0 and step {moment.step} of the next" in second.out
    trained = [step for step in first.steps + second.steps if step.phase == "train"]
    assert trained == [step for step in whole.steps if step.phase == "train"]
    assert_same_results(tmp_path / "results", whole.results)


@pytest.mark.parametrize(
    ("event", "where"),
    [
        ("flush fold/checkpoint_epoch_1.pth.tmp", "fold 1, epoch 2, after step 1"),
        pytest.param("flush fold/checkpoint_epoch_2.pth.tmp", "fold 1, its test", marks=pytest.mark.exhaustive),
        ("rename fold/metrics.json.tmp", "fold 1, which is done"),
        pytest.param("rename tiny/summary.json.tmp", "fold 1, which is done", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_while_files_are_written(event: str, where: str, whole: Whole, tree: PngTree, tmp_path: Path) -> None:
    arguments = flags(tree, tmp_path / "results")
    result = Job(tmp_path / "said", arguments, Disturbance(signal_at_event=(event, signal.SIGTERM))).result()
    assert (result.code, result.err) == (143, stopped(signal.SIGTERM, where))
    second = finish(tmp_path / "said", arguments)
    assert ("fold 1: finished before, test accuracy" in second.out) == ("done" in where)
    assert_same_results(tmp_path / "results", whole.results)


AT_ONCE = {signal.SIGTERM: (-15, ""), signal.SIGINT: (130, "quaclrs-train: interrupted\n")}
"""Exit code and message of a process that has nothing to save."""


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("rename fold01/", signal.SIGTERM),
        ("load", signal.SIGINT),
        pytest.param("rename fold01/", signal.SIGINT, marks=pytest.mark.exhaustive),
        pytest.param("load", signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_what_has_nothing_to_save_ends_at_once(
    event: str, number: signal.Signals, whole: Whole, tmp_path: Path
) -> None:
    """During packing and during loading."""
    tree = make_tree(tmp_path / "tree")
    arguments = flags(tree, tmp_path / "results")
    result = Job(tmp_path / "said", arguments, Disturbance(signal_at_event=(event, number))).result()
    assert (result.code, result.err, result.steps) == (*AT_ONCE[number], [])
    finish(tmp_path / "said", arguments)
    assert_same_results(tmp_path / "results", whole.results)
    assert content_of(tree.csv_file.parent / "quaclrs_shards") == whole.shards


@pytest.mark.parametrize(("number", "code"), [SIGNALS[1], pytest.param(*SIGNALS[0], marks=pytest.mark.exhaustive)])
def test_a_signal_passed_on_is_the_same_one(number: int, code: int, tree: PngTree, tmp_path: Path) -> None:
    other = SIGNALS[0][0] if number == signal.SIGINT else SIGNALS[1][0]
    several = Disturbance(signals={MIDDLE: [(0, number), (0.1, number), (0.1, other)]})
    result = Job(tmp_path / "said", flags(tree, tmp_path / "results"), several).result()
    assert (result.code, result.err) == (code, stopped(number, WHERE[MIDDLE]))


def test_a_second_signal_ends_at_once(whole: Whole, tree: PngTree, tmp_path: Path) -> None:
    arguments = {number: flags(tree, tmp_path / str(int(number))) for number in AT_ONCE}
    jobs = {
        number: Job(
            tmp_path / f"said {number}", arguments[number], Disturbance(signals={LAST: [(0, number), (2.05, number)]})
        )
        for number in AT_ONCE
    }
    for number, job in jobs.items():
        result = job.result()
        assert (result.code, result.err) == AT_ONCE[number]
        assert not list((tmp_path / str(int(number))).rglob("*.pth"))
        finish(tmp_path / "said", arguments[number])
        assert_same_results(tmp_path / str(int(number)), whole.results)


# --- the command itself ---

COMMAND = (
    "--model_name",
    "mobilenet",
    "--freeze_features",
    "--fold",
    1,
    "--epochs",
    6,
    "--loader",
    "files",
    "--device",
    "cpu",
)


def start(arguments: Sequence[object]) -> subprocess.Popen[str]:
    warnings = [
        "-W",
        "error",
        "-W",
        "ignore:This process:DeprecationWarning",
    ]  # of a fork beside threads, from Python 3.12
    command = [sys.executable, *warnings, "-m", "quaclrs.cli", *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, start_new_session=True, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def stop_after_an_epoch(output_dir: Path, arguments: Sequence[object], number: signal.Signals, group: bool) -> None:
    """Run the command, send it (``group``: its process group) ``number``, and check its message and exit code."""
    with start(arguments) as process:
        try:
            wait_for(output_dir / "mobilenet" / "fold_1" / "checkpoint_epoch_1.pth", process)
            if group:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, (out, err)
    assert err.startswith(f"quaclrs-train: stopped by {number.name} in fold 1, "), err
    assert err.endswith("; the same command with --resume goes on from there\n")
    assert err.count("\n") == 1


def test_the_command_and_ctrl_c(tree: PngTree, tmp_path: Path) -> None:
    """A terminal sends the signal to the loader's workers too."""
    arguments = flags(tree, tmp_path / "results", *COMMAND, "--num_workers", 2)
    stop_after_an_epoch(tmp_path / "results", arguments, signal.SIGINT, group=True)
    whole = finish(tmp_path / "said", flags(tree, tmp_path / "whole", *COMMAND))
    again = finish(tmp_path / "said", flags(tree, tmp_path / "results", *COMMAND))
    assert again.steps == whole.steps[-len(again.steps) :]
    assert 0 < len(again.steps) < len(whole.steps)
    assert_same_results(tmp_path / "results", results(tmp_path / "whole"))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGHUP, marks=pytest.mark.exhaustive),
    ],
)
def test_the_command_with_ranks_and_a_schedulers_signal(number: signal.Signals, tree: PngTree, tmp_path: Path) -> None:
    """A scheduler signals the launcher only; afterwards one process goes on with the global batch of both ranks."""
    arguments = flags(tree, tmp_path / "results", *COMMAND, "--distributed", "--nproc", 2)
    stop_after_an_epoch(tmp_path / "results", arguments, number, group=False)
    alone = finish(tmp_path / "said", flags(tree, tmp_path / "results", *COMMAND))
    assert {len(step.index) for step in alone.steps if step.phase == "train"} == {6}


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as handler:
            signal.raise_signal(signal.SIGHUP)
            assert handler.signal is None
            signal.raise_signal(signal.SIGUSR1)
            assert handler.signal is signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- on another number of processes ---


@pytest.fixture(scope="module")
def even_tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Four folds of eight rows: divisible by all batch sizes used here."""
    return write_tree(tmp_path_factory.mktemp("even"), make_rows(CLASSES[:4], (1, 2, 3, 4)))


def shared_flags(tree: PngTree, output_dir: Path, batch_size: int, *more: object) -> list[object]:
    return flags(
        tree, output_dir, "--loader", "files", "--num_folds", 4, "--fold", 3, "--batch_size", batch_size, *more
    )


def together(
    folder: Path, arguments: Sequence[object], processes: int, disturbed: dict[int, Disturbance] | None = None
) -> list[Result]:
    """Run ``processes`` ranks, disturbed as ``disturbed`` says by rank; returns their results by rank."""
    disturbed = disturbed or {}
    if processes == 1:
        return [Job(folder, arguments, disturbed.get(0, UNDISTURBED)).result()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    jobs = [
        Job(folder, arguments, disturbed.get(rank, UNDISTURBED), (rank, processes, port)) for rank in range(processes)
    ]
    return [job.result() for job in jobs]


def global_batches(runs: Sequence[Sequence[Result]]) -> list[tuple[int, ...]]:
    """The samples of each optimizer step over all ranks."""
    batches = []
    for run in runs:
        of_ranks = [[step.index for step in result.steps if step.phase == "train"] for result in run]
        batches += [tuple(number for part in parts for number in part) for parts in zip(*of_ranks, strict=True)]
    return batches


ONE, TWO = (1, 4), (2, 2)
"""Processes and --batch_size; the global batch is the same."""


InWorlds = Callable[[str, tuple[int, int]], tuple[list[Result], Path]]


@pytest.fixture(scope="module")
def in_worlds(even_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> InWorlds:
    """Results and output folder of an undisturbed training of a model in one process or two; made once."""

    @functools.cache
    def run(model: str, world: tuple[int, int]) -> tuple[list[Result], Path]:
        folder = tmp_path_factory.mktemp("world")
        arguments = shared_flags(even_tree, folder / "results", world[1], "--model_name", model)
        done = together(folder / "said", arguments, world[0])
        assert [(result.code, result.err) for result in done] == [(0, "")] * world[0]
        return done, folder / "results"

    return run


@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        (Moment("train", 2, 3), 1),
        pytest.param(Moment("train", 4, 3), 0, marks=pytest.mark.exhaustive),
        pytest.param(Moment("train", 6, 3), 1, marks=pytest.mark.exhaustive),
        (Moment("validate", 1, 3), 0),
        pytest.param(Moment("test", 1, 3), 1, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_as_many_processes_leave_no_trace(
    moment: Moment, rank: int, even_tree: PngTree, in_worlds: InWorlds, tmp_path: Path
) -> None:
    """The signal may reach either rank."""
    arguments = shared_flags(even_tree, tmp_path / "results", 2)
    first = together(tmp_path / "said", arguments, 2, {rank: Disturbance(signals={moment: [(0, signal.SIGTERM)]})})
    assert [result.code for result in first] == [143, 143]
    assert (first[0].err + first[1].err).count("\n") == 1
    assert f"stopped by {'a signal' if rank else 'SIGTERM'} in fold 3, " in first[0].err
    second = together(tmp_path / "said", arguments, 2)
    assert [(result.code, result.err) for result in second] == [(0, "")] * 2
    whole, promised = in_worlds("tiny", TWO)
    for before, after, undisturbed in zip(first, second, whole, strict=True):
        done = [step for step in before.steps + after.steps if step.phase == "train"]
        assert done == [step for step in undisturbed.steps if step.phase == "train"]
    assert_same_results(tmp_path / "results", results(promised))


@pytest.mark.parametrize(("before", "after"), [(TWO, 1), (ONE, 2)], ids=["two, then one", "one, then two"])
@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_another_number_of_processes_keeps_the_global_batches(
    step: int, before: tuple[int, int], after: int, even_tree: PngTree, in_worlds: InWorlds, tmp_path: Path
) -> None:
    """Without BatchNorm and dropout, which see only a rank's part of a batch, equal batches give equal weights."""
    processes, batch_size = before
    arguments = shared_flags(even_tree, tmp_path / "results", batch_size, "--model_name", "plain")
    stop = {0: Disturbance(signals={Moment("train", step, 3): [(0, signal.SIGTERM)]})}
    first = together(tmp_path / "said", arguments, processes, stop)
    assert {result.code for result in first} == {143}
    second = together(tmp_path / "said", arguments, after)
    assert [(result.code, result.err) for result in second] == [(0, "")] * after
    whole, promised = in_worlds("plain", before)
    assert global_batches([first, second]) == global_batches([whole])
    assert len(global_batches([whole])) == 2 * 4
    found, expected = (
        json.loads((root / "plain" / "fold_3" / "metrics.json").read_text())
        for root in (tmp_path / "results", promised)
    )
    assert found["global_batch"] == expected["global_batch"] == 4
    assert found["processes"] == after
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)  # sums in another order


def test_a_number_that_does_not_divide_the_global_batch(even_tree: PngTree, tmp_path: Path) -> None:
    arguments = shared_flags(even_tree, tmp_path / "results", 4)
    stop = {0: Disturbance(signals={Moment("train", 1, 3): [(0, signal.SIGTERM)]})}
    together(tmp_path / "said", arguments, 1, stop)
    before = content_of(tmp_path / "results")
    refused = together(tmp_path / "said", arguments, 3)
    path = tmp_path / "results" / "tiny" / "fold_3" / "run.json"
    reason = "its global batch of 4 samples cannot be shared by 3 processes; use a number that divides it"
    assert refused[0].err.startswith("quaclrs-train: error: ")
    assert refused[0].err.endswith(f"{path}: {reason}\n")
    assert refused[0].err.count("\n") == 1
    assert refused[0].code == 2
    assert all(result.code != 0 and "Traceback" not in result.err for result in refused)
    config = TrainConfig(model_name="tiny", output_dir=tmp_path / "results", num_folds=4, batch_size=4, resume=True)
    with pytest.raises(TrainingError, match="cannot be shared by 4 processes"):  # BatchNorm cannot train on one sample
        agreed_global_batch(config, World(size=4))
    assert agreed_global_batch(config, World(size=2)) == 4
    assert content_of(tmp_path / "results") == before


def test_what_was_set_aside_does_not_count(even_tree: PngTree, tmp_path: Path) -> None:
    """An earlier run on more processes, renamed by a run without --resume."""
    arguments = shared_flags(even_tree, tmp_path / "results", 4)
    assert {result.code for result in together(tmp_path / "said", arguments, 2)} == {0}
    fresh = [part for part in arguments if part != "--resume"]
    stop = {0: Disturbance(signals={Moment("train", 1, 3): [(0, signal.SIGTERM)]})}
    assert together(tmp_path / "said", fresh, 1, stop)[0].code == 143
    assert (tmp_path / "results" / "tiny" / "fold_3.previous" / "run.json").is_file()
    assert "resuming after epoch 0 and step 1" in finish(tmp_path / "said", arguments).out


# --- what may change, and what may not ---


@pytest.fixture(scope="module")
def begun(even_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in float32 that was stopped within its first epoch. Copy it before use."""
    folder = tmp_path_factory.mktemp("begun")
    stop = Disturbance(signals={Moment("train", 2, 3): [(0, signal.SIGTERM)]})
    assert Job(folder / "said", shared_flags(even_tree, folder / "results", 4), stop).result().code == 143
    return folder / "results"


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--batch_size", 6], "global_batch was 4, now 6"),
        (["--image_size", 40], "image_size was 32, now 40"),
        (["--patience", 3], "patience was 7, now 3"),
        (["--learning_rate", 0.02], "learning_rate was 0.01, now 0.02"),
        (["--weight_decay", 0.5], "weight_decay was 1e-05, now 0.5"),
        (["--scheduler", "none"], "scheduler was 'plateau', now 'none'"),
        (["--seed", 1], "seed was 42, now 1"),
        (["--tf32"], "tf32 was False, now True"),
        (["--use_amp"], "compute_dtype was 'torch.float32', now 'torch.bfloat16'; use_amp was False, now True"),
        (
            ["--use_amp", "--amp_dtype", "float16"],
            "compute_dtype was 'torch.float32', now 'torch.float16'; use_amp was False",
        ),
        (["--freeze_features"], "freeze_features was False, now True"),
        (["--label_column", "augmentation"], "data was '"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_training_is_refused(
    more: list[object], difference: str, even_tree: PngTree, begun: Path, tmp_path: Path
) -> None:
    """The message names the difference, and no file changes."""
    shutil.copytree(begun, tmp_path / "results")
    result = Job(tmp_path / "said", shared_flags(even_tree, tmp_path / "results", 4, *more)).result()
    assert result.code == 2
    path = tmp_path / "results" / "tiny" / "fold_3" / "checkpoint_within_epoch.pth"
    assert result.err.startswith(f"quaclrs-train: error: {path}: belongs to another run ("), result.err
    assert difference in result.err
    assert result.err.endswith("); use the same settings, or another --output_dir\n")
    assert result.err.count("\n") == 1
    assert (results(tmp_path / "results") | {"tiny/run_status.json": 0}) == (
        results(begun) | {"tiny/run_status.json": 0}
    )


def test_another_kind_of_amp_is_refused(even_tree: PngTree, tmp_path: Path) -> None:
    arguments = shared_flags(even_tree, tmp_path / "results", 4, "--use_amp", "--amp_dtype")
    stop = Disturbance(signals={Moment("train", 2, 3): [(0, signal.SIGTERM)]})
    assert Job(tmp_path / "said", [*arguments, "float16"], stop).result().code == 143
    refused = Job(tmp_path / "said", [*arguments, "bfloat16"]).result()
    assert "compute_dtype was 'torch.float16', now 'torch.bfloat16')" in refused.err
    finish(tmp_path / "said", [*arguments, "float16"])
    finish(tmp_path / "said", shared_flags(even_tree, tmp_path / "whole", 4, "--use_amp", "--amp_dtype", "float16"))
    assert_same_results(tmp_path / "results", results(tmp_path / "whole"))  # the scaler's state included


def test_how_it_is_done_may_change(even_tree: PngTree, tmp_path: Path) -> None:
    """Loader, workers, prefetch and checkpoints may change at each resume; the weights are the same."""
    pack_tree(even_tree, tmp_path / "shards", encoding="indexed")
    data: list[object] = ["--shards", tmp_path / "shards", "--csv_file", even_tree.csv_file]
    rest: list[object] = ["--num_folds", 4, "--fold", 3, "--batch_size", 4]
    ways: list[list[object]] = [
        ["--loader", "resident"],
        ["--loader", "mapped", "--num_workers", 2],
        ["--loader", "mapped", "--prefetch", 5, "--checkpoint_minutes", 1e-9],
        ["--loader", "files", "--keep_checkpoints", 2],
        ["--loader", "auto", "--gradcam_per_class", 0, "--device", "cpu", "--checkpoint_minutes", 100],
    ]
    whole = finish(tmp_path / "said", flags(even_tree, tmp_path / "whole", *data, *rest, *ways[0]))
    steps: list[Step] = []
    for number, way in enumerate(ways):
        stop = UNDISTURBED if way is ways[-1] else Disturbance(signals={Moment("train", 2, 3): [(0, signal.SIGTERM)]})
        result = Job(tmp_path / "said", flags(even_tree, tmp_path / "results", *data, *rest, *way), stop).result()
        assert result.code == (0 if way is ways[-1] else 143), (number, result)
        steps += [step for step in result.steps if step.phase == "train"]
    assert steps == [step for step in whole.steps if step.phase == "train"]
    found, expected = results(tmp_path / "results"), results(tmp_path / "whole")
    folder = "tiny/fold_3"
    assert sorted(found) == sorted(expected)
    for name in ("best_model.pth", "checkpoint_epoch_2.pth"):
        assert found[f"{folder}/{name}"] == expected[f"{folder}/{name}"]
    for name in ("history", "test_loss", "confusion_matrix"):
        assert found[f"{folder}/metrics.json"][name] == expected[f"{folder}/metrics.json"][name]


# --- what lies there ---


def test_nothing_to_resume(whole: Whole, tree: PngTree, tmp_path: Path) -> None:
    result = finish(tmp_path / "said", flags(tree, tmp_path / "results", *EVERY_STEP))
    for fold in (1, 2, 3):
        assert (
            f"{tmp_path}/results/tiny/fold_{fold}: no checkpoint to resume from; starting at the beginning\n"
            in result.out
        )
    assert_same_results(tmp_path / "results", whole.results)


@pytest.fixture(scope="module")
def stopped_once(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped in epoch 1 and in epoch 2 of fold 1: ``results``, and as ``kept.pth`` what the first
    stop wrote within its epoch.
    """
    root = tmp_path_factory.mktemp("stopped")
    for moment in (MIDDLE, Moment("train", 2)):
        stop = Disturbance(signals={moment: [(0, signal.SIGTERM)]})
        assert Job(root / "said", flags(tree, root / "results"), stop).result().code == 143
        if not (root / "kept.pth").exists():
            shutil.copy(root / "results" / "tiny" / "fold_1" / "checkpoint_within_epoch.pth", root / "kept.pth")
    return root


@pytest.fixture
def stopped_twice(stopped_once: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it that may be changed: fold 1's folder, and ``kept.pth``."""
    shutil.copytree(stopped_once / "results", tmp_path / "results")
    return tmp_path / "results" / "tiny" / "fold_1", stopped_once / "kept.pth"


def test_an_older_state_within_an_epoch_is_ignored(
    stopped_twice: tuple[Path, Path], whole: Whole, tree: PngTree, tmp_path: Path
) -> None:
    """A process that was killed after writing an epoch's checkpoint and before deleting this file leaves it behind."""
    folder, older = stopped_twice
    assert (folder / "checkpoint_epoch_1.pth").is_file()
    shutil.copy(older, folder / "checkpoint_within_epoch.pth")
    result = finish(tmp_path / "said", flags(tree, tmp_path / "results"))
    assert "fold_1: resuming after epoch 1\n" in result.out
    assert_same_results(tmp_path / "results", whole.results)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("checkpoint_within_epoch.pth", 0),
        ("checkpoint_epoch_1.pth", 3000),
        pytest.param("checkpoint_within_epoch.pth", 100, marks=pytest.mark.exhaustive),
        pytest.param("checkpoint_within_epoch.pth", 3000, marks=pytest.mark.exhaustive),
        pytest.param("checkpoint_epoch_1.pth", 0, marks=pytest.mark.exhaustive),
        pytest.param("checkpoint_epoch_1.pth", 100, marks=pytest.mark.exhaustive),
    ],
)
def test_a_damaged_checkpoint_is_named(
    name: str, length: int, stopped_twice: tuple[Path, Path], tree: PngTree, tmp_path: Path
) -> None:
    """quaclrs renames complete files only; a disk can still damage one."""
    damaged = stopped_twice[0] / name
    damaged.write_bytes(damaged.read_bytes()[:length])
    result = Job(tmp_path / "said", flags(tree, tmp_path / "results")).result()
    assert result.code == 2
    assert result.err.startswith(f"quaclrs-train: error: {damaged}: cannot be loaded (")
    assert result.err.endswith("); delete it and run again\n")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("version", [None, pytest.param(1, marks=pytest.mark.exhaustive), 99])
def test_another_version_is_refused(
    version: int | None, stopped_twice: tuple[Path, Path], tree: PngTree, tmp_path: Path
) -> None:
    path = stopped_twice[0] / "checkpoint_epoch_1.pth"
    content = torch.load(path, weights_only=True)
    content.pop("version") if version is None else content.update(version=version)
    torch.save(content, path)
    result = Job(tmp_path / "said", flags(tree, tmp_path / "results")).result()
    reason = f"checkpoint version {version}, this quaclrs reads {checkpoint.CHECKPOINT_VERSION}; train without --resume"
    assert (result.code, result.err) == (2, f"quaclrs-train: error: {path}: {reason}\n")


# --- more epochs ---

ONE_FOLD = ("--fold", 1)
IMPROVES_LATE = ("--seed", 8)
"""With it the best epoch of three is the first, and of more the fourth."""


def to_epochs(tree: PngTree, output_dir: Path, epochs: int, *more: object) -> list[object]:
    return flags(tree, output_dir, *ONE_FOLD, "--epochs", epochs, *more)


def fold_document(output_dir: Path, name: str = "metrics.json") -> Any:
    return json.loads((output_dir / "tiny" / "fold_1" / name).read_text())


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--scheduler", "none", "--learning_rate", 0.1],
        ["--patience", 1, "--seed", 2],  # stops after the third epoch, which three epochs at most do not show
        [*IMPROVES_LATE, "--keep_checkpoints", 4],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_a_finished_fold_goes_on_to_more_epochs(more: list[object], tree: PngTree, tmp_path: Path) -> None:
    """To the results of all epochs at once, in two goes, with no file left over."""
    whole = finish(tmp_path / "said", to_epochs(tree, tmp_path / "whole", 7, *more))
    steps: list[Step] = []
    for epochs, before in ((3, 0), (6, 3), (7, 6)):
        result = finish(tmp_path / "said", to_epochs(tree, tmp_path / "results", epochs, *more))
        going_on = f"finished before with --epochs {before}, and goes on to --epochs {epochs}\n"
        assert (going_on in result.out) == (before > 0)
        steps += [step for step in result.steps if step.phase == "train"]
    assert steps == [step for step in whole.steps if step.phase == "train"]
    for root in (tmp_path / "results", tmp_path / "whole"):
        for path in root.rglob("checkpoint_epoch_*.pth"):  # each says how many epochs were asked for when it was made
            content = torch.load(path, weights_only=True)
            content["run"].pop("epochs")
            torch.save(content, path)
    assert_same_results(tmp_path / "results", results(tmp_path / "whole"))
    found = fold_document(tmp_path / "results")
    assert found["run"]["epochs"] == 7
    assert found["stopped_early"] == (found["epochs_run"] < 7) == ("--patience" in more)


@pytest.mark.parametrize("one_in", [4, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_while_it_goes_on(one_in: int, tree: PngTree, tmp_path: Path) -> None:
    """At each event in turn. The old result stays whole until the new one is, and is then never seen again."""
    root, known = tmp_path / "results", tmp_path / "known"
    known.touch()
    more = [*EVERY_STEP, *IMPROVES_LATE]
    finish(tmp_path / "said", to_epochs(tree, tmp_path / "whole", 5, *more))
    finish(tmp_path / "said", to_epochs(tree, root, 3, *more))
    short, long = results(root), results(tmp_path / "whole")
    assert short["tiny/fold_1/metrics.json"]["best_epoch"] <= 3 < long["tiny/fold_1/metrics.json"]["best_epoch"]
    kept = [name for name in short if name.startswith("tiny/fold_1/")]
    seen: list[object] = []
    disturbance = Disturbance(killed_at_a_new_event=known, one_in=one_in)
    code = KILLED
    while code == KILLED:
        code = Job(tmp_path / "said", to_epochs(tree, root, 5, *more), disturbance).result().code
        moving = (root / "tiny" / "fold_1" / "further" / "metrics.json").is_file()
        seen.append("moving" if moving else fold_document(root)["epochs_run"])
        if seen[-1] == 3:
            found = results(root)
            assert {name: found.get(name) for name in kept} == {name: short[name] for name in kept}
    assert code == 0
    assert len(seen) > 40 / one_in
    assert seen == sorted(seen, key=[3, "moving", 5].index)
    if one_in == 1:
        assert set(seen) == {3, "moving", 5}
    assert_same_results(root, long)


def test_a_move_that_was_killed_is_ended_by_the_next_run(tree: PngTree, tmp_path: Path) -> None:
    """Whatever number of epochs that one asks for: the new result was whole."""
    root = tmp_path / "results"
    finish(tmp_path / "said", to_epochs(tree, root, 3))
    stop = Disturbance(signal_at_event=("rename further/checkpoint_epoch_5.pth at", signal.SIGKILL))
    assert Job(tmp_path / "said", to_epochs(tree, root, 5), stop).result().code == KILLED
    assert fold_document(root)["epochs_run"] == 3
    assert fold_document(root, "further/metrics.json")["epochs_run"] == 5
    refused = Job(tmp_path / "said", to_epochs(tree, root, 3)).result()
    assert "metrics.json: belongs to another run (epochs was 5, now 3, but epoch 5 was reached); " in refused.err
    assert not finish(tmp_path / "said", to_epochs(tree, root, 5)).steps
    finish(tmp_path / "said", to_epochs(tree, tmp_path / "whole", 5))
    assert_same_results(root, results(tmp_path / "whole"))


def test_the_old_result_stands_until_the_new_one_is_there(tree: PngTree, tmp_path: Path) -> None:
    """The first command still finds its result; what goes on may be stopped, and then be given other epochs."""
    root, folder = tmp_path / "results", tmp_path / "results" / "tiny" / "fold_1"
    finish(tmp_path / "said", to_epochs(tree, root, 3, *IMPROVES_LATE))
    short = results(root)
    stop = Disturbance(signals={Moment("train", 3): [(0, signal.SIGTERM)]})
    assert Job(tmp_path / "said", to_epochs(tree, root, 8, *IMPROVES_LATE), stop).result().code == 143
    assert (folder / "further" / "checkpoint_within_epoch.pth").is_file()
    again = finish(tmp_path / "said", to_epochs(tree, root, 3, *IMPROVES_LATE))
    assert "fold 1: finished before, test accuracy" in again.out
    found = results(root)
    assert {name: found[name] for name in short} == short
    refused = Job(tmp_path / "said", to_epochs(tree, root, 4, *IMPROVES_LATE)).result()
    assert "further/checkpoint_within_epoch.pth: belongs to another run (epochs was 8, now 4, but" in refused.err
    finish(tmp_path / "said", to_epochs(tree, root, 6, *IMPROVES_LATE))
    finish(tmp_path / "said", to_epochs(tree, tmp_path / "whole", 6, *IMPROVES_LATE))
    assert_same_results(root, results(tmp_path / "whole"))


def test_an_interrupted_fold_goes_on_to_other_epochs(tree: PngTree, tmp_path: Path) -> None:
    finish(tmp_path / "said", to_epochs(tree, tmp_path / "whole", 4))
    stop = Disturbance(signals={Moment("train", 3): [(0, signal.SIGTERM)]})
    for before in (3, 6):
        root = tmp_path / str(before)
        assert Job(tmp_path / "said", to_epochs(tree, root, before), stop).result().code == 143
        finish(tmp_path / "said", to_epochs(tree, root, 4))
        assert_same_results(root, results(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("more", "epochs", "message"),
    [
        (["--scheduler", "cosine"], 3, "(epochs was 2, now 3: the cosine schedule spans all epochs); use the same"),
        (["--scheduler", "cosine"], 1, "(epochs was 2, now 1: the cosine schedule spans all epochs); use the same"),
        ([], 1, "(epochs was 2, now 1, but epoch 2 was reached); use the same settings, or another --output_dir\n"),
        (["--learning_rate", 0.02], 3, "learning_rate was 0.01, now 0.02); use the same"),
    ],
)
def test_other_epochs_that_are_refused(
    more: list[object], epochs: int, message: str, tree: PngTree, tmp_path: Path
) -> None:
    """Of a finished fold, and of one that only lacks its result; no file changes."""
    root = tmp_path / "results"
    finish(tmp_path / "said", to_epochs(tree, root, 2, *(more if "cosine" in more else [])))
    for name in ("metrics.json", "checkpoint_epoch_2.pth"):
        before = results(root)
        refused = Job(tmp_path / "said", to_epochs(tree, root, epochs, *more)).result()
        assert refused.code == 2
        assert refused.err.startswith(f"quaclrs-train: error: {root}/tiny/fold_1/{name}: belongs to another run (")
        assert message in refused.err
        assert refused.err.count("\n") == 1
        assert results(root) | {"tiny/run_status.json": 0} == before | {"tiny/run_status.json": 0}
        (root / "tiny" / "fold_1" / "metrics.json").unlink(missing_ok=True)


def test_a_finished_fold_without_its_checkpoint_does_not_begin_anew(tree: PngTree, tmp_path: Path) -> None:
    root = tmp_path / "results"
    finish(tmp_path / "said", to_epochs(tree, root, 2))
    (root / "tiny" / "fold_1" / "checkpoint_epoch_2.pth").unlink()
    before = results(root)
    refused = Job(tmp_path / "said", to_epochs(tree, root, 3)).result()
    assert refused.code == 2
    assert refused.err == (
        f"quaclrs-train: error: {root}/tiny/fold_1: holds a result but no checkpoint to train it further from; give "
        "the --epochs that it was made with, or train without --resume\n"
    )
    assert results(root) | {"tiny/run_status.json": 0} == before | {"tiny/run_status.json": 0}
    finish(tmp_path / "said", to_epochs(tree, root, 2))


def test_the_summary_has_the_folds_of_the_asked_epochs(tree: PngTree, tmp_path: Path) -> None:
    """Folds of other epochs are left out of it until they are trained further too."""
    root = tmp_path / "results"
    finish(tmp_path / "said", flags(tree, root))
    finish(tmp_path / "said", to_epochs(tree, root, 3))
    assert [fold["fold"] for fold in json.loads((root / "tiny" / "summary.json").read_text())["folds"]] == [1]
    finish(tmp_path / "said", flags(tree, root, "--epochs", 3))
    finish(tmp_path / "said", flags(tree, tmp_path / "whole", "--epochs", 3))
    found, expected = results(root), results(tmp_path / "whole")
    assert found["tiny/summary.json"] == expected["tiny/summary.json"]
    assert len(found["tiny/summary.json"]["folds"]) == 3


def test_two_processes_go_on_to_more_epochs(even_tree: PngTree, tmp_path: Path) -> None:
    for root, goes in ((tmp_path / "results", (1, 3)), (tmp_path / "whole", (3,))):
        for epochs in goes:
            done = together(tmp_path / "said", shared_flags(even_tree, root, 2, "--epochs", epochs), 2)
            assert [(result.code, result.err) for result in done] == [(0, "")] * 2
    assert_same_results(tmp_path / "results", results(tmp_path / "whole"))
