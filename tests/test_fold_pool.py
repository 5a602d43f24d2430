"""Contract of ``--parallel folds`` and of a shared output folder: the results of one process, failures of one fold."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from png_trees import PngTree, make_rows, write_tree

from quaclrs.cli.train import main
from quaclrs.config import TrainConfig
from quaclrs.errors import Interrupted, StorageError, TrainingError, UsageError
from quaclrs.experiment import cross_validation, fold, fold_pool
from quaclrs.experiment.cross_validation import FoldRunner, list_tasks, run_cross_validation
from quaclrs.experiment.results import FoldResult
from quaclrs.experiment.run import Run
from quaclrs.experiment.run_status import hold_fold, mark_done, read_run_status, update_status
from quaclrs.loaders.dataset import open_dataset
from quaclrs.training.architectures import ARCHITECTURES
from quaclrs.training.records import EpochRecord
from quaclrs.training.trainer import Hooks

CLASSES = ("dog_bark", "drilling", "traffic")
DEADLINE_S = 120
"""Limit of every wait, so that a hang is a failure."""
EPOCHS = 3
PARALLEL = ("--parallel", "folds", "--nproc", 2)
ROOT = Path(__file__).parents[1]
MACHINE = {"config", "environment", "processes"}
"""Keys of a result that may differ between ways of making it, beside times."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "sklearn.metrics", "quaclrs.cli.train", "quaclrs.experiment.fold_pool"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Three classes, three folds of seven rows. Read only."""
    return write_tree(tmp_path_factory.mktemp("parallel"), make_rows(CLASSES, (1, 2, 3)))


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    """Checkpoints are large, and pytest would keep those of its last three runs."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(autouse=True)
def one_thread_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One torch thread, as in this process (conftest.py): sums of floats depend on the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def flags(tree: PngTree, output_dir: Path, *more: object) -> list[str]:
    common = (
        "--loader files --num_workers 0 --num_folds 3 --batch_size 2 --image_size 32 --device cpu --gradcam_per_class 0"
    )
    paths = ["--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir, "--output_dir", output_dir]
    return [
        str(flag)
        for flag in (
            *paths,
            *common.split(),
            "--model_name",
            "mobilenet",
            "--freeze_features",
            "--epochs",
            EPOCHS,
            *more,
        )
    ]


def config_for(tree: PngTree, output_dir: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        **{"csv_file": tree.csv_file, "spectrograms_dir": tree.spectrograms_dir, "output_dir": output_dir},
        **{"loader": "files", "num_workers": 0, "num_folds": 3, "batch_size": 2, "device": "cpu"},
        **{
            "model_name": "mobilenet",
            "image_size": 32,
            "gradcam_per_class": 0,
            "epochs": EPOCHS,
            "freeze_features": True,
        },
    }
    return TrainConfig(**defaults | options)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "write_plots", lambda *_: [])


@pytest.fixture(scope="module")
def one_by_one(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output folder of two models trained in one process, fold after fold."""
    output_dir, before = tmp_path_factory.mktemp("one_by_one"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "write_plots", lambda *_: [])
        run_cross_validation(config_for(tree, output_dir, model_name="mobilenet,resnet18"), lambda text: None)
    torch.set_num_threads(before)
    yield output_dir
    shutil.rmtree(output_dir)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def without_times(content: Any) -> Any:
    if isinstance(content, list):
        return [without_times(value) for value in content]
    if not isinstance(content, dict):
        return content
    return {
        name: without_times(value)
        for name, value in content.items()
        if name not in MACHINE and not name.endswith(("seconds", "per_s", "wait"))
    }


def last_weights(fold_folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(fold_folder / f"checkpoint_epoch_{EPOCHS}.pth", weights_only=True)
    weights: dict[str, torch.Tensor] = checkpoint["state"]["model"]
    return weights


def assert_same_results(ours: Path, theirs: Path, *models: str) -> None:
    """Equal to the last digit, except for times."""
    for name in models:
        assert without_times(read_json(ours / name / "summary.json")) == without_times(
            read_json(theirs / name / "summary.json")
        )
        for number in (1, 2, 3):
            one, other = (folder / name / f"fold_{number}" for folder in (ours, theirs))
            for file in ("metrics.json", "classification_report.json"):
                assert without_times(read_json(one / file)) == without_times(read_json(other / file))
            weights, expected = last_weights(one), last_weights(other)
            assert weights.keys() == expected.keys()
            assert [key for key, value in weights.items() if not torch.equal(value, expected[key])] == []


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def states(model_folder: Path) -> dict[str, str]:
    return {name: entry["state"] for name, entry in read_run_status(model_folder).items()}


# --- several processes ---


def test_results_are_those_of_one_process(
    tree: PngTree, one_by_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", site_with("sabotage({})", tmp_path / "site"))  # draws no plots
    assert main(flags(tree, tmp_path, *PARALLEL, "--model_name", "mobilenet,resnet18")) == 0
    assert_same_results(tmp_path, one_by_one, "mobilenet", "resnet18")
    log = capsys.readouterr().out
    trained = Counter(re.findall(r"^(\w+): fold (\d): training on", log, re.MULTILINE))
    assert trained == Counter(
        dict.fromkeys(((name, str(k)) for name in ("mobilenet", "resnet18") for k in (1, 2, 3)), 1)
    )
    assert 1 <= log.count("loader: files on cpu") <= 2  # one per process, although it has trained two models
    assert log.count("note: 6 rows share their image") == 1
    for name in ("mobilenet", "resnet18"):
        assert states(tmp_path / name) == {"fold_1": "done", "fold_2": "done", "fold_3": "done"}
        for number in (1, 2, 3):
            said = (tmp_path / name / "logs" / f"fold_{number}.log").read_text()
            assert said.count(f"fold {number}: training on 7 samples") == 1
            assert said.count("train loss") == EPOCHS
            assert f"fold {number}: test accuracy" in said


def test_one_dataset_and_a_loader_for_each_size(tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one image size follow each other, so a new loader is made only between sizes."""
    opened: list[TrainConfig] = []

    def counted(config: TrainConfig, **options: Any) -> Any:
        opened.append(config)
        return open_dataset(config, **options)

    runs: list[Run] = []

    def noted(run: Run, number: int) -> None:
        runs.append(run)

    monkeypatch.setattr(cross_validation, "open_dataset", counted)
    monkeypatch.setattr(cross_validation, "run_fold", noted)
    log: list[str] = []
    config = config_for(tree, tmp_path, model_name="inception,mobilenet,resnet18,inception", image_size=None)
    with FoldRunner.opened(config, log.append) as runner:
        for name, number in list_tasks(config):
            runner.train(name, number)
    assert len(opened) == 1
    names = [run.config.model_name for run in runs]
    assert names == ["mobilenet"] * 3 + ["resnet18"] * 3 + ["inception"] * 3
    assert [run.image_size for run in runs] == [224] * 6 + [299] * 3
    assert len({id(run.loader) for run in runs}) == 2
    assert [line for line in log if line.startswith("loader:")] == ["loader: files on cpu (as asked for)"] * 2


def test_all_models() -> None:
    """Every architecture once, those of one image size together."""
    everything = list_tasks(TrainConfig(model_name="all"))
    assert Counter(everything) == Counter({(name, number): 1 for name in ARCHITECTURES for number in range(1, 11)})
    assert everything[-10:] == [("inception", number) for number in range(1, 11)]
    assert list_tasks(TrainConfig(model_name="vgg16, vgg16", fold=4)) == [("vgg16", 4)]
    for name in ("vgg16,nope", "vgg16,", ""):
        with pytest.raises(
            UsageError, match=r"--model_name .*: choose one of alexnet, .*, several with commas, or all"
        ):
            list_tasks(TrainConfig(model_name=name))


# --- when a fold fails ---


def sabotage(where: dict[str, str]) -> None:
    """Make folds of this process fail or wait: ``where`` maps a fold to ``bug``, ``killed`` or ``slow``.

    Also sets one torch thread, as in the other runs, and draws no plots: they take longer than the training.
    """
    import torch

    import quaclrs.experiment.cross_validation
    import quaclrs.experiment.fold
    from quaclrs.training.state import TrainState

    def wait_for_company() -> None:
        """Wait until a second process trains, so that no fold ends before that, however slow the machine is."""
        if "COMPANY" in os.environ:
            open(os.path.join(os.environ["COMPANY"], str(os.getpid())), "w").close()  # noqa: PTH118, PTH123
            while len(os.listdir(os.environ["COMPANY"])) < 2:  # noqa: PTH208 - no pathlib where this is copied to
                time.sleep(0.02)

    torch.set_num_threads(1)
    vars(quaclrs.experiment.fold)["write_plots"] = lambda *_: []
    run_fold, step = quaclrs.experiment.fold.run_fold, TrainState.step
    steps: list[None] = []
    now = [""]

    def sabotaged_fold(run: Run, fold: int) -> FoldResult | None:
        now[0] = where.get(str(fold), "")
        steps.clear()
        if now[0] == "bug":
            raise ZeroDivisionError("a\nbug")
        return run_fold(run, fold)

    def sabotaged_step(*arguments: Any) -> Any:
        steps.append(None)
        if now[0] == "killed" and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if now[0] == "slow":
            wait_for_company()
            time.sleep(0.25)
        return step(*arguments)

    vars(quaclrs.experiment.cross_validation)["run_fold"] = sabotaged_fold
    TrainState.step = sabotaged_step  # type: ignore[assignment, method-assign]


def site_with(code: str, folder: Path) -> str:
    """A PYTHONPATH with which ``code`` runs at the start of every process that the pool spawns."""
    folder.mkdir()
    lines = (
        *("from __future__ import annotations", "import os, signal, sys, time", inspect.getsource(sabotage)),
        *("if any('spawn_main' in argument for argument in sys.orig_argv):", f"    {code}"),
    )
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it to fork the pool's workers from a server that has imported everything: ten times as fast.

    Each worker calls the given function first.
    """

    def with_first(first: Callable[..., None], *arguments: object) -> None:
        forkserver.ensure_running()  # not first in the pool, which blocks SIGINT then: all processes would inherit that
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: _processes)
        monkeypatch.setattr(fold_pool, "_run_worker", functools.partial(_work_after, first, arguments))

    return with_first


def _work_after(first: Callable[..., None], arguments: tuple[object, ...], *rest: Any) -> None:
    first(*arguments)
    fold_pool._run_worker(*rest)


@pytest.mark.usefixtures("no_plots")
def test_a_fold_that_fails_costs_itself_only(
    tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_workers: Callable[..., None]
) -> None:
    """Afterwards, --resume trains that fold only, in any number of processes."""
    forked_workers(sabotage, {})

    def stop(record: EpochRecord) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):  # leaves a checkpoint of another run in fold 2's folder
        run_cross_validation(
            config_for(tree, tmp_path, fold=2, learning_rate=0.5), lambda text: None, Hooks(epoch_done=stop)
        )
    assert main(flags(tree, tmp_path, *PARALLEL, "--resume")) == 2
    root, printed = tmp_path / "mobilenet", capsys.readouterr()
    reason = "belongs to another run (learning_rate was 0.5, now 0.001); use the same settings, or another --output_dir"
    message = f"mobilenet fold 2: {root}/fold_2/checkpoint_epoch_1.pth: {reason} (log: {root}/logs/fold_2.log)"
    advice = "the same command with --resume trains only what is missing"
    assert printed.err == f"quaclrs-train: error: 1 of 3 fold(s) failed: {message}; {advice}\n"
    assert (
        f"mobilenet fold 2 failed: {root}/fold_2/checkpoint_epoch_1.pth: {reason}; the other folds go on\n"
        in printed.out
    )
    assert reason in (root / "logs" / "fold_2.log").read_text()
    assert states(root) == {"fold_1": "done", "fold_2": "failed", "fold_3": "done"}
    assert reason in read_run_status(root)["fold_2"]["error"]
    assert list(read_json(root / "summary.json")["fold_accuracies"]) == ["fold_1", "fold_3"]
    before = modified(root / "fold_1") | modified(root / "fold_3")
    shutil.rmtree(root / "fold_2")
    assert main(flags(tree, tmp_path, "--resume")) == 0
    assert modified(root / "fold_1") | modified(root / "fold_3") == before
    log = capsys.readouterr().out
    assert re.findall(r"fold (\d): training on", log) == ["2"]
    assert sorted(re.findall(r"fold (\d): finished before", log)) == ["1", "3"]
    assert set(states(root).values()) == {"done"}
    assert read_run_status(root)["fold_2"]["error"] is None
    assert list(read_json(root / "summary.json")["fold_accuracies"]) == ["fold_1", "fold_2", "fold_3"]


def test_a_process_that_dies_costs_its_fold_only(
    tree: PngTree,
    one_by_one: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    forked_workers: Callable[..., None],
) -> None:
    """Killed by a signal, or ended by a bug: new processes train the remaining folds."""
    forked_workers(sabotage, {"1": "bug", "2": "killed"})
    assert main(flags(tree, tmp_path, *PARALLEL)) == 2
    root, printed = tmp_path / "mobilenet", capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("quaclrs-train: error: 2 of 3 fold(s) failed: ")
    assert f"mobilenet fold 1: ZeroDivisionError: a bug (log: {root}/logs/fold_1.log)" in printed.err
    assert f"mobilenet fold 2: its process was killed by SIGKILL (log: {root}/logs/fold_2.log)" in printed.err
    assert "Traceback (most recent call last)" in (root / "logs" / "fold_1.log").read_text()
    assert "fold 2: training on 7 samples" in (root / "logs" / "fold_2.log").read_text()
    status = read_run_status(root)
    assert (status["fold_2"]["state"], status["fold_2"]["error"]) == ("failed", "its process was killed by SIGKILL")
    assert status["fold_3"]["state"] == "done"
    metrics = [folder / "mobilenet" / "fold_3" / "metrics.json" for folder in (tmp_path, one_by_one)]
    assert without_times(read_json(metrics[0])) == without_times(read_json(metrics[1]))


def _die_unless(marker: Path | None) -> None:
    """Exit at once; with ``marker``, only in the first process that calls this."""
    if marker is None:
        os._exit(3)
    with contextlib.suppress(FileExistsError), marker.open("x"):
        os._exit(3)
    sabotage({})


@pytest.mark.parametrize("all_of_them", [True, False], ids=["all", "one of two"])
def test_processes_that_cannot_start(
    all_of_them: bool,
    tree: PngTree,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    forked_workers: Callable[..., None],
) -> None:
    root = tmp_path / "mobilenet"
    forked_workers(_die_unless, None if all_of_them else tmp_path / "first")
    problem = "a process on cpu could not start: its process ended with exit code 3; its own messages are above"
    exit_code = main(flags(tree, tmp_path, *PARALLEL, "--epochs", 1))
    printed = capsys.readouterr()
    if all_of_them:
        assert (exit_code, printed.err) == (2, f"quaclrs-train: error: {problem}\n")
    else:
        assert (exit_code, printed.err) == (0, "")
        assert printed.out.count(f"{problem}; the other processes go on\n") == 1
        assert states(root) == {"fold_1": "done", "fold_2": "done", "fold_3": "done"}


@pytest.mark.parametrize(
    "all_of_them", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["both", "one of two"]
)
def test_processes_that_die_before_they_have_started(
    all_of_them: bool,
    tree: PngTree,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the parent writes to a process that the kernel kills at once breaks."""
    start, started = SpawnProcess.start, []

    def killed_at_its_start(process: SpawnProcess) -> None:
        started.append(process)
        if all_of_them or len(started) == 1:
            raise BrokenPipeError
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", killed_at_its_start)
    problem = "a process on cpu was killed while it started (out of memory?)"
    exit_code = main(flags(tree, tmp_path, *PARALLEL, "--epochs", 1, "--model_name", "mobilenet"))
    printed = capsys.readouterr()
    if all_of_them:
        assert (exit_code, printed.err) == (2, f"quaclrs-train: error: {problem}\n")
    else:
        assert (exit_code, printed.err) == (0, "")
        assert printed.out.count(f"{problem}; the other processes go on\n") == 1
        assert states(tmp_path / "mobilenet") == {"fold_1": "done", "fold_2": "done", "fold_3": "done"}


# --- signals ---


def in_session(arguments: list[str], folder: Path) -> None:
    """Run ``quaclrs-train`` in a process group of its own, as a terminal does."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # the test reads along
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def members(group: int) -> list[int]:
    """The process ids of a process group that are still alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def eventually(condition: Callable[[], bool], seconds: float = DEADLINE_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def interrupt(arguments: list[str], site: str, folder: Path, number: signal.Signals) -> int | None:
    """Send ``number`` when two folds are training (for SIGKILL, when both have a checkpoint).

    Returns the exit code once no process is left.
    """
    folder.mkdir()
    process = _processes.Process(target=_train_with_site, args=(site, arguments, folder))
    process.start()
    assert process.pid is not None
    said = folder / "stdout"

    def two_at_work() -> bool:
        what = "epoch 1" if number == signal.SIGKILL else "training on"
        return said.exists() and len(set(re.findall(rf"(fold \d): {what}", said.read_text()))) == 2

    try:
        assert eventually(two_at_work)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: every process gets it
        else:
            os.kill(process.pid, number)
        process.join(DEADLINE_S)
        # the workers of a killed process notice its death themselves
        assert eventually(lambda: not members(process.pid or 0), 20 if number == signal.SIGKILL else 1)
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
    return process.exitcode


def _train_with_site(site: str, arguments: list[str], folder: Path) -> None:
    (folder / "company").mkdir()
    os.environ.update(PYTHONPATH=site, OMP_NUM_THREADS="1", COMPANY=str(folder / "company"))
    in_session(arguments, folder)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([signal.SIGINT], id="INT"),
        pytest.param([signal.SIGUSR1], id="USR1"),
        pytest.param([signal.SIGHUP], marks=pytest.mark.exhaustive, id="HUP"),
        pytest.param([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], marks=pytest.mark.exhaustive, id="TERM-INT-TERM"),
    ],
)
def test_signals_save_every_fold_and_leave_no_process(
    stops: list[signal.Signals], tree: PngTree, one_by_one: Path, tmp_path: Path
) -> None:
    """A run that is killed, then stopped, each time resumed, and finished in one process has the same results as one
    without interruption.
    """
    site = site_with("sabotage({'1': 'slow', '2': 'slow', '3': 'slow'})", tmp_path / "site")
    output_dir = tmp_path / "results"
    assert interrupt(flags(tree, output_dir, *PARALLEL), site, tmp_path / "KILL", signal.SIGKILL) == -signal.SIGKILL
    assert (tmp_path / "KILL" / "stderr").read_text() == ""
    root = output_dir / "mobilenet"
    assert "running" in states(root).values()
    for stop, number in enumerate(stops):
        folder = tmp_path / f"stop {stop}"
        assert interrupt(flags(tree, output_dir, *PARALLEL, "--resume"), site, folder, number) == 128 + number
        what = f"stopped by {number.name} in the folds that were running, each of which is saved"
        assert (
            folder / "stderr"
        ).read_text() == f"quaclrs-train: {what}; the same command with --resume goes on from there\n"
        assert states(root) == {"fold_1": "interrupted", "fold_2": "interrupted"}
        # within an epoch, or, on a slow machine, in the test after the last epoch
        saved = ("checkpoint_within_epoch.pth", f"checkpoint_epoch_{EPOCHS}.pth")
        assert all(any((root / name / file).exists() for file in saved) for name in states(root))
    assert main(flags(tree, output_dir, "--resume")) == 0
    assert_same_results(output_dir, one_by_one, "mobilenet")
    assert set(states(root).values()) == {"done"}


# --- sharing an output folder ---


def _train_slowly(arguments: list[str], folder: Path) -> None:
    folder.mkdir()
    sabotage({"1": "slow", "2": "slow"})
    in_session(arguments, folder)


def test_a_fold_belongs_to_one_process(
    tree: PngTree, one_by_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes on different folds do not disturb each other; a third on the same fold is refused."""
    root, running = tmp_path / "mobilenet", []
    for number in (1, 2):
        arguments = flags(tree, tmp_path, "--fold", number)
        running.append(_processes.Process(target=_train_slowly, args=(arguments, tmp_path / f"process{number}")))
        running[-1].start()
    try:
        assert eventually(lambda: states(root) == {"fold_1": "running", "fold_2": "running"})
        assert main(flags(tree, tmp_path, "--fold", 1)) == 2
        owner = f"process {running[0].pid} on {socket.gethostname()}"
        advice = "wait for it, or choose another --fold or --output_dir"
        assert (
            capsys.readouterr().err == f"quaclrs-train: error: {root}: fold 1 is being trained by {owner}; {advice}\n"
        )
        for process in running:
            process.join(DEADLINE_S)
        assert [process.exitcode for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
            process.join()
    assert states(root) == {"fold_1": "done", "fold_2": "done"}
    assert list(read_json(root / "summary.json")["fold_accuracies"]) == ["fold_1", "fold_2"]
    for number in (1, 2):
        metrics = [folder / "mobilenet" / f"fold_{number}" / "metrics.json" for folder in (tmp_path, one_by_one)]
        assert without_times(read_json(metrics[0])) == without_times(read_json(metrics[1]))


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (None, "done", None),
        (TrainingError("the loss is nan"), "failed", "the loss is nan"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (Interrupted("stopped by SIGTERM", signal.SIGTERM), "interrupted", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt: "),
    ],
)
def test_the_status_says_how_a_fold_ended(
    error: BaseException | None, state: str, said: str | None, tmp_path: Path
) -> None:
    update_status(tmp_path, 10, state="done")
    update_status(tmp_path, 2, state="failed", error="of the last time")
    with contextlib.suppress(TrainingError, ZeroDivisionError, Interrupted, KeyboardInterrupt), hold_fold(tmp_path, 2):
        entry = read_run_status(tmp_path)["fold_2"]
        assert (entry["state"], entry["pid"], entry["host"]) == ("running", os.getpid(), socket.gethostname())
        assert (entry["until"], entry["error"]) == (None, None)
        if error is not None:
            raise error
    status = read_run_status(tmp_path)
    assert (status["fold_2"]["state"], status["fold_2"]["error"]) == (state, said)
    assert status["fold_2"]["until"] is not None
    assert list(status) == ["fold_2", "fold_10"]
    assert status["fold_10"] == {"state": "done"}


def test_a_stale_entry_does_not_block(tmp_path: Path) -> None:
    """The process that held the fold was killed before it could note its end; an unreadable status file is ignored."""
    update_status(tmp_path, 1, state="running", pid=1, host="elsewhere")
    with hold_fold(tmp_path, 1):
        assert read_run_status(tmp_path)["fold_1"]["pid"] == os.getpid()
    (tmp_path / "run_status.json").write_text("{")
    assert read_run_status(tmp_path) == {}
    with hold_fold(tmp_path, 1):
        pass
    assert states(tmp_path) == {"fold_1": "done"}


def test_a_fold_is_free_again_although_a_child_goes_on(tmp_path: Path) -> None:
    """A forked process, such as a DataLoader worker that outlives the fold, has the lock's file open too."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom quaclrs.experiment.run_status import hold_fold\n"
        "with hold_fold(Path(sys.argv[1]), 1):\n    child = os.fork()\n    child or time.sleep(60)\n"
        "print(child, flush=True)\nsys.stdin.read()\nos.kill(child, 9)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdecimal()
        with hold_fold(tmp_path, 1):
            pass
    finally:
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def test_finished_folds_are_noted_as_done(tmp_path: Path) -> None:
    update_status(tmp_path, 1, state="running", pid=1, error=None)
    mark_done(tmp_path, 1)
    assert read_run_status(tmp_path)["fold_1"]["state"] == "done"
    before = modified(tmp_path)
    mark_done(tmp_path, 1)
    assert modified(tmp_path) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "mobilenet").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*mobilenet"), hold_fold(tmp_path / "mobilenet", 1):
        pass
