#!/usr/bin/env python3
"""Images per second of packing, loading and training, each beside its baseline and its physical limit, in one run.

    python benchmarks/throughput.py pack
        packing each encoding, against bare decoding of the same files on the same cores
    python benchmarks/throughput.py decode
        loaders that decode PNGs, against a bare DALI pipeline with DALI's own WebDataset reader
    python benchmarks/throughput.py load
        loaders with nothing to decode, against a memory-mapped array with torch
    python benchmarks/throughput.py step
        the trainer's step on one batch that is on the device already: the ceiling of each model
    python benchmarks/throughput.py train
        the trainer's epoch over a loader, against that ceiling
    python benchmarks/throughput.py --all --peers
        pack, decode, load and train, with a result file each and all peers of peers/registry.py; the baseline of
        `load` is then FFCV
    torchrun --nproc_per_node 2 benchmarks/throughput.py load train
        every rank takes its part; images/s are those of all ranks together

Without --csv_file it makes synthetic data. Every batch is touched; one warm-up, then interleaved repeats. Each peer is
checked against Pillow's pixels and gets the number of workers, 0 to the machine's cores, with which it is fastest; ours
have --num_workers. A peer that cannot be installed, or fails, is left out with its reason. The first run with --peers
makes the peers' environments.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.bench_data import use_fewer_images, use_synthetic_data
from harness.contender import Options, Outcome
from harness.packing_speed import measure_packing
from harness.records import OWN_RESULTS, save_outcome
from harness.tables import summary_table
from peers.registry import KEYS

from quaclrs.cli.arguments import Parser, add_dataset_arguments
from quaclrs.cli.demo import cache_root
from quaclrs.config import COMPILERS, ENCODINGS, usable_processors
from quaclrs.errors import UsageError, raised_on_every_rank, run_command

if TYPE_CHECKING:  # spawned workers import this file anew and must not wait for torch
    import torch

_ALL = ("pack", "decode", "load", "train")
_MODES = ("pack", "decode", "load", "step", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    from quaclrs.training.distributed import is_rank, run_rank

    parser = _make_parser()
    options = parser.parse_args(arguments)
    return run_command(
        lambda: run_rank(lambda: _run(options), parser.prog) if is_rank() else _run(options), parser.prog
    )


def _make_parser() -> Parser:
    parser = Parser(prog="throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", type=_mode, metavar="MODE", help=f"any of {', '.join(_MODES)}")
    parser.add_argument("--all", action="store_true", help=", ".join(_ALL))
    parser.add_argument(
        "--peers",
        type=Path,
        nargs="?",
        const=cache_root() / "peers",
        metavar="DIR",
        help="measure all peers, in environments made in DIR (~/.cache/quaclrs/peers) if they are not there",
    )
    add_dataset_arguments(parser)
    parser.add_argument("--work_dir", type=Path, help="where data and shards are made; a temporary folder if not given")
    parser.add_argument(
        "--results_dir", type=Path, default=OWN_RESULTS, help="where result files go (results/benchmarks)"
    )
    parser.add_argument("--samples_per_class", type=int, default=8, help="of the synthetic data, per fold (8)")
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS), choices=ENCODINGS, help="to pack (all)")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64, help="of each rank, in decode and load (64)")
    parser.add_argument(
        "--num_workers", type=int, help="of our own loaders and of packing (the cores, divided among the ranks)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "uint8", "float16"),
        help="decode: float32; load: float32 and uint8, on a GPU float16 too; peers have no float16",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--decode_images", type=int, default=520, metavar="N", help="decode only so many, evenly spaced (520)"
    )
    parser.add_argument("--load_epochs", type=int, default=4, metavar="N", help="epochs in each repeat of `load` (4)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("quaclrs", *KEYS),
        metavar="NAME",
        help=f"load only these: quaclrs (ours), {', '.join(KEYS)}",
    )
    _add_training_flags(parser.add_argument_group("step and train"))
    return parser


def _mode(text: str) -> str:
    if text not in _MODES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a mode; choose among {', '.join(_MODES)}")
    return text


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    models = ("alexnet", "vgg16", "resnet18", "mobilenet", "inception", "efficientnet", "convnext")
    group.add_argument(
        "--models", nargs="+", default=models, choices=models, metavar="NAME", help="all seven if not given"
    )
    group.add_argument(
        "--train_batch_sizes", type=int, nargs="+", metavar="B", help="16 on the CPU, 256 and 32 on a GPU"
    )
    group.add_argument(
        "--compile", nargs="+", choices=COMPILERS, help="none, and at batches up to 32 on one GPU cudagraph"
    )
    group.add_argument("--use_amp", action=argparse.BooleanOptionalAction, help="default: on a GPU yes, on the CPU no")
    group.add_argument(
        "--train_loader", choices=("resident", "mapped", "files", "dali"), help="resident on a GPU, else mapped"
    )
    group.add_argument("--train_encoding", default="indexed", choices=ENCODINGS)
    group.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps of one repeat: 1 to 3 on the CPU, 50 on a GPU"
    )


def _run(options: Options) -> None:
    from quaclrs.training.distributed import joined_world

    with raised_on_every_rank():
        modes = _chosen_modes(options)
        _check_numbers(options)
    with joined_world(options.device) as world:
        with raised_on_every_rank():
            _refuse_in_several_processes(options, modes, world.size)
        options.world, options.log = world, functools.partial(print, flush=True) if world.is_main else _discard
        if options.num_workers is None:
            options.num_workers = max(1, usable_processors() // world.local_size)
        temporary = world.broadcast_object(
            tempfile.mkdtemp(prefix="quaclrs-bench-") if world.is_main and not options.work_dir else ""
        )
        work_dir = Path(temporary or options.work_dir).resolve()
        try:
            _measure_all(modes, options, work_dir)
        finally:
            if temporary and world.local_rank == 0:
                shutil.rmtree(work_dir, ignore_errors=True)


def _chosen_modes(options: Options) -> list[str]:
    chosen = {*options.modes, *(_ALL if options.all else ())}
    if not chosen:
        raise UsageError(
            f"nothing to measure; give --all, or any of {', '.join(_MODES)} (before --peers, which takes a folder)"
        )
    return [mode for mode in _MODES if mode in chosen]


def _check_numbers(options: Options) -> None:
    for name in ("samples_per_class", "batch_size", "num_workers", "repeats", "decode_images", "load_epochs", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: at least 1")
    for size in options.train_batch_sizes or ():
        if size < 2:
            raise UsageError(f"--train_batch_sizes {size}: at least 2, or BatchNorm has nothing to compare")


def _refuse_in_several_processes(options: Options, modes: Sequence[str], processes: int) -> None:
    if processes == 1:
        return
    if options.peers is not None or set(options.only or ()) - {"quaclrs"}:
        flag = f"--peers {options.peers}" if options.peers is not None else f"--only {' '.join(options.only)}"
        raise UsageError(f"{flag}: peers know nothing of {processes} processes; measure them without torchrun")
    if "pack" in modes:
        raise UsageError(
            f"pack: has workers of its own, and {processes} processes would each pack all; leave it out under torchrun"
        )


def _measure_all(modes: Sequence[str], options: Options, work_dir: Path) -> None:
    world = options.world
    with world.main_process_first():
        work_dir.mkdir(parents=True, exist_ok=True)
        if options.csv_file is None:
            use_synthetic_data(options, work_dir / "data")
    outcomes = []
    for mode in modes:
        started = time.perf_counter()
        outcome = _measure(mode, options, work_dir)
        outcomes.append(outcome)
        if world.is_main:
            seconds = time.perf_counter() - started
            setting = {
                "num_workers": options.num_workers,
                "repeats": options.repeats,
                "world_size": world.size,
                "seconds": seconds,
            }
            path = save_outcome(outcome, setting | _measure_machine(outcome.device), options.results_dir)
            print(f"{mode}: {seconds:.0f} s; written to {path}\n", flush=True)
    world.gather(None)  # a barrier: no rank removes files that another still reads
    if len(modes) > 1:
        options.log(summary_table([group for outcome in outcomes for group in outcome.groups]))


@functools.cache
def _measure_machine(device: torch.device) -> dict[str, float]:
    import torch
    from harness.limits import measure_matmul_speed, measure_memory_bandwidth

    return measure_memory_bandwidth(device) | measure_matmul_speed(torch.float32, device)


def _measure(mode: str, options: Options, work_dir: Path) -> Outcome:
    if mode == "pack":
        return measure_packing(options, work_dir)
    if mode in ("step", "train"):
        from harness.training_speed import measure_training

        return measure_training(options, work_dir, train=mode == "train")
    # not at the top: spawned workers of `pack` must not wait for torch
    from harness.loading_speed import measure_loading
    from peers.registry import DECODING, READY

    if mode == "load":
        return measure_loading(READY, options, work_dir)
    with options.world.main_process_first():
        few = use_fewer_images(options, options.decode_images, work_dir / "decode")
    return measure_loading(DECODING, few, work_dir / "decode")


def _discard(text: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
