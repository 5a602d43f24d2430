"""Contract of packing: what happens with odd and bad images, and with CSVs of other shapes."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from packing import (
    call_tool,
    content_of,
    manifest_of,
    pack_flags,
    pack_tree,
    packing_error,
    resized_by_pillow,
    run_tool,
    samples_of,
)
from PIL import Image
from png_trees import CLASSES, PngTree, grid_image, make_row, make_rows, write_csv, write_tree

from quaclrs.config import Columns
from quaclrs.errors import ShardError
from quaclrs.imaging.png import resize_rgb
from quaclrs.shards.format import FLAG_NOT_PLAIN
from quaclrs.shards.reader import ShardSet


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """24 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(CLASSES[:4], (1, 2, 3)))


# --- images ---


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


@pytest.mark.parametrize("encoding", ["png", "rgb", "indexed"])
def test_the_summary_says_how_16_bit_images_are_rendered(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path, [make_row(label, fold) for label in CLASSES[:2] for fold in (1, 2)])
    flags = pack_flags(tree, tmp_path / "plain", encoding=encoding, image_size=16)
    assert call_tool("shard_dataset", flags) == 0
    assert "16 bits" not in capsys.readouterr().out
    for row in (0, 3):
        grey = np.asarray(grid_image(tree.rows[row]["class"], row).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 150 + 300).save(tree.path(row))
    flags = pack_flags(tree, tmp_path / "deep", encoding=encoding, image_size=16)
    for _ in range(2):  # also where nothing is left to do
        assert call_tool("shard_dataset", flags) == 0
        assert "note: 2 image(s) have 16 bits per channel; values are rendered as value >> 8" in (
            capsys.readouterr().out
        )
    with ShardSet(tmp_path / "deep") as shards:
        for number, row in enumerate(shards.samples["row"].tolist()):
            expected = resized_by_pillow(tree.path(row), 16)
            found = resize_rgb(Image.fromarray(shards.image(number)), 16)
            np.testing.assert_array_equal(found, expected)


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
