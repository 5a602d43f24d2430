"""``quaclrs-train``: the command line of the original trainer, and ours. Imports torch only once the flags are read."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quaclrs import __version__
from quaclrs.cli.arguments import Parser, add_dataset_arguments, columns_of
from quaclrs.config import AMP_DTYPES, COMPILERS, PARALLEL, SCHEDULERS, TrainConfig
from quaclrs.errors import UsageError, run_command, told_once

PROGRAM = "quaclrs-train"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    return run_command(lambda: _train(options, given), PROGRAM)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the flags; ``--demo`` changes some defaults, and what is given beside it still counts."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.demo:
        from quaclrs.cli.demo import DEMO_DEFAULTS, PARALLEL_DEMO_DEFAULTS

        parser.set_defaults(**(PARALLEL_DEMO_DEFAULTS if options.parallel else DEMO_DEFAULTS))
        options = parser.parse_args(arguments)
    return options


def to_config(options: argparse.Namespace) -> TrainConfig:
    """The run's configuration. Raises :class:`UsageError` naming a flag whose value cannot work."""
    names = {field.name for field in dataclasses.fields(TrainConfig)} & set(vars(options))
    return TrainConfig(columns=columns_of(options), **{name: getattr(options, name) for name in names})


def _train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    config = to_config(options)

    from quaclrs.training.distributed import is_rank, run_rank
    from quaclrs.training.launcher import launch, processes_wanted

    if is_rank():
        return run_rank(lambda: _train_as_rank(config, options), PROGRAM)
    _refuse_mixed_ways(config, options.distributed, rank=False)
    if options.demo:
        config = _with_demo(config)
    if config.parallel:
        from quaclrs.experiment.fold_pool import run_in_parallel

        _tell(config, run_in_parallel(config, processes_wanted(config.nproc, config.device, "--parallel folds")))
        return 0
    if options.distributed:
        processes = processes_wanted(config.nproc, config.device, "--distributed")
        if processes > 1:
            return launch(arguments, processes)
    _train_here(config, demo=False)
    return 0


def _train_as_rank(config: TrainConfig, options: argparse.Namespace) -> None:
    with told_once():
        _refuse_mixed_ways(config, options.distributed, rank=True)
    _train_here(config, options.demo)


def _train_here(config: TrainConfig, demo: bool) -> None:
    """Train in this process, be it alone or one of several; ``demo`` that its data are still to be made."""
    from quaclrs.experiment.cross_validation import run_cross_validation
    from quaclrs.training.distributed import joined_world
    from quaclrs.training.progress import console_hooks
    from quaclrs.training.trainer import Hooks

    with joined_world(config.device) as world:
        if demo:
            with world.main_process_first():
                config = _with_demo(config)
        if world.is_main:
            _tell(config, run_cross_validation(config, print, console_hooks(config.epochs), world))
        else:
            run_cross_validation(config, lambda text: None, Hooks(), world)


def _with_demo(config: TrainConfig) -> TrainConfig:
    from quaclrs.cli.demo import prepare_demo

    return prepare_demo(config)


def _refuse_mixed_ways(config: TrainConfig, distributed: bool, rank: bool) -> None:
    if config.parallel and distributed:
        raise UsageError(
            "--distributed --parallel folds: processes either share each fold, or take whole folds; give one of the two"
        )
    if config.parallel and rank:
        raise UsageError("--parallel folds: starts its own processes; run it without torchrun")
    if config.nproc is not None and not (config.parallel or distributed):
        raise UsageError(f"--nproc {config.nproc}: is about --distributed or --parallel folds; give one of them")


def _tell(config: TrainConfig, summaries: dict[str, dict[str, Any]]) -> None:
    from quaclrs.experiment.cross_validation import SUMMARY_FILE

    for name, summary in summaries.items():
        spread = "" if summary["std_test_accuracy"] is None else f" ± {summary['std_test_accuracy']:.2%}"
        print(
            f"{name}: test accuracy {summary['mean_test_accuracy']:.2%}{spread} over {summary['num_folds']} fold(s)"
            f"{_originals(summary)}; results in {config.output_dir / name} (start with {SUMMARY_FILE} and fold_*/plots)"
        )


def _originals(summary: dict[str, Any]) -> str:
    accuracy = summary["mean_test_accuracy_originals"]
    return "" if accuracy is None else f", {accuracy:.2%} on originals only"


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Train and test a spectrogram classifier by k-fold cross-validation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--demo", action="store_true", help="make a small synthetic dataset, pack it, and train on it")
    add_dataset_arguments(parser.add_argument_group("data"), show_defaults=True)
    _add_data_arguments(parser.add_argument_group("reading"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_training_arguments(parser.add_argument_group("training"))
    _add_run_arguments(parser.add_argument_group("run"))
    return parser


def _add(group: Any, name: str, help_text: str, **options: Any) -> None:
    """A flag whose default is the one of :class:`TrainConfig`."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    group.add_argument(f"--{name}", default=fields[name].default, help=help_text, **options)


def _add_data_arguments(group: Any) -> None:
    _add(
        group,
        "shards",
        "folder of quaclrs-pack; without it, the CSV's images are packed once",
        type=Path,
        metavar="DIR",
    )
    _add(group, "loader", "auto, resident, mapped, dali or files (Pillow)")
    _add(group, "num_workers", "processes or threads that read and decode", type=int, metavar="N")
    _add(group, "prefetch", "batches made ahead, where they are read from disk", type=int, metavar="N")
    _add(group, "image_size", "pixels; the model's own size if not given", type=int, metavar="S")


def _add_model_arguments(group: Any) -> None:
    _add(
        group,
        "model_name",
        "alexnet, vgg16, resnet18, mobilenet, inception, efficientnet or convnext; several with commas, or all",
    )
    _add(group, "pretrained", "start from ImageNet weights", action="store_true")
    _add(group, "freeze_features", "train the head only", action="store_true")


def _add_training_arguments(group: Any) -> None:
    _add(group, "batch_size", "samples per step and process", type=int, metavar="B")
    _add(group, "epochs", "at most", type=int, metavar="N")
    _add(group, "patience", "epochs without a better validation accuracy before stopping", type=int, metavar="N")
    _add(group, "learning_rate", "Adam's", type=float, metavar="LR")
    _add(group, "weight_decay", "Adam's", type=float, metavar="WD")
    _add(
        group,
        "scheduler",
        "plateau halves the learning rate when validation stalls; cosine anneals it",
        choices=SCHEDULERS,
    )
    _add(group, "use_amp", "automatic mixed precision", action="store_true")
    _add(
        group,
        "amp_dtype",
        "what it computes in; by default bfloat16 where the GPU is fast with it, else float16",
        choices=AMP_DTYPES,
    )
    _add(group, "tf32", "let float32 on a GPU round to TF32, which is faster", action="store_true")
    _add(
        group,
        "compile",
        "inductor: torch.compile; cudagraph: capture each whole step, for small batches",
        choices=COMPILERS,
    )
    _add(group, "sync_bn", "BatchNorm over the batches of all GPUs", action="store_true")
    _add(group, "seed", "of weights and order", type=int)


def _add_run_arguments(group: Any) -> None:
    _add(group, "fold", "test this fold only; all folds if not given", type=int, metavar="K")
    _add(group, "num_folds", "folds of the protocol", type=int, metavar="K")
    _add(group, "device", "auto, cpu, cuda or cuda:N")
    _add(group, "output_dir", "results go to {output_dir}/{model_name}/fold_{k}", type=Path, metavar="DIR")
    _add(group, "resume", "go on where an interrupted run stopped; finished folds are kept", action="store_true")
    _add(group, "keep_checkpoints", "regular checkpoints to keep per fold", type=int, metavar="N")
    _add(group, "gradcam_per_class", "Grad-CAM images per class; 0 for none", type=int, metavar="N")
    _add(
        group,
        "checkpoint_minutes",
        "also write a checkpoint within an epoch each time so long has passed",
        type=float,
        metavar="MIN",
    )
    _add(
        group, "profile", "write a profile of some steps of the first epoch, and what bounds them", action="store_true"
    )
    group.add_argument(
        "--distributed", action="store_true", help="each fold on all GPUs of this machine (elsewhere, use torchrun)"
    )
    _add(group, "parallel", "folds: one process per GPU, each training whole folds", choices=PARALLEL)
    _add(group, "nproc", "processes of the two above; needed on the CPU", type=int, metavar="N")
