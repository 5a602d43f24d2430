"""Contract of ``--encoding indexed``: lossless for every image, shared layouts and palettes, reproducible bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from packing import (
    TIMEOUT_S,
    call_tool,
    content_of,
    manifest_of,
    members_of,
    pack_flags,
    pack_tree,
    samples_of,
    tool_command,
)
from PIL import Image
from png_trees import PngTree, make_row, make_rows, write_csv, write_tree

from quaclrs.config import PackConfig
from quaclrs.errors import DataError, ShardError, UsageError
from quaclrs.shards.packing.pack import pack
from quaclrs.shards.reader import ShardSet
from quaclrs.shards.verify import verify

SMALL = 32 * 1024
"""Shard size in bytes, so small that each fold has several shards."""


@pytest.fixture(scope="module")
def indexed_shards(png_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    pack_tree(png_tree, folder, encoding="indexed", shard_size=SMALL)
    return folder


def rgb_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def photograph(path: Path, colours: int = 257) -> None:
    """Save an image of exactly ``colours`` colours; 257 are one too many."""
    number = np.arange(40 * 100).reshape(40, 100) % colours
    Image.fromarray(np.stack([number % 256, number // 256, number * 0], axis=-1).astype(np.uint8)).save(path)


def test_every_image_can_be_rendered_by_hand(indexed_shards: Path, png_tree: PngTree) -> None:
    """With NumPy and json alone, as the format describes, without using the package."""
    manifest, samples = manifest_of(indexed_shards), samples_of(indexed_shards)
    payloads = {
        info.name.partition(".")[0]: content
        for entry in manifest["shards"]
        for info, content in members_of(indexed_shards / entry["file"])
        if info.name.endswith(".npy")
    }
    for record, content in zip(samples, payloads.values(), strict=True):
        layout = manifest["layouts"][record["layout"]]
        palette = np.frombuffer(bytes.fromhex(manifest["palettes"][record["palette"]]), np.uint8).reshape(-1, 3)
        grid = np.frombuffer(content[128:], np.uint8).reshape(len(layout["row_edges"]), len(layout["column_edges"]))
        heights = np.diff([*layout["row_edges"], layout["height"]])
        widths = np.diff([*layout["column_edges"], layout["width"]])
        rendered = palette[grid].repeat(heights, axis=0).repeat(widths, axis=1)
        assert np.array_equal(rendered, rgb_of(png_tree.path(int(record["row"]))))
    assert len(payloads) == len(png_tree.rows)


def test_layouts_and_palettes_are_shared(indexed_shards: Path) -> None:
    manifest = manifest_of(indexed_shards)
    assert len(manifest["layouts"]) == 1
    assert len(manifest["layouts"][0]["row_edges"]) == 10
    assert len(manifest["layouts"][0]["column_edges"]) == 25
    assert len(manifest["palettes"]) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_reads_the_grids(indexed_shards: Path) -> None:
    first = str(indexed_shards / manifest_of(indexed_shards)["shards"][0]["file"])
    samples = list(webdataset.WebDataset(first, shardshuffle=False).decode())
    assert all(sample["npy"].shape == (10, 25) and sample["npy"].dtype == np.uint8 for sample in samples)
    assert [sample["cls"] for sample in samples] == samples_of(indexed_shards)["label"][: len(samples)].tolist()


def test_workers_do_not_change_a_byte(indexed_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    pack_tree(png_tree, tmp_path / "shards", encoding="indexed", shard_size=SMALL, num_workers=2)
    assert content_of(tmp_path / "shards") == content_of(indexed_shards)


def test_from_png_shards_comes_the_same_as_from_the_tree(
    indexed_shards: Path, png_shards: Path, tmp_path: Path
) -> None:
    pack(
        PackConfig(
            from_shards=png_shards, output_dir=tmp_path / "shards", encoding="indexed", shard_size=SMALL, num_workers=1
        )
    )
    assert content_of(tmp_path / "shards") == content_of(indexed_shards)


def test_from_png_shards_come_png_and_rgb_too(png_shards: Path, rgb_shards: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"shard_size": 32 * 1024, "num_workers": 1}
    pack(PackConfig(from_shards=png_shards, output_dir=tmp_path / "png", **sizes))
    pack(PackConfig(from_shards=png_shards, output_dir=tmp_path / "rgb", encoding="rgb", image_size=32, **sizes))
    assert content_of(tmp_path / "png") == content_of(png_shards)
    assert content_of(tmp_path / "rgb") == content_of(rgb_shards)


def test_only_png_shards_hold_the_images(rgb_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"--from_shards .*: is encoded rgb; only png shards hold the original images"):
        pack(PackConfig(from_shards=rgb_shards, output_dir=tmp_path / "shards"))


@pytest.mark.parametrize("given", [{}, {"csv_file": Path("a")}, {"from_shards": Path("a"), "csv_file": Path("b")}])
def test_there_is_one_source(given: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --csv_file and --spectrograms_dir, or --from_shards alone"):
        PackConfig(output_dir=tmp_path, **given)  # type: ignore[arg-type]


FIRST_PASS, SECOND_PASS = ".packing/fold*.seen", "fold*/fold*.tar"


@pytest.mark.parametrize(
    "moments",
    [
        [(SECOND_PASS, 3)],
        pytest.param(
            [(FIRST_PASS, 0), (FIRST_PASS, 1), (FIRST_PASS, 20), (SECOND_PASS, 1), (SECOND_PASS, 20)],
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["once", "often"],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    moments: list[tuple[str, int]], indexed_shards: Path, png_tree: PngTree, tmp_path: Path
) -> None:
    """Each moment is a number of files of the first or second pass that exist."""
    output_dir = tmp_path / "shards"
    options = {"encoding": "indexed", "shard_size": SMALL, "num_workers": 2}
    command = tool_command("shard_dataset", pack_flags(png_tree, output_dir, **options))
    for files, count in moments:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(output_dir.glob(files))) < count:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (output_dir / "manifest.json").exists()
    pack_tree(png_tree, output_dir, encoding="indexed", shard_size=SMALL)
    assert content_of(output_dir) == content_of(indexed_shards)


def test_the_first_round_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(folds=(1, 2, 3)))
    with monkeypatch.context() as patch:

        def stop(*arguments: object, **options: object) -> None:
            raise DataError("stopped between the rounds")

        patch.setattr("quaclrs.shards.packing.pack.write_shared_shard", stop)
        with pytest.raises(DataError, match="stopped between the rounds"):
            pack_tree(tree, tmp_path / "shards", encoding="indexed")

    def decode_again(*arguments: object) -> None:
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr("quaclrs.shards.encodings.indexed.decode_png", decode_again)
    assert pack_tree(tree, tmp_path / "shards", encoding="indexed").manifest.num_samples == len(tree.rows)
    assert not (tmp_path / "shards" / ".packing").exists()


def test_a_photograph_is_refused_by_name_with_the_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(folds=(1,)))
    photograph(tree.path(3))
    assert call_tool("shard_dataset", pack_flags(tree, tmp_path / "shards", encoding="indexed")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tree.path(3)) in line
    assert "257 colours" in line
    assert "--encoding png or rgb" in line


def test_a_photograph_can_be_left_out(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(folds=(1,)))
    photograph(tree.path(3))
    affected = [row for row in range(len(tree.rows)) if tree.path(row) == tree.path(3)]
    manifest = pack_tree(tree, tmp_path / "shards", encoding="indexed", on_error="skip").manifest
    assert [skipped.row for skipped in manifest.skipped] == affected
    assert verify(tmp_path / "shards") == len(tree.rows) - len(affected)


def test_images_of_several_sizes_and_colour_maps(tmp_path: Path) -> None:
    """Two sizes, three colour maps with more than 256 colours together, 1 colour, 1×1 pixel, cells of 1 pixel."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (40, 100, 3)).astype(np.uint8)[:2, :2] for _ in range(3)]
    ramps = [
        np.stack([np.arange(200), np.full(200, colour), np.arange(200)[::-1]], axis=1).astype(np.uint8)
        for colour in (0, 99, 255)
    ]
    images += [
        ramp[random.integers(0, 200, (20, 50))].repeat(2, axis=0).repeat(2, axis=1) for ramp in ramps for _ in range(2)
    ]
    images += [
        np.full((40, 100, 3), 7, np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        ramps[0][random.integers(0, 200, (33, 77))],
    ]
    rows = [make_row("dog_bark", 1 + i % 3, recording=i) for i in range(len(images))]
    tree = PngTree(write_csv(tmp_path / "data.csv", rows), tmp_path / "spectrograms", rows)
    for row, image in enumerate(images):
        tree.path(row).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tree.path(row))
    pack_tree(tree, tmp_path / "shards", encoding="indexed")
    assert verify(tmp_path / "shards") == len(rows)
    with ShardSet(tmp_path / "shards") as shards:
        for number, record in enumerate(shards.samples):
            assert np.array_equal(shards.image(number), images[record["row"]])


def test_export_restores_the_pixels_and_the_mode(indexed_shards: Path, png_tree: PngTree, tmp_path: Path) -> None:
    assert call_tool("inspect_shards", ["export", str(indexed_shards), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / png_tree.csv_file.name).read_bytes() == png_tree.csv_file.read_bytes()
    for row in range(0, len(png_tree.rows), 5):
        path = tmp_path / "out" / "spectrograms" / png_tree.path(row).relative_to(png_tree.spectrograms_dir)
        with Image.open(png_tree.path(row)) as original, Image.open(path) as restored:
            assert restored.mode == original.mode == "RGBA"
            assert restored.tobytes() == original.tobytes()


def test_verify_renders_every_image(indexed_shards: Path, tmp_path: Path) -> None:
    """All hashes and tables agree, but one cell has another colour."""
    folder = tmp_path / "shards"
    shutil.copytree(indexed_shards, folder)
    manifest, samples = manifest_of(folder), samples_of(folder)
    tar = folder / manifest["shards"][0]["file"]
    content = bytearray(tar.read_bytes())
    content[int(samples[0]["offset"]) + int(samples[0]["size"]) - 1] ^= 1  # another colour in the last cell
    tar.write_bytes(content)
    manifest["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=rf"{tar.name}: .*\(sample 0, row \d+\): .*(not the original's|does not have)"):
        verify(folder)


def test_the_summary_of_png_shards_says_what_indexed_would_save(
    png_tree: PngTree, png_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_tool("shard_dataset", pack_flags(png_tree, png_shards)) == 0
    assert (
        "all of 64 images looked at are colour-mapped grids: --encoding indexed would keep them without loss"
        in capsys.readouterr().out
    )


def test_the_summary_of_photographs_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(folds=(1,)))
    for row in range(len(tree.rows)):
        photograph(tree.path(row), colours=300)
    assert call_tool("shard_dataset", pack_flags(tree, tmp_path / "png")) == 0
    assert "is no colour-mapped grid (the image has 300 colours" in capsys.readouterr().out
