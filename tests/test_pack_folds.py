"""Contract of ``--folds``: jobs share one folder, in any order or in parallel, and write the bytes of one packing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packing import (
    JOB_FOLDS,
    JOB_SETTINGS,
    TIMEOUT_S,
    call_tool,
    content_of,
    job_flags,
    pack_folds,
    pack_tree,
    rows_of,
    tool_command,
)
from PIL import Image
from png_trees import PngTree, make_rows, write_tree

from quaclrs.config import PackConfig
from quaclrs.errors import DataError, ShardError, StorageError
from quaclrs.shards.encodings.base import Finding, SharedTables
from quaclrs.shards.encodings.indexed import IndexedEncoding
from quaclrs.shards.packing.pack import pack
from quaclrs.system.file_locks import locked

ENCODINGS = ("png", "indexed", "rgb")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """24 images in three folds, one row each. Read only."""
    return write_tree(
        tmp_path_factory.mktemp("tree"), make_rows(("ambulance", "car_horn", "police", "traffic"), JOB_FOLDS)
    )


@pytest.fixture(scope="module")
def whole(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Encoding to the content of ``tree`` packed at once."""
    folder = tmp_path_factory.mktemp("whole")
    for encoding in ENCODINGS:
        pack_tree(tree, folder / encoding, encoding=encoding, **JOB_SETTINGS)
    return {encoding: content_of(folder / encoding) for encoding in ENCODINGS}


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """12 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(("ambulance", "police"), JOB_FOLDS))


# --- processes that log each image they examine ---

JOB = """
import sys, time
from pathlib import Path
import quaclrs.shards.packing.pack as packing
from quaclrs.shards.encodings import indexed, png, rgb
from quaclrs.config import PackConfig

csv_file, images, output_dir, folds, encoding, log, stop_at = sys.argv[1:]

def note(what):
    with Path(log).open("a") as file:
        file.write(what + "\\n")

def noted(function, what):
    def wrapped(*arguments):
        name = what or arguments[1].rpartition("/")[2]
        note(name)
        if name == stop_at:
            time.sleep(3600)
        return function(*arguments)
    return wrapped

indexed.decode_png, rgb.decode_png = noted(indexed.decode_png, ""), noted(rgb.decode_png, "")
png.check_png = noted(png.check_png, "")
packing.finalize = noted(packing.finalize, "finalize")
config = PackConfig(
    csv_file=Path(csv_file), spectrograms_dir=Path(images), output_dir=Path(output_dir), encoding=encoding,
    folds=tuple(map(int, folds.split(","))) if folds else None, shard_size=4096, image_size=16, num_workers=1,
)
summary = packing.pack(config)
print(summary.images_packed, summary.already_complete, *summary.missing_folds)
"""


class Job:
    """A packing process that logs the name of each image it decodes or checks, and sleeps at ``stop_at``."""

    def __init__(
        self, tree: PngTree, output_dir: Path, folds: str, encoding: str, log: Path, stop_at: str = "nowhere"
    ) -> None:
        self.log = log
        arguments = [tree.csv_file, tree.spectrograms_dir, output_dir, folds, encoding, log, stop_at]
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def examined(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_until_examined(self, name: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while name not in self.examined():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.005)

    def result(self) -> tuple[int, bool, tuple[int, ...]]:
        """Images packed, whether the folder was complete already, missing folds."""
        stdout, stderr = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, stderr
        images, complete, *missing = stdout.split()
        return int(images), complete == "True", tuple(map(int, missing))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


# --- the same bytes for every division of the folds ---


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("parts", [[(3,), (1,), (2,)], [(2, 1), None], [(1, 2, 3)]], ids=str)
def test_any_division_in_any_order_gives_the_bytes_of_one_packing(
    encoding: str,
    parts: list[tuple[int, ...] | None],
    tree: PngTree,
    whole: dict[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    todo = set(JOB_FOLDS)
    for part in parts:
        summary = pack_tree(tree, tmp_path / "shards", folds=part, encoding=encoding, **JOB_SETTINGS)
        own = todo & set(part or JOB_FOLDS)
        todo -= own
        assert summary.missing_folds == tuple(sorted(todo))
        assert summary.images_packed == len(rows_of(tree, *own))
        assert not summary.already_complete
        assert (tmp_path / "shards" / "manifest.json").exists() == (not todo)
    assert content_of(tmp_path / "shards") == whole[encoding]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_jobs_from_shards_too(encoding: str, tree: PngTree, whole: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    pack_tree(tree, tmp_path / "png", **JOB_SETTINGS)
    for folds in ((2,), (3, 1)):
        options: dict[str, Any] = {"encoding": encoding, "num_workers": 1} | JOB_SETTINGS
        pack(PackConfig(from_shards=tmp_path / "png", output_dir=tmp_path / "shards", folds=folds, **options))
    assert content_of(tmp_path / "shards") == whole[encoding]


def test_jobs_may_spell_the_folder_of_images_differently(
    tree: PngTree, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_folds(tree, tmp_path / "shards", 1, 3, encoding="indexed")
    monkeypatch.chdir(tree.spectrograms_dir.parent)
    relative = PngTree(tree.csv_file, Path("spectrograms"), tree.rows)
    assert pack_folds(relative, tmp_path / "shards", 2, encoding="indexed").missing_folds == ()
    assert content_of(tmp_path / "shards") == whole["indexed"]


def test_skipped_images_are_those_of_one_packing(small_tree: PngTree, tmp_path: Path) -> None:
    for row in rows_of(small_tree, 2):
        small_tree.path(row).write_bytes(b"")  # so one fold has no good image
    small_tree.path(rows_of(small_tree, 3)[1]).unlink()
    for encoding in ENCODINGS:
        pack_tree(small_tree, tmp_path / "whole" / encoding, on_error="skip", encoding=encoding, **JOB_SETTINGS)
        for fold in (2, 3, 1):
            summary = pack_folds(small_tree, tmp_path / "jobs" / encoding, fold, on_error="skip", encoding=encoding)
            assert len(summary.manifest.skipped) == {2: 4, 3: 1, 1: 5}[fold]  # the last job: all
    assert content_of(tmp_path / "jobs") == content_of(tmp_path / "whole")


def test_a_job_whose_image_was_mended_goes_on(small_tree: PngTree, tmp_path: Path) -> None:
    bad = small_tree.path(rows_of(small_tree, 2)[0])
    bad.write_bytes(b"")
    pack_folds(small_tree, tmp_path / "shards", 1)
    with pytest.raises(DataError, match="the file is empty"):
        pack_folds(small_tree, tmp_path / "shards", 2)
    shutil.copyfile(small_tree.path(rows_of(small_tree, 1)[0]), bad)
    pack_folds(small_tree, tmp_path / "shards", 3)
    assert pack_folds(small_tree, tmp_path / "shards", 2).missing_folds == ()
    pack_tree(small_tree, tmp_path / "whole", **JOB_SETTINGS)
    assert content_of(tmp_path / "shards") == content_of(tmp_path / "whole")


def test_an_image_that_changed_after_its_fold_was_packed_is_packed_anew(small_tree: PngTree, tmp_path: Path) -> None:
    pack_folds(small_tree, tmp_path / "shards", 1, encoding="indexed")
    pack_folds(small_tree, tmp_path / "shards", 2, encoding="indexed")
    changed = small_tree.path(rows_of(small_tree, 1)[0])
    with Image.open(changed) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(changed)
    assert pack_folds(small_tree, tmp_path / "shards", 3, encoding="indexed").missing_folds == (1,)
    assert pack_folds(small_tree, tmp_path / "shards", 1, encoding="indexed").missing_folds == ()
    pack_tree(small_tree, tmp_path / "whole", encoding="indexed", **JOB_SETTINGS)
    assert content_of(tmp_path / "shards") == content_of(tmp_path / "whole")


# --- at the same time ---


@pytest.mark.parametrize(
    ("encoding", "folds_of_jobs"),
    [
        ("indexed", ["1", "3", "2,1,3"]),
        pytest.param("indexed", ["1", "2", "3", "3", "2,1,3"], marks=pytest.mark.exhaustive),
        pytest.param("png", ["1", "2", "3", "3", "2,1,3"], marks=pytest.mark.exhaustive),
    ],
    ids=["indexed-3", "indexed-5", "png-5"],
)
def test_jobs_in_parallel_examine_each_image_once_and_finalize_once(
    encoding: str, folds_of_jobs: list[str], tree: PngTree, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    jobs = [Job(tree, tmp_path / "shards", folds, encoding, log) for folds in folds_of_jobs]
    results = [job.result() for job in jobs]
    assert content_of(tmp_path / "shards") == whole[encoding]
    assert Counter(jobs[0].examined()) == Counter(["finalize", *(tree.path(row).name for row in range(len(tree.rows)))])
    assert sum(images for images, _, _ in results) == len(tree.rows)
    assert () in [missing for _, _, missing in results]


@pytest.mark.exhaustive
def test_jobs_with_workers_beside_a_whole_packing(
    tree: PngTree, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    output_dir = tmp_path / "shards"
    options: list[dict[str, object]] = [{"folds": "3", "num_workers": 2}, {"folds": "1", "num_workers": 2}, {}]
    commands = [
        tool_command("shard_dataset", job_flags(tree, output_dir, encoding="indexed", **more)) for more in options
    ]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    ends = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert content_of(output_dir) == whole["indexed"]


@pytest.fixture
def stopped_job(tree: PngTree, tmp_path: Path) -> Any:
    """A job of fold 1, encoding ``indexed``, that sleeps during its first pass; and its output folder."""
    name = tree.path(rows_of(tree, 1)[3]).name
    job = Job(tree, tmp_path / "shards", "1", "indexed", tmp_path / "stopped.log", stop_at=name)
    job.wait_until_examined(name)
    yield job, tmp_path / "shards"
    job.kill()


def test_a_running_job_is_waited_for_and_a_killed_one_is_replaced(
    stopped_job: tuple[Job, Path],
    tree: PngTree,
    whole: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped, output_dir = stopped_job
    other = Job(tree, output_dir, "2", "indexed", tmp_path / "other.log")
    assert other.process.stderr is not None
    waiting = f"{output_dir}: other jobs are at work on shards of fold(s) 1; waiting for them\n"
    assert other.process.stderr.readline() == waiting
    in_hand = stopped.examined()[-1]
    before = set(other.examined())
    assert {tree.path(row).name for row in rows_of(tree, 2, 3)} <= before  # all unclaimed shards
    assert in_hand not in before
    assert not list(output_dir.glob("fold*"))  # no shard before all images are examined
    stopped.kill()
    assert other.result() == (len(rows_of(tree, 2)), False, (1, 3))
    assert in_hand in other.examined()
    assert len(other.examined()) == len(set(other.examined()))
    monkeypatch.setattr("quaclrs.shards.encodings.indexed.decode_png", None)  # calling it fails
    summary = pack_folds(tree, output_dir, 1, encoding="indexed")
    assert (summary.images_packed, summary.missing_folds) == (len(rows_of(tree, 1)), (3,))
    pack_tree(tree, output_dir, encoding="indexed", **JOB_SETTINGS)
    assert content_of(output_dir) == whole["indexed"]


def test_other_settings_are_refused_while_a_job_is_alive(
    stopped_job: tuple[Job, Path], tree: PngTree, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, output_dir = stopped_job
    for more in ({"encoding": "png", "folds": "2"}, {"encoding": "png"}):
        assert call_tool("shard_dataset", job_flags(tree, output_dir, **more)) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == (
            f"shard_dataset.py: error: {output_dir}: jobs with --folds pack here from another --encoding (encoding: "
            "indexed, now png); "
            "go on as they do, choose another folder, or delete this one to pack anew\n"
        )
    assert stopped.process.poll() is None


def test_a_whole_packing_waits_for_a_running_job(
    stopped_job: tuple[Job, Path], tree: PngTree, whole: dict[str, dict[str, bytes]]
) -> None:
    stopped, output_dir = stopped_job
    command = tool_command("shard_dataset", job_flags(tree, output_dir, encoding="indexed"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == f"{output_dir}: another process is packing here; waiting for it\n"
    assert process.poll() is None
    stopped.kill()
    _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, stderr) == (0, "")
    assert content_of(output_dir) == whole["indexed"]


def test_images_that_changed_between_two_jobs_are_not_written(
    small_tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image changes between the starts of two jobs, and the second examines a shard that the first has examined."""

    def change_and_look_again(encoding: IndexedEncoding, findings: set[Finding]) -> SharedTables:
        monkeypatch.undo()
        path = small_tree.path(rows_of(small_tree, 1)[0])
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        pack_folds(small_tree, tmp_path / "shards", 2, encoding="indexed")
        return encoding.share(findings)

    monkeypatch.setattr(IndexedEncoding, "share", change_and_look_again)  # called between the two passes
    with pytest.raises(
        ShardError, match=r"another job looked at other images for fold01/fold01-00000\d\.tar: some changed while"
    ):
        pack_folds(small_tree, tmp_path / "shards", 1, encoding="indexed")
    assert pack_folds(small_tree, tmp_path / "shards", 1, encoding="indexed").missing_folds == (3,)


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_file(tmp_path: Path) -> None:
    """So it is for a process that waits while another finalizes the folder and deletes ``.packing/``."""
    path = tmp_path / "folder" / "lock"
    waits, is_held, may_end = threading.Event(), threading.Event(), threading.Event()

    def wait_for_lock() -> None:
        with locked(path, on_wait=waits.set):
            is_held.set()
            may_end.wait(TIMEOUT_S)

    thread = threading.Thread(target=wait_for_lock)
    with locked(path) as held:
        assert held
        thread.start()
        assert waits.wait(TIMEOUT_S)
        time.sleep(0.05)  # it is about to block
        shutil.rmtree(path.parent)
    assert is_held.wait(TIMEOUT_S)
    with locked(path) as held:
        assert not held
    may_end.set()
    thread.join(TIMEOUT_S)


def test_a_file_system_without_locks_is_named(tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError) as caught:
        pack_folds(tree, tmp_path / "shards", 1)
    assert str(caught.value) == (
        f"cannot lock {tmp_path}/shards/.packing/lock: No locks available; "
        "choose an --output_dir on a file system with locks (Lustre: mounted with flock)"
    )


# --- killed ---

KILLED_AT_A_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from quaclrs.config import PackConfig
from quaclrs.shards.packing.pack import pack

csv_file, images, output_dir, encoding, promised, first_steps, last_steps = sys.argv[1:]
output_dir = Path(output_dir)

def run(*folds):
    return pack(PackConfig(
        csv_file=Path(csv_file),
        spectrograms_dir=Path(images),
        output_dir=output_dir,
        encoding=encoding,
        folds=folds,
        num_workers=1,
    ))

def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def killed_at(original, step):
    def wrapped(*arguments, **options):
        global done
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return original(*arguments, **options)
    return wrapped

promised = content(Path(promised))
for first, steps in ((True, first_steps), (False, last_steps)):
    killed = 0
    for step in map(int, steps.split(",")):
        if not first:
            run(2)
        child = os.fork()
        if child == 0:
            done = 0
            for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "unlink"), (os, "rmdir")):
                setattr(owner, name, killed_at(getattr(owner, name), step))
            run(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        whole = (output_dir / "manifest.json").is_file()
        found = content(output_dir)
        packed = {name for name in found if not name.startswith(".packing/")}
        assert not whole or packed == set(promised), (step, sorted(found))
        for name in set(found) & set(promised):
            assert found[name] == promised[name], (step, name)
        run(1)
        assert first != (output_dir / "manifest.json").is_file()
        run(2)
        assert content(output_dir) == promised, (step, sorted(content(output_dir)))
        assert not (output_dir / ".packing").exists(), step
        shutil.rmtree(output_dir)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    print(killed)
"""
EVERY_STEP = ",".join(map(str, range(100)))


@pytest.mark.parametrize(
    ("encoding", "first_steps", "last_steps"),
    [
        ("indexed", "3", "6,12"),
        pytest.param("png", EVERY_STEP, EVERY_STEP, marks=pytest.mark.exhaustive),
        pytest.param("indexed", EVERY_STEP, EVERY_STEP, marks=pytest.mark.exhaustive),
    ],
    ids=["indexed", "png-every-step", "indexed-every-step"],
)
def test_a_job_killed_before_a_rename_or_removal_goes_on(
    encoding: str, first_steps: str, last_steps: str, tmp_path: Path
) -> None:
    """The first job, which stores the settings, and the last one, which writes the manifest and deletes .packing/."""
    tree = write_tree(tmp_path / "tree", make_rows(("ambulance",), (1, 2)))
    pack_tree(tree, tmp_path / "promised", encoding=encoding, shard_size=PackConfig.shard_size)
    folders = [tree.csv_file, tree.spectrograms_dir, tmp_path / "shards", encoding, tmp_path / "promised"]
    arguments = [*folders, first_steps, last_steps]
    command = [sys.executable, "-c", KILLED_AT_A_STEP, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    first, last = map(int, done.stdout.split())
    # settings, tar, index, record; then also metadata, samples and manifest, and the removal of all in .packing/
    assert first >= min(4, len(first_steps.split(",")))
    assert last >= min(6 + 5, len(last_steps.split(",")))


def test_killed_with_its_workers_a_job_goes_on(
    tree: PngTree, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    output_dir = tmp_path / "shards"
    command = tool_command("shard_dataset", job_flags(tree, output_dir, encoding="indexed", folds="2,3", num_workers=2))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(output_dir.glob(".packing/*.seen")):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)  # its workers notice by themselves
    process.wait(TIMEOUT_S)
    assert not (output_dir / "manifest.json").exists()
    pack_folds(tree, output_dir, 1, encoding="indexed")
    assert pack_folds(tree, output_dir, 2, 3, encoding="indexed").missing_folds == ()
    assert content_of(output_dir) == whole["indexed"]
