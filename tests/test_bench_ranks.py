"""Contract of the benchmark on several ranks: two real ranks give one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmarking
import pytest
from png_trees import PngTree

THROUGHPUT = benchmarking.BENCHMARKS / "throughput.py"
SHORT_RUN = f"""
import os, runpy, socket, sys
sys.path[:0] = [{str(benchmarking.BENCHMARKS)!r}, {str(Path(__file__).parent)!r}]
import benchmarking, pytest
benchmarking.shorten_trials(pytest.MonkeyPatch())
"""
"""The beginning of a script that runs throughput.py with short trials."""
RUN = f"""
runpy.run_path({str(THROUGHPUT)!r}, run_name="__main__")
"""
FORK_RANKS = f"""
from harness import loading_speed, training_speed  # once for both ranks: importing takes longer than the rest
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}}
ranks = []
for rank in ("0", "1"):
    ranks.append(os.fork())
    if ranks[-1] == 0:
        os.environ |= {{"RANK": rank, "LOCAL_RANK": rank}}
        runpy.run_path({str(THROUGHPUT)!r}, run_name="__main__")  # ends with sys.exit
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) != 0 for rank in ranks))
"""
"""What torchrun does, without its own process and with one import."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.parametrize(
    ("launcher", "text"),
    [
        pytest.param((), SHORT_RUN + FORK_RANKS, id="forked"),
        pytest.param(TORCHRUN, SHORT_RUN + RUN, id="torchrun", marks=pytest.mark.exhaustive),
    ],
)
def test_two_ranks_share_the_work_and_one_reports(
    launcher: tuple[str, ...], text: str, png_tree: PngTree, tmp_path: Path
) -> None:
    csv_file = benchmarking.write_small_csv(png_tree, tmp_path / "data.csv", rows=40)
    script = tmp_path / "throughput.py"
    script.write_text(text)
    command = [
        *(sys.executable, *launcher, str(script), "load", "train", "--device", "cpu", "--dtypes", "uint8"),
        *("--csv_file", str(csv_file), "--spectrograms_dir", str(png_tree.spectrograms_dir)),
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
