"""Contract of packing: shards that any reader understands, the same bytes in every way to pack, clear reports."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import RGB_IMAGE_SIZE, SHARD_SIZE
from packing import (
    call_tool,
    content_of,
    identities,
    manifest_of,
    members_of,
    pack_flags,
    pack_tree,
    run_tool,
    samples_of,
    tars,
)
from PIL import Image
from png_trees import CLASSES, PngTree, grid_image, make_row, make_rows, write_csv, write_tree

from quaclrs.config import TrainConfig, parse_bytes
from quaclrs.errors import UsageError
from quaclrs.loaders.dataset import open_dataset
from quaclrs.shards.format import FLAG_NOT_PLAIN, FLAG_TRANSPARENT, FORMAT_VERSION
from quaclrs.shards.reader import ShardSet


@pytest.fixture
def small_tree(tmp_path: Path) -> PngTree:
    """24 images in three folds; tests may damage them."""
    return write_tree(tmp_path / "tree", make_rows(CLASSES[:4], (1, 2, 3)))


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


def test_the_tool_with_two_workers_writes_the_same_bytes_as_one(
    png_shards: Path, png_tree: PngTree, tmp_path: Path
) -> None:
    done = run_tool("shard_dataset", pack_flags(png_tree, tmp_path / "shards", num_workers=2))
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


SHARED_BY_CLASSES = "warning: 2 image(s) carry rows of different classes: a.png, b.png"
SHARED_BY_FOLDS = (
    "warning: 2 image(s) carry rows of more than one fold, which leaks training data into the test: a.png, b.png"
)


@pytest.mark.parametrize("how", ["flat", "hard links", "symbolic links", "copies", "others"])
def test_rows_of_several_folds_and_classes_that_share_a_file(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told when packing (from the tree or from shards), inspecting, and opening the tree, its cache or shards."""
    listed = [("a", "dog", 1), ("a", "cat", 2), ("a", "dog", 3), ("b", "cat", 1), ("b", "cat", 2), ("b", "dog", 3)]
    rows = [{"spec_file_name": f"{file}.png", "class": label, "fold": str(k)} for file, label, k in listed]
    tree = PngTree(write_csv(tmp_path / "d.csv", rows), tmp_path / "spectrograms", rows)
    for row, described in enumerate(rows):
        flat, path = tree.spectrograms_dir / described["spec_file_name"], tree.path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not flat.exists():
            grid_image("police", ord(listed[row][0])).save(flat)
        if how == "hard links":
            path.hardlink_to(flat)
        elif how == "symbolic links":
            path.symlink_to(flat)
        elif how != "flat":
            grid_image("police", row if how == "others" else ord(listed[row][0])).save(path)
    said: dict[str, str] = {}
    for name, encoding in (("shards", "png"), ("rgb", "rgb"), ("indexed", "indexed")):
        assert call_tool("shard_dataset", pack_flags(tree, tmp_path / name, encoding=encoding, image_size=16)) == 0
        said[f"packing {name}"] = capsys.readouterr().out
        assert call_tool("inspect_shards", ["info", str(tmp_path / name)]) == 0
        said[f"info {name}"] = capsys.readouterr().out
        said[f"opening {name}"] = opened(TrainConfig(shards=tmp_path / name), want_shards=True)
    flags = ["--from_shards", str(tmp_path / "shards"), "--output_dir", str(tmp_path / "again"), "--num_workers", "1"]
    assert call_tool("shard_dataset", flags) == 0
    said["from_shards"] = capsys.readouterr().out
    config = TrainConfig(csv_file=tree.csv_file, spectrograms_dir=tree.spectrograms_dir)
    if how != "copies":  # two files to the tree, one image to the shards
        said["tree"] = opened(config, want_shards=False)
        said["cache"] = opened(config, want_shards=True)
    for name, text in said.items():
        if how == "copies" and name.startswith("packing"):
            continue
        expected = {"note: 6 rows share their image", SHARED_BY_CLASSES, SHARED_BY_FOLDS}
        assert {line for line in expected if line in text} == (set() if how == "others" else expected), (name, text)


def opened(config: TrainConfig, *, want_shards: bool) -> str:
    """What opening the data logs."""
    lines: list[str] = []
    open_dataset(config, want_shards=want_shards, log=lines.append).close()
    return "\n".join(lines)


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
