#!/usr/bin/env python3
"""Draws result files: each group of contenders as bars with their spread, costs of datasets of other sizes as points.

    python benchmarks/plot.py benchmarks/results/load_*.json --output_dir figures

Writes one PNG per result file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.records import Row, read_record

from quaclrs.cli.arguments import Parser
from quaclrs.errors import DataError, run_command
from quaclrs.system.atomic_files import make_folder
from quaclrs.system.matplotlib_import import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALING = {
    "first_batch_s": "seconds to the first batch",
    "resident_mb_added_at_most": "memory added, MB",
    "images_per_s": "images/s",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="plot.py", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="files of benchmarks/results")
    parser.add_argument("--output_dir", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    def command() -> None:
        make_folder(options.output_dir)
        for path in options.results:
            print(plot_result(path, options.output_dir / f"{path.stem}.png"))

    return run_command(command, parser.prog)


def plot_result(result: Path, image: Path) -> Path:
    """Draw ``result`` to ``image`` and return ``image``. Raises :class:`DataError` for a file that is no result."""
    import_matplotlib()
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    try:
        document = read_record(result)
        rows, environment = document["rows"], document["environment"]
        draw = _draw_scaling if "samples" in rows[0] else _draw_groups
        figure = draw(rows)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{result}: not a result of benchmarks/ ({type(error).__name__}: {error}); name files it wrote"
        ) from None
    hardware = environment.get("gpu", {}).get("name") or f"{environment['cpus_usable']} cores, {environment['cpu']}"
    figure.suptitle(
        f"{document['what']}: {hardware}, torch {environment['packages']['torch']}, {document['date']}", fontsize=9
    )
    figure.savefig(image, dpi=110)
    plt.close(figure)
    return image


def _draw_groups(rows: list[Row]) -> Figure:
    """Draw each group as horizontal bars; the whiskers span the slowest and the fastest repeat."""
    import matplotlib.pyplot as plt

    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "left_out" not in row:
            groups.setdefault(row["group"], []).append(row)
    heights = [len(group) for group in groups.values()]
    height = 0.9 + 0.36 * sum(heights) + 0.7 * len(groups)
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8, height), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
        medians = [row["median_images_per_s"] for row in group]
        spread = [
            [row["median_images_per_s"] - min(row["images_per_s"]) for row in group],
            [max(row["images_per_s"]) - row["median_images_per_s"] for row in group],
        ]
        axis.barh(
            [row["name"] for row in group], medians, xerr=spread, color=[_bar_colour(row) for row in group], capsize=2
        )
        axis.invert_yaxis()
        axis.set_title(f"{name} (grey: what ratios are to; orange: a limit of the machine)", loc="left", fontsize=9)
        axis.set_xlabel("images/s", fontsize=8)
        axis.tick_params(labelsize=8)
    return figure


def _bar_colour(row: Row) -> str:
    if row["facts"].get("limit"):
        return "tab:orange"
    return "tab:gray" if row["name"] == row["baseline"] else "tab:blue"


def _draw_scaling(rows: list[Row]) -> Figure:
    """Draw one small axis per cost, over the number of samples."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(_SCALING), figsize=(9, 3), layout="constrained")
    for axis, (field, label) in zip(axes, _SCALING.items(), strict=True):
        axis.plot([row["samples"] for row in rows], [row[field] for row in rows], "o")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("samples", fontsize=8)
        axis.set_title(label, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
