#!/usr/bin/env python3
"""What the mapped loader costs a process: seconds from opening the shards to the first batch, and memory while an epoch goes by.

    python benchmarks/footprint.py SHARDS

The first batch is taken twice: by the process that may still have to compile the redraw (once per machine) and in one that finds it
compiled, which is what a user meets. Memory is the process's resident set beyond what it had with torch and the loader imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import write_result

from quaclrs.arguments import Parser

_PAGE = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="footprint.py", description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--one_process", action="store_true", help="measure in this process and print the figures as JSON")
    options = parser.parse_args(arguments)
    if options.one_process:
        print(json.dumps(_measure(options)))
        return 0
    runs = [_in_a_process(sys.argv[1:] if arguments is None else list(arguments)) for _ in range(3)]
    _report(options, runs[1:])  # the first may have compiled
    return 0


def _in_a_process(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--one_process"]
    figures: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures


def _measure(options: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    import quaclrs.loaders.mapped
    from quaclrs.config import TrainConfig
    from quaclrs.dataset import open_dataset
    from quaclrs.loaders import Choice, build_loader
    from quaclrs.loaders.base import LoaderConfig
    from quaclrs.order import epoch_order, evaluation_batches

    config = LoaderConfig(
        image_size=options.image_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_batch=options.batch_size,
        num_workers=options.num_workers,
    )
    assert quaclrs.loaders.mapped
    before = _resident_bytes()
    started = time.perf_counter()
    dataset = open_dataset(TrainConfig(shards=options.shards), want_shards=False, log=lambda line: None)
    loader = build_loader(Choice(name="mapped", reason="benchmark"), dataset, config)
    batches = evaluation_batches(epoch_order(np.arange(len(dataset)), seed=0, epoch=1), options.batch_size)
    highest, first_batch_s = before, None
    for batch in loader.load(batches):
        first_batch_s = first_batch_s or time.perf_counter() - started
        highest = max(highest, _resident_bytes())
        del batch
    return {
        "samples": len(dataset),
        "first_batch_s": first_batch_s,
        "resident_mb_before": before / 1e6,
        "resident_mb_added_at_most": (highest - before) / 1e6,
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _report(options: Any, runs: list[dict[str, Any]]) -> None:
    import torch

    for run in runs:
        print(
            f"{run['samples']:,} samples: first batch after {run['first_batch_s']:.2f} s, "
            f"{run['resident_mb_added_at_most']:.0f} MB of memory added at most over an epoch"
        )
    setting = {"batch_size": options.batch_size, "image_size": options.image_size, "num_workers": options.num_workers}
    print(f"written to {write_result('footprint', runs, setting, torch.device('cpu'))}")


if __name__ == "__main__":
    sys.exit(main())
