#!/usr/bin/env python3
"""Make a synthetic dataset with the geometry and the traps of the real one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quaclrs.cli.arguments import Parser
from quaclrs.config import default_num_workers
from quaclrs.errors import run_command
from quaclrs.synthesize import SynthesisConfig, SynthesisSummary, synthesize_dataset


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="synthesize_dataset.py", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--samples_per_class", type=int, default=8, metavar="N", help="rows per class and fold; 445: real size, 7 GB"
    )
    parser.add_argument("--folds", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--num_workers", type=int, default=default_num_workers(), metavar="N", help="processes")
    return parser.parse_args(arguments)


def summary_line(summary: SynthesisSummary) -> str:
    what = f"{summary.rows:,} rows in {summary.files:,} files, {summary.total_bytes / 1e6:,.1f} MB"
    if summary.drawn == 0:
        return f"{what}; all were there already"
    mean_kb = summary.total_bytes / summary.files / 1e3
    pace = f"{summary.drawn:,} drawn in {summary.seconds:.1f} s, {summary.images_per_second:.0f} images/s"
    return f"{what} ({mean_kb:.0f} kB each); {pace}"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    def command() -> None:
        summary = synthesize_dataset(SynthesisConfig(**vars(options)), progress=True)
        print(summary_line(summary))
        print(f"CSV: {summary.csv_file}\nimages: {summary.spectrograms_dir}")

    return run_command(command, "synthesize_dataset.py")


if __name__ == "__main__":
    sys.exit(main())
