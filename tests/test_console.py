"""Contract of what commands print: nobody reading it, a full disk or an ASCII terminal never ends the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from png_trees import PngTree, make_rows, write_csv, write_tree

CLASSES = ("dog_bark", "drilling")
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Two classes in folds 1, 2 and 3; one class is named in Chinese. Read only."""
    written = write_tree(tmp_path_factory.mktemp("console"), make_rows(CLASSES, (1, 2, 3)))
    rows = [row | {"class": row["class"].replace("drilling", "钻孔")} for row in written.rows]
    return PngTree(write_csv(written.csv_file, rows), written.spectrograms_dir, rows)


def data_flags(tree: PngTree) -> list[str]:
    return ["--csv_file", str(tree.csv_file), "--spectrograms_dir", str(tree.spectrograms_dir)]


def train_command(tree: PngTree, *flags: str) -> list[str]:
    quick = "--model_name mobilenet --image_size 8 --batch_size 4 --epochs 1 --num_workers 0 --gradcam_per_class 0"
    module = [sys.executable, "-m", "quaclrs.cli", *data_flags(tree), *quick.split()]
    return [*module, "--num_folds", "3", "--loader", "files", "--device", "cpu", "--output_dir", "results", *flags]


def tool_command(name: str, *flags: str) -> list[str]:
    code = f"import sys; from quaclrs.cli.{name} import main; sys.exit(main())"
    return [sys.executable, "-c", code, *flags]


def run(
    command: list[str], folder: Path, shell: str = '"$@"', **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run ``command`` by bash in ``folder``; ``shell`` says where its output goes."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        ["bash", "-c", shell, "bash", *command],
        cwd=folder,
        env=one_thread,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )


FULL_DISK = b"quaclrs-train: some of the output was lost (No space left on device)\n"
CASES = {
    "nobody reads": ('"$@" | true; exit ${PIPESTATUS[0]}', {}, b""),
    "one line is read": ('"$@" | head -1; exit ${PIPESTATUS[0]}', {}, b""),
    "full disk": ('"$@" > /dev/full', {}, FULL_DISK),
    "full disk for both": ('"$@" > /dev/full 2>&1', {}, b""),
    "closed": ('"$@" >&- 2>&-', {}, b""),
    "ASCII": ('"$@"', {"PYTHONIOENCODING": "ascii"}, b""),
}


TRAINED_BY_DEFAULT = ("nobody reads", "full disk")
"""A training in an interpreter of its own takes seconds; packings, below, meet every case by default."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in TRAINED_BY_DEFAULT else pytest.mark.exhaustive) for case in CASES]
)
def test_a_training_goes_on(case: str, tree: PngTree, tmp_path: Path) -> None:
    shell, environment, expected = CASES[case]
    done = run(train_command(tree), tmp_path, shell, **environment)
    assert (done.returncode, done.stderr) == (0, expected)
    summary = json.loads((tmp_path / "results/mobilenet/summary.json").read_text())
    assert [fold["fold"] for fold in summary["folds"]] == [1, 2, 3]
    if case == "ASCII":
        assert b"\\xb1" in done.stdout


@pytest.mark.exhaustive
def test_parallel_folds_and_ranks_go_on(tree: PngTree, tmp_path: Path) -> None:
    for flags in ("--parallel folds --nproc 2", "--distributed --nproc 2 --fold 1"):
        done = run(train_command(tree, *flags.split(), "--output_dir", flags[2:5]), tmp_path, CASES["nobody reads"][0])
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        assert (tmp_path / flags[2:5] / "mobilenet" / "summary.json").is_file()


@pytest.mark.parametrize("case", CASES)
def test_a_packing_goes_on(case: str, tree: PngTree, tmp_path: Path) -> None:
    shell, environment, expected = CASES[case]
    flags = [*data_flags(tree), "--output_dir", "shards", "--num_workers", "1"]
    done = run(tool_command("pack", *flags), tmp_path, shell, **environment)
    assert (done.returncode, done.stderr) == (0, expected.replace(b"-train", b"-pack"))
    assert (tmp_path / "shards" / "manifest.json").is_file()
    if case == "ASCII":
        assert b"\\u94bb\\u5b54" in done.stdout


@pytest.mark.parametrize(
    ("case", "code"), [("nobody reads", 141), ("full disk", 2), ("full disk for both", 2), ("ASCII", 0)]
)
def test_inspect_says_that_its_result_is_lost(case: str, code: int, png_shards: Path, tmp_path: Path) -> None:
    shell, environment, expected = CASES[case]
    done = run(tool_command("inspect", "info", str(png_shards)), tmp_path, shell, **environment)
    assert (done.returncode, done.stderr) == (code, expected.replace(b"-train", b"-inspect"))


@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag"]])
@pytest.mark.parametrize("case", ["nobody reads", "full disk for both"])
def test_parsing(flags: list[str], case: str, tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "quaclrs.cli", *flags], tmp_path, CASES[case][0])
    assert done.returncode == (0 if flags == ["--help"] else 2)
    assert b"Traceback" not in done.stderr
