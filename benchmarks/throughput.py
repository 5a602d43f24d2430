#!/usr/bin/env python3
"""Images per second of packing, of loading and of training, each beside its yardstick, in one run.

    python benchmarks/throughput.py pack     packing png shards, against bare decoding of the same files on the same cores
    python benchmarks/throughput.py decode   loaders that decode PNGs, against a bare DALI pipeline with DALI's own WebDataset reader
    python benchmarks/throughput.py load     loaders with nothing to decode, against a memory-mapped array with torch
                                             --peers DIR adds all of peers/registry.py to both, and compares the latter with FFCV
    python benchmarks/throughput.py step     the trainer's step on one batch that is on the device already: the ceiling of each model
    python benchmarks/throughput.py train    the trainer's epoch over a loader, against that ceiling
    python benchmarks/throughput.py all      pack, decode, load and train, a result file each

Without --csv_file it makes its own synthetic data. Every batch is touched; one warm-up, then interleaved repeats. Each peer is checked
against Pillow's pixels, and given the number of workers, 0 to the machine's cores, with which it is fastest; ours have --num_workers.
A peer that cannot be installed, or fails, is left out with its reason.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_data import fewer_pictures, make_data
from measure import Outcome, save
from packing_speed import measure_packing
from peers.registry import KEYS

from quaclrs.arguments import Parser, add_dataset_arguments
from quaclrs.config import COMPILERS, ENCODINGS, default_num_workers
from quaclrs.errors import run_command

_MODES = ("pack", "decode", "load", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="throughput.py", description=__doc__)
    parser.add_argument("mode", choices=(*_MODES, "step", "all"))
    add_dataset_arguments(parser)
    parser.add_argument("--work_dir", type=Path, help="where data and shards are made; a temporary folder if not given")
    parser.add_argument("--samples_per_class", type=int, default=8, help="of the synthetic data, per fold")
    parser.add_argument("--encodings", nargs="+", default=ENCODINGS, choices=ENCODINGS, help="to pack")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=default_num_workers(), help="of our own loaders, and for packing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "uint8"), choices=("float32", "uint8"), help="to load")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode_images", type=int, default=520, metavar="N", help="decode only so many, spread over the dataset")
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="measure all peers, in environments made in DIR if they are not there"
    )
    parser.add_argument(
        "--only", nargs="+", choices=("quaclrs", *KEYS), metavar="NAME", help=f"load only these: quaclrs (ours), {', '.join(KEYS)}"
    )
    _add_training_flags(parser.add_argument_group("step and train"))
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options), parser.prog)


def _add_training_flags(group: Any) -> None:
    models = ("alexnet", "vgg16", "resnet18", "mobilenet", "inception", "efficientnet", "convnext")
    group.add_argument("--models", nargs="+", default=models, choices=models, metavar="NAME", help="all seven if not given")
    group.add_argument("--train_batch_sizes", type=int, nargs="+", metavar="B", help="16 on the CPU, 256 and 32 on a GPU")
    group.add_argument("--compile", nargs="+", choices=COMPILERS, help="none, and at batches up to 32 on a GPU cudagraph")
    group.add_argument("--use_amp", action=argparse.BooleanOptionalAction, help="on a GPU yes, on the CPU no")
    group.add_argument("--train_loader", choices=("resident", "mapped", "files", "dali"), help="resident on a GPU, else mapped")
    group.add_argument("--train_encoding", default="indexed", choices=ENCODINGS)
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps of one repeat: 3 on the CPU, 50 on a GPU")


def _run(options: Any) -> None:
    work_dir = (options.work_dir or Path(tempfile.mkdtemp(prefix="quaclrs-bench-"))).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    try:
        if options.csv_file is None:
            make_data(options, work_dir / "data")
        for mode in _MODES if options.mode == "all" else (options.mode,):
            outcome = _measure(mode, options, work_dir)
            setting = outcome.setting | {"num_workers": options.num_workers, "repeats": options.repeats}
            print(f"written to {save(outcome.what, outcome.groups, setting, outcome.device)}", flush=True)
    finally:
        if options.work_dir is None:
            shutil.rmtree(work_dir, ignore_errors=True)


def _measure(mode: str, options: Any, work_dir: Path) -> Outcome:
    if mode == "pack":
        return measure_packing(options, work_dir)
    if mode in ("step", "train"):
        from training_speed import measure_training

        return measure_training(options, work_dir, train=mode == "train")
    from loading_speed import measure_loading  # imports torch, for which spawned workers of `pack` shall not wait
    from peers.registry import DECODING, READY

    if mode == "load":
        return measure_loading(READY, options, work_dir)
    few = fewer_pictures(options, options.decode_images, work_dir / "decode")
    return measure_loading(DECODING, few, work_dir / "decode")


if __name__ == "__main__":
    sys.exit(main())
