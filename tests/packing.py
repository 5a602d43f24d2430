"""Helpers that pack in tests: through the library, through the tools' own ``main``, or in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from png_trees import PngTree

from quaclrs.config import PackConfig
from quaclrs.errors import QuaclrsError
from quaclrs.shards.packing.pack import PackSummary, pack

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TIMEOUT_S = 60
_FSYNC = os.fsync


def pack_tree(tree: PngTree, output_dir: Path, **options: Any) -> PackSummary:
    """Pack in this process. One worker, the default, starts no other process. Does not wait for the disk (fsync)."""
    defaults: dict[str, Any] = {"num_workers": 1, "shard_size": 32 * 1024}
    config = PackConfig(
        csv_file=tree.csv_file, spectrograms_dir=tree.spectrograms_dir, output_dir=output_dir, **(defaults | options)
    )
    with pytest.MonkeyPatch.context() as patch:
        if os.fsync is _FSYNC:  # else the test has replaced it
            patch.setattr(os, "fsync", lambda descriptor: None)
        return pack(config)


def pack_flags(tree: PngTree, output_dir: Path, **flags: object) -> list[str]:
    """The command line of :func:`pack_tree`."""
    chosen = {
        "csv_file": tree.csv_file,
        "spectrograms_dir": tree.spectrograms_dir,
        "output_dir": output_dir,
        "num_workers": 1,
        "shard_size": "32KiB",
    }
    return [str(part) for name, value in (chosen | flags).items() for part in (f"--{name}", value)]


def call_tool(name: str, arguments: list[str]) -> int:
    """Call ``tools/{name}.py``'s main in this process; returns the exit code."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code: int = module.main(arguments)
    return code


def tool_command(name: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-W", "error", str(TOOLS / f"{name}.py"), *arguments]


def run_tool(name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``tools/{name}.py`` as a process of its own."""
    return subprocess.run(tool_command(name, arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, without sources.json, which holds the times of the packed images."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "sources.json"
    }


def manifest_of(shards: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((shards / "manifest.json").read_text())
    return document


def samples_of(shards: Path) -> NDArray[np.void]:
    """(N,) records of samples.npy, read with NumPy alone."""
    samples: NDArray[np.void] = np.load(shards / "samples.npy")
    return samples


def tars(shards: Path) -> list[Path]:
    """All tars, in the order of the manifest."""
    return [shards / entry["file"] for entry in manifest_of(shards)["shards"]]


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file: both change when it is written anew."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def packing_error(tree: PngTree, output_dir: Path, **options: object) -> str:
    """The message of a packing that must fail: one line, exit code 2, and no manifest."""
    with pytest.raises(QuaclrsError) as caught:
        pack_tree(tree, output_dir, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (output_dir / "manifest.json").exists()
    return str(caught.value)


def resized_by_pillow(path: Path, size: int) -> NDArray[np.uint8]:
    """(size, size, 3): the image file at ``path``, by Pillow alone; 16-bit grey first as ``value >> 8``."""
    with Image.open(path) as opened:
        image: Image.Image = opened
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def members_of(tar: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members and their contents, read with the standard library alone."""
    with tarfile.open(tar, "r:") as archive:
        return [(info, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]


# --- jobs that pack single folds of one folder ---

JOB_FOLDS = (1, 2, 3)
JOB_SETTINGS: dict[str, Any] = {"shard_size": 4096, "image_size": 16}
"""Small shards: a fold has several of them in every encoding."""


def pack_folds(tree: PngTree, output_dir: Path, *folds: int, **options: Any) -> PackSummary:
    """As :func:`pack_tree`, a job that packs ``folds``."""
    return pack_tree(tree, output_dir, folds=folds, **(JOB_SETTINGS | options))


def job_flags(tree: PngTree, output_dir: Path, **more: object) -> list[str]:
    """The command line of :func:`pack_folds`, without its folds."""
    return pack_flags(tree, output_dir, **(JOB_SETTINGS | more))


def rows_of(tree: PngTree, *folds: int) -> list[int]:
    """The rows of ``folds``, counted from 0."""
    return [row for row, described in enumerate(tree.rows) if int(described["fold"]) in folds]
