"""Contract of packing: killed, interrupted or run twice at a time, it loses no work and writes the same bytes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest
from packing import (
    TIMEOUT_S,
    content_of,
    identities,
    pack_flags,
    pack_tree,
    tool_command,
)
from PIL import Image
from png_trees import CLASSES, PngTree, make_rows, write_tree

from quaclrs.config import PackConfig
from quaclrs.errors import DataError, QuaclrsError, StorageError


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """24 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(CLASSES[:4], (1, 2, 3)))


# --- killed, and run again ---


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT_S)


def pack_and_kill(command: list[str], output_dir: Path, finished_shards: int, delay_s: float) -> bool:
    """Kill packer and workers ``delay_s`` after they finished so many shards; False when packing had ended before."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and len(list(output_dir.glob("fold*/*.tar"))) < finished_shards:
            time.sleep(0.0005)
        time.sleep(delay_s)
        return process.poll() is None
    finally:
        kill_group(process)


@pytest.mark.parametrize(
    "finished_shards", [17, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 1, 4, 9, 26, 33))]
)
def test_a_killed_packing_run_again_gives_the_same_bytes(
    finished_shards: int, png_shards: Path, png_tree: PngTree, tmp_path: Path
) -> None:
    output_dir = tmp_path / "shards"
    command = tool_command("shard_dataset", pack_flags(png_tree, output_dir, num_workers=2))
    dice = random.Random(finished_shards)
    while not pack_and_kill(command, output_dir, finished_shards, dice.uniform(0, 0.004)):
        shutil.rmtree(output_dir)  # packing ended before the kill
    left = content_of(output_dir) if output_dir.is_dir() else {}
    promised = content_of(png_shards)
    for name, content in left.items():
        if name.endswith((".tar", ".idx")):  # never an incomplete shard under its final name
            assert content == promised[name], name
    pack_tree(png_tree, output_dir)
    assert content_of(output_dir) == promised


KILLED_AT_A_STEP = """
import os, signal, sys
from pathlib import Path
from quaclrs.config import PackConfig
from quaclrs.shards.packing.pack import pack

csv_file, spectrograms_dir, output_dir = map(Path, sys.argv[1:4])
config = PackConfig(csv_file=csv_file, spectrograms_dir=spectrograms_dir, output_dir=output_dir, num_workers=1)
steps = 0

def killed_around(original, step):
    def wrapped(*arguments, **options):
        global steps
        for after in (False, True):
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            result = original(*arguments, **options) if not after else result
        return result
    return wrapped

for step in map(int, sys.argv[4].split(",")):
    child = os.fork()
    if child == 0:
        os.fsync, Path.replace = killed_around(os.fsync, step), killed_around(Path.replace, step)
        pack(config)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(step, os.WEXITSTATUS(status))  # pack() made fewer steps than that
        break
    found = sorted(path.name for path in config.output_dir.glob("fold*/*.tar"))
    for name in found:
        promised = Path(sys.argv[5], "fold01", name)
        assert promised.stat().st_size == (config.output_dir / "fold01" / name).stat().st_size
    pack(config)
    for path in config.output_dir.rglob("*"):
        if path.is_file():
            promised = Path(sys.argv[5], path.relative_to(config.output_dir))
            assert path.read_bytes() == promised.read_bytes(), (step, path)
    print(step, len(found), sum(path.is_file() for path in config.output_dir.rglob("*")))
    import shutil
    shutil.rmtree(config.output_dir)
"""


EVERY_STEP = ",".join(map(str, range(100)))


@pytest.mark.parametrize(
    "steps", ["2,11,19,99", pytest.param(EVERY_STEP, marks=pytest.mark.exhaustive)], ids=["some", "every"]
)
def test_killed_before_and_after_a_flush_or_rename(steps: str, tmp_path: Path) -> None:
    """One shard, so six files: tar, index, record, metadata, samples and manifest, each flushed and then renamed.

    A seventh, sources.json, is only renamed.
    """
    tree = write_tree(tmp_path / "tree", make_rows(CLASSES[:2], (1,)))
    pack_tree(tree, tmp_path / "promised", shard_size=PackConfig.shard_size)
    files = sum(path.is_file() for path in (tmp_path / "promised").rglob("*"))
    arguments = [tree.csv_file, tree.spectrograms_dir, tmp_path / "shards", steps, tmp_path / "promised"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_A_STEP, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *killed, last = [line.split() for line in done.stdout.splitlines()]
    assert last[1] == "0"
    # six files are flushed and renamed, killed before and after
    assert len(killed) > 6 * 4 if steps == EVERY_STEP else len(killed) == 3
    assert {int(count) for _, _, count in killed} == {files}
    assert {tars for _, tars, _ in killed} == {"0", "1"}


def test_finished_shards_are_kept_when_an_image_is_bad(small_tree: PngTree, tmp_path: Path) -> None:
    output_dir = tmp_path / "shards"
    bad = next(small_tree.path(row) for row in range(len(small_tree.rows)) if small_tree.rows[row]["fold"] == "3")
    good = bad.read_bytes()
    bad.write_bytes(good[:-30])
    with pytest.raises(DataError):
        pack_tree(small_tree, output_dir)
    assert not (output_dir / "manifest.json").exists()
    finished = {name: kept for name, kept in identities(output_dir).items() if name.endswith((".tar", ".idx"))}
    assert {"fold01/fold01-000000.tar", "fold02/fold02-000000.tar"} <= set(finished)
    assert not list(output_dir.rglob("*.tmp"))
    bad.write_bytes(good)
    summary = pack_tree(small_tree, output_dir)
    assert summary.images_packed < 24
    assert finished.items() <= identities(output_dir).items()
    pack_tree(small_tree, tmp_path / "at once")
    assert content_of(output_dir) == content_of(tmp_path / "at once")


def test_finished_shards_are_kept_when_the_rest_is_then_packed_with_skip(small_tree: PngTree, tmp_path: Path) -> None:
    output_dir = tmp_path / "shards"
    bad = next(small_tree.path(row) for row in range(len(small_tree.rows)) if small_tree.rows[row]["fold"] == "3")
    bad.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        pack_tree(small_tree, output_dir)
    finished = {name: kept for name, kept in identities(output_dir).items() if name.endswith((".tar", ".idx"))}
    pack_tree(small_tree, output_dir, on_error="skip")
    assert finished.items() <= identities(output_dir).items()


def test_a_shard_that_lacks_skipped_rows_is_not_kept_for_stop(small_tree: PngTree, tmp_path: Path) -> None:
    bad = small_tree.path(0)
    bad.write_bytes(b"")
    obstacle = tmp_path / "shards" / "manifest.json"
    obstacle.mkdir(parents=True)  # packing fails at its last step, after all shards
    with pytest.raises(StorageError):
        pack_tree(small_tree, tmp_path / "shards", on_error="skip")
    obstacle.rmdir()
    with pytest.raises(DataError, match="the file is empty"):
        pack_tree(small_tree, tmp_path / "shards", on_error="stop")


def test_an_image_changed_before_the_second_try_is_packed_anew(small_tree: PngTree, tmp_path: Path) -> None:
    obstacle = tmp_path / "shards" / "manifest.json"
    obstacle.mkdir(parents=True)
    with pytest.raises(StorageError):
        pack_tree(small_tree, tmp_path / "shards")
    obstacle.rmdir()
    before = small_tree.path(0).read_bytes()
    with Image.open(small_tree.path(0)) as image:
        changed = Image.fromarray(np.asarray(image)[::-1].copy())
    changed.save(small_tree.path(0))
    assert small_tree.path(0).read_bytes() != before
    pack_tree(small_tree, tmp_path / "shards")
    pack_tree(small_tree, tmp_path / "fresh")
    assert content_of(tmp_path / "shards") == content_of(tmp_path / "fresh")


def test_a_finished_shard_that_was_cut_since_is_packed_anew(small_tree: PngTree, tmp_path: Path) -> None:
    obstacle = tmp_path / "shards" / "manifest.json"
    obstacle.mkdir(parents=True)
    with pytest.raises(StorageError):
        pack_tree(small_tree, tmp_path / "shards")
    obstacle.rmdir()
    cut = tmp_path / "shards" / "fold01" / "fold01-000000.tar"
    os.truncate(cut, 1024)
    pack_tree(small_tree, tmp_path / "shards")
    pack_tree(small_tree, tmp_path / "fresh")
    assert content_of(tmp_path / "shards") == content_of(tmp_path / "fresh")


def test_a_stopped_packing_of_other_settings_leaves_nothing_behind(small_tree: PngTree, tmp_path: Path) -> None:
    output_dir = tmp_path / "shards"
    obstacle = output_dir / "manifest.json"
    obstacle.mkdir(parents=True)
    with pytest.raises(StorageError):
        pack_tree(small_tree, output_dir, shard_size=1)  # many more shards than next time
    (output_dir / "fold01" / "fold01-000099.tar.tmp").write_bytes(b"killed while writing")
    obstacle.rmdir()
    pack_tree(small_tree, output_dir)
    pack_tree(small_tree, tmp_path / "fresh")
    assert content_of(output_dir) == content_of(tmp_path / "fresh")


def test_ctrl_c_stops_with_one_line_and_the_packing_can_go_on(
    png_shards: Path, png_tree: PngTree, tmp_path: Path
) -> None:
    output_dir = tmp_path / "shards"
    command = tool_command("shard_dataset", pack_flags(png_tree, output_dir, num_workers=2))
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(output_dir.glob("fold*/*.tar")):
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stderr) == (130, "shard_dataset.py: interrupted\n")
    assert not list(output_dir.rglob("*.tmp"))
    pack_tree(png_tree, output_dir)
    assert content_of(output_dir) == content_of(png_shards)


# --- two at once ---


def test_two_packings_at_once_give_one_result(png_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    command = tool_command("shard_dataset", pack_flags(png_tree, tmp_path / "shards"))
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=TIMEOUT_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert content_of(tmp_path / "shards") == content_of(png_shards)
    assert sorted("already packed" in stdout for stdout, _ in ends) == [False, True]


def test_a_packing_waits_for_the_one_before_it(small_tree: PngTree, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    output_dir = tmp_path / "shards"
    (output_dir / ".packing").mkdir(parents=True)
    command = tool_command("shard_dataset", pack_flags(small_tree, output_dir))
    with (output_dir / ".packing" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline() == f"{output_dir}: another process is packing here; waiting for it\n"
        assert process.poll() is None
        assert not list(output_dir.glob("fold*"))
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stderr) == (0, "")
    assert "24 samples" in stdout
    assert not (output_dir / ".packing").exists()


# --- workers that die ---


@pytest.mark.parametrize(("num_workers", "finished_shards"), [(2, 5), pytest.param(8, 0, marks=pytest.mark.exhaustive)])
def test_a_worker_that_is_killed_is_one_line(
    num_workers: int, finished_shards: int, png_tree: PngTree, tmp_path: Path
) -> None:
    """The kernel kills a process when memory runs out. With 8 workers, while other workers are still starting."""
    output_dir = tmp_path / "shards"
    process = start_tool(png_tree, output_dir, num_workers)
    try:
        worker = workers_of(process.pid)[0]
        wait_for_shards(output_dir, finished_shards)
        os.kill(worker, signal.SIGKILL)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        end_group(process)
    assert process.returncode == 2, stderr
    *others, line = stderr.splitlines()
    assert line == (
        "shard_dataset.py: error: a worker process died (killed, or out of memory?); "
        "run the same command again, with fewer --num_workers"
    )
    assert finished_shards == 0 or not others  # Python's pool may print an error when a worker dies while others start
    assert not (output_dir / "manifest.json").exists()


def test_a_worker_that_dies_before_it_has_started(
    png_tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the kernel kills it at once: what the parent writes to it breaks."""
    start, started = SpawnProcess.start, []

    def killed_at_its_start(process: SpawnProcess) -> None:
        started.append(process)
        if len(started) == 2:
            raise BrokenPipeError
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", killed_at_its_start)
    with pytest.raises(QuaclrsError, match=r"a worker process died \(killed, or out of memory.*fewer --num_workers"):
        pack_tree(png_tree, tmp_path / "shards", num_workers=3)
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert pack_tree(png_tree, tmp_path / "shards").manifest.num_samples == 270


def test_workers_end_with_their_parent(png_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    output_dir = tmp_path / "shards"
    process = start_tool(png_tree, output_dir, num_workers=2)
    try:
        workers = workers_of(process.pid)
        wait_for_shards(output_dir, 1)
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
        deadline = time.monotonic() + TIMEOUT_S
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, "a worker goes on without its parent"
            time.sleep(0.01)
    finally:
        end_group(process)
    pack_tree(png_tree, output_dir)
    assert content_of(output_dir) == content_of(png_shards)


def start_tool(tree: PngTree, output_dir: Path, num_workers: int) -> subprocess.Popen[str]:
    command = tool_command("shard_dataset", pack_flags(tree, output_dir, num_workers=num_workers))
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)


def wait_for_shards(output_dir: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(output_dir.glob("fold*/*.tar"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def workers_of(parent: int) -> list[int]:
    """Wait until spawned workers exist; their process ids, from /proc."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc/.../children to find a worker")
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        workers = [int(child) for child in children.read_text().split() if b"spawn_main" in command_line(int(child))]
        if workers:
            return workers
        time.sleep(0.0005)
    raise AssertionError("no worker was started")


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended


def is_running(process: int) -> bool:
    return command_line(process) != b""  # a process that has ended, but was not waited for, has none
