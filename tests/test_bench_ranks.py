"""The benchmark under torchrun: two real processes, one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from png_trees import PngTree

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_two_processes_share_the_work_and_one_speaks(png_tree: PngTree, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(BENCHMARKS / "throughput.py"), "load", "train", "--device", "cpu", "--dtypes", "uint8"),
        *("--csv_file", str(png_tree.csv_file), "--spectrograms_dir", str(png_tree.spectrograms_dir)),
        *("--work_dir", str(tmp_path / "work"), "--results_dir", str(tmp_path / "results")),
        *("--image_size", "32", "--batch_size", "16", "--repeats", "1", "--load_epochs", "1"),
        *("--models", "mobilenet", "--train_batch_sizes", "2", "--steps", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("all that was measured") == 1
    files = sorted((tmp_path / "results").iterdir())
    assert [path.name.split("_")[0] for path in files] == ["load", "train"]
    for path in files:
        assert "_2processes_" in path.name  # beside a result of one process, not over it
        document = json.loads(path.read_bytes())
        assert document["command"].startswith("torchrun (2 processes) benchmarks/throughput.py load train")
        assert document["setting"]["world_size"] == 2
        for row in document["rows"]:
            assert row["facts"]["world_size"] == 2
            assert row["facts"]["images_per_s_per_process"] == row["median_images_per_s"] / 2
    names = [row["name"] for row in document["rows"]]
    assert any(name.startswith("train, mapped") for name in names)
