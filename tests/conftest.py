"""Fixtures that several test files share; all images are tiny."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from png_trees import PngTree, make_rows, write_tree

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as for a command that a shell runs in the background; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

RGB_IMAGE_SIZE = 32
SHARD_SIZE = 32 * 1024
"""Bytes; small enough that a fold has several shards."""


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small batches gain nothing from a second thread, and lose much when another process has its core."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def png_tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """13 classes × 10 folds × 2 rows and 10 rows that share a file. Read only."""
    return write_tree(tmp_path_factory.mktemp("png_tree"), make_rows())


def _pack(tree: PngTree, output_dir: Path, **options: object) -> Path:
    from quaclrs.config import PackConfig
    from quaclrs.shards.packing.pack import pack

    pack(
        PackConfig(
            csv_file=tree.csv_file,
            spectrograms_dir=tree.spectrograms_dir,
            output_dir=output_dir,
            shard_size=SHARD_SIZE,
            num_workers=1,
            **options,  # type: ignore[arg-type]
        )
    )
    return output_dir


@pytest.fixture(scope="session")
def png_shards(png_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``png_tree`` packed with ``--encoding png``. Read only: copy it before damaging it."""
    return _pack(png_tree, tmp_path_factory.mktemp("png_shards"))


@pytest.fixture(scope="session")
def rgb_shards(png_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``png_tree`` packed with ``--encoding rgb --image_size 32``. Read only."""
    return _pack(png_tree, tmp_path_factory.mktemp("rgb_shards"), encoding="rgb", image_size=RGB_IMAGE_SIZE)
