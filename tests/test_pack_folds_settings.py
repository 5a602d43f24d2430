"""Contract of ``--folds``: which settings jobs may have, and what the user sees of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from packing import (
    JOB_FOLDS,
    JOB_SETTINGS,
    call_tool,
    content_of,
    job_flags,
    manifest_of,
    pack_folds,
    pack_tree,
    rows_of,
)
from png_trees import PngTree, make_rows, write_csv, write_tree

from quaclrs.config import Columns, PackConfig, folds_text, parse_folds
from quaclrs.errors import DataError, ShardError, StorageError, UsageError
from quaclrs.shards.packing.pack import pack
from quaclrs.shards.reader import ShardSet


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """24 images in three folds, one row each. Read only."""
    return write_tree(
        tmp_path_factory.mktemp("tree"), make_rows(("ambulance", "car_horn", "police", "traffic"), JOB_FOLDS)
    )


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """12 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(("ambulance", "police"), JOB_FOLDS))


# --- settings ---


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"encoding": "png"}, "another --encoding (encoding: rgb, now png)"),
        ({"image_size": 32}, "another --image_size (image_size: 16, now 32)"),
        ({"seed": 5}, "another --seed (seed: 0, now 5)"),
        ({"shard_size": 9999}, "another --shard_size (shard_size: 4096, now 9999)"),
        ({"columns": Columns(label="fsID")}, "other columns (columns: {"),
    ],
)
@pytest.mark.parametrize("folds", [(2,), None])
def test_other_settings_than_those_of_finished_jobs_are_refused(
    folds: tuple[int, ...] | None, options: dict[str, Any], what: str, tree: PngTree, tmp_path: Path
) -> None:
    pack_folds(tree, tmp_path / "shards", 1, encoding="rgb")
    before = {name: content for name, content in content_of(tmp_path / "shards").items() if not name.endswith(".claim")}
    with pytest.raises(ShardError) as caught:
        pack_tree(tree, tmp_path / "shards", **({"folds": folds, "encoding": "rgb"} | JOB_SETTINGS | options))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'shards'}: jobs with --folds pack here from {what}")
    assert message.endswith("; go on as they do, choose another folder, or delete this one to pack anew")
    after = {name: content for name, content in content_of(tmp_path / "shards").items() if not name.endswith(".claim")}
    assert after == before


def test_another_csv_and_another_kind_of_source_are_refused(tree: PngTree, tmp_path: Path) -> None:
    pack_tree(tree, tmp_path / "png", **JOB_SETTINGS)
    pack_folds(tree, tmp_path / "shards", 1)
    other = PngTree(write_csv(tmp_path / "other.csv", tree.rows[1:]), tree.spectrograms_dir, tree.rows[1:])
    with pytest.raises(ShardError, match=r"jobs with --folds pack here from another CSV; go on"):
        pack_folds(other, tmp_path / "shards", 2)
    with pytest.raises(ShardError, match=r"from another kind of source \(from_shards: False, now True\)"):
        pack(
            PackConfig(
                from_shards=tmp_path / "png", output_dir=tmp_path / "shards", folds=(2,), num_workers=1, **JOB_SETTINGS
            )
        )


def test_a_first_pass_is_finished_work_too(tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise DataError("stopped between the passes")

    with monkeypatch.context() as patch:
        patch.setattr("quaclrs.shards.packing.pack.write_shared_shard", stop)
        with pytest.raises(DataError, match="stopped between the passes"):
            pack_folds(tree, tmp_path / "shards", 1, encoding="indexed")
    with pytest.raises(ShardError, match=r"another --encoding \(encoding: indexed, now png\)"):
        pack_tree(tree, tmp_path / "shards", **JOB_SETTINGS)


@pytest.mark.parametrize("folds", [(2,), None])
def test_a_job_that_finished_nothing_fixes_no_settings(
    folds: tuple[int, ...] | None, small_tree: PngTree, tmp_path: Path
) -> None:
    path = small_tree.path(rows_of(small_tree, 1)[0])
    good = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        pack_folds(small_tree, tmp_path / "shards", 1, encoding="rgb", shard_size=1 << 20)
    path.write_bytes(good)
    assert pack_tree(small_tree, tmp_path / "shards", folds=folds, **JOB_SETTINGS).missing_folds == (
        (1, 3) if folds else ()
    )


def test_jobs_fix_the_settings_also_after_a_failed_whole_packing(small_tree: PngTree, tmp_path: Path) -> None:
    pack_folds(small_tree, tmp_path / "shards", 1)
    small_tree.path(rows_of(small_tree, 3)[-1]).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        pack_tree(small_tree, tmp_path / "shards", **JOB_SETTINGS)
    with pytest.raises(ShardError, match=r"jobs with --folds pack here from another --seed \(seed: 0, now 1\)"):
        pack_tree(small_tree, tmp_path / "shards", **JOB_SETTINGS, seed=1)


def test_the_work_of_a_whole_packing_is_not_taken_for_that_of_jobs(small_tree: PngTree, tmp_path: Path) -> None:
    """A packing of all folds fails, then a job with other settings that finishes nothing: the first may continue."""
    bad = small_tree.path(rows_of(small_tree, 3)[0])
    good = bad.read_bytes()
    bad.write_bytes(b"")
    for options in ({}, {"folds": (3,), "encoding": "rgb", "shard_size": 1 << 20}):
        with pytest.raises(DataError, match="the file is empty"):
            pack_tree(small_tree, tmp_path / "shards", **(JOB_SETTINGS | options))
    assert not list((tmp_path / "shards").glob("fold*/*"))  # neither finds shards of the other
    bad.write_bytes(good)
    pack_tree(small_tree, tmp_path / "shards", **JOB_SETTINGS)


def test_work_of_a_stopped_whole_packing_is_deleted(small_tree: PngTree, tmp_path: Path) -> None:
    """The shards of other settings are deleted, and none of them gets into the new folder."""
    output_dir = tmp_path / "shards"
    obstacle = output_dir / "manifest.json"
    obstacle.mkdir(parents=True)
    with pytest.raises(StorageError):
        pack_tree(small_tree, output_dir, shard_size=1)  # many more shards than next time
    obstacle.rmdir()
    for fold in JOB_FOLDS:
        pack_folds(small_tree, output_dir, fold)
    pack_tree(small_tree, tmp_path / "fresh", **JOB_SETTINGS)
    assert content_of(output_dir) == content_of(tmp_path / "fresh")


def test_a_finished_folder_answers_every_job(tree: PngTree, tmp_path: Path) -> None:
    pack_folds(tree, tmp_path / "shards", *JOB_FOLDS)
    before = content_of(tmp_path / "shards")
    summary = pack_folds(tree, tmp_path / "shards", 2)
    assert (summary.already_complete, summary.images_packed, summary.missing_folds) == (True, 0, ())
    with pytest.raises(ShardError, match=r"holds shards made from another --seed \(seed: 0, now 1\)"):
        pack_folds(tree, tmp_path / "shards", 2, seed=1)
    (tmp_path / "shards" / ".packing").mkdir()  # killed while it deleted the folder
    shutil.copyfile(tmp_path / "shards" / "manifest.json", tmp_path / "shards" / ".packing" / "fold01-000000.seen")
    with pytest.raises(ShardError, match=r"holds shards made from another --seed"):
        pack_folds(tree, tmp_path / "shards", 2, seed=1)
    assert content_of(tmp_path / "shards") == before


# --- what the user sees ---


def test_a_job_says_what_is_missing_and_the_last_one_how_it_ended(
    tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "shards"
    assert call_tool("shard_dataset", job_flags(tree, output_dir, folds="2")) == 0
    *_, packed, missing = capsys.readouterr().out.splitlines()
    assert packed.startswith(f"{output_dir}: 8 samples in ")
    assert "encoding png; packed 8 images in " in packed
    assert (
        missing
        == f"{output_dir}: fold(s) 1,3 are not there yet; the call that finds all folds there writes the manifest"
    )
    assert call_tool("inspect_shards", ["info", str(output_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"inspect_shards.py: error: {output_dir}/manifest.json: no such file (a packing was begun here: run "
        "quaclrs-pack again "
        "to finish it, if it is not running; fold(s) 1,3 are missing); make shards with quaclrs-pack"
    )
    with pytest.raises(ShardError, match=r"fold\(s\) 1,3 are missing"):
        ShardSet(output_dir)
    assert call_tool("shard_dataset", job_flags(tree, output_dir, folds="1,3")) == 0
    printed = capsys.readouterr().out
    assert f"{output_dir}: 24 samples in " in printed
    assert "packed 16 images in " in printed
    assert "not there yet" not in printed
    assert manifest_of(output_dir)["folds"] == [1, 2, 3]


def test_a_fold_half_packed_is_a_missing_one(small_tree: PngTree, tmp_path: Path) -> None:
    small_tree.path(rows_of(small_tree, 2)[-1]).write_bytes(b"")
    pack_folds(small_tree, tmp_path / "shards", 3)
    with pytest.raises(DataError):
        pack_folds(small_tree, tmp_path / "shards", 1, 2, shard_size=4096)
    assert list((tmp_path / "shards" / "fold02").glob("*.tar"))
    with pytest.raises(ShardError, match=r"fold\(s\) 2 are missing"):
        ShardSet(tmp_path / "shards")


def test_space_is_needed_for_the_own_folds_only(tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = sum(
        tree.path(row).stat().st_size + 4096 for row in rows_of(tree, 1)
    )  # 4 kB for the other members and the headers
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.raises(StorageError, match=r"the shards need 0\.00 GB and the disk has 0\.00 GB free"):
        pack_tree(tree, tmp_path / "shards", **JOB_SETTINGS)
    for fold in JOB_FOLDS:
        pack_folds(tree, tmp_path / "shards", fold)
    assert (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize("text", ["", " ", "one", "1,,2", "1;2", "-1", "3-1", "1-", "1.5", "1-2-3", "12345", "²"])
def test_what_is_not_a_list_of_folds(
    text: str, tree: PngTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_tool("shard_dataset", [*job_flags(tree, tmp_path / "shards"), f"--folds={text}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"shard_dataset.py: error: --folds {text!r}: not a list of folds; write for example 3 or 1,2 or 1-3,7"
    )
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ((4,), "--folds 4: {csv} has no fold 4; choose among 1-3"),
        ((7, 1, 9), "--folds 1,7,9: {csv} has no fold 7,9; choose among 1-3"),
        ((1, 2, 1), "--folds 1,2,1: names fold 1 twice; name each fold once"),
        ((0,), "--folds 0: folds count from 1"),
        ((), "--folds: names no fold; write for example 3 or 1,2 or 1-3,7"),
    ],
)
def test_folds_that_cannot_be(folds: tuple[int, ...], message: str, tree: PngTree, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pack_folds(tree, tmp_path / "shards", *folds)
    assert str(caught.value) == message.format(csv=tree.csv_file)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("text", "folds", "short"),
    [
        ("3", (3,), "3"),
        ("1,2", (1, 2), "1,2"),
        (" 1-3 , 7", (1, 2, 3, 7), "1-3,7"),
        ("9,1-2,8-8,10", (9, 1, 2, 8, 10), "1,2,8-10"),
    ],
)
def test_lists_of_folds(text: str, folds: tuple[int, ...], short: str) -> None:
    assert parse_folds(text) == folds
    assert folds_text(folds) == short
    assert parse_folds(short) == tuple(sorted(folds))
