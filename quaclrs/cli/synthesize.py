"""``quaclrs-synthesize``: make a synthetic dataset with the geometry and the traps of the real one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quaclrs.cli.arguments import Parser, add_version_argument
from quaclrs.config import usable_processors
from quaclrs.errors import run_command
from quaclrs.system.console import tolerant_output

if TYPE_CHECKING:
    from quaclrs.synthesize import SynthesisSummary

PROGRAM = "quaclrs-synthesize"


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Run the command line; returns the exit code. ``program`` is the name that messages begin with."""
    with tolerant_output(program):
        options = build_parser(program).parse_args(arguments)
        return run_command(lambda: _synthesize(options), program)


def build_parser(program: str = PROGRAM) -> Parser:
    """All flags of ``quaclrs-synthesize``."""
    parser = Parser(
        prog=program, description="Make a synthetic dataset with the geometry and the traps of the real one."
    )
    add_version_argument(parser)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--samples_per_class", type=int, default=8, metavar="N", help="rows per class and fold; 445: real size, 7 GB"
    )
    parser.add_argument("--folds", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--num_workers", type=int, default=usable_processors(), metavar="N", help="processes")
    return parser


def _synthesize(options: argparse.Namespace) -> None:
    from quaclrs.synthesize import SynthesisConfig, synthesize_dataset

    summary = synthesize_dataset(SynthesisConfig(**vars(options)), progress=True)
    print(_summary_line(summary))
    print(f"CSV: {summary.csv_file}\nimages: {summary.spectrograms_dir}")


def _summary_line(summary: SynthesisSummary) -> str:
    what = f"{summary.rows:,} rows in {summary.files:,} files, {summary.total_bytes / 1e6:,.1f} MB"
    if summary.drawn == 0:
        return f"{what}; all were there already"
    mean_kb = summary.total_bytes / summary.files / 1e3
    pace = f"{summary.drawn:,} drawn in {summary.seconds:.1f} s, {summary.images_per_second:.0f} images/s"
    return f"{what} ({mean_kb:.0f} kB each); {pace}"
