"""Contract of verifying: intact shards pass, and all damage is detected and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RGB_IMAGE_SIZE
from numpy.typing import NDArray
from packing import manifest_of, members_of, pack_tree, samples_of
from png_trees import CLASSES, grid_image, make_rows, write_tree

from quaclrs.errors import DataError, ShardError
from quaclrs.shards.format import FORMAT_VERSION
from quaclrs.shards.verify import verify

TAR, INDEX = "fold02/fold02-000001.tar", "fold02/fold02-000001.idx"


SMALL_CLASSES, SMALL_SAMPLES, SOME_SAMPLE = CLASSES[:6], 26, 20


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 samples in two folds, of two shards each."""
    folder = tmp_path_factory.mktemp("small")
    pack_tree(write_tree(folder / "tree", make_rows(SMALL_CLASSES, (1, 2))), folder / "shards", shard_size=20_000)
    return folder / "shards"


@pytest.fixture
def copy(small_shards: Path, tmp_path: Path) -> Path:
    """Good shards; tests may damage them."""
    return Path(shutil.copytree(small_shards, tmp_path / "shards"))


def verify_error(shards: Path) -> str:
    """What verify says about damaged shards; must be one line."""
    with pytest.raises(ShardError) as caught:
        verify(shards)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **values: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | values))


def edit_entry(folder: Path, shard: str, **values: Any) -> None:
    """Change the manifest's entry of one shard."""
    entries = [entry | values if entry["file"] == shard else entry for entry in manifest_of(folder)["shards"]]
    edit_manifest(folder, shards=entries)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def update_hashes(shards: Path, file: str = TAR) -> None:
    """Make the manifest agree with a changed tar and index, so that only their content can show the damage."""
    tar = shards / file
    edit_entry(shards, file, bytes=tar.stat().st_size, sha256=sha256(tar), index_sha256=sha256(tar.with_suffix(".idx")))


def rewrite_samples(shards: Path, change: Callable[[NDArray[np.void]], None]) -> None:
    """Change samples.npy, and make the manifest agree."""
    samples = samples_of(shards)
    change(samples)
    np.save(shards / "samples.npy", samples)
    edit_manifest(shards, samples_sha256=sha256(shards / "samples.npy"))


# --- good shards ---


def test_good_shards_pass(png_shards: Path, rgb_shards: Path) -> None:
    assert verify(png_shards) == 270
    assert verify(rgb_shards) == 270


def test_shards_with_every_oddity_pass(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", make_rows(CLASSES[:3], (2, 5)))
    grid_image("police", 1).convert("RGB").quantize(64).save(tree.path(1))
    grid_image("police", 1).convert("L").save(tree.path(2), transparency=5)
    clear = grid_image("police", 3, width=64)
    clear.putpixel((0, 0), (1, 2, 3, 0))
    clear.save(tree.path(3))
    tree.path(4).unlink()
    pack_tree(tree, tmp_path / "shards", on_error="skip")
    assert verify(tmp_path / "shards") == 11
    pack_tree(tree, tmp_path / "rgb", on_error="skip", encoding="rgb", image_size=8)
    assert verify(tmp_path / "rgb") == 11


def test_verify_reads_every_byte_but_changes_none(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    verify(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


# --- damage that a hash or a size shows ---


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_in_a_tar(place: float, copy: Path) -> None:
    flip(copy / TAR, int((copy / TAR).stat().st_size * place))
    assert (
        verify_error(copy)
        == f"{copy / TAR}: SHA-256 differs from the manifest's, the file has changed; restore it or pack anew"
    )


def test_a_tar_that_was_cut(copy: Path) -> None:
    size = (copy / TAR).stat().st_size
    os.truncate(copy / TAR, size - 512)
    assert verify_error(copy).startswith(f"{copy / TAR}: has {size - 512} bytes, the manifest says {size}")


def test_a_missing_tar(copy: Path) -> None:
    (copy / TAR).unlink()
    assert verify_error(copy).startswith(f"{copy / TAR}: missing; ")


def test_a_flipped_bit_in_an_index(copy: Path) -> None:
    flip(copy / INDEX, 30)
    assert verify_error(copy).startswith(f"{copy / INDEX}: SHA-256 differs")


def test_a_missing_index(copy: Path) -> None:
    (copy / INDEX).unlink()
    assert verify_error(copy).startswith(f"{copy / INDEX}: missing; ")


@pytest.mark.parametrize("place", [20, 1000, -1])
def test_a_flipped_bit_in_the_samples_table(place: int, copy: Path) -> None:
    flip(copy / "samples.npy", place)
    assert verify_error(copy).startswith(f"{copy / 'samples.npy'}: does not match the manifest (SHA-256 differs)")


@pytest.mark.parametrize("name", ["samples.npy", "metadata.csv", "manifest.json"])
def test_a_missing_table(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert verify_error(copy).startswith(f"{copy / name}: ")


def test_an_edited_csv(copy: Path) -> None:
    path = copy / "metadata.csv"
    path.write_bytes(path.read_bytes().replace(b"ambulance", b"Ambulance", 1))
    assert verify_error(copy) == f"{path}: is not the CSV these shards were packed from; pack them anew"


@pytest.mark.parametrize(
    "name", ["fold02/notes.txt", "fold02/fold02-000099.tar", "fold02/fold02-000000.tar.tmp", "fold77/x.idx"]
)
def test_a_stray_file(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"")
    assert verify_error(copy).startswith(f"{copy / name}: not in the manifest; delete it")


def test_a_packing_that_was_stopped_here(copy: Path) -> None:
    (copy / ".packing").mkdir()
    assert verify_error(copy).startswith(f"{copy / '.packing'}: a packing is running or was stopped here")


# --- manifests ---


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json"])
def test_a_manifest_that_is_not_json(content: bytes, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(content)
    message = verify_error(copy)
    assert message.startswith(f"{copy / 'manifest.json'}: not JSON (")
    assert message.endswith("; pack the shards anew")


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"format": "webdataset"}'])
def test_a_manifest_of_something_else(content: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(content)
    assert verify_error(copy).startswith(
        f"{copy / 'manifest.json'}: not a manifest of quaclrs-shards; point --shards at a folder of"
    )


@pytest.mark.parametrize(
    ("version", "step"),
    [
        (FORMAT_VERSION + 1, "update quaclrs"),
        (99, "update quaclrs"),
        (0, "pack the shards anew"),
        ("x", "pack the shards anew"),
    ],
)
def test_a_manifest_of_another_version(version: object, step: str, copy: Path) -> None:
    edit_manifest(copy, version=version)
    assert (
        verify_error(copy)
        == f"{copy / 'manifest.json'}: format version {version!r}, this quaclrs reads version {FORMAT_VERSION}; {step}"
    )


@pytest.mark.parametrize("encoding", ["jpeg2000", "", None, ["png"]])
def test_a_manifest_of_an_unknown_encoding(encoding: object, copy: Path) -> None:
    edit_manifest(copy, encoding=encoding)
    message = verify_error(copy)
    assert message.startswith(f"{copy / 'manifest.json'}: unknown encoding {encoding!r} (known: png, ")
    assert message.endswith("; update quaclrs or pack anew")


@pytest.mark.parametrize("name", ["classes", "shards", "samples_sha256", "skipped", "seed"])
def test_a_manifest_with_a_part_missing(name: str, copy: Path) -> None:
    document = manifest_of(copy)
    del document[name]
    (copy / "manifest.json").write_text(json.dumps(document))
    message = verify_error(copy)
    assert message.startswith(f"{copy / 'manifest.json'}: damaged manifest (")
    assert name in message


def test_a_manifest_with_a_part_too_many(copy: Path) -> None:
    edit_manifest(copy, surprise=1)
    assert "damaged manifest (" in verify_error(copy)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_samples": SMALL_SAMPLES + 1}, f"samples.npy: has ({SMALL_SAMPLES},) records"),
        ({"classes": ["x", *sorted(SMALL_CLASSES)[1:]]}, "samples.npy: labels differ from the CSV's"),
        ({"classes": sorted(SMALL_CLASSES, reverse=True)}, "samples.npy: labels differ from the CSV's"),
        ({"folds": [1, 2, 3]}, "samples.npy: folds differ from the CSV's"),
        ({"seed": 1}, "samples.npy: does not hold every row of metadata.csv exactly once, in the order of seed 1"),
        ({"skipped": [{"row": 3, "file": "a", "reason": "b"}]}, "samples.npy: does not hold every row"),
        ({"csv_fingerprint": "0" * 64}, "metadata.csv: is not the CSV these shards were packed from"),
        ({"encoding": "rgb", "image_size": 32}, "fold01/fold01-000000.tar"),
    ],
)
def test_a_manifest_that_says_something_else_than_the_files(values: dict[str, object], named: str, copy: Path) -> None:
    edit_manifest(copy, **values)
    assert verify_error(copy).startswith(f"{copy}/{named}")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"samples": 1}, "samples.npy: sample counts per shard differ from the manifest's"),
        ({"bytes": 1}, f"{TAR}: has "),
        ({"sha256": "0" * 64}, f"{TAR}: SHA-256 differs"),
        ({"index_sha256": "0" * 64}, f"{INDEX}: SHA-256 differs"),
        ({"file": "fold02/fold02-000077.tar"}, "fold02/fold02-000077.tar: missing"),
    ],
)
def test_a_manifest_that_says_something_else_of_a_shard(values: dict[str, object], named: str, copy: Path) -> None:
    edit_entry(copy, TAR, **values)
    assert verify_error(copy).startswith(f"{copy}/{named}")


def test_a_shard_dropped_from_the_manifest(copy: Path) -> None:
    edit_manifest(copy, shards=[entry for entry in manifest_of(copy)["shards"] if entry["file"] != TAR])
    assert verify_error(copy).startswith(f"{copy / 'samples.npy'}: sample counts per shard differ")


# --- damage with matching hashes: only the content shows it ---


def test_a_changed_label_in_a_tar(copy: Path) -> None:
    tar = copy / TAR
    info, label = next((info, label) for info, label in members_of(tar) if info.name.endswith(".cls"))
    content = bytearray(tar.read_bytes())
    content[info.offset_data : info.offset_data + len(label)] = b"9" * len(label)
    tar.write_bytes(content)
    update_hashes(copy)
    message = verify_error(copy)
    assert message.startswith(f"{tar}: {info.name.removesuffix('.cls')} (sample ")
    assert "key, label or row differ from the CSV's" in message


def test_a_changed_row_in_a_tar(copy: Path) -> None:
    tar = copy / TAR
    content = tar.read_bytes()
    assert b'"augmentation": "original"' in content
    tar.write_bytes(content.replace(b'"augmentation": "original"', b'"augmentation": "0riginal"', 1))
    update_hashes(copy)
    assert "key, label or row differ from the CSV's" in verify_error(copy)


def test_a_damaged_image_in_a_tar(copy: Path) -> None:
    flip(copy / TAR, (copy / TAR).read_bytes().index(b"IDAT") + 40)
    update_hashes(copy)
    with pytest.raises(DataError, match="truncated or damaged") as caught:
        verify(copy)
    assert str(caught.value).startswith(f"{copy / TAR}: fold02-")


def test_an_index_of_other_offsets(copy: Path) -> None:
    index = copy / INDEX
    index.write_text(index.read_text().replace("png 512 ", "png 1024 ", 1))
    update_hashes(copy)
    assert "the DALI index says otherwise" in verify_error(copy)


def test_an_index_of_another_count(copy: Path) -> None:
    index = copy / INDEX
    index.write_text("\n".join(index.read_text().splitlines()[:-1]) + "\n")
    update_hashes(copy)
    assert verify_error(copy).startswith(f"{index}: not an index of ")


def test_a_tar_that_ends_early(copy: Path) -> None:
    tar = copy / TAR
    last = members_of(tar)[-3][0].offset
    tar.write_bytes(tar.read_bytes()[:last] + bytes(10240))
    update_hashes(copy)
    assert verify_error(copy).startswith(f"{tar}: ends before sample ")


def test_a_samples_table_of_other_offsets(copy: Path) -> None:
    def move(samples: NDArray[np.void]) -> None:
        samples["offset"][SOME_SAMPLE] += 512

    rewrite_samples(copy, move)
    assert "lies elsewhere than samples.npy says" in verify_error(copy)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("label", "labels differ from the CSV's"),
        ("fold", "folds differ from the CSV's"),
        ("width", "is 100x40, not 101x40"),
        ("flags", "mode RGBA or its transparency is not what samples.npy says"),
        ("row", "does not hold every row of metadata.csv exactly once"),
    ],
)
def test_a_samples_table_of_other_values(field: str, words: str, copy: Path) -> None:
    def change(samples: NDArray[np.void]) -> None:
        samples[field][SOME_SAMPLE] += 1

    rewrite_samples(copy, change)
    assert words in verify_error(copy)


def test_a_samples_table_in_another_order(copy: Path) -> None:
    def swap(samples: NDArray[np.void]) -> None:
        samples[[0, 1]] = samples[[1, 0]]

    rewrite_samples(copy, swap)
    assert "in the order of seed 0" in verify_error(copy)


def test_rgb_pixels_of_another_shape(rgb_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(rgb_shards, tmp_path / "shards"))
    edit_manifest(shards, image_size=16)
    assert f"holds ({RGB_IMAGE_SIZE}, {RGB_IMAGE_SIZE}, 3) uint8, not (16, 16, 3) uint8" in verify_error(shards)
