#!/usr/bin/env python3
"""Show a shard folder, check every promise of it, or restore the files it was packed from."""

from __future__ import annotations

import sys
from pathlib import Path

from quaclrs.cli.arguments import Parser
from quaclrs.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="inspect_shards.py", description=__doc__)
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
    options = parser.parse_args(arguments)

    def command() -> None:
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

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
