"""``quaclrs-train``: parses the original trainer's flags and ours, then calls experiment/.

The flags derive from the fields of :class:`TrainConfig`. torch is imported only after they are parsed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quaclrs import __version__
from quaclrs.cli.arguments import Parser, add_dataset_arguments, columns_of
from quaclrs.config import TrainConfig
from quaclrs.errors import UsageError, raised_on_every_rank, run_command
from quaclrs.system.console import tolerant_output
from quaclrs.training.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from quaclrs.experiment.results import Summary

PROGRAM = "quaclrs-train"
_SEVERAL = "several processes"
_GROUPS = ("reading", "model", "training", "run", _SEVERAL)
"""Headings of ``--help``, each with the settings of that ``group``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with tolerant_output(PROGRAM):
        options = parse(given)
        return run_command(lambda: _run(options, given), PROGRAM)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. ``--demo`` changes some defaults; explicit flags override them."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.demo:
        from quaclrs.cli.demo import DEMO_DEFAULTS, PARALLEL_DEMO_DEFAULTS

        parser.set_defaults(**(PARALLEL_DEMO_DEFAULTS if options.parallel else DEMO_DEFAULTS))
        options = parser.parse_args(arguments)
    return options


def to_config(options: argparse.Namespace) -> TrainConfig:
    """Build the run's configuration. Raises :class:`UsageError` naming a flag whose value cannot work."""
    names = {field.name for field in dataclasses.fields(TrainConfig)} & set(vars(options))
    return TrainConfig(columns=columns_of(options), **{name: getattr(options, name) for name in names})


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    config = to_config(options)

    from quaclrs.training.distributed import is_rank, run_rank
    from quaclrs.training.launcher import launch, processes_wanted

    if is_rank():
        return run_rank(lambda: _train_as_rank(config, options), PROGRAM)
    _refuse_conflicting_flags(config, options.distributed, rank=False)
    if options.demo:
        config = _prepare_demo_data(config)
    if config.parallel:
        from quaclrs.experiment.fold_pool import run_in_parallel

        _print_summaries(
            config, run_in_parallel(config, processes_wanted(config.nproc, config.device, "--parallel folds"))
        )
        return 0
    if options.distributed:
        processes = processes_wanted(config.nproc, config.device, "--distributed")
        if processes > 1:
            return launch(arguments, processes)
    _train_here(config, demo=False)
    return 0


def _train_as_rank(config: TrainConfig, options: argparse.Namespace) -> None:
    with raised_on_every_rank():
        _refuse_conflicting_flags(config, options.distributed, rank=True)
    _train_here(config, options.demo)


def _train_here(config: TrainConfig, demo: bool) -> None:
    """Train in this process, alone or as one of several; ``demo``: make the demo's dataset first."""
    from quaclrs.experiment.cross_validation import run_cross_validation
    from quaclrs.training.distributed import joined_world
    from quaclrs.training.progress import console_hooks
    from quaclrs.training.trainer import Hooks

    with joined_world(config.device) as world:
        if demo:
            with world.main_process_first():
                config = _prepare_demo_data(config)
        if world.is_main:
            _print_summaries(config, run_cross_validation(config, print, console_hooks(config.epochs), world))
        else:
            run_cross_validation(config, lambda text: None, Hooks(), world)


def _prepare_demo_data(config: TrainConfig) -> TrainConfig:
    from quaclrs.cli.demo import prepare_demo

    return prepare_demo(config)


def _refuse_conflicting_flags(config: TrainConfig, distributed: bool, rank: bool) -> None:
    """Raise :class:`UsageError` for ways of using several processes that exclude each other."""
    if config.parallel and distributed:
        raise UsageError(
            "--distributed --parallel folds: processes either share each fold, or take whole folds; give one of the two"
        )
    if config.parallel and rank:
        raise UsageError("--parallel folds: starts its own processes; run it without torchrun")
    if config.nproc is not None and not (config.parallel or distributed):
        raise UsageError(f"--nproc {config.nproc}: is about --distributed or --parallel folds; give one of them")


def _print_summaries(config: TrainConfig, summaries: dict[str, Summary]) -> None:
    from quaclrs.experiment.results import SUMMARY_FILE

    for name, summary in summaries.items():
        std, originals = summary.std("test_accuracy"), summary.mean("test_accuracy_originals")
        print(
            f"{name}: test accuracy {summary.mean('test_accuracy'):.2%}{'' if std is None else f' ± {std:.2%}'} "
            f"over {len(summary.folds)} fold(s)"
            f"{'' if originals is None else f', {originals:.2%} on originals only'}; "
            f"results in {config.output_dir / name} (start with {SUMMARY_FILE} and fold_*/plots)"
        )


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Train and test a spectrogram classifier by k-fold cross-validation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--demo", action="store_true", help="make a small synthetic dataset, pack it, and train on it")
    add_dataset_arguments(parser.add_argument_group("data"), show_defaults=True)
    types = typing.get_type_hints(TrainConfig)
    for name in _GROUPS:
        group = parser.add_argument_group(name)
        if name == _SEVERAL:
            help_text = "each fold on all GPUs of this machine (elsewhere, use torchrun)"
            group.add_argument("--distributed", action="store_true", help=help_text)
        for field in dataclasses.fields(TrainConfig):
            if field.metadata["group"] == name:
                _add_flag(group, field, types[field.name])
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], declared: Any) -> None:
    """Add the flag of one field of :class:`TrainConfig`; its type is ``int`` for one declared ``int | None``."""
    *first, last = ARCHITECTURES
    help_text = field.metadata["help"].replace("{architectures}", f"{', '.join(first)} or {last}")
    options: dict[str, Any] = {"default": field.default, "help": help_text}
    field_type = next((part for part in typing.get_args(declared) if part is not type(None)), declared)
    if field_type is bool:
        options["action"] = "store_true"
    else:
        choices = field.metadata["choices"]  # refused by TrainConfig, which names the nearest
        metavar = f"{{{','.join(choices)}}}" if choices else field.metadata["metavar"]
        options |= {"type": field_type, "metavar": metavar}
    group.add_argument(f"--{field.name}", **options)
