"""Contract of the benchmark: it refuses bad input, its limits bound the rows, and it names each row's bottleneck."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarking
import footprint
import pytest
import throughput
import torch
from harness import loading_speed, measure, packing_speed, processes
from harness.bottleneck import (
    BUSY,
    HANDING_OVER,
    NEAR_LIMIT,
    SPREAD,
    find_bottleneck,
    find_training_bottleneck,
)
from harness.contender import Contender, Group, Pass
from harness.measure import race, repeat_run
from harness.tables import group_table, summary_table
from png_trees import PngTree

from quaclrs.cli.demo import cache_root
from quaclrs.errors import UsageError
from quaclrs.training.bottleneck import DATA_WAIT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def short_trials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        benchmarking.shorten_trials(patch)
        yield


# ---------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "nothing to measure; give --all, or any of pack, decode, load, step, train (before --peers, which takes a "
            "folder)",
        ),
        (["--peers", "load"], "nothing to measure; give --all, or any of pack"),
        (["laod"], "argument MODE: 'laod' is not a mode; choose among pack, decode, load, step, train"),
        (["load", "--repeats", "0"], "--repeats 0: at least 1"),
        (
            ["train", "--train_batch_sizes", "16", "1"],
            "--train_batch_sizes 1: at least 2, or BatchNorm has nothing to compare",
        ),
        (
            ["train", "--compile", "cudagraph", "--device", "cpu"],
            "--compile cudagraph: captures the work of one GPU, and this is cpu",
        ),
    ],
)
def test_refused_in_one_line(
    arguments: list[str], message: str, png_tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--csv_file", str(png_tree.csv_file), "--spectrograms_dir", str(png_tree.spectrograms_dir)]
    try:
        code = throughput.main([*arguments, *data, "--work_dir", str(tmp_path)])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert "\n" not in said
    assert said.startswith("throughput.py: error: ")
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load", "--peers", "envs"], "--peers envs: peers know nothing of 2 processes; measure them without torchrun"),
        (["load", "--only", "quaclrs", "dali"], "--only quaclrs dali: peers know nothing of 2 processes"),
        (
            ["pack", "load"],
            "pack: has workers of its own, and 2 processes would each pack all; leave it out under torchrun",
        ),
    ],
)
def test_refused_under_torchrun(arguments: list[str], message: str) -> None:
    options = throughput._make_parser().parse_args(arguments)
    throughput._refuse_in_several_processes(options, options.modes, 1)
    with pytest.raises(UsageError, match="^" + message):
        throughput._refuse_in_several_processes(options, options.modes, 2)
    fitting = throughput._make_parser().parse_args(["load", "train", "--only", "quaclrs"])
    throughput._refuse_in_several_processes(fitting, fitting.modes, 2)


def test_the_one_command() -> None:
    options = throughput._make_parser().parse_args(["--all", "--peers"])
    assert throughput._chosen_modes(options) == ["pack", "decode", "load", "train"]
    assert options.peers == cache_root() / "peers"
    several = throughput._make_parser().parse_args(["train", "load", "step", "--peers", "envs"])
    assert throughput._chosen_modes(several) == ["load", "step", "train"]
    assert several.peers == Path("envs")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in conftest.py, whose fixture comes later than those of a module."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_run(png_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result documents by mode, and the printed text, of one run of every mode with all of our own loaders."""
    folder = tmp_path_factory.mktemp("bench")
    csv_file = benchmarking.write_small_csv(png_tree, folder / "data.csv", rows=40)
    arguments = [
        *("--all", "--device", "cpu", "--only", "quaclrs"),
        *("--csv_file", str(csv_file), "--spectrograms_dir", str(png_tree.spectrograms_dir)),
        *("--work_dir", str(folder / "work"), "--results_dir", str(folder / "results"), "--decode_images", "20"),
        *("--image_size", "32", "--batch_size", "16", "--repeats", "1", "--load_epochs", "2", "--encodings", "png"),
        *("--num_workers", "1", "--models", "mobilenet", "--train_batch_sizes", "2", "--steps", "1"),
    ]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), _one_thread():
        patch.setattr(packing_speed, "SYNTHESIS_FOLDS", 1)
        assert throughput.main(arguments) == 0
    files = [json.loads(path.read_bytes()) for path in (folder / "results").iterdir()]
    return {document["what"]: document for document in files}, said.getvalue()


def test_a_run_measures_every_mode_against_limits(small_run: tuple[dict[str, Any], str]) -> None:
    documents, _ = small_run
    assert set(documents) == {"pack", "decode", "load", "train"}
    for document in documents.values():
        for name in ("memory_write_gb_per_s", "memory_copy_gb_per_s", "matmul_float32_gflop_per_s", "seconds"):
            assert document["setting"][name] > 0
        named = {(row["group"], row["name"]) for row in document["rows"]}
        limited = [row for row in document["rows"] if row["facts"].get("limit")]
        assert limited
        assert all(row["baseline"] not in {limit["name"] for limit in limited} for row in document["rows"])
        for row in document["rows"]:
            assert row["facts"]["world_size"] == 1
            assert row["facts"]["images_per_s_per_process"] == row["median_images_per_s"]
            if not row["facts"].get("limit") and row["name"] != "synthesis":
                assert (row["group"], row["bounded_by"]) in named
                assert row["facts"]["share_of_limit"] > 0
                known = row["facts"]["cores_busy"] is not None or row["facts"]["share_of_limit"] >= NEAR_LIMIT
                assert (
                    bool(row["facts"].get("bound_by")) == known
                )  # a pass of less than 10 ms may have had no time at all


def test_rows_say_what_they_cost(small_run: tuple[dict[str, Any], str]) -> None:
    documents, _ = small_run
    ours = [row for mode in ("decode", "load") for row in documents[mode]["rows"] if not row["facts"].get("limit")]
    assert {row["name"] for row in ours} == {
        *("dali, png shards", "files, PNG tree"),
        *(f"{loader}, {encoding} shards" for loader in ("mapped", "resident") for encoding in ("indexed", "rgb")),
    }
    for row in ours:
        for name in ("first_batch_s", "open_to_first_batch_s", "host_peak_mb", "bytes_per_image"):
            assert row["facts"][name] > 0, (row["name"], name)
        assert "device_images_per_s" not in row["facts"]  # there is no device whose time could be told
    rgb = next(row for row in ours if row["name"] == "mapped, rgb shards")
    assert rgb["facts"]["bytes_per_image"] > 3 * 32 * 32
    trained = next(row for row in documents["train"]["rows"] if row["name"].startswith("train, "))
    assert 0 <= trained["facts"]["data_wait"] < 1
    assert trained["facts"]["host_peak_mb"] > 100


def test_one_table_is_what_a_user_ends_with(small_run: tuple[dict[str, Any], str]) -> None:
    documents, said = small_run
    whole = said[said.index("all that was measured") :]
    for document in documents.values():
        for row in document["rows"]:
            assert row["group"] in whole
            assert (f"limit: {row['name']}" if row["facts"].get("limit") else row["name"]) in whole
    for head in ("images/s", "min", "max", "ratio", "of limit", "data wait", "first batch", "host peak", "bound by"):
        assert head in whole


# ---------------------------------------------------------------------- races


def _contender(name: str, images: float = 10, **options: Any) -> Contender:
    return Contender(name=name, run=lambda: Pass(images=images), **options)


def test_limits_are_shown_and_compared_with_nothing() -> None:
    limit = _contender("the machine", images=1e9, is_limit=True, work="memory writes")
    ours, other = _contender("ours", limit=limit), _contender("other")
    group = Group(name="a group", contenders=[ours, other, limit], baseline=other)
    race(group.contenders, repeats=3)
    assert limit.facts["limit"] is True
    assert "bound_by" not in limit.facts
    assert 0 < ours.facts["share_of_limit"] < 1
    assert other.facts["share_of_limit"] is None
    for text in (group_table(group), summary_table([group])):
        assert "limit: the machine" in text
        assert "* other" in text
        assert "  ours" in text


def test_the_baseline_is_never_a_limit() -> None:
    ours = _contender("ours")
    assert loading_speed._pick_baseline({}, [ours]) is ours
    failed, works = _contender("FFCV", left_out="no compiler"), _contender("memory map")
    assert loading_speed._pick_baseline({"ffcv-raw": failed, "memmap": works}, [failed, works, ours]) is works


def test_facts_are_medians_of_the_counted_repeats() -> None:
    waits = iter([0.9, 0.1, 0.3, 0.2])  # the first is the warm-up
    told = Contender(name="ours", run=lambda: Pass(images=6, first_batch_s=0.5, data_wait=next(waits), device_s=2.0))
    race([told], repeats=3)
    assert (told.facts["data_wait"], told.facts["first_batch_s"], told.facts["device_images_per_s"]) == (0.2, 0.5, 3.0)
    assert "bound_by" not in told.facts  # a device did the work, and nothing is known of it


def test_several_epochs_are_one_pass() -> None:
    firsts = iter([0.3, 0.1, 0.2])
    run = repeat_run(lambda: Pass(images=5, first_batch_s=next(firsts), device_s=1.5), 3)
    assert run() == Pass(images=15, first_batch_s=0.2, device_s=4.5)
    assert repeat_run(lambda: Pass(images=5), 2)() == Pass(images=10)


class TwoRanks:
    """A world of two, whose other rank has as many images and takes three times as long."""

    size = local_size = 2
    is_main = True

    def __init__(self) -> None:
        self.meetings = 0

    def gather(self, value: Any) -> list[Any]:
        self.meetings += value is None
        return [value] if value is None else [value, (value[0], 3 * value[1])]


def test_images_of_all_ranks_over_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    world, together, ticks = TwoRanks(), _contender("together"), itertools.count()
    together.run = lambda: Pass(images=45)
    monkeypatch.setattr(
        measure, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    )  # each pass takes one second
    race([together], repeats=2, world=world)  # type: ignore[arg-type]
    assert together.rates == [2 * 45 / 3] * 2  # both ranks' images, in the time of the slower one
    assert world.meetings == 2  # before each counted repeat
    assert together.facts["world_size"] == 2
    assert together.facts["images_per_s_per_process"] == together.median / 2


# ---------------------------------------------------------------------- bottlenecks


@pytest.mark.parametrize(
    ("share", "cores_busy", "expected"),
    [
        (NEAR_LIMIT, 0.1, "memory writes"),
        (NEAR_LIMIT - 0.01, BUSY, "render"),
        (0.1, BUSY - 0.01, HANDING_OVER),
        (None, 1.0, "render"),
        (None, None, None),
        (0.1, None, None),
    ],
)
def test_bottleneck(share: float | None, cores_busy: float | None, expected: str | None) -> None:
    assert (
        find_bottleneck(share_of_limit=share, limit="memory writes", cores_busy=cores_busy, work="render") == expected
    )


@pytest.mark.parametrize(
    ("data_wait", "ceiling", "share", "expected"),
    [
        (DATA_WAIT, 0.9, 0.9, "data"),
        (DATA_WAIT - 0.01, 1 - SPREAD - 0.01, 0.9, "host"),
        (0.01, 1 - SPREAD, NEAR_LIMIT, "arithmetic"),
        (0.01, 1.0, NEAR_LIMIT - 0.01, "model"),
        (0.01, 1.0, None, "model"),
    ],
)
def test_bottleneck_of_training(data_wait: float, ceiling: float, share: float | None, expected: str) -> None:
    assert find_training_bottleneck(data_wait=data_wait, share_of_ceiling=ceiling, share_of_limit=share) == expected


# ---------------------------------------------------------------------- processes, and datasets of other sizes


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_are_counted_with_all_that_they_started() -> None:
    # a shell that waits for its child: two processes
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo started; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        tree = processes.list_tree_pids(shell.pid)
        try:
            assert len(tree) == 2
            assert processes.read_peak_bytes(tree) > processes.read_peak_bytes(tree[:1]) > 0
        finally:
            for pid in reversed(tree):
                os.kill(pid, 9)
    assert processes.read_peak_bytes([shell.pid]) == 0  # it is gone
    before = processes.read_cpu_seconds([os.getpid()])
    while processes.read_cpu_seconds([os.getpid()]) == before:
        pass
    processes.reset_peaks([os.getpid()])
    assert processes.read_peak_bytes([os.getpid()]) >= processes.read_resident_bytes([os.getpid()]) * 0.9


def test_simulated_datasets_open_and_read(rgb_shards: Path, tmp_path: Path) -> None:
    from quaclrs.config import TrainConfig
    from quaclrs.loaders.dataset import open_dataset

    for records in (7, 1000):
        made = footprint.simulate_shards(rgb_shards, records, tmp_path)
        dataset = open_dataset(TrainConfig(shards=made), want_shards=False, log=lambda line: None)
        assert len(dataset) == records
        assert dataset.shards is not None
        assert dataset.shards.array(records - 1).shape == (32, 32, 3)
        dataset.close()
