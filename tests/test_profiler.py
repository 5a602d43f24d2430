"""Contract of ``--profile``: trace and bottleneck agree with each other and with other clocks; nothing else changes."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest
import torch
from png_trees import PngTree, make_row, write_tree
from torch import nn

from quaclrs.cli import train as cli
from quaclrs.config import TrainConfig
from quaclrs.errors import Interrupted, StorageError
from quaclrs.experiment import fold
from quaclrs.experiment.cross_validation import run_cross_validation
from quaclrs.loaders.base import Batch
from quaclrs.training import profiler
from quaclrs.training.bottleneck import Setting, Steps, Trace, advice, find_bottleneck, page, read_trace, union_length
from quaclrs.training.distributed import World
from quaclrs.training.loop import OnStep
from quaclrs.training.profiler import schedule_steps, with_profile
from quaclrs.training.running_metrics import RunningMetrics
from quaclrs.training.state import TrainState
from quaclrs.training.trainer import Hooks

CLASSES = ("dog_bark", "drilling", "traffic")
STEPS, BATCH = 12, 2
TIMED, TRACED = range(2, 6), range(7, 12)
"""What a profile of twelve steps measures, counted from 0: two to warm up, and one for the profiler to settle."""
CONVOLUTIONS = 52
"""Of MobileNetV2."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Three classes; folds 1 and 3 of six rows, and fold 2, which fold 1's training is on, of 24. Read only."""
    rows = [
        make_row(label, number, f"ts{i}", "timestretch_0.8")
        for number, copies in ((1, 2), (2, STEPS * BATCH // 3), (3, 2))
        for label in CLASSES
        for i in range(copies)
    ]
    return write_tree(tmp_path_factory.mktemp("profiling"), rows)


def config_for(tree: PngTree, output_dir: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        **{"csv_file": tree.csv_file, "spectrograms_dir": tree.spectrograms_dir, "output_dir": output_dir},
        **{"loader": "files", "num_workers": 0, "num_folds": 3, "fold": 1, "batch_size": BATCH, "device": "cpu"},
        **{"model_name": "mobilenet", "image_size": 32, "gradcam_per_class": 0, "epochs": 1},
    }
    return TrainConfig(**defaults | options)


def train(config: TrainConfig, hooks: Hooks | None = None) -> list[str]:
    """Run, on one thread and without plots; returns what the profiler said."""
    log: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in the fixtures of a module too, since another number rounds otherwise
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fold, "write_plots", lambda *_: [])
            run_cross_validation(config, log.append, hooks)
    finally:
        torch.set_num_threads(threads)
        assert not torch._C._autograd._profiler_enabled()
    return [line for line in log if line.startswith("profile: ")]


def fold_folder(output_dir: Path) -> Path:
    return output_dir / "mobilenet" / "fold_1"


def final_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    (last,) = fold_folder(output_dir).glob("checkpoint_epoch_*.pth")
    weights: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state"]["model"]
    return weights


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = final_weights(one), final_weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def read_events(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def figures(text: str, name: str) -> list[float]:
    """The numbers of the page's line ``name``."""
    (line,) = re.findall(rf"^{re.escape(name)} .*$", text, flags=re.MULTILINE)
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line.removeprefix(name))]


class Clock:
    """Hooks that note when each training step ended and what had been waited for till then."""

    def __init__(self, slow: dict[int, float] | None = None) -> None:
        self.at: list[tuple[float, float]] = []
        self._slow = slow or {}

    def hooks(self) -> Hooks:
        return Hooks(
            step_meter=lambda phase, epoch, samples: self._note if (phase, epoch) == ("train", 1) else lambda *_: None
        )

    def _note(self, batch: Batch, totals: RunningMetrics, waited_s: float) -> None:
        sleep(self._slow.get(len(self.at), 0.0))
        self.at.append((perf_counter(), waited_s))


@pytest.fixture(scope="module")
def plain(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs without a profile."""
    output_dir = tmp_path_factory.mktemp("plain")
    assert train(config_for(tree, output_dir, epochs=2)) == []
    return output_dir


@dataclasses.dataclass
class Profiled:
    output_dir: Path
    log: list[str]
    clock: Clock
    tracers: list[torch.profiler.profile]

    @property
    def folder(self) -> Path:
        return fold_folder(self.output_dir) / "profile"

    @property
    def text(self) -> str:
        return (self.folder / "bottleneck.txt").read_text()


@pytest.fixture(scope="module")
def profiled(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """The same two epochs with a profile; the fourth step takes long."""
    made = Profiled(tmp_path_factory.mktemp("profiled"), [], Clock({3: 0.3}), [])
    original = profiler._tracer

    def kept(*arguments: Any, **options: Any) -> torch.profiler.profile:
        made.tracers.append(original(*arguments, **options))
        return made.tracers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiler, "_tracer", kept)
        made.log = train(config_for(tree, made.output_dir, epochs=2, profile=True), made.clock.hooks())
    return made


# --- a real training on the CPU ---


def test_a_profile_changes_no_bit(plain: Path, profiled: Profiled) -> None:
    assert_same_weights(plain, profiled.output_dir)
    with_it, without = (
        json.loads((fold_folder(folder) / "metrics.json").read_text()) for folder in (profiled.output_dir, plain)
    )
    assert with_it["run"] == without["run"]  # so either can resume the other
    for name in ("test_loss", "confusion_matrix", "best_epoch"):
        assert with_it[name] == without[name]
    for ours, theirs in zip(with_it["history"], without["history"], strict=True):
        assert [ours[name] for name in ("train_loss", "val_loss")] == [
            theirs[name] for name in ("train_loss", "val_loss")
        ]
    assert not (fold_folder(plain) / "profile").exists()


def test_one_line_and_two_files(profiled: Profiled) -> None:
    assert sorted(path.name for path in profiled.folder.iterdir()) == ["bottleneck.txt", "trace.json.gz"]
    (line,) = profiled.log
    match = re.fullmatch(r"profile: (bound by \w+ \(waiting for data \d+%\)); see (.*)", line)
    assert match is not None
    assert Path(match[2]) == profiled.folder / "bottleneck.txt"
    assert f"Bottleneck: {match[1]}\n" in profiled.text
    assert len(profiled.tracers) == 1  # the first epoch's
    assert profiled.text.startswith(
        "mobilenet, batch 2, loader files, cpu\n"
        "Epoch 1, counting this call's steps: 3 to 6 timed as they are, 8 to 12 traced (trace.json.gz)\n"
    )
    assert profiled.text.count("\n") < 60


def test_the_trace_holds_the_steps(profiled: Profiled) -> None:
    """Whole ones: as many forward and optimizer steps as annotations, and nothing outside them."""
    events = read_events(profiled.folder)
    names = Counter(event["name"] for event in events if event.get("ph") == "X")
    steps = [event for event in events if str(event["name"]).startswith("ProfilerStep#")]
    assert [event["name"] for event in steps] == [f"ProfilerStep#{number}" for number in range(1, 1 + len(TRACED))]
    assert names["Optimizer.step#Adam.step"] == len(TRACED)
    assert names["aten::conv2d"] == CONVOLUTIONS * len(TRACED)
    begin, end = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    inside = [event for event in events if event.get("cat") == "cpu_op" and begin <= event["ts"] <= end]
    assert len(inside) == sum(event.get("cat") == "cpu_op" for event in events)


def test_times_agree_with_another_clock(profiled: Profiled) -> None:
    at = profiled.clock.at
    assert len(at) == STEPS
    wall = [1e3 * (after[0] - before[0]) for before, after in itertools.pairwise(at)]  # of steps 1, 2, ...
    waited = [1e3 * (after[1] - before[1]) for before, after in itertools.pairwise(at)]
    timed = [wall[step - 1] for step in TIMED]
    assert max(timed) > 300  # the slow step is one of them, so that the mean is not the median
    mean, median, shortest, longest, images_per_s = figures(profiled.text, "wall")
    assert mean == pytest.approx(np.mean(timed), abs=3)
    assert median == pytest.approx(np.median(timed), abs=3)
    assert shortest == pytest.approx(min(timed), abs=3)
    assert longest == pytest.approx(max(timed), abs=3)
    assert images_per_s == pytest.approx(1e3 * BATCH / np.mean(timed), rel=0.02, abs=3)
    data, data_share = figures(profiled.text, "data wait")
    assert data == pytest.approx(np.mean([waited[step - 1] for step in TIMED]), abs=0.006)
    assert data_share == pytest.approx(100 * data / mean, abs=0.2)
    compute, compute_share = figures(profiled.text, "compute")
    assert compute + data == pytest.approx(mean, abs=0.02)
    assert compute_share + data_share == pytest.approx(100, abs=0.11)
    (traced,) = figures(profiled.text, "traced")
    assert traced == pytest.approx(np.mean([wall[step - 1] for step in TRACED]), rel=0.1, abs=2)


def test_operators_agree_with_torchs_own_sums(profiled: Profiled) -> None:
    (tracer,) = profiled.tracers
    averages = {
        row.key[:60]: row.self_cpu_time_total / 1e3 / len(TRACED)  # the page cuts longer names
        for row in tracer.key_averages()
        if "ProfilerStep#" not in row.key
    }
    averages.pop("ProfilerStep*", None)
    table = re.findall(r"^(\S.*?) +(\d+\.\d+) ms +(\d+\.\d)%$", profiled.text, flags=re.MULTILINE)
    assert len(table) == 10
    expected = sorted(
        (name for name in averages if name.startswith("aten::") or "Backward" in name), key=averages.__getitem__
    )
    assert {name for name, *_ in table[:5]} == set(expected[-5:])
    for name, ms, _ in table:
        assert float(ms) == pytest.approx(averages[name], rel=0.01, abs=0.002)
    events = read_events(profiled.folder)
    assert sum(float(share) for *_, share in table) <= 100
    in_all = 1e3 * sum(seconds for _, seconds in read_trace(events, len(TRACED), None).operators) / len(TRACED)
    (traced,) = figures(profiled.text, "traced")
    assert 0.3 * traced < in_all <= traced
    assert float(table[0][2]) == pytest.approx(100 * float(table[0][1]) / in_all, abs=0.1)


def test_a_resumed_run_is_profiled_and_leaves_the_same_weights(plain: Path, tree: PngTree, tmp_path: Path) -> None:
    """Stopped while the profiler records; then the three steps that are left are profiled, and epoch 2 is not."""
    seen: list[int] = []

    def stop(batch: Batch, totals: RunningMetrics, waited_s: float) -> None:
        seen.append(len(batch))
        if len(seen) == 9:
            assert torch._C._autograd._profiler_enabled()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="epoch 1, after step 9"):
        train(config_for(tree, tmp_path, epochs=2, profile=True), Hooks(step_meter=lambda *_: stop))
    assert not torch._C._autograd._profiler_enabled()
    assert not (fold_folder(tmp_path) / "profile").exists()
    (line,) = train(config_for(tree, tmp_path, epochs=2, profile=True, resume=True))
    assert "bound by" in line
    text = (fold_folder(tmp_path) / "profile" / "bottleneck.txt").read_text()
    assert "Epoch 1, counting this call's steps: 2 timed as they are, 3 traced" in text
    assert_same_weights(plain, tmp_path)


def test_the_command_line(
    tree: PngTree, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the output that a person sees; kineto's own messages are none of it."""
    monkeypatch.setattr(fold, "write_plots", lambda *_: [])
    paths = ["--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir, "--output_dir", tmp_path]
    flags = (
        "--loader files --num_workers 0 --num_folds 3 --fold 1 --model_name "
        "mobilenet --image_size 32 --gradcam_per_class 0"
    )
    for batch, files in ((12, 0), (8, 2)):
        more = ["--epochs", 1, "--batch_size", batch, "--profile"]
        assert cli.main([str(flag) for flag in (*paths, *flags.split(), *more)]) == 0
        assert len(list(fold_folder(tmp_path).glob("profile/*"))) == files
    out, err = capfd.readouterr()
    assert "profile: too few steps; the longest epoch trained here had 2, and it takes 3\n" in out
    assert out.count("profile: bound by ") == 1
    assert "USDT" not in err
    assert "gpuGetDeviceCount" not in err


# --- any course of events, without a network ---


class Bench:
    """Drives hooks as the engine does, with a step that is one operator."""

    def __init__(
        self, folder: Path, world: World | None = None, hooks: Hooks | None = None, profile: bool = True
    ) -> None:
        model, device = nn.Linear(2, 2), torch.device("cpu")
        self.config = TrainConfig(profile=profile)
        self.training = TrainState.create(model, np.ones(2, np.float32), device, self.config)
        self.training.world = world or World()
        self.folder, self.hooks = folder, hooks or Hooks()
        self.log: list[str] = []

    def profile(self) -> Any:
        return with_profile(self.hooks, self.config, self.training, "files", self.folder, self.log.append)

    def steps(self, meter: OnStep, count: int, done: int = 0) -> Iterator[int]:
        """``done`` were done before an interruption."""
        totals = RunningMetrics(torch.device("cpu"))
        totals.samples = 4 * done
        for step in range(count):
            torch.ones(3).exp()
            totals.samples += 4
            meter(Batch(torch.zeros(4, 3, 1, 1), torch.zeros(4, dtype=torch.int64), torch.arange(4)), totals, 0.0)
            yield step

    def epoch(self, hooks: Hooks, number: int, steps: int, expected: int | None = None, done: int = 0) -> None:
        meter = hooks.step_meter("train", number, 4 * (steps + done if expected is None else expected))
        assert len(list(self.steps(meter, steps, done))) == steps
        hooks.step_meter("validate", number, 8)

    @property
    def text(self) -> str:
        return (self.folder / "profile" / "bottleneck.txt").read_text()


def annotated(bench: Bench) -> int:
    return sum(str(event["name"]).startswith("ProfilerStep#") for event in read_events(bench.folder / "profile"))


def test_every_plan_fits_its_epoch() -> None:
    assert [schedule_steps(steps) for steps in range(3)] == [None] * 3
    before = None
    for steps in range(3, 200):
        plan = schedule_steps(steps)
        assert plan is not None
        assert 1 <= plan.timed < plan.timed_end <= plan.traced < plan.end <= steps
        assert plan.end == min(steps, 46)
        assert plan.timed_end < steps - (steps > 3)  # one step fewer than expected, and there is still one to trace
        if before is not None:  # a longer epoch gives no less
            assert plan.timed >= before.timed
            assert plan.end - plan.traced >= before.end - before.traced
        before = plan
    assert schedule_steps(46) == schedule_steps(10**6) == profiler.ProfileSchedule(5, 25, 26, 46)


@pytest.mark.parametrize("steps", [3, 4, 5, 12, 46, 60])
def test_steps_are_counted_right(steps: int, tmp_path: Path) -> None:
    bench, plan = Bench(tmp_path), schedule_steps(steps)
    assert plan is not None
    with bench.profile() as hooks:
        meter = hooks.step_meter("train", 1, 4 * steps)
        tracing = [step + 1 for step in bench.steps(meter, steps) if torch._C._autograd._profiler_enabled()]
        hooks.step_meter("validate", 1, 8)
    assert tracing == list(range(plan.traced, plan.end))  # from then on, after that many steps
    assert annotated(bench) == plan.end - plan.traced
    assert len(bench.log) == 1


@pytest.mark.parametrize("steps", [3, 4, 7])
def test_an_epoch_that_ends_a_step_early(steps: int, tmp_path: Path) -> None:
    """A lone last sample joins its neighbour's batch."""
    bench, plan = Bench(tmp_path), schedule_steps(steps + 1)
    assert plan is not None
    with bench.profile() as hooks:
        bench.epoch(hooks, 1, steps, expected=steps + 1)
        assert not torch._C._autograd._profiler_enabled()
        bench.epoch(hooks, 2, 20)
    assert len(bench.log) == 1
    traced = "" if steps == plan.traced + 1 else f"{plan.traced + 1} to "
    assert f", {traced}{steps} traced" in bench.text


@pytest.mark.parametrize("steps", [6, 7])
def test_an_epoch_that_ends_before_a_step_is_traced(steps: int, tmp_path: Path) -> None:
    """However that comes, the profiler that has started is stopped, and the next epoch has its own."""
    bench = Bench(tmp_path)
    with bench.profile() as hooks:
        bench.epoch(hooks, 1, steps, expected=12)
        assert not torch._C._autograd._profiler_enabled()
        assert bench.log == []
        bench.epoch(hooks, 2, 3)
    assert bench.text.splitlines()[1].startswith("Epoch 2, ")


def test_an_epoch_that_is_too_short_leaves_it_to_the_next(tmp_path: Path) -> None:
    """As when a resumed run has two steps left of its first epoch."""
    bench = Bench(tmp_path)
    with bench.profile() as hooks:
        bench.epoch(hooks, 1, 2, done=10)
        assert bench.log == []
        bench.epoch(hooks, 2, 12)
        bench.epoch(hooks, 3, 12)
    (line,) = bench.log
    assert line.startswith("profile: bound by ")
    assert bench.text.splitlines()[1].startswith("Epoch 2, ")
    assert annotated(bench) == 5


@pytest.mark.parametrize("after", range(1, 13))
@pytest.mark.parametrize("where", ["in a hook", "between steps"])
def test_an_exception_stops_the_profiler(where: str, after: int, tmp_path: Path) -> None:
    calls = []

    def inner(*_: object) -> None:
        calls.append(1)
        if where == "in a hook" and len(calls) == after:
            raise KeyboardInterrupt

    def epoch() -> None:
        with bench.profile() as hooks:
            for step in bench.steps(hooks.step_meter("train", 1, 48), 12):
                if step + 1 == after:
                    raise KeyboardInterrupt

    bench = Bench(tmp_path, hooks=Hooks(step_meter=lambda *_: inner))
    with pytest.raises(KeyboardInterrupt):
        epoch()
    assert not torch._C._autograd._profiler_enabled()
    whole = where == "between steps" and after == 12
    assert [path.name for path in sorted(tmp_path.glob("profile/*"))] == (
        ["bottleneck.txt", "trace.json.gz"] if whole else []
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # nobody else's is in the way
        pass


def test_only_rank_0_and_only_when_asked_for(tmp_path: Path) -> None:
    for options in ({"profile": False}, {"world": World(rank=1, size=2)}):
        bench = Bench(tmp_path, **options)
        with bench.profile() as hooks:
            assert hooks is bench.hooks
        assert bench.log == []
    called: list[object] = []
    bench = Bench(
        tmp_path, hooks=Hooks(step_meter=lambda phase, *_: lambda *_: called.append(phase), epoch_done=called.append)
    )
    with bench.profile() as hooks:
        assert hooks.epoch_done is bench.hooks.epoch_done
        bench.epoch(hooks, 1, 3)
        list(bench.steps(hooks.step_meter("test", 1, 8), 2))
    assert called == ["train"] * 3 + ["test"] * 2


@pytest.mark.parametrize(
    ("events", "said"),
    [([], "ValueError: the trace holds 0 of 5 steps"), ([{"ph": "X", "cat": "user_annotation"}], "KeyError: 'name'")],
)
def test_a_trace_that_nobody_understands_costs_no_training(
    events: list[Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    monkeypatch.setattr(profiler, "_write_trace", lambda *_: events)
    with bench.profile() as hooks:
        bench.epoch(hooks, 1, 12)
        bench.epoch(hooks, 2, 12)
    (line,) = bench.log
    assert line == f"profile: no bottleneck found, since torch's trace cannot be understood ({said})"


# --- a GPU's trace, made up ---


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": ts, "dur": dur, "args": args}


def launch(name: str, ts: float, correlation: int, tid: int = 1) -> dict[str, Any]:
    return event("cuda_runtime", name, ts, 2, tid, correlation=correlation)


def work(
    cat: str, name: str, ts: float, dur: float, correlation: int, stream: int = 7, device: int = 0
) -> dict[str, Any]:
    return event(cat, name, ts, dur, stream, device=device, stream=stream, correlation=correlation)


def gpu_events() -> list[dict[str, Any]]:
    """Two steps, from 1000 to 2000 µs, on thread 1; thread 2 is a loader's. The device is busy for 250 + 100 + 50 + 30
    = 430 µs.
    """
    return [
        {"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "python"}},
        event("user_annotation", "ProfilerStep#2", 1500, 500),
        event("user_annotation", "ProfilerStep#1", 1000, 500),
        event("user_annotation", "ProfilerStep#3", 2000, 100),  # begun by the profiler's step, never done
        event("gpu_user_annotation", "ProfilerStep#1", 1000, 900, 7, device=0),
        # before the steps: its kernel runs within them, but is not theirs
        launch("cudaLaunchKernel", 900, 1),
        work("kernel", "earlier", 1010, 80, 1),
        # two streams overlap: 1100 to 1300 and 1200 to 1350
        event("cpu_op", "aten::conv2d", 1090, 100),
        event("cpu_op", "aten::convolution", 1095, 90),
        launch("cudaLaunchKernel", 1100, 2),
        work("kernel", "winograd", 1100, 200, 2),
        launch("cuLaunchKernel", 1192, 3),
        work("kernel", "render", 1200, 150, 3, stream=20),
        # another GPU
        launch("cudaLaunchKernelExC", 1400, 4),
        work("kernel", "elsewhere", 1400, 90, 4, device=1),
        # a graph: one launch, two kernels; the second runs after the steps
        launch("cudaGraphLaunch", 1600, 5),
        work("kernel", "gemm", 1700, 100, 5),
        work("kernel", "gemm", 2100, 50, 5),
        # a copy, and the host waits for it
        event("cpu_op", "aten::_local_scalar_dense", 1840, 60),
        event("cpu_op", "aten::_local_scalar_dense", 1980, 1),  # of a tensor on the CPU: no call
        launch("cudaMemcpyAsync", 1842, 6),
        work("gpu_memcpy", "Memcpy DtoH", 1850, 30, 6),
        launch("cudaStreamSynchronize", 1845, 7),
        launch("cudaEventSynchronize", 1950, 8),
        launch("cudaStreamSynchronize", 1500, 9, tid=2),
        # the profiler's own end
        launch("cudaDeviceSynchronize", 2050, 10),
        launch("cudaLaunchKernel", 2060, 11),
        work("kernel", "later", 2300, 500, 11),
    ]


@pytest.mark.parametrize("written", [None, b"", b'{"traceEvents": [{"na'])
def test_a_trace_that_a_full_disk_cut_is_one_line(written: bytes | None, tmp_path: Path) -> None:
    class Tracer:
        def export_chrome_trace(self, path: str) -> None:
            if written is not None:
                Path(path).write_bytes(written)

    with pytest.raises(StorageError, match=r"^cannot write .*trace\.json\.tmp: "):
        profiler._write_trace(Tracer(), tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_a_gpu_trace_says() -> None:
    trace = read_trace(gpu_events(), 2, device=0)
    assert trace.device_s == pytest.approx(430e-6)
    assert trace.launches == 4
    assert trace.lost_launches == 1  # that of the other GPU
    assert trace.synchronisations == {
        "cudaStreamSynchronize in aten::_local_scalar_dense": 1,
        "cudaEventSynchronize in Python": 1,
    }
    names, seconds = zip(*trace.operators, strict=True)
    assert names == ("aten::convolution", "render", "gemm", "aten::_local_scalar_dense")
    assert seconds == pytest.approx((200e-6, 150e-6, 150e-6, 30e-6))
    assert read_trace(gpu_events(), 1, device=0).device_s == pytest.approx(250e-6)
    assert read_trace(gpu_events(), 2, device=1).device_s == pytest.approx(90e-6)
    on_cpu = read_trace(gpu_events(), 2, device=None)
    assert dict(on_cpu.operators) == {
        "aten::conv2d": pytest.approx(10e-6),
        "aten::convolution": pytest.approx(90e-6),
        "aten::_local_scalar_dense": pytest.approx(61e-6),
    }
    with pytest.raises(ValueError, match="holds 3 of 4 steps"):
        read_trace(gpu_events(), 4, device=0)


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(1, 2)], 1),
        ([(5, 6), (1, 2)], 2),
        ([(1, 9), (2, 3), (4, 10)], 9),
        ([(1, 2), (2, 3)], 2),
        ([(3, 3)], 0),
    ],
)
def test_union(intervals: list[tuple[float, float]], length: float) -> None:
    assert union_length(intervals) == length


def steps_of(wall_ms: float, waited_ms: float = 0.0, samples: int = 32, count: int = 20) -> Steps:
    host = (wall_ms - waited_ms) / 1e3
    return Steps(
        wall_s=[wall_ms / 1e3] * count,
        host_s=[host] * count,
        waited_s=[waited_ms / 1e3] * count,
        samples=[samples] * count,
    )


def trace_of(device_ms: float, launches: int = 400, lost: int = 0) -> Trace:
    return Trace(
        steps=20,
        device_s=20 * device_ms / 1e3,
        launches=launches,
        lost_launches=lost,
        synchronisations={},
        operators=[("aten::mm", 20 * device_ms / 1e3)],
    )


@pytest.mark.parametrize(
    ("device_ms", "waited_ms", "bound"),
    [
        (2.0, 0.1, "host"),
        (2.0, 1.9, "host"),
        (2.0, 2.0, "data"),
        (2.0, 7.5, "data"),
        (8.9, 2.0, "data"),
        (8.9, 1.9, "host"),
        (9.1, 0.1, "device"),
        (9.1, 5.0, "device"),  # whatever is waited for, the device has enough to do
        (11.0, 0.1, "device"),  # a traced step can be slower on the device too
    ],
)
def test_bottlenecks_on_a_gpu(device_ms: float, waited_ms: float, bound: str) -> None:
    """The profiler slowed the traced steps from 10 to 30 ms, which does not count."""
    bottleneck = find_bottleneck(steps_of(10, waited_ms), steps_of(30, 20), trace_of(device_ms), on_gpu=True)
    assert bottleneck.bound == bound
    assert bottleneck.busy is not None
    assert bottleneck.busy == pytest.approx(min(device_ms / 10, 1.0))
    assert bottleneck.waiting == pytest.approx(waited_ms / 10)
    idle = 1 - bottleneck.busy
    assert bottleneck.line == f"bound by {bound} (waiting for data {bottleneck.waiting:.0%}, device idle {idle:.0%})"


def test_steps_of_other_sizes_are_compared_by_sample() -> None:
    """The last, smaller batch of a short epoch is the traced one."""
    traced = steps_of(30, samples=8, count=1)
    trace = dataclasses.replace(trace_of(1.0), steps=1, device_s=2e-3)
    assert find_bottleneck(steps_of(10, count=1), traced, trace, on_gpu=True).busy == pytest.approx(0.8)


@pytest.mark.parametrize(("waited_ms", "bound"), [(0.0, "compute"), (1.9, "compute"), (2.0, "data"), (9.0, "data")])
def test_bottlenecks_on_the_cpu(waited_ms: float, bound: str) -> None:
    bottleneck = find_bottleneck(steps_of(10, waited_ms), steps_of(30), trace_of(0.0, launches=0), on_gpu=False)
    assert (bottleneck.bound, bottleneck.busy) == (bound, None)


@pytest.mark.parametrize(("launches", "lost", "bound"), [(0, 0, "unknown"), (400, 5, "unknown"), (400, 4, "host")])
def test_a_device_that_was_not_watched_is_not_called_idle(launches: int, lost: int, bound: str) -> None:
    bottleneck = find_bottleneck(steps_of(10), steps_of(10), trace_of(0.5, launches, lost), on_gpu=True)
    assert bottleneck.bound == bound


def setting_of(loader: str = "mapped", processes: int = 1, **options: Any) -> Setting:
    config = TrainConfig(**options)
    return Setting(
        config=config, loader=loader, processes=processes, device="cuda:0 (made up)", on_gpu=True, steps="Epoch 1"
    )


@pytest.mark.parametrize(
    ("bound", "setting", "said", "unsaid"),
    [
        ("data", setting_of(), ["--loader resident", "--encoding indexed", "--num_workers (now 4)"], []),
        ("data", setting_of("resident"), ["--batch_size (now 32)"], ["--loader"]),
        ("host", setting_of(), ["--compile cudagraph", "--batch_size (now 32)"], []),
        ("host", setting_of(compile="cudagraph", batch_size=64), ["--batch_size (now 64)"], ["--compile"]),
        ("host", setting_of(processes=2), ["--batch_size"], ["--compile"]),  # which the command line refuses there
        ("device", setting_of(), ["--use_amp", "--tf32", "--model_name"], []),
        ("device", setting_of(tf32=True), ["--use_amp"], ["--tf32"]),
        ("device", setting_of(use_amp=True), ["--model_name"], ["--use_amp", "--tf32"]),
        ("compute", setting_of(), ["--model_name"], []),
        ("unknown", setting_of(), ["KINETO_LOG_LEVEL"], []),
    ],
)
def test_advice(bound: str, setting: Setting, said: list[str], unsaid: list[str]) -> None:
    """Flags that exist and are not given already, in one sentence."""
    text = advice(bound, setting)
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)
    assert text.endswith(".")
    assert text.count(". ") == 0
    known = {flag for action in cli._parser()._actions for flag in action.option_strings} | pack_flags()
    assert set(re.findall(r"--\w+", text)) <= known
    assert len(text) < 200


def pack_flags() -> set[str]:
    source = (Path(__file__).parents[1] / "quaclrs" / "cli" / "pack.py").read_text()
    return set(re.findall(r'"(--\w+)"', source))


def test_the_page_of_a_gpu() -> None:
    trace = dataclasses.replace(
        trace_of(2.0, lost=3),
        synchronisations={"cudaEventSynchronize in Python": 1, "cudaStreamSynchronize in aten::item": 20},
        operators=[("aten::mm", 30e-3), ("x" * 300, 10e-3)],
    )
    timed, traced = steps_of(10, 1.0), steps_of(30)
    setting = dataclasses.replace(setting_of(processes=2), peak_bytes=(3 * 2**29, 2**31))
    text = page(setting, timed, traced, trace, find_bottleneck(timed, traced, trace, on_gpu=True))
    assert "Bottleneck: bound by host (waiting for data 10%, device idle 80%)\n" in text
    assert figures(text, "device") == [2.0, 20.0, 80.0]
    assert figures(text, "host") == [9.0, 90.0]
    assert figures(text, "traced") == [30.0]
    assert "Kernel launches: 20.0 a step (400 in all, of which 3 without their work in the trace)\n" in text
    lines = text.splitlines()
    found = lines.index("Host synchronisations inside the 20 traced steps:")
    assert lines[found + 1 : found + 3] == [
        "  20 × cudaStreamSynchronize in aten::item",
        "  1 × cudaEventSynchronize in Python",
    ]
    assert "Peak device memory: 1.50 GiB in tensors, 2.00 GiB taken from the device" in lines
    assert re.search(r"^aten::mm +1\.500 ms +75\.0%$", text, flags=re.MULTILINE)
    assert "rank 0 of 2" in text
    assert max(map(len, lines)) < 200
    without = page(setting, timed, traced, trace_of(2.0), find_bottleneck(timed, traced, trace, on_gpu=True))
    assert "Host synchronisations inside the 20 traced steps: none\n" in without


# --- a real GPU ---


def _read_back(batch: Batch, metrics: RunningMetrics, waited_s: float) -> None:
    metrics.sums[0].item()


def _ignore(batch: Batch, metrics: RunningMetrics, waited_s: float) -> None:
    pass


@pytest.mark.gpu
@pytest.mark.parametrize("reads_back", [False, True])
def test_a_profile_on_a_gpu(reads_back: bool, tree: PngTree, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    read: OnStep = _read_back if reads_back else _ignore
    hooks = Hooks(step_meter=lambda phase, *_: read if phase == "train" else _ignore)
    (line,) = train(config_for(tree, tmp_path, device="cuda", profile=True), hooks)
    folder = fold_folder(tmp_path) / "profile"
    text, events = (folder / "bottleneck.txt").read_text(), read_events(folder)
    assert re.match(r"profile: bound by (data|host|device) ", line), line
    kernels = [event["dur"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device_ms, busy, idle = figures(text, "device")
    assert 0 < device_ms <= 1.001 * sum(kernels) / 1e3 / len(TRACED) + 0.006
    assert busy + idle == pytest.approx(100, abs=0.11)
    launches = re.search(r"^Kernel launches: (\d+\.\d) a step", text, flags=re.MULTILINE)
    assert launches is not None
    assert float(launches[1]) > 2 * CONVOLUTIONS  # a kernel each, forward and backward
    assert ("traced steps: none\n" in text) != reads_back
    assert (f"  {len(TRACED)} × cudaStreamSynchronize in aten::_local_scalar_dense\n" in text) == reads_back
    assert re.search(r"^aten::\w*convolution\w* ", text, flags=re.MULTILINE)
    assert re.search(r"^Peak device memory: 0\.\d+ GiB", text, flags=re.MULTILINE)
