"""Contract of the benchmark's peers: each is started, checked and tuned, and none of them can spoil a run."""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import benchmarking
import numpy as np
import pytest
import torch
from harness import measure, peer_contender, records
from harness.contender import Contender, Group, Outcome, Pass, PeerError
from harness.peer_contender import Setting, list_worker_counts, open_peer, tune_workers
from harness.peer_environment import read_requirements
from harness.peer_process import PEERS_FOLDER, Peer
from harness.tables import group_table
from peers.registry import DECODING, KEYS, PEERS, READY, Entry
from PIL import Image
from png_trees import PngTree

SIZE = 32
BATCH = 8
SAMPLES = 20
ENVIRONMENTS = "QUACLRS_PEERS"
"""Names the folder of the peers' environments, as for throughput.py --peers; without it those peers are skipped."""
NEEDS = {"dali": "nvidia.dali", "webdataset": "webdataset"}


@pytest.fixture(autouse=True)
def short_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_contender, "_TUNING_S", 0.05)


@pytest.fixture(scope="session")
def setting(png_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The first samples of ``png_tree``: pixels by Pillow alone, their list, and png shards of them."""
    from quaclrs.config import PackConfig
    from quaclrs.shards.packing.pack import pack

    folder = tmp_path_factory.mktemp("peers")
    small = benchmarking.write_small_csv(png_tree, folder / "data.csv", SAMPLES)
    shards = folder / "shards-png"
    pack(
        PackConfig(
            csv_file=small,
            spectrograms_dir=png_tree.spectrograms_dir,
            output_dir=shards,
            num_workers=1,
            shard_size=8 * 1024,
        )
    )
    files = [png_tree.path(int(row)) for row in np.load(shards / "samples.npy")["row"]]
    pixels = [
        np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for path in files
    ]
    np.save(folder / "pixels.npy", np.stack(pixels))
    with (folder / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("number", "file"), *enumerate(map(str, files))])
    return Setting(
        pixels=folder / "pixels.npy",
        images=folder / "images.csv",
        shards=shards,
        work_dir=folder / "stores",
        batch_size=BATCH,
        dtype="float32",
        device="cpu",
        cores=1,
        environments=None,
    )


def entry(key: str) -> Entry:
    return next(entry for entry in PEERS if entry.key == key)


def served(python: Path, entry: Entry, setting: Setting, num_workers: int) -> tuple[int, Peer]:
    peer = Peer(entry.name, python, PEERS_FOLDER / entry.script, setting.arguments(entry, num_workers), deadline_s=120)
    with peer:
        done = peer.run()
        assert done.first_batch_s is not None
        assert 0 < done.first_batch_s < 60
        assert done.device_s is None
        assert peer.stored["bytes_per_image"] > 100
        return int(done.images), peer


OURS = {
    "pillow": (0, "float32"),
    "torchvision": (1, "uint8"),
    "webdataset": (2, "float32"),
    "dali": (1, "float32"),
    "memmap": (1, "float32"),
    "memmap-kept": (1, "float32"),
}
"""Peers of our own environment, with the number of workers and the dtype to test them with."""
BY_DEFAULT = ("pillow", "memmap-kept")
"""One that decodes and one with ready pixels; each start takes seconds, and the others are exhaustive."""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


@pytest.mark.parametrize(
    "key", [key if key in BY_DEFAULT else pytest.param(key, marks=pytest.mark.exhaustive) for key in OURS]
)
def test_a_peer_of_our_environment_serves_every_sample_once(key: str, setting: Setting) -> None:
    """The script itself checks a whole epoch before it serves one."""
    if key in NEEDS and not _installed(NEEDS[key]):
        pytest.skip(f"no {NEEDS[key]} here")
    num_workers, dtype = OURS[key]
    images, peer = served(Path(sys.executable), entry(key), _with(setting, dtype=dtype), num_workers)
    assert images == SAMPLES
    assert peer.versions["torch"]
    if key not in ("dali", "torchvision"):
        assert peer.check["most_levels_from_pillow"] == 0


@pytest.mark.parametrize("key", [entry.key for entry in PEERS if entry.environment is not None])
def test_a_peer_of_another_environment_serves_every_sample_once(key: str, setting: Setting) -> None:
    wanted = entry(key)
    folder = os.environ.get(ENVIRONMENTS)
    if folder is None:
        pytest.skip(f"{ENVIRONMENTS} names no folder of peers' environments")
    python = Path(folder) / str(wanted.environment) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment {wanted.environment} in {ENVIRONMENTS}")
    assert served(python, wanted, setting, num_workers=1)[0] == SAMPLES


def test_the_registry_is_whole() -> None:
    assert len(set(KEYS)) == len({entry.name for entry in PEERS}) == len(PEERS)
    for entry in PEERS:
        assert (PEERS_FOLDER / entry.script).is_file()
        assert entry.group in (DECODING, READY)
        if entry.environment is not None:
            requirements = read_requirements(PEERS_FOLDER / f"requirements-{entry.environment}.txt")
            assert requirements
            assert all("==" in requirement for requirement in requirements)


@pytest.mark.exhaustive  # starts a peer; test_peer_checks.py tests the check, a test below the reason
def test_a_peer_with_wrong_pixels_is_not_timed(setting: Setting, tmp_path: Path) -> None:
    other = tmp_path / "other.npy"
    np.save(other, 255 - np.load(setting.pixels))
    with pytest.raises(PeerError, match="differs from Pillow's pixels by up to") as caught:
        served(Path(sys.executable), entry("pillow"), _with(setting, pixels=other), 0)
    assert caught.value.reason.startswith("ended early with exit code 1: ValueError: the batch differs")


# ---------------------------------------------------------------------- the protocol, with scripts that do nothing


READY_LINE = json.dumps({"ready": True, "versions": {"python": "3"}, "check": {"most_levels_from_pillow": 0.5}})


def _script(tmp_path: Path, text: str) -> Entry:
    script = tmp_path / "peer.py"
    script.write_text(text)
    return Entry(key="test", name="a test's peer", script=str(script), group=READY)


def _serving(run: str) -> str:
    """Return a script that is ready at once and does ``run`` for each ``line`` of its stdin."""
    return f"import sys, os, json, time\nprint({READY_LINE!r}, flush=True)\nfor line in sys.stdin:\n    {run}\n"


ANSWER = 'print(json.dumps({"images": 7}), flush=True)'


def test_protocol(tmp_path: Path) -> None:
    script = Path(_script(tmp_path, _serving(f'assert line == "run\\n"; {ANSWER}')).script)
    with Peer("a test's peer", Path(sys.executable), script, [], deadline_s=30) as peer:
        assert peer.versions == {"python": "3"}
        assert peer.check == {"most_levels_from_pillow": 0.5}
        assert [peer.run(), peer.run()] == [Pass(images=7), Pass(images=7)]


def test_what_a_library_prints_is_not_an_answer(tmp_path: Path, setting: Setting) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        "from peers.serving import make_parser, parse, serve\n"
        "options = parse(make_parser(None))\n"
        "print('a library says hello')\n"
        "serve(lambda: print('and again') or {'images': 3}, options, ('numpy',))\n"
    )
    with Peer(
        "a test's peer", Path(sys.executable), script, setting.arguments(entry("pillow"), 0), deadline_s=30
    ) as peer:
        assert peer.run() == Pass(images=3)
        assert peer.versions["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise MemoryError('no room')", "ended early with exit code 1: MemoryError: no room"),
        ("import sys\nsys.exit('ValueError: the batch differs')", "exit code 1: ValueError: the batch differs"),
        (_serving("os._exit(9)"), "ended early with exit code 9: it said nothing"),
        (
            "import a_library_that_nobody_has",
            "exit code 1: ModuleNotFoundError: No module named 'a_library_that_nobody_has'",
        ),
    ],
)
def test_a_peer_that_crashes_is_left_out_with_its_reason(
    text: str, reason: str, tmp_path: Path, setting: Setting
) -> None:
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        contender = open_peer(_script(tmp_path, text), setting, stack, said.append)
    assert contender.left_out is not None
    assert reason in contender.left_out
    assert len(said) == 1
    assert said[0].startswith("left out: a test's peer: ")


def test_a_peer_that_cannot_be_installed_is_left_out_with_its_reason(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(name: str, requirements: list[str], folder: Path, *, over_ours: bool) -> Path:
        raise PeerError(name, "not installed: ERROR: No matching distribution found for ffcv==1.0.2")

    monkeypatch.setattr("harness.peer_contender.make_environment", install)
    with contextlib.ExitStack() as stack:
        contender = open_peer(entry("ffcv-raw"), _with(setting, environments=tmp_path), stack, lambda line: None)
        without = open_peer(entry("ffcv-raw"), setting, stack, lambda line: None)
    assert contender.left_out == "not installed: ERROR: No matching distribution found for ffcv==1.0.2"
    assert without.left_out == "needs an environment of its own; name a folder with --peers"


# ---------------------------------------------------------------------- tuning and racing


def test_tuning_keeps_the_best_number_of_workers(tmp_path: Path) -> None:
    seconds = "{0: 0.2, 1: 0.02, 2: 0.1}[int(sys.argv[1])]"
    script = Path(_script(tmp_path, _serving(f"time.sleep({seconds}); {ANSWER}")).script)
    with contextlib.ExitStack() as stack:
        tried: list[Peer] = []

        def start(count: int) -> Peer:
            tried.append(Peer("a test's peer", Path(sys.executable), script, [count], deadline_s=30))
            return tried[-1]

        best, rates, peer = tune_workers(start, [0, 1, 2], stack)
        assert best == 1
        assert peer is tried[1]
        assert peer.run() == Pass(images=7)
        assert [peer.is_open for peer in tried] == [False, True, False]
    assert list(rates) == [0, 1, 2]
    assert rates[1] == max(rates.values())


@pytest.mark.parametrize("ours", [None, "active"])
def test_torchs_threads_of_peers_sleep_unless_told_otherwise(
    ours: str | None, tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if ours is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", ours)
    wanted = ours or "passive"
    test = _script(tmp_path, f"import os\nassert os.environ['OMP_WAIT_POLICY'] == {wanted!r}\n" + _serving(ANSWER))
    with contextlib.ExitStack() as stack:
        contender = open_peer(test, setting, stack, lambda line: None)
        assert contender.left_out is None
        assert contender.facts["OMP_WAIT_POLICY"] == wanted
        assert contender.run() == Pass(images=7)


def test_tuning_passes_over_numbers_of_workers_that_fail() -> None:
    class Picky:
        def __init__(self, count: int) -> None:
            self.count = count

        def __enter__(self) -> Picky:
            if self.count == 0:
                raise PeerError("picky", "wants a worker")
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def run(self) -> Pass:
            if self.count == 2:
                raise PeerError("picky", "wants no more than one")
            return Pass(images=1)

        def close(self) -> None:
            closed.append(self.count)

    closed: list[int] = []
    with contextlib.ExitStack() as stack:
        best, rates, _ = tune_workers(Picky, [0, 1, 2], stack)  # type: ignore[arg-type]
        assert (best, list(rates)) == (1, [1])
        assert closed == [2]  # at once: its workers would take the cores from those that are timed
        with pytest.raises(PeerError, match="picky: wants a worker"):
            tune_workers(Picky, [0], stack)  # type: ignore[arg-type]


def test_worker_counts() -> None:
    assert list_worker_counts(0, 1) == [0, 1]
    assert list_worker_counts(0, 2) == [0, 1, 2]
    assert list_worker_counts(1, 4) == [1, 2, 3, 4]
    assert list_worker_counts(0, 8) == [0, 1, 2, 3, 4, 8]
    assert list_worker_counts(0, 20) == [0, 1, 2, 3, 4, 8, 16, 20]


def test_a_peer_that_fails_in_the_race_is_left_out_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = iter([5, 5])

    def weak() -> Pass:
        try:
            return Pass(images=next(runs))
        except StopIteration:
            raise PeerError("weak", f"ended early: {tmp_path}/secret/file.py: killed") from None

    good, bad = Contender(name="good", run=lambda: Pass(images=4)), Contender(name="weak", run=weak)
    group = Group(name="a group", contenders=[bad, good], baseline=good)
    measure.race(group.contenders, repeats=3)
    assert len(good.rates) == 3
    assert good.left_out is None
    assert bad.rates == []
    assert "left out: ended early" in group_table(group)
    assert math.isnan(measure.ratio(good, bad))

    written: dict[str, Any] = {}
    monkeypatch.setattr(records, "write_result", lambda what, rows, setting, device, folder: written.update(rows=rows))
    records.save_outcome(Outcome(what="load", groups=[group], setting={}, device=torch.device("cpu")), {}, tmp_path)
    row = written["rows"][0]
    assert (row["group"], row["name"]) == ("a group", "weak")
    assert row["left_out"] == "ended early: file.py: killed"  # and nothing of the machine's folders
    assert written["rows"][1]["ratio_to_baseline"] == 1


def test_errors_of_our_own_loaders_are_not_swallowed() -> None:
    def broken() -> Pass:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        measure.race([Contender(name="ours", run=broken)], repeats=1)


def _with(setting: Setting, **changes: Any) -> Setting:
    import dataclasses

    return dataclasses.replace(setting, **changes)


def test_scripts_import_nothing_that_a_peers_environment_lacks() -> None:
    for script in PEERS_FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.partition(".")[0] for name in names} & {"harness", "quaclrs"}, script.name


def test_no_script_hides_a_library() -> None:
    """A script's folder comes first where it looks for modules."""
    names = {path.stem for path in PEERS_FOLDER.glob("*.py")}
    libraries = ("litdata", "datasets", "streaming", "ffcv", "webdataset", "torch", "numpy", "PIL", "nvidia")
    assert not names.intersection(libraries)
    assert all(name not in sys.stdlib_module_names for name in names)
    assert importlib.util.find_spec("peers.serving") is not None
