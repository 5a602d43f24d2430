"""Contract of packing: an output folder with other content, and disks that are full or read-only."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import (
    TIMEOUT_S,
    call_tool,
    content_of,
    identities,
    pack_flags,
    pack_tree,
    packing_error,
    tool_command,
)
from PIL import Image
from png_trees import CLASSES, PngTree, grid_image, make_rows, write_csv, write_tree

from quaclrs.config import Columns, TrainConfig
from quaclrs.errors import ShardError
from quaclrs.loaders.dataset import open_dataset
from quaclrs.shards.packing.write_shard import SampleSource, read_source


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """24 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(CLASSES[:4], (1, 2, 3)))


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


ENCODINGS = ["png", "rgb", "indexed"]


def redraw(path: Path) -> None:
    """Other pixels, but the same size in bytes, and a later time."""
    before = path.stat()
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA")).copy()
    pixels[:4, :4, 0] ^= 128
    Image.fromarray(pixels).save(path, compress_level=0)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(1, before.st_mtime_ns + 1))


@pytest.fixture
def plain_tree(small_tree: PngTree) -> PngTree:
    """Images whose size in bytes follows from their shape alone, as fast writers make them."""
    for row in range(len(small_tree.rows)):
        with Image.open(small_tree.path(row)) as image:
            image.copy().save(small_tree.path(row), compress_level=0)
    return small_tree


def named(tree: PngTree, row: int) -> str:
    return f"fold{tree.rows[row]['fold']}/{tree.path(row).name}"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_changed_image_of_the_same_size_is_named(encoding: str, plain_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(plain_tree, tmp_path / "shards", encoding=encoding, image_size=16)
    before = content_of(tmp_path / "shards")
    redraw(plain_tree.path(3))
    for _ in range(2):
        with pytest.raises(ShardError) as caught:
            pack_tree(plain_tree, tmp_path / "shards", encoding=encoding, image_size=16)
        assert str(caught.value) == (
            f"{tmp_path / 'shards'}: holds shards made from images that have changed since, the first "
            f"{named(plain_tree, 3)}; choose another folder, or delete this one to pack anew"
        )
    assert content_of(tmp_path / "shards") == before


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_touched_image_is_compared_once_and_packs_nothing(
    encoding: str, plain_tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def count_and_read(source: SampleSource) -> bytes:
        read.append(source.file)
        return read_source(source)

    monkeypatch.setattr("quaclrs.shards.packing.changed_sources.read_source", count_and_read)
    options: dict[str, Any] = {"encoding": encoding, "image_size": 16}
    pack_tree(plain_tree, tmp_path / "shards", **options)
    before = content_of(tmp_path / "shards")
    assert pack_tree(plain_tree, tmp_path / "shards", **options).already_complete
    assert read == []  # an untouched tree is not read
    os.utime(plain_tree.path(5), ns=(1, 1))
    for _ in range(2):
        assert pack_tree(plain_tree, tmp_path / "shards", **options).already_complete
        assert read == [named(plain_tree, 5)]
    (tmp_path / "shards" / "sources.json").unlink()  # as in shards of earlier versions
    for _ in range(2):
        assert pack_tree(plain_tree, tmp_path / "shards", **options).already_complete
        assert len(read) == 1 + len(plain_tree.rows)
    assert content_of(tmp_path / "shards") == before


@pytest.mark.parametrize("content", [b"", b"{}", b'{"shards": "of another packing", "sources": {}}', b"[1]"])
def test_any_other_sources_file_is_no_hint(content: bytes, plain_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(plain_tree, tmp_path / "shards")
    redraw(plain_tree.path(3))
    (tmp_path / "shards" / "sources.json").write_bytes(content)
    with pytest.raises(ShardError, match=f"the first {named(plain_tree, 3)};"):
        pack_tree(plain_tree, tmp_path / "shards")


def test_a_skipped_image_that_was_mended_is_named(plain_tree: PngTree, tmp_path: Path) -> None:
    good = plain_tree.path(3).read_bytes()
    plain_tree.path(3).write_bytes(good[:-20] + bytes(20))
    pack_tree(plain_tree, tmp_path / "shards", on_error="skip")
    os.utime(plain_tree.path(3), ns=(1, 1))
    assert pack_tree(plain_tree, tmp_path / "shards", on_error="skip").already_complete
    plain_tree.path(3).write_bytes(good)
    with pytest.raises(ShardError, match=f"the first {named(plain_tree, 3)};"):
        pack_tree(plain_tree, tmp_path / "shards", on_error="skip")


@pytest.mark.parametrize("change", ["other size", "damaged", "missing"])
def test_changed_images_are_noticed(change: str, small_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(small_tree, tmp_path / "shards", on_error="skip")
    if change == "other size":
        grid_image("police", 99).save(small_tree.path(3))
    elif change == "damaged":
        small_tree.path(3).write_bytes(bytes(small_tree.path(3).stat().st_size))
        os.utime(small_tree.path(3), ns=(1, 1))
    else:
        small_tree.path(3).unlink()
    with pytest.raises(ShardError, match=f"have changed since, the first {named(small_tree, 3)};"):
        pack_tree(small_tree, tmp_path / "shards", on_error="skip")


def test_images_written_anew_with_the_same_pixels_are_the_same_to_indexed(small_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(small_tree, tmp_path / "shards", encoding="indexed")
    with Image.open(small_tree.path(3)) as image:
        image.copy().save(small_tree.path(3), compress_level=0)
    assert pack_tree(small_tree, tmp_path / "shards", encoding="indexed").already_complete


def test_the_trainers_cache_notices_a_changed_image_of_the_same_size(plain_tree: PngTree) -> None:
    config = TrainConfig(csv_file=plain_tree.csv_file, spectrograms_dir=plain_tree.spectrograms_dir)
    for _ in range(2):
        open_dataset(config, want_shards=True, log=lambda text: None).close()
    redraw(plain_tree.path(3))
    with pytest.raises(ShardError, match=f"have changed since, the first {named(plain_tree, 3)};"):
        open_dataset(config, want_shards=True, log=lambda text: None)


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
