#!/usr/bin/env python3
"""Pack a CSV and its PNG tree into per-fold WebDataset shards, once. The format is described in
quaclrs/shards/format.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from quaclrs.cli.arguments import Parser, add_dataset_arguments, columns_of
from quaclrs.config import (
    DEFAULT_IMAGE_SIZE,
    ENCODINGS,
    ON_ERROR,
    PackConfig,
    default_num_workers,
    folds_text,
    parse_bytes,
    parse_folds,
)
from quaclrs.errors import run_command

_ENCODING_HELP = "png keeps the files' bytes; indexed keeps colour-mapped grids, lossless and smaller; rgb resizes once"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="shard_dataset.py", description=__doc__)
    add_dataset_arguments(parser)
    parser.add_argument(
        "--from_shards", type=Path, metavar="SHARDS", help="png shards to pack from, in place of CSV and folder"
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="SHARDS", help="folder for the shards")
    parser.add_argument("--encoding", default="png", metavar="|".join(ENCODINGS), help=_ENCODING_HELP)
    parser.add_argument("--image_size", type=int, default=DEFAULT_IMAGE_SIZE, help="pixels, for --encoding rgb")
    parser.add_argument("--shard_size", default="256MiB", help="upper bound of one tar")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling inside each fold")
    parser.add_argument("--num_workers", type=int, default=default_num_workers(), help="processes")
    parser.add_argument("--on_error", default="stop", metavar="|".join(ON_ERROR), help="what to do about a bad image")
    parser.add_argument(
        "--folds", metavar="1-3,7", help="pack only these; other calls, at the same time or later, pack the others"
    )
    options = parser.parse_args(arguments)

    def command() -> None:
        from quaclrs.shards.packing.pack import pack
        from quaclrs.shards.packing.summary import describe_packing, indexing_advice
        from quaclrs.shards.reader import ShardSet

        config = PackConfig(
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

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
