#!/usr/bin/env python3
"""Costs of the mapped loader: seconds from opening the shards to the first batch, memory added in an epoch, images/s.

    python benchmarks/footprint.py SHARDS
    python benchmarks/footprint.py SHARDS --records 1000 57918 1000000

``--records`` simulates datasets of other sizes: a CSV and a table of samples of so many rows, whose records all lie in
the tars of SHARDS, so that each is used many times or not at all. Everything that grows with a dataset grows, except
the tars and the page cache they would need.

A first process is not counted: it may have to compile the render kernel, which happens once per machine. Each size is
then measured in two processes. Memory is the resident set beyond what the process had with torch and the loader
imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.records import OWN_RESULTS, write_result

from quaclrs.cli.arguments import Parser

_PAGE = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="footprint.py", description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--records", type=int, nargs="+", metavar="N", help="sizes of simulated datasets")
    parser.add_argument("--most_batches", type=int, default=1000, help="of the epoch")
    parser.add_argument(
        "--results_dir", type=Path, default=OWN_RESULTS, help="where the result file goes (results/benchmarks)"
    )
    parser.add_argument(
        "--one_process", action="store_true", help="measure in this process and print the figures as JSON"
    )
    options = parser.parse_args(arguments)
    if options.one_process:
        print(json.dumps(_measure(options)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sizes = [simulate_shards(options.shards, records, Path(folder)) for records in options.records or ()]
        _measure_in_process(options, options.shards)  # may have to compile the render kernel
        runs = [_measure_in_process(options, shards) for shards in sizes or [options.shards] for _ in range(2)]
    _report(options, runs)
    return 0


def simulate_shards(shards: Path, records: int, folder: Path) -> Path:
    """Make a shard folder of ``records`` samples whose tars are those of ``shards``; return it."""
    import numpy as np

    from quaclrs.shards import format as fmt
    from quaclrs.shards.reader import ShardSet

    made = folder / str(records)
    made.mkdir()
    with ShardSet(shards) as real:
        samples = np.resize(real.samples, records)
        lines = (shards / fmt.METADATA_FILE).read_bytes().splitlines(keepends=True)
        rows = itertools.islice(itertools.cycle(real.samples["row"].tolist()), records)
        csv = b"".join([lines[0], *(lines[1 + row].rstrip(b"\r\n") + b"\n" for row in rows)])
        samples["row"] = np.arange(records)
        table = io.BytesIO()
        np.save(table, samples)
        manifest = dataclasses.replace(
            real.manifest,
            csv_fingerprint=hashlib.sha256(csv).hexdigest(),
            num_samples=records,
            samples_sha256=hashlib.sha256(table.getvalue()).hexdigest(),
            skipped=(),
        )
    for fold in sorted({Path(entry.file).parent for entry in manifest.shards}):
        (made / fold).symlink_to((shards / fold).resolve())
    (made / fmt.METADATA_FILE).write_bytes(csv)
    (made / fmt.SAMPLES_FILE).write_bytes(table.getvalue())
    (made / fmt.MANIFEST_FILE).write_bytes(manifest.to_json())
    return made


def _measure_in_process(options: argparse.Namespace, shards: Path) -> dict[str, Any]:
    flags = [
        f"--{name}={getattr(options, name)}" for name in ("batch_size", "image_size", "num_workers", "most_batches")
    ]
    command = [sys.executable, __file__, str(shards), *flags, "--one_process"]
    figures: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    import quaclrs.loaders.mapped
    from quaclrs.config import TrainConfig
    from quaclrs.data.sampling import epoch_order, evaluation_batches
    from quaclrs.loaders import Choice, build_loader
    from quaclrs.loaders.base import LoaderConfig
    from quaclrs.loaders.dataset import open_dataset

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
    opened = time.perf_counter()
    batches = evaluation_batches(epoch_order(np.arange(len(dataset)), seed=0, epoch=1), options.batch_size)
    highest, first, images = before, 0.0, 0
    for batch in loader.load(batches[: options.most_batches]):
        first = first or time.perf_counter()
        highest = max(highest, _resident_bytes())
        images += len(batch)
        del batch
    return {
        "samples": len(dataset),
        "open_s": opened - started,
        "first_batch_s": first - started,
        "images_per_s": (images - options.batch_size) / (time.perf_counter() - first),  # without the first batch
        "resident_mb_before": before / 1e6,
        "resident_mb_added_at_most": (highest - before) / 1e6,
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _report(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    import torch

    for run in runs:
        print(
            f"{run['samples']:,} samples: opened in {run['open_s']:.2f} s, first batch after "
            f"{run['first_batch_s']:.2f} s, "
            f"{run['images_per_s']:,.0f} images/s, {run['resident_mb_added_at_most']:.0f} MB of memory added at most "
            "over an epoch"
        )
    setting = {"batch_size": options.batch_size, "image_size": options.image_size, "num_workers": options.num_workers}
    setting |= {"most_batches": options.most_batches, "simulated": options.records is not None}
    what = "scaling" if options.records else "footprint"
    print(f"written to {write_result(what, runs, setting, torch.device('cpu'), options.results_dir)}")


if __name__ == "__main__":
    sys.exit(main())
