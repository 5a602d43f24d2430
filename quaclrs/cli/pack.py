"""``quaclrs-pack``: pack a CSV and its PNG tree into per-fold WebDataset shards, once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from quaclrs.cli.arguments import Parser, add_dataset_arguments, add_version_argument, columns_of
from quaclrs.config import (
    DEFAULT_IMAGE_SIZE,
    ENCODINGS,
    ON_ERROR,
    PackConfig,
    folds_text,
    parse_bytes,
    parse_folds,
    usable_processors,
)
from quaclrs.errors import run_command
from quaclrs.system.console import tolerant_output

PROGRAM = "quaclrs-pack"


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Run the command line; returns the exit code. ``program`` is the name that messages begin with."""
    with tolerant_output(program):
        options = build_parser(program).parse_args(arguments)
        return run_command(lambda: _pack(to_config(options)), program)


def build_parser(program: str = PROGRAM) -> Parser:
    """All flags of ``quaclrs-pack``."""
    parser = Parser(
        prog=program,
        description="Pack a CSV and its PNG tree into per-fold WebDataset shards, once. Run it again to "
        "go on after an interruption.",
    )
    add_version_argument(parser)
    add_dataset_arguments(parser)
    parser.add_argument(
        "--from_shards", type=Path, metavar="SHARDS", help="png shards to pack from, in place of CSV and folder"
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="SHARDS", help="folder for the shards")
    encoding_help = "; ".join(f"{name} {words}" for name, words in ENCODINGS.items())
    parser.add_argument("--encoding", default="png", metavar="|".join(ENCODINGS), help=encoding_help)
    parser.add_argument("--image_size", type=int, default=DEFAULT_IMAGE_SIZE, help="pixels, for --encoding rgb")
    parser.add_argument("--shard_size", default="256MiB", help="upper bound of one tar")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling inside each fold")
    parser.add_argument("--num_workers", type=int, default=usable_processors(), help="processes")
    parser.add_argument("--on_error", default="stop", metavar="|".join(ON_ERROR), help="what to do about a bad image")
    parser.add_argument(
        "--folds", metavar="1-3,7", help="pack only these; other calls, at the same time or later, pack the others"
    )
    return parser


def to_config(options: argparse.Namespace) -> PackConfig:
    """The packing that ``options`` describe. Raises :class:`UsageError` naming a flag whose value cannot work."""
    return PackConfig(
        csv_file=options.csv_file,
        spectrograms_dir=options.spectrograms_dir,
        from_shards=options.from_shards,
        output_dir=options.output_dir,
        encoding=options.encoding,
        image_size=options.image_size,
        shard_size=parse_bytes(options.shard_size),
        seed=options.seed,
        num_workers=options.num_workers,
        on_error=options.on_error,
        folds=None if options.folds is None else parse_folds(options.folds),
        columns=columns_of(options),
    )


def _pack(config: PackConfig) -> None:
    from quaclrs.shards.packing.pack import pack
    from quaclrs.shards.packing.summary import describe_packing, indexing_advice
    from quaclrs.shards.reader import ShardSet

    summary = pack(config, progress=True)
    print(describe_packing(summary, config.output_dir))
    if summary.missing_folds:
        missing = folds_text(summary.missing_folds)
        print(
            f"{config.output_dir}: fold(s) {missing} are not there yet; the call that finds all folds there writes "
            "the manifest"
        )
        return
    with ShardSet(config.output_dir) as shards:
        advice = indexing_advice(shards)
    if advice:
        print(advice)
