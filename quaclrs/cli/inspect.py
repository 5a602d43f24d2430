"""``quaclrs-inspect``: show a shard folder, check every promise of it, or restore the files it was packed from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from quaclrs.cli.arguments import Parser, add_version_argument
from quaclrs.errors import run_command
from quaclrs.system.console import exit_code_of_output, tolerant_output

PROGRAM = "quaclrs-inspect"


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Run the command line; returns the exit code. ``program`` is the name that messages begin with."""
    with tolerant_output(program) as out:
        options = build_parser(program).parse_args(arguments)
        return run_command(lambda: _inspect(options), program) or exit_code_of_output(out)


def build_parser(program: str = PROGRAM) -> Parser:
    """``info``, ``verify`` and ``export``, each a subcommand with the shard folder as its argument."""
    parser = Parser(
        prog=program,
        description="Show a shard folder, check every promise of it, or restore the files it was packed from.",
    )
    add_version_argument(parser)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, help_text in (
        ("info", "what the shards hold"),
        ("verify", "hashes, counts, labels, rows, every image, and the DALI index"),
        ("export", "restore the CSV and the images (png: byte for byte)"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("shards", type=Path, metavar="SHARDS")
        if name == "export":
            action.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    return parser


def _inspect(options: argparse.Namespace) -> None:
    from quaclrs.shards.packing.summary import describe_shards
    from quaclrs.shards.reader import ShardSet
    from quaclrs.shards.verify import export, verify

    if options.action == "info":
        with ShardSet(options.shards) as shards:
            print(describe_shards(shards))
    elif options.action == "verify":
        print(f"{options.shards}: all promises kept by {verify(options.shards, progress=True)} samples")
    else:
        written = export(options.shards, options.output_dir, progress=True)
        print(f"{options.output_dir}: {written} files written")
