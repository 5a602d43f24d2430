"""Contract of opening and exporting shards, and of the inspecting tool: export restores the original files."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import RGB_IMAGE_SIZE
from packing import call_tool, content_of, pack_tree, run_tool
from PIL import Image
from png_trees import CLASSES, PngTree, grid_image, make_row, make_rows, write_csv, write_tree

from quaclrs.errors import DataError, ShardError, StorageError
from quaclrs.shards.format import FORMAT_VERSION
from quaclrs.shards.reader import ShardSet
from quaclrs.shards.verify import export, verify

TAR = "fold02/fold02-000001.tar"


@pytest.fixture
def copy(png_shards: Path, tmp_path: Path) -> Path:
    """Good shards; tests may damage them."""
    return Path(shutil.copytree(png_shards, tmp_path / "shards"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- opening ---


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as caught:
        ShardSet(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds no shards (manifest.json is missing); make shards with quaclrs-pack"
    with pytest.raises(ShardError) as caught:
        ShardSet(tmp_path / "nowhere")
    assert str(caught.value) == f"{tmp_path / 'nowhere' / 'manifest.json'}: no such file; make shards with quaclrs-pack"


def test_what_is_no_shard_folder_is_called_what_it_is(png_tree: PngTree, png_shards: Path, tmp_path: Path) -> None:
    def said(root: Path) -> str:
        with pytest.raises(ShardError) as caught:
            ShardSet(root)
        return str(caught.value)

    for root in (png_tree.csv_file.parent, png_tree.spectrograms_dir, png_tree.path(0).parent):
        assert said(root) == (
            f"{root}: holds PNGs, not shards; give --csv_file and --spectrograms_dir, or pack it with quaclrs-pack and "
            "name the folder that this writes"
        )
    file = png_shards / "manifest.json"
    assert said(file) == f"{file}: is a file; name the folder of shards that holds manifest.json"
    shutil.copytree(png_shards, tmp_path / "shards")
    assert said(tmp_path).endswith(f"name the folder in it that does, such as {tmp_path / 'shards'}")
    (tmp_path / "shards" / "manifest.json").unlink()
    assert "no such file, beside tars that may be shards; restore it, or pack anew" in said(tmp_path / "shards")
    (tmp_path / "shards" / ".packing").mkdir()
    assert "no such file (a packing was begun here: run quaclrs-pack again" in said(tmp_path / "shards")


def test_shards_travel_to_worker_processes(png_shards: Path) -> None:
    with ShardSet(png_shards) as shards:
        first = shards.payload(0).tobytes()  # the tar is mapped now, and maps cannot be pickled
        with pickle.loads(pickle.dumps(shards)) as travelled:
            assert travelled.payload(0).tobytes() == first


def test_arrays_outlive_their_shards(rgb_shards: Path) -> None:
    with ShardSet(rgb_shards) as shards:
        array = shards.array(5)
        before = array.copy()
    np.testing.assert_array_equal(array, before)


def test_payloads_cannot_be_written_to(png_shards: Path) -> None:
    with ShardSet(png_shards) as shards:
        payload = shards.payload(0)
        with pytest.raises(ValueError, match="read-only"):
            payload[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            shards.samples["row"][0] = 1


# --- export ---


def test_export_restores_the_tree_byte_for_byte(png_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    assert export(png_shards, tmp_path / "out") == 261  # 260 images, which 270 rows name, and the CSV
    assert content_of(tmp_path / "out") == content_of(png_tree.csv_file.parent)


def test_exported_trees_pack_into_the_same_shards(png_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    export(png_shards, tmp_path / "out")
    pack_tree(
        PngTree(tmp_path / "out" / "data.csv", tmp_path / "out" / "spectrograms", png_tree.rows), tmp_path / "shards"
    )
    assert content_of(tmp_path / "shards") == content_of(png_shards)


def test_export_of_rgb_gives_pillows_resize(rgb_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    assert export(rgb_shards, tmp_path / "out") == 261
    for row in range(0, 270, 7):
        with Image.open(png_tree.path(row)) as image:
            expected = np.asarray(
                image.convert("RGB").resize((RGB_IMAGE_SIZE, RGB_IMAGE_SIZE), Image.Resampling.BILINEAR)
            )
        with Image.open(tmp_path / "out" / png_tree.path(row).relative_to(png_tree.csv_file.parent)) as restored:
            assert (restored.format, restored.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(restored), expected)
    assert (tmp_path / "out" / "data.csv").read_bytes() == png_tree.csv_file.read_bytes()


@pytest.mark.parametrize("encoding", ["png", "rgb"])
def test_export_into_what_is_there_already(encoding: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    shards = request.getfixturevalue(f"{encoding}_shards")
    export(shards, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert export(shards, tmp_path / "out") == 0  # equal files are left alone
    changed = next((tmp_path / "out" / "spectrograms" / "fold3").iterdir())
    changed.write_bytes(b"something of the user's")
    with pytest.raises(DataError) as caught:
        export(shards, tmp_path / "out")
    assert str(caught.value) == f"{changed}: exists with other content; export into an empty folder"
    assert changed.read_bytes() == b"something of the user's"
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_export_refuses_to_replace_another_csv(png_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("mine")
    with pytest.raises(DataError, match=r"data\.csv: exists with other content"):
        export(png_shards, tmp_path)
    assert (tmp_path / "data.csv").read_text() == "mine"


def test_export_of_what_was_skipped(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(CLASSES[:2], (1,)))
    tree.path(0).write_bytes(b"")
    pack_tree(tree, tmp_path / "shards", on_error="skip")
    assert export(tmp_path / "shards", tmp_path / "out") == 4
    tree.path(0).unlink()
    assert content_of(tmp_path / "out") == content_of(tmp_path / "tree")


def test_export_to_a_place_that_cannot_be_written(png_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose a folder that can be written"):
        export(png_shards, tmp_path / "file")


# --- the tool ---


@dataclass(frozen=True)
class Printed:
    code: int
    out: str
    err: str


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    def call(*arguments: object) -> Printed:
        code = call_tool("inspect_shards", [str(argument) for argument in arguments])
        return Printed(code, *capsys.readouterr())

    return call


def test_info(png_shards: Path, png_tree: PngTree, inspect: Callable[..., Printed]) -> None:
    printed = inspect("info", png_shards)
    assert (printed.code, printed.err) == (0, "")
    lines = printed.out.splitlines()
    assert lines[0] == f"{png_shards}: quaclrs-shards version {FORMAT_VERSION}, encoding png, seed 0"
    kept = sum(path.stat().st_size for path in map(png_tree.path, range(270))) / 270 / 1e3
    assert lines[1].startswith("samples 270, shards ")
    assert lines[1].endswith(f"{kept:.1f} kB per image")
    assert f"packed from data.csv (SHA-256 {sha256(png_tree.csv_file)[:16]}…)" in lines[2]
    assert lines[4].split() == ["air_conditioner", *["2"] * 10, "20"]
    assert lines[8].split() == ["dog_bark", *["3"] * 10, "30"]
    assert lines[17].split() == ["total", *["27"] * 10, "270"]
    assert "images: size 100x40 (270); mode RGBA (270)" in lines
    assert "note: 20 rows share their image with another row; each row is one sample" in lines


def test_info_of_rgb_names_the_size(rgb_shards: Path, inspect: Callable[..., Printed]) -> None:
    assert ", encoding rgb, 32x32, seed 0\n" in inspect("info", rgb_shards).out


def test_info_warns_of_leakage(tmp_path: Path, inspect: Callable[..., Printed]) -> None:
    tree = write_tree(tmp_path / "tree", [make_row("police", fold, recording=7) for fold in (1, 2)])
    pack_tree(tree, tmp_path / "shards")
    assert "warning: 1 recording(s) (fsID) lie in more than one fold" in inspect("info", tmp_path / "shards").out


def test_the_tool_as_a_process(png_shards: Path) -> None:
    verified = run_tool("inspect_shards", ["verify", str(png_shards)])
    assert (verified.returncode, verified.stderr) == (0, "")
    assert verified.stdout == f"{png_shards}: all promises kept by 270 samples\n"


def test_the_tool_exports(png_shards: Path, png_tree: PngTree, tmp_path: Path, inspect: Callable[..., Printed]) -> None:
    printed = inspect("export", png_shards, tmp_path / "out")
    assert printed == Printed(0, f"{tmp_path / 'out'}: 261 files written\n", "")
    assert content_of(tmp_path / "out") == content_of(png_tree.csv_file.parent)


@pytest.mark.parametrize("action", ["info", "verify", "export"])
def test_damage_is_one_line_and_exit_code_2(
    action: str, copy: Path, tmp_path: Path, inspect: Callable[..., Printed]
) -> None:
    (copy / TAR).unlink()
    printed = inspect(action, copy, *([tmp_path / "out"] if action == "export" else []))
    assert (printed.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line == f"inspect_shards.py: error: {copy / TAR}: missing; restore it or pack the shards anew"


def test_an_unknown_action_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call_tool("inspect_shards", ["destroy", "shards"])
    assert caught.value.code == 2
    assert "destroy" in capsys.readouterr().err


def test_shards_of_other_columns_verify_and_export(tmp_path: Path) -> None:
    from quaclrs.config import Columns

    rows = [{"part": "1", "genre": "rock", "path": "a/b.png"}, {"part": "2", "genre": "jazz", "path": "c.png"}]
    tree = PngTree(write_csv(tmp_path / "tree.csv", rows), tmp_path / "images", rows)
    for row in rows:
        path = tree.spectrograms_dir / f"fold{row['part']}" / row["path"]
        path.parent.mkdir(parents=True)
        grid_image("police", 1).save(path)
    pack_tree(tree, tmp_path / "shards", columns=Columns(file="path", label="genre", fold="part"))
    assert verify(tmp_path / "shards") == 2
    export(tmp_path / "shards", tmp_path / "out")
    assert content_of(tmp_path / "out" / "spectrograms") == content_of(tree.spectrograms_dir)
