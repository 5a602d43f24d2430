"""Contract of packing: any reader reads the shards, every way to pack gives the same bytes, and no work is lost."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import RGB_IMAGE_SIZE, SHARD_SIZE
from packing import (
    TIMEOUT_S,
    call_tool,
    content_of,
    manifest_of,
    members_of,
    pack_flags,
    pack_tree,
    resized_by_pillow,
    run_tool,
    samples_of,
    tool_command,
)
from PIL import Image
from png_trees import CLASSES, PngTree, grid_image, make_row, make_rows, write_csv, write_tree

from quaclrs.config import Columns, PackConfig, parse_bytes
from quaclrs.errors import DataError, QuaclrsError, ShardError, StorageError, UsageError
from quaclrs.shards.format import FLAG_NOT_PLAIN, FLAG_TRANSPARENT, FORMAT_VERSION
from quaclrs.shards.reader import ShardSet

FEW_CLASSES, FEW_FOLDS = CLASSES[:4], (1, 2, 3)


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """24 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(FEW_CLASSES, FEW_FOLDS))


# --- what the shards hold, read by three other libraries ---


@dataclass(frozen=True)
class Sample:
    key: str
    payload: bytes
    label: int
    row: dict[str, str]


def promised_samples(shards: Path, tree: PngTree) -> list[Sample]:
    """What CSV, PNG files and the row numbers of samples.npy say, without using the packer."""
    samples, position = [], dict.fromkeys(range(1, 11), 0)
    for row in samples_of(shards)["row"].tolist():
        described = tree.rows[row]
        fold = int(described["fold"])
        key = f"fold{fold:02d}-{position[fold]:06d}"
        position[fold] += 1
        samples.append(Sample(key, tree.path(row).read_bytes(), sorted(CLASSES).index(described["class"]), described))
    return samples


def tars(shards: Path) -> list[Path]:
    return [shards / entry["file"] for entry in manifest_of(shards)["shards"]]


def test_tarfile_agrees_with_the_manifest(png_shards: Path, png_tree: PngTree) -> None:
    found = []
    for tar in tars(png_shards):
        members = members_of(tar)
        for (png, payload), (cls, label), (document, row) in zip(
            members[::3], members[1::3], members[2::3], strict=True
        ):
            key = png.name.removesuffix(".png")
            assert [info.name for info in (png, cls, document)] == [f"{key}.png", f"{key}.cls", f"{key}.json"]
            found.append(Sample(key, payload, int(label), json.loads(row)))
    assert found == promised_samples(png_shards, png_tree)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_agrees_with_the_manifest(png_shards: Path, png_tree: PngTree) -> None:
    webdataset = pytest.importorskip("webdataset")
    dataset = webdataset.WebDataset([str(tar) for tar in tars(png_shards)], shardshuffle=False)
    found = [Sample(s["__key__"], s["png"], int(s["cls"]), json.loads(s["json"])) for s in dataset]
    assert found == promised_samples(png_shards, png_tree)


def test_dali_agrees_with_the_manifest(png_shards: Path, png_tree: PngTree) -> None:
    dali = pytest.importorskip("nvidia.dali")
    paths = tars(png_shards)

    def records() -> tuple[object, ...]:
        columns = dali.fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["png", "cls", "json"],
            missing_component_behavior="error",
            name="reader",
        )
        return tuple(columns)

    pipeline = dali.pipeline_def(batch_size=27, num_threads=1, device_id=None)(records)()
    pipeline.build()
    promised = promised_samples(png_shards, png_tree)
    assert pipeline.epoch_size("reader") == len(promised) == 270
    found = []
    for _ in range(270 // 27):
        columns = [[np.asarray(column.at(i)).tobytes() for i in range(27)] for column in pipeline.run()]
        found += [(payload, int(label), json.loads(row)) for payload, label, row in zip(*columns, strict=True)]
    assert found == [(sample.payload, sample.label, sample.row) for sample in promised]


def test_samples_table_leads_to_every_payload(png_shards: Path, png_tree: PngTree) -> None:
    samples, files = samples_of(png_shards), [tar.read_bytes() for tar in tars(png_shards)]
    for record in samples:
        offset, size, row = int(record["offset"]), int(record["size"]), int(record["row"])
        assert files[record["shard"]][offset : offset + size] == png_tree.path(row).read_bytes()
        assert (record["width"], record["height"]) == (100, 40)
        assert not record["flags"] & (FLAG_NOT_PLAIN | FLAG_TRANSPARENT)
        assert record["fold"] == int(png_tree.rows[row]["fold"])
        assert record["label"] == int(png_tree.rows[row]["classID"])
    assert sorted(samples["row"].tolist()) == list(range(270))
    assert (np.diff(samples["fold"].astype(int)) >= 0).all()


def test_every_fold_is_shuffled(png_shards: Path) -> None:
    samples = samples_of(png_shards)
    for fold in range(1, 11):
        labels = samples["label"][samples["fold"] == fold].tolist()
        rows = samples["row"][samples["fold"] == fold].tolist()
        assert rows != sorted(rows)
        assert labels != sorted(labels)


def test_manifest_says_what_is_there(png_shards: Path, png_tree: PngTree) -> None:
    manifest = manifest_of(png_shards)
    assert (manifest["format"], manifest["version"], manifest["encoding"]) == ("quaclrs-shards", FORMAT_VERSION, "png")
    assert manifest["classes"] == sorted(CLASSES)
    assert manifest["folds"] == list(range(1, 11))
    assert manifest["num_samples"] == 270
    assert manifest["csv_fingerprint"] == hashlib.sha256(png_tree.csv_file.read_bytes()).hexdigest()
    assert manifest["samples_sha256"] == hashlib.sha256((png_shards / "samples.npy").read_bytes()).hexdigest()
    assert manifest["facts"] == {"modes": {"RGBA": 270}, "picture_sizes": {"100x40": 270}, "transparent_pictures": 0}
    assert (png_shards / "metadata.csv").read_bytes() == png_tree.csv_file.read_bytes()
    for entry in manifest["shards"]:
        tar = png_shards / entry["file"]
        assert tar.stat().st_size == entry["bytes"]
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == entry["sha256"]
        assert hashlib.sha256(tar.with_suffix(".idx").read_bytes()).hexdigest() == entry["index_sha256"]
        assert len(members_of(tar)) == 3 * entry["samples"]
        assert tar.parent.name == f"fold{entry['fold']:02d}"
    listed = {name for entry in manifest["shards"] for name in (entry["file"], entry["file"].replace(".tar", ".idx"))}
    assert set(content_of(png_shards)) == listed | {"manifest.json", "metadata.csv", "samples.npy"}


def test_no_path_time_or_user_is_written_down(png_shards: Path, png_tree: PngTree) -> None:
    whole = b"".join(content_of(png_shards).values())
    assert str(png_tree.csv_file.parent).encode() not in whole
    for tar in tars(png_shards):
        for info, _ in members_of(tar):
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)


def test_tars_are_what_the_standard_library_writes(png_shards: Path, rgb_shards: Path) -> None:
    for tar in (tars(png_shards)[0], tars(rgb_shards)[-1]):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for info, content in members_of(tar):
                plain = tarfile.TarInfo(info.name)
                plain.size = len(content)
                archive.addfile(plain, io.BytesIO(content))
        assert tar.read_bytes() == buffer.getvalue()


def test_index_is_what_nvidias_wds2idx_writes(png_shards: Path, rgb_shards: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    for tar in (*tars(png_shards)[:4], *tars(rgb_shards)[-2:]):
        theirs = tmp_path / "theirs.idx"
        with wds2idx.IndexCreator(str(tar), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == theirs.read_bytes()


def test_shards_stay_below_their_size(png_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    sizes = [entry["bytes"] for entry in manifest_of(png_shards)["shards"]]
    end_of_archive = tarfile.RECORDSIZE
    assert max(sizes) <= SHARD_SIZE + end_of_archive
    assert len(sizes) > 30
    few = write_tree(tmp_path / "tree", make_rows(CLASSES[:2], (1, 2)))
    pack_tree(few, tmp_path / "one_each", shard_size=1)
    assert {entry["samples"] for entry in manifest_of(tmp_path / "one_each")["shards"]} == {1}  # a sample is never cut
    pack_tree(png_tree, tmp_path / "large", shard_size=1 << 30)
    assert [entry["samples"] for entry in manifest_of(tmp_path / "large")["shards"]] == [
        27
    ] * 10  # folds never share a shard


def test_rgb_payloads_are_pillows_resize(rgb_shards: Path, png_tree: PngTree) -> None:
    samples = samples_of(rgb_shards)
    found = [
        np.load(io.BytesIO(content))
        for tar in tars(rgb_shards)
        for info, content in members_of(tar)
        if info.name.endswith(".npy")
    ]
    assert len(found) == 270
    for row, array in zip(samples["row"].tolist(), found, strict=True):
        with Image.open(png_tree.path(row)) as image:
            expected = np.asarray(
                image.convert("RGB").resize((RGB_IMAGE_SIZE, RGB_IMAGE_SIZE), Image.Resampling.BILINEAR)
            )
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, expected)
    assert manifest_of(rgb_shards)["image_size"] == RGB_IMAGE_SIZE


def test_samples_are_read_by_number(png_shards: Path, rgb_shards: Path, png_tree: PngTree) -> None:
    with ShardSet(png_shards) as png, ShardSet(rgb_shards) as rgb:
        for number in (0, 100, 269):
            path = png_tree.path(int(png.samples["row"][number]))
            assert png.payload(number).tobytes() == path.read_bytes()
            with Image.open(path) as image:
                expected = np.asarray(
                    image.convert("RGB").resize((RGB_IMAGE_SIZE, RGB_IMAGE_SIZE), Image.Resampling.BILINEAR)
                )
            np.testing.assert_array_equal(rgb.array(number), expected)


# --- the same bytes in every way to pack ---


def test_the_tool_with_three_workers_writes_the_same_bytes_as_one(
    png_shards: Path, png_tree: PngTree, tmp_path: Path
) -> None:
    done = run_tool("shard_dataset", pack_flags(png_tree, tmp_path / "shards", num_workers=3))
    assert (done.returncode, done.stderr) == (0, "")
    assert content_of(tmp_path / "shards") == content_of(png_shards)
    assert f"{tmp_path / 'shards'}: 270 samples in {len(tars(png_shards))} shards" in done.stdout


def test_a_tree_elsewhere_with_other_times_gives_the_same_bytes(
    png_shards: Path, png_tree: PngTree, tmp_path: Path
) -> None:
    moved = PngTree(tmp_path / "moved" / "data.csv", tmp_path / "moved" / "images", png_tree.rows)
    shutil.copytree(png_tree.spectrograms_dir, moved.spectrograms_dir, copy_function=shutil.copyfile)  # new times
    shutil.copyfile(png_tree.csv_file, moved.csv_file)
    pack_tree(moved, tmp_path / "shards")
    assert content_of(tmp_path / "shards") == content_of(png_shards)


def test_another_seed_gives_another_order_of_the_same_rows(png_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(png_tree, tmp_path / "shards", seed=1)
    ours, theirs = samples_of(tmp_path / "shards"), samples_of(png_shards)
    assert ours["row"].tolist() != theirs["row"].tolist()
    assert sorted(ours["row"].tolist()) == sorted(theirs["row"].tolist())
    assert ours["fold"].tolist() == theirs["fold"].tolist()


def test_packing_again_does_nothing(png_shards: Path, png_tree: PngTree) -> None:
    before = identities(png_shards)
    summary = pack_tree(png_tree, png_shards)
    assert (summary.already_complete, summary.images_packed) == (True, 0)
    assert identities(png_shards) == before


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file: both change when it is written anew."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


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
    "finished_shards", [1, 17, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 4, 9, 26, 33))]
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
    """One shard, so six files: tar, index, record, metadata, samples and manifest, each flushed and then renamed."""
    tree = write_tree(tmp_path / "tree", make_rows(CLASSES[:2], (1,)))
    pack_tree(tree, tmp_path / "promised", shard_size=PackConfig.shard_size)
    files = len(content_of(tmp_path / "promised"))
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


# --- images ---


def packing_error(tree: PngTree, output_dir: Path, **options: object) -> str:
    with pytest.raises(QuaclrsError) as caught:
        pack_tree(tree, output_dir, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (output_dir / "manifest.json").exists()
    return str(caught.value)


def test_a_missing_image_is_named_before_anything_is_written(small_tree: PngTree, tmp_path: Path) -> None:
    small_tree.path(5).unlink()
    message = packing_error(small_tree, tmp_path / "shards")
    assert message == (
        f"{small_tree.csv_file}: row 6: no image at {small_tree.path(5)} (No such file or directory); "
        "check --spectrograms_dir, restore the file, or pack with --on_error skip to leave it out"
    )
    assert not (tmp_path / "shards").exists()


def test_a_name_too_long_is_a_missing_image(small_tree: PngTree, tmp_path: Path) -> None:
    rows = [*small_tree.rows, make_row("ambulance", 1) | {"spec_file_name": "a" * 300}]
    tree = PngTree(write_csv(tmp_path / "data.csv", rows), small_tree.spectrograms_dir, rows)
    assert "row 25: no image at" in packing_error(tree, tmp_path / "shards")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    grid_image("police", 0).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda png: png[: len(png) // 2], "truncated or damaged: the end of the file is missing"),
        (lambda png: png[:50] + b"\0\0\0\0" + png[54:], "truncated or damaged"),
        (lambda png: jpeg(), "not a PNG (it looks like JPEG)"),
        (lambda png: b"", "not a PNG (the file is empty)"),
    ],
    ids=["cut", "overwritten", "jpeg", "empty"],
)
@pytest.mark.parametrize("encoding", ["png", "rgb"])
def test_a_bad_image_stops_the_packing_with_row_and_file(
    encoding: str, damage: object, reason: str, small_tree: PngTree, tmp_path: Path
) -> None:
    path = small_tree.path(7)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    message = packing_error(small_tree, tmp_path / "shards", encoding=encoding, image_size=16)
    assert message.startswith(f"row 8: {path}: {reason}")


def test_a_bad_image_in_a_worker_is_reported_by_the_tool_in_one_line(small_tree: PngTree, tmp_path: Path) -> None:
    path = small_tree.path(7)
    path.write_bytes(path.read_bytes()[:-1])
    done = run_tool("shard_dataset", pack_flags(small_tree, tmp_path / "shards", num_workers=2))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"shard_dataset.py: error: row 8: {path}: truncated or damaged: the end of the file is missing; "
        "restore the file, or pack with --on_error skip to leave it out"
    ]


def test_skip_leaves_bad_images_out_and_says_which(small_tree: PngTree, tmp_path: Path) -> None:
    rows = [2, 9, 20]
    for row, content in zip(rows, (small_tree.path(2).read_bytes()[:40], None, b"<svg/>"), strict=True):
        if content is None:
            small_tree.path(row).unlink()
        else:
            small_tree.path(row).write_bytes(content)
    summary = pack_tree(small_tree, tmp_path / "shards", on_error="skip")
    skipped = summary.manifest.skipped
    assert [row.row for row in skipped] == rows
    assert [row.file for row in skipped] == [
        f"fold{small_tree.rows[row]['fold']}/{small_tree.path(row).name}" for row in rows
    ]
    assert "the end of the file is missing" in skipped[0].reason
    assert "No such file or directory" in skipped[1].reason
    assert "HTML or SVG" in skipped[2].reason
    assert sorted(samples_of(tmp_path / "shards")["row"].tolist()) == [row for row in range(24) if row not in rows]


def test_a_manifest_with_skipped_rows_does_not_depend_on_where_the_tree_lies(
    small_tree: PngTree, tmp_path: Path
) -> None:
    small_tree.path(2).write_bytes(small_tree.path(2).read_bytes()[:16] + bytes(5000))
    small_tree.path(9).unlink()
    elsewhere = PngTree(small_tree.csv_file, tmp_path / "moved", small_tree.rows)
    shutil.copytree(small_tree.spectrograms_dir, elsewhere.spectrograms_dir)
    pack_tree(small_tree, tmp_path / "here", on_error="skip")
    pack_tree(elsewhere, tmp_path / "there", on_error="skip")
    assert content_of(tmp_path / "here") == content_of(tmp_path / "there")


def test_shards_of_nothing_but_skipped_images_are_left_out(small_tree: PngTree, tmp_path: Path) -> None:
    for row in range(24):
        if small_tree.rows[row]["fold"] == "2":
            small_tree.path(row).write_bytes(b"")
    pack_tree(small_tree, tmp_path / "shards", on_error="skip")
    assert {Path(name).parent.name for name in content_of(tmp_path / "shards")} == {"", "fold01", "fold03"}
    assert len(ShardSet(tmp_path / "shards")) == 16


def test_a_dataset_of_bad_images_only_is_refused(small_tree: PngTree, tmp_path: Path) -> None:
    for row in range(24):
        small_tree.path(row).write_bytes(b"")
    assert "not one row has a good image" in packing_error(small_tree, tmp_path / "shards", on_error="skip")


def test_shards_packed_with_skip_are_refused_where_stop_was_asked_for(small_tree: PngTree, tmp_path: Path) -> None:
    small_tree.path(2).write_bytes(b"")
    pack_tree(small_tree, tmp_path / "shards", on_error="skip")
    assert pack_tree(small_tree, tmp_path / "shards", on_error="skip").already_complete
    with pytest.raises(ShardError, match=r"was packed with --on_error skip and lacks 1 row\(s\), the first fold"):
        pack_tree(small_tree, tmp_path / "shards")


def odd_images() -> dict[str, Image.Image]:
    plain = grid_image("police", 1).convert("RGB")
    deep = np.random.default_rng(0).integers(0, 65536, (40, 100)).astype(np.uint16)
    return {"palette": plain.quantize(64), "grey": plain.convert("L"), "16bit": Image.fromarray(deep), "rgb": plain}


def odd_tree(folder: Path) -> PngTree:
    """One image of each odd mode, and one of another size."""
    images = odd_images() | {"large": grid_image("police", 2, width=130, height=60)}
    rows = [make_row("police", 1) | {"spec_file_name": f"{name}.png"} for name in images]
    tree = PngTree(write_csv(folder / "data.csv", rows), folder / "spectrograms", rows)
    (tree.spectrograms_dir / "fold1").mkdir(parents=True)
    for name, image in images.items():
        image.save(tree.spectrograms_dir / "fold1" / f"{name}.png")
    return tree


def test_palette_grey_deep_and_large_images_pack_as_they_are(tmp_path: Path) -> None:
    tree = odd_tree(tmp_path)
    pack_tree(tree, tmp_path / "shards")
    with ShardSet(tmp_path / "shards") as shards:
        facts = {}
        for number, record in enumerate(shards.samples):
            path = tree.path(int(record["row"]))
            assert shards.payload(number).tobytes() == path.read_bytes()
            facts[path.stem] = (int(record["width"]), int(record["height"]), bool(record["flags"] & FLAG_NOT_PLAIN))
    assert facts == {
        "palette": (100, 40, True),
        "grey": (100, 40, True),
        "16bit": (100, 40, True),
        "rgb": (100, 40, False),
        "large": (130, 60, False),
    }
    assert manifest_of(tmp_path / "shards")["facts"] == {
        "modes": {"I;16": 1, "L": 1, "P": 1, "RGB": 1, "RGBA": 1},
        "picture_sizes": {"100x40": 4, "130x60": 1},
        "transparent_pictures": 0,
    }


def test_palette_grey_deep_and_large_images_become_rgb_as_pillow_converts(tmp_path: Path) -> None:
    tree = odd_tree(tmp_path)
    pack_tree(tree, tmp_path / "shards", encoding="rgb", image_size=24)
    with ShardSet(tmp_path / "shards") as shards:
        for number, row in enumerate(shards.samples["row"].tolist()):
            expected = resized_by_pillow(tree.path(row), 24)
            np.testing.assert_array_equal(shards.array(number), expected)


# --- CSVs ---


@pytest.mark.parametrize("folds", [(1,), (2, 7), (4, 12)])
def test_any_folds_pack(folds: tuple[int, ...], tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(CLASSES[:2], folds))
    pack_tree(tree, tmp_path / "shards")
    manifest = manifest_of(tmp_path / "shards")
    assert manifest["folds"] == list(folds)
    assert [entry["file"] for entry in manifest["shards"]] == [
        f"fold{fold:02d}/fold{fold:02d}-000000.tar" for fold in folds
    ]


def test_the_largest_fold_number_packs(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", [make_row("police", 9999)])
    pack_tree(tree, tmp_path / "shards")
    assert samples_of(tmp_path / "shards")["fold"].tolist() == [9999]


def test_other_columns_and_flat_folders(tmp_path: Path) -> None:
    rows = [{"part": str(1 + i % 2), "genre": "rock" if i < 2 else "jazz", "path": f"sub/{i}.png"} for i in range(4)]
    tree = PngTree(write_csv(tmp_path / "music.csv", rows), tmp_path / "images", rows)
    (tree.spectrograms_dir / "sub").mkdir(parents=True)
    for i in range(4):
        grid_image("police", i).save(tree.spectrograms_dir / f"sub/{i}.png")
    flags = pack_flags(tree, tmp_path / "shards", file_column="path", label_column="genre", fold_column="part")
    assert call_tool("shard_dataset", flags) == 0
    with ShardSet(tmp_path / "shards") as shards:
        assert shards.manifest.classes == ("jazz", "rock")
        assert shards.metadata().columns == Columns(file="path", label="genre", fold="part")
        for number, row in enumerate(shards.samples["row"].tolist()):
            assert shards.payload(number).tobytes() == (tree.spectrograms_dir / rows[row]["path"]).read_bytes()
            assert shards.manifest.classes[shards.samples["label"][number]] == rows[row]["genre"]


def test_a_bad_csv_is_refused_by_the_tool_with_exit_code_2(
    small_tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(small_tree.csv_file, [*small_tree.rows, make_row("police", 0)])
    assert call_tool("shard_dataset", pack_flags(small_tree, tmp_path / "shards")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(
        f"shard_dataset.py: error: {small_tree.csv_file}: row 25: column 'fold' is '0', not a whole number"
    )
    assert not (tmp_path / "shards").exists()


# --- an output folder that holds something else ---


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"encoding": "rgb"}, "another --encoding (encoding: png, now rgb)"),
        ({"seed": 5}, "another --seed (seed: 0, now 5)"),
        ({"shard_size": 4096}, "another --shard_size (shard_size: 32768, now 4096)"),
        ({"columns": Columns(label="fsID")}, "other columns ("),
    ],
)
def test_other_settings_are_refused_and_the_shards_left_alone(
    options: dict[str, object], what: str, small_tree: PngTree, tmp_path: Path
) -> None:
    pack_tree(small_tree, tmp_path / "shards")
    before = identities(tmp_path / "shards")
    with pytest.raises(ShardError) as caught:
        pack_tree(small_tree, tmp_path / "shards", **options)
    assert str(caught.value).startswith(f"{tmp_path / 'shards'}: holds shards made from {what}")
    assert str(caught.value).endswith("choose another folder, or delete this one to pack anew")
    assert identities(tmp_path / "shards") == before  # nor any lock or other trace of the refused packing


def test_another_image_size_is_refused(small_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(small_tree, tmp_path / "shards", encoding="rgb", image_size=16)
    with pytest.raises(ShardError, match=r"another --image_size \(image_size: 16, now 32\)"):
        pack_tree(small_tree, tmp_path / "shards", encoding="rgb", image_size=32)


def test_an_image_that_grows_while_packing_is_noticed(
    small_tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free space is measured between planning, which notes the sizes, and reading."""
    path, measure = small_tree.path(7), shutil.disk_usage

    def grow_then_measure(folder: Path) -> object:
        path.write_bytes(path.read_bytes() + b"more")
        return measure(folder)

    monkeypatch.setattr(shutil, "disk_usage", grow_then_measure)
    size = path.stat().st_size
    message = packing_error(small_tree, tmp_path / "shards")
    assert message.startswith(
        f"row 8: {path}: has {size + 4} bytes, a moment ago {size}; let nobody write to it while packing"
    )


def test_another_csv_is_refused(small_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(small_tree, tmp_path / "shards")
    rows = small_tree.rows[1:]
    other = PngTree(write_csv(tmp_path / "other.csv", rows), small_tree.spectrograms_dir, rows)
    with pytest.raises(ShardError, match="holds shards made from another CSV"):
        pack_tree(other, tmp_path / "shards")


def test_changed_images_are_noticed(small_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(small_tree, tmp_path / "shards")
    grid_image("police", 99).save(small_tree.path(3))
    with pytest.raises(ShardError, match="holds shards made from images that have changed since"):
        pack_tree(small_tree, tmp_path / "shards")


def test_something_that_is_no_manifest_is_refused(small_tree: PngTree, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match=r"manifest\.json: not a manifest of quaclrs-shards"):
        pack_tree(small_tree, tmp_path / "shards")


# --- disks ---


def run_with_file_limit(limit_bytes: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run where no file may grow beyond ``limit_bytes``: a program sees that as a full disk."""
    script = (
        "import os, resource, sys; n = int(sys.argv[1]); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"
    )
    command = [sys.executable, "-c", script, str(limit_bytes), *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_full_disk_stops_with_one_line_and_keeps_what_is_finished(
    num_workers: int, small_tree: PngTree, tmp_path: Path
) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    large = next(row for row in range(24) if small_tree.rows[row]["fold"] == "3")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(small_tree.path(large))  # 120 kB, in a shard of its own
    output_dir = tmp_path / "shards"
    command = tool_command("shard_dataset", pack_flags(small_tree, output_dir, num_workers=num_workers))
    done = run_with_file_limit(100_000, command)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"shard_dataset.py: error: cannot write {output_dir}/fold03/fold03-00000")
    assert line.endswith("free some space and run the same command again; what is finished is kept")
    assert not (output_dir / "manifest.json").exists()
    assert not list(output_dir.rglob("*.tmp"))
    finished = {name: kept for name, kept in identities(output_dir).items() if name.endswith((".tar", ".idx"))}
    assert (
        num_workers > 1 or "fold01/fold01-000000.tar" in finished
    )  # two workers may both be interrupted in their first shard
    pack_tree(small_tree, output_dir)
    assert finished.items() <= identities(output_dir).items()
    pack_tree(small_tree, tmp_path / "fresh")
    assert content_of(output_dir) == content_of(tmp_path / "fresh")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_last_moment(
    code: int, small_tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        message = packing_error(small_tree, tmp_path / "shards")
    assert message == (
        f"cannot write {tmp_path / 'shards' / 'fold01' / 'fold01-000000.tar'}: {os.strerror(code)}; "
        "free some space and run the same command again; what is finished is kept"
    )
    assert not list((tmp_path / "shards").rglob("*.tmp"))


def test_too_little_space_is_told_before_the_work(
    small_tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    message = packing_error(small_tree, tmp_path / "shards")
    assert message.startswith(f"{tmp_path / 'shards'}: the shards need 0.00 GB and the disk has 0.00 GB free")
    assert not list((tmp_path / "shards").glob("fold*"))


def test_an_output_folder_that_cannot_be_made(
    small_tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert call_tool("shard_dataset", pack_flags(small_tree, tmp_path / "file" / "shards")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shard_dataset.py: error: cannot write {tmp_path}/file/shards")
    assert line.endswith("Not a directory; choose a folder that can be written")


def test_a_folder_that_cannot_be_written_in_the_middle_keeps_what_is_finished(
    small_tree: PngTree, tmp_path: Path
) -> None:
    output_dir = tmp_path / "shards"
    output_dir.mkdir()
    (output_dir / "fold03").write_text("in the way")
    message = packing_error(small_tree, output_dir)
    assert message.startswith(f"cannot write {output_dir}/fold03/fold03-000000.tar: ")
    finished = {name: kept for name, kept in identities(output_dir).items() if name.endswith((".tar", ".idx"))}
    assert {Path(name).parent.name for name in finished} == {"fold01", "fold02"}
    (output_dir / "fold03").unlink()
    pack_tree(small_tree, output_dir)
    assert finished.items() <= identities(output_dir).items()


def test_a_read_only_folder(small_tree: PngTree, tmp_path: Path, unprivileged: None) -> None:
    (tmp_path / "shards").mkdir(mode=0o555)
    assert packing_error(small_tree, tmp_path / "shards").endswith(
        "Permission denied; choose a folder that can be written"
    )


@pytest.fixture
def unprivileged() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to read-only folders")


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
    assert process.returncode == 2
    *others, line = stderr.splitlines()
    assert line == (
        "shard_dataset.py: error: a worker process died (killed, or out of memory?); "
        "run the same command again, with fewer --num_workers"
    )
    assert finished_shards == 0 or not others  # Python's pool may print an error when a worker dies while others start
    assert not (output_dir / "manifest.json").exists()


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


# --- what the tool says ---


def test_the_summary_names_what_a_user_must_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *make_rows(("ambulance", "dog_bark"), (1, 2)),  # two rows of dog_bark share a file in each fold
        make_row("police", 1, recording=77),
        make_row("police", 2, recording=77),  # a recording in two folds
        make_row("traffic", 1, recording=88),
        make_row("traffic", 1, recording=88) | {"class": "police"},  # one file, two classes
    ]
    tree = write_tree(tmp_path / "tree", rows)
    clear = grid_image("police", 5)
    clear.putpixel((0, 0), (1, 2, 3, 0))
    clear.save(tree.path(len(rows) - 4))
    bad = next(i for i, row in enumerate(rows) if row["class"] == "ambulance")
    tree.path(bad).write_bytes(b"GIF89a")
    named = f"row {bad + 1}: fold{rows[bad]['fold']}/{tree.path(bad).name}"
    assert call_tool("shard_dataset", pack_flags(tree, tmp_path / "shards", on_error="skip")) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert [line.split() for line in lines[:6]] == [
        ["fold1", "fold2", "total"],
        ["ambulance", "2", "2", "4"],
        ["dog_bark", "3", "3", "6"],
        ["police", "2", "1", "3"],
        ["traffic", "1", "0", "1"],
        ["total", "8", "6", "14"],
    ]
    text = "\n".join(lines[6:])
    assert "images: size 100x40 (13); mode RGBA (13)" in text
    assert "note: 1 image(s) have real transparency; training drops it" in text
    assert "note: 6 rows share their image with another row" in text
    assert f"warning: 1 image(s) carry rows of different classes: fold1/{rows[-1]['spec_file_name']}" in text
    assert (
        "warning: 1 recording(s) (fsID) lie in more than one fold, which leaks training data into the test: 77" in text
    )
    assert "warning: classID disagrees with the sorted class names in" in text
    assert f"warning: 1 row(s) were skipped: {named}: not a PNG (it looks like GIF)" in text
    size = sum(tar.stat().st_size for tar in tars(tmp_path / "shards"))
    assert (
        f"{tmp_path / 'shards'}: 13 samples in 2 shards, {size / 1e6:.1f} MB, encoding png; packed 14 images in "
        in text
    )


def test_the_summary_of_a_clean_tree_warns_of_nothing(
    png_tree: PngTree, png_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_tool("shard_dataset", pack_flags(png_tree, png_shards)) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.out
    assert "note: 20 rows share their image with another row; each row is one sample" in printed.out
    assert f"{png_shards}: already packed from this CSV and these settings; nothing to do" in printed.out
    assert printed.err == ""


def test_flags_take_hyphens(small_tree: PngTree, tmp_path: Path) -> None:
    flags = [
        flag.replace("_", "-") if flag.startswith("--") else flag
        for flag in pack_flags(small_tree, tmp_path / "shards")
    ]
    assert call_tool("shard_dataset", flags) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000000", 10**6),
        ("256MiB", 256 * 2**20),
        ("256mib", 256 * 2**20),
        ("256Mi", 256 * 2**20),
        ("1GB", 10**9),
        ("1.5 kB", 1500),
        ("2K", 2000),
        (" 3GiB ", 3 * 2**30),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e6", "1TB", "1 2", "1iB", "0x10", "1,5MB", "1MiBs"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f"--shard_size {text!r}: not a size; write for example 256MiB or 1GB"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"encoding": "jpeg"}, "--encoding jpeg: choose one of png, "),
        ({"image_size": 0}, "--image_size 0: choose 1 to 4096 pixels"),
        ({"image_size": 5000}, "--image_size 5000: choose 1 to 4096 pixels"),
        ({"shard_size": "0"}, "--shard_size 0: at least 1 byte"),
        ({"shard_size": "big"}, "--shard_size 'big': not a size"),
        ({"seed": -1}, "--seed -1: not negative"),
        ({"num_workers": 0}, "--num_workers 0: at least 1"),
        ({"on_error": "ignore"}, "--on_error ignore: choose one of stop, skip"),
    ],
)
def test_a_flag_that_cannot_work_is_named(
    flags: dict[str, object], message: str, png_tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_tool("shard_dataset", pack_flags(png_tree, tmp_path / "shards", **flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shard_dataset.py: error: {message}")
    assert not (tmp_path / "shards").exists()
