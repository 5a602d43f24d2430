"""Helpers of the benchmark's tests. Import it first: it adds ``benchmarks/`` to ``sys.path``, as its scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from png_trees import PngTree

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))


def shorten_trials(patch: pytest.MonkeyPatch) -> None:
    """Measure limits for hundredths of a second and on little data: tests look at what is done, not at how fast."""
    from harness import limits

    patch.setattr(limits, "_TRIAL_S", 0.01)
    patch.setattr(limits, "_MATMUL_S", 0.01)
    patch.setattr(limits, "_MATMUL_SIZE", {"cpu": 256})
    patch.setattr(limits, "_BANDWIDTH_BYTES", 2**20)


def write_small_csv(tree: PngTree, path: Path, rows: int) -> Path:
    """Write the first ``rows`` rows of ``tree``'s CSV to ``path`` and return ``path``."""
    with tree.csv_file.open(newline="", encoding="utf-8") as file:
        path.write_text("".join(file.readlines()[: 1 + rows]), encoding="utf-8")
    return path
