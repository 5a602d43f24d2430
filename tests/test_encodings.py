"""Contract of the encoding registry: an encoding defined outside the package does all that the built-in ones do."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_encoding
from numpy.typing import NDArray
from packing import content_of, manifest_of, members_of, pack_tree, samples_of
from PIL import Image
from png_trees import CLASSES, PngTree, make_rows, write_tree
from test_exact_training import exact, train

from quaclrs.config import ENCODINGS, PackConfig
from quaclrs.errors import DataError, ShardError, UsageError
from quaclrs.loaders import MemoryEstimate, choose_loader
from quaclrs.shards.encodings import encoding_names, get_encoding, register_encoding
from quaclrs.shards.encodings.base import Content, TwoPassEncoding
from quaclrs.shards.packing.pack import pack
from quaclrs.shards.packing.summary import describe_shards, indexing_advice
from quaclrs.shards.reader import ShardSet
from quaclrs.shards.verify import export, verify

MOST_LINES = 60


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """24 images in four folds."""
    return write_tree(tmp_path_factory.mktemp("tree"), make_rows(CLASSES[:3], (1, 2, 3, 4)))


@pytest.fixture(scope="module")
def toy_shards(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    pack_tree(tree, folder, encoding="zlib")
    return folder


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_new_encoding_takes_few_lines() -> None:
    assert len(inspect.getsource(toy_encoding).splitlines()) < MOST_LINES


def test_its_shards_hold_every_image(toy_shards: Path, tree: PngTree) -> None:
    manifest = manifest_of(toy_shards)
    assert (manifest["encoding"], manifest["image_size"]) == ("zlib", None)
    assert {info.name.partition(".")[2] for info, _ in members_of(toy_shards / manifest["shards"][0]["file"])} == {
        "zz",
        "cls",
        "json",
    }
    with ShardSet(toy_shards) as shards:
        assert len(shards) == len(tree.rows)
        for number, row in enumerate(samples_of(toy_shards)["row"].tolist()):
            np.testing.assert_array_equal(shards.image(number), pixels_of(tree.path(row)))
        assert ", encoding zlib, seed 0\n" in describe_shards(shards)
        assert indexing_advice(shards) is None


def test_spawned_workers_find_it(toy_shards: Path, tree: PngTree, tmp_path: Path) -> None:
    """They import its module when they unpickle the plan."""
    pack_tree(tree, tmp_path / "shards", encoding="zlib", num_workers=2)
    assert content_of(tmp_path / "shards") == content_of(toy_shards)


def test_shards_carry_it_to_other_processes(toy_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardSet(toy_shards) as shards:
        pickled, image = pickle.dumps(shards), shards.image(3)
    monkeypatch.setattr("quaclrs.shards.encodings._REGISTRY", {})  # as in a process that has not imported the toy
    with pickle.loads(pickled) as travelled:
        np.testing.assert_array_equal(travelled.image(3), image)


def test_it_packs_from_png_shards_and_in_folds(toy_shards: Path, tree: PngTree, tmp_path: Path) -> None:
    pack_tree(tree, tmp_path / "png")
    options: dict[str, Any] = {"encoding": "zlib", "shard_size": 32 * 1024, "num_workers": 1}
    for folds in ((3, 1), (2, 4)):
        pack(PackConfig(from_shards=tmp_path / "png", output_dir=tmp_path / "shards", folds=folds, **options))
    assert content_of(tmp_path / "shards") == content_of(toy_shards)
    with pytest.raises(ShardError, match=r"is encoded zlib; only png shards hold the original images"):
        pack(PackConfig(from_shards=toy_shards, output_dir=tmp_path / "again", **options))


def test_a_bad_image_is_refused_by_name(tree: PngTree, tmp_path: Path) -> None:
    copy = write_tree(tmp_path / "tree", tree.rows)
    copy.path(5).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty") as caught:
        pack_tree(copy, tmp_path / "shards", encoding="zlib")
    assert str(caught.value).startswith(f"row 6: {copy.path(5)}: ")


def test_verify_and_export(toy_shards: Path, tree: PngTree, tmp_path: Path) -> None:
    assert verify(toy_shards) == len(tree.rows)
    export(toy_shards, tmp_path / "out")
    for row in range(len(tree.rows)):
        restored = tmp_path / "out" / "spectrograms" / tree.path(row).relative_to(tree.spectrograms_dir)
        np.testing.assert_array_equal(pixels_of(restored), pixels_of(tree.path(row)))


def test_verify_decodes_and_compares_every_payload(
    tree: PngTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything fits together but the pixels: another image was encoded than the one whose digest was recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(toy_encoding, "pixel_digest", lambda rgb: 1)
        pack_tree(tree, tmp_path / "shards", encoding="zlib")
    with pytest.raises(ShardError, match=r"\(sample 0, row \d+\): decoded, its pixels are not the original's"):
        verify(tmp_path / "shards")


@pytest.mark.parametrize("loader", ["files", "resident"])
def test_training_on_it_gives_the_losses_of_the_files(
    loader: str, toy_shards: Path, from_tree: Any, tmp_path: Path
) -> None:
    metrics = train(tmp_path, "--shards", toy_shards, "--loader", loader)
    assert metrics["loader"] == loader
    assert metrics["data"]["encoding"] == "zlib"
    assert exact(metrics) == exact(from_tree)


@pytest.fixture(scope="module")
def from_tree(tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = ("--csv_file", tree.csv_file, "--spectrograms_dir", tree.spectrograms_dir)
    return train(tmp_path_factory.mktemp("files"), *data, "--loader", "files")


def test_which_loaders_read_it() -> None:
    choice = choose_loader("auto", "zlib", MemoryEstimate(needed=1, free=10**9))
    assert (choice.name, choice.reason) == ("files", "images that only their encoding can decode")
    for loader in ("mapped", "dali"):
        if loader == "dali":
            pytest.importorskip("nvidia.dali")
        with pytest.raises(
            UsageError,
            match=rf"--loader {loader}: a shard folder of encoding zlib holds images that .*; use --loader files, or",
        ):
            choose_loader(loader, "zlib")


# --- the registry ---


def test_the_command_line_offers_the_built_in_encodings() -> None:
    assert tuple(name for name in encoding_names() if name != "zlib") == tuple(ENCODINGS)
    assert PackConfig.encoding == next(iter(ENCODINGS))


def test_an_unknown_name_is_refused_with_all_known_ones(tree: PngTree, tmp_path: Path) -> None:
    message = f"--encoding jpeg: choose one of {', '.join(ENCODINGS)}, zlib"
    with pytest.raises(UsageError, match=message):
        get_encoding("jpeg")
    with pytest.raises(UsageError, match=message):
        pack_tree(tree, tmp_path / "shards", encoding="jpeg")
    assert not (tmp_path / "shards").exists()


def test_a_name_is_given_once() -> None:
    class Other(toy_encoding.ZlibEncoding):
        pass

    register_encoding(toy_encoding.ZlibEncoding())  # the same class again, as when its module is imported twice
    with pytest.raises(ValueError, match="encoding 'zlib' is registered already, as ZlibEncoding"):
        register_encoding(Other())


@pytest.mark.parametrize("name", [*ENCODINGS, "zlib"])
def test_every_encoding_renders_one_image_by_itself(name: str, tree: PngTree, tmp_path: Path) -> None:
    """``encode`` alone, without a packing; for a two-pass encoding that is a dataset of one image."""
    encoding, png = get_encoding(name), tree.path(0).read_bytes()
    encoded = encoding.encode(png, "image", image_size=16)
    assert encoded.payload
    assert (encoded.facts.width, encoded.facts.height) == (100, 40)
    assert encoding.depends_on_image_size == (name == "rgb")
    assert encoding.keeps_original_files == (encoded.payload == png)
    assert isinstance(encoding, TwoPassEncoding) == (encoding.content is Content.GRIDS)
    with pytest.raises(DataError, match=r"^image: not a PNG"):
        encoding.encode(b"GIF89a", "image", image_size=16)
