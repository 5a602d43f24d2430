"""Contract of golden losses: a fixed training has the losses in ``golden/losses.json``, to the last bit.

So nothing about order, initial weights, images, loss, optimizer or averages changes unnoticed. After a change that is
meant to change them: ``python tests/test_golden.py`` writes the file anew.

The last bits of a sum depend on its order, which torch and its libraries choose by the processor's instructions.
:data:`ENVIRONMENT` and
:func:`train` choose for them, so that the file holds on every x86-64 processor. Other versions of them may still sum in
another order, or round a logarithm differently; there the losses have to agree to :data:`TOLERANCE`.

ResNet18 at 64 pixels, learning slowly, since it forgives: a last bit stays one. MobileNetV2 with five samples a batch
makes ten per cent of it in two steps, by BatchNorm over values that are nearly equal.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from png_trees import CLASSES, make_row, write_csv

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
EXACT = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")
TOLERANCE = 1e-4
"""Relative; ten times what AVX-512 and fused multiply-add change. Another order, or other weights, change 1e-2."""
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels: no vector instructions but SSE2
    "MKL_CBWR": "COMPATIBLE",  # matrix products: likewise, and the same on processors that are not Intel's
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2,-AVX512F",  # exp and log: without fused multiply-add
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


# --- the training, in a process of its own ---


def write_data(folder: Path) -> list[str]:
    """Three classes, three folds of eight images, by arithmetic alone: NumPy's random numbers may change. Returns the
    flags.
    """
    rows = []
    for fold in (1, 2, 3):
        for number in range(8):
            row = make_row(CLASSES[number % 3], fold, f"take{number}")
            rows.append(row)
            y, x = np.mgrid[:10, :24]
            level = (x * (7 + 4 * (number % 3)) + y * y * (3 + fold) + number * 29) % 240  # (10, 24) cells of 4 pixels
            grey = np.kron(level, np.ones((4, 4), dtype=np.int64)).astype(np.uint8)
            image = np.stack([grey, 255 - grey, grey // 2 + 60, np.full_like(grey, 255)], axis=2)
            path = folder / "spectrograms" / f"fold{fold}" / row["spec_file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return ["--csv_file", str(write_csv(folder / "data.csv", rows)), "--spectrograms_dir", str(folder / "spectrograms")]


def train() -> dict[str, Any]:
    """The losses, exactly."""
    import torch

    from quaclrs.cli.train import main
    from quaclrs.experiment import fold

    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # oneDNN generates code for the processor that it finds
    torch.backends.nnpack.set_flags(False)
    setattr(fold, "write_plots", lambda *_: [])  # noqa: B010  (a private use of a name that fold imports)
    with tempfile.TemporaryDirectory() as folder:
        network = [
            "--model_name",
            "resnet18",
            "--image_size",
            "64",
            "--batch_size",
            "5",
            "--epochs",
            "2",
            "--learning_rate",
            "1e-5",
        ]
        rest = [
            "--num_folds",
            "3",
            "--fold",
            "1",
            "--loader",
            "files",
            "--num_workers",
            "0",
            "--gradcam_per_class",
            "0",
        ]
        files = [*write_data(Path(folder)), "--output_dir", f"{folder}/results", "--device", "cpu"]
        assert main([*files, *network, *rest]) == 0
        metrics = json.loads(Path(folder, "results", "resnet18", "fold_1", "metrics.json").read_text())
    losses = [{name: float(entry[name]).hex() for name in EXACT} for entry in metrics["history"]]
    return {"made_with": versions(), "history": losses, "test_loss": float(metrics["test_loss"]).hex()}


def versions() -> dict[str, str]:
    """Of all that computes: equal ones give equal bits."""
    import torch

    blas = re.search(r"Math Kernel Library Version \S+", torch.__config__.show())
    return {
        "torch": torch.__version__.partition("+")[0],
        "blas": blas[0] if blas else "another",
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
    }


def start_training(more: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = os.environ | ENVIRONMENT | (more or {})
    return subprocess.Popen([sys.executable, __file__, "-"], env=environment, stdout=subprocess.PIPE, text=True)


def losses_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    losses: dict[str, Any] = json.loads(out.splitlines()[-1])
    return losses


# --- the tests ---


@pytest.fixture(scope="module")
def losses() -> list[dict[str, Any]]:
    """As they are, and with MKL and oneDNN on as if on other processors."""
    others: tuple[dict[str, str], ...] = ({}, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"})
    processes = [start_training(other) for other in others]
    try:
        return [losses_of(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def numbers(found: dict[str, Any]) -> list[float]:
    return [float.fromhex(entry[name]) for entry in found["history"] for name in EXACT] + [
        float.fromhex(found["test_loss"])
    ]


def test_losses_are_golden(losses: list[dict[str, Any]]) -> None:
    golden = json.loads(GOLDEN.read_text())
    if losses[0]["made_with"] == golden["made_with"]:
        assert losses[0] == golden
    assert numbers(losses[0]) == pytest.approx(numbers(golden), rel=TOLERANCE)


def test_losses_do_not_depend_on_the_processor(losses: list[dict[str, Any]]) -> None:
    assert losses[0] == losses[1]


def test_there_is_something_to_lose(losses: list[dict[str, Any]]) -> None:
    first, second = losses[0]["history"]
    assert all(math.isfinite(number) for number in numbers(losses[0]))
    assert float.fromhex(second["train_loss"]) < float.fromhex(first["train_loss"])
    assert second["val_loss"] != first["val_loss"]


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(train()))
    else:
        GOLDEN.write_text(json.dumps(losses_of(start_training()), indent=2) + "\n")
