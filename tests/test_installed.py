"""Contract of the wheel: it holds the whole package, and all four commands installed from it work from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ("quaclrs-train", "quaclrs-pack", "quaclrs-inspect", "quaclrs-synthesize")
CSV_NAME = "spectrograms_balanced_no_sirens.csv"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
TIMEOUT_S = 300


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """The command's standard output; fails with everything it said unless it exits with 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network from a copy, because a build leaves its own files beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "quaclrs", source / "quaclrs", ignore=shutil.ignore_patterns("__pycache__"))
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, source], built)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment with the wheel in it; the libraries are those of this interpreter."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run([*PIP, "--python", python, "install", "--no-deps", "--no-index", "--no-compile", wheel], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # --system-site-packages would show those of the system, not those of the environment that the tests run in; a path
    # in a .pth file is searched last, and its own .pth files, an editable quaclrs among them, are not read
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "libraries.pth").write_text("\n".join(libraries))
    return folder / "bin"


def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    package = ROOT / "quaclrs"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.suffix == ".py" or path.name in ("py.typed", "README.md")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"quaclrs/py.typed", "quaclrs/README.md", "quaclrs/cli/train.py"} <= wanted
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_package_is_the_one_that_runs(commands: Path, tmp_path: Path) -> None:
    where = "import quaclrs, torch; print(quaclrs.__file__)"
    assert str(commands.parent) in run([commands / "python", "-c", where], tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_version(name: str, commands: Path, tmp_path: Path) -> None:
    assert run([commands / name, "--help"], tmp_path).startswith(f"usage: {name} ")
    assert run([commands / name, "--version"], tmp_path) == f"{name} 0.1.0\n"
    assert list(tmp_path.iterdir()) == []


def test_from_no_data_to_a_trained_model(commands: Path, tmp_path: Path) -> None:
    """All four commands, one after another, from a folder that has nothing in it."""
    made = run(
        [commands / "quaclrs-synthesize", "--output_dir", "data", "--samples_per_class", "1", "--folds", "3"], tmp_path
    )
    assert f"CSV: data/{CSV_NAME}" in made
    data = ["--csv_file", f"data/{CSV_NAME}", "--spectrograms_dir", "data/spectrograms"]
    packing = ["--output_dir", "shards", "--encoding", "rgb", "--image_size", "32"]
    run([commands / "quaclrs-pack", *data, *packing], tmp_path)
    assert "shards: all promises kept by " in run([commands / "quaclrs-inspect", "verify", "shards"], tmp_path)
    settings = "--model_name mobilenet --epochs 1 --num_folds 3 --fold 1 --image_size 32 --gradcam_per_class 0"
    told = run([commands / "quaclrs-train", "--shards", "shards", "--device", "cpu", *settings.split()], tmp_path)
    assert "results in results/mobilenet" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "results", "shards"]
    assert (tmp_path / "results/mobilenet/summary.json").is_file()
