#!/usr/bin/env python3
"""Writes the tables of both READMEs from the newest result files, so that no figure is typed by hand.

python benchmarks/readme_tables.py           rewrite what stands between ``<!-- table: NAME -->`` and ``<!-- /table
-->`` python benchmarks/readme_tables.py --check   only say whether the READMEs are what the results make of them
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import targets
from harness.records import RESULTS, Record, Row, find_row, newest, newest_path

from quaclrs.cli.arguments import Parser
from quaclrs.errors import DataError, run_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_NOT_YET = "Not measured yet.\n"

Column = tuple[str, Callable[[Row], str]]
"""Its head, and a row's cell."""


def _fact(name: str, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get("facts", {}).get(name)
        return "" if value is None else form.format(value)

    return cell


def rate(images_per_s: float) -> str:
    """images/s with as many digits as mean something."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def _spread(row: Row) -> str:
    return f"{rate(min(row['images_per_s']))} – {rate(max(row['images_per_s']))}"


def _ratio(row: Row) -> str:
    value = None if _is_limit(row) else row["ratio_to_baseline"]
    return "" if value is None else f"{value:.2f}"


def _bound(row: Row) -> str:
    return "the limit itself" if _is_limit(row) else row["facts"].get("bound_by", "")


def _is_limit(row: Row) -> bool:
    return bool(row.get("facts", {}).get("limit"))


_RATES: tuple[Column, ...] = (
    ("images/s", lambda row: rate(row["median_images_per_s"])),
    ("slowest – fastest", _spread),
)
_LIMIT: tuple[Column, ...] = (("of the limit", _fact("share_of_limit", "{:.2f}")), ("bound by", _bound))
_LOADING: tuple[Column, ...] = (
    ("workers", _fact("num_workers", "{}")),
    ("first batch, s", _fact("first_batch_s", "{:.3f}")),
    ("memory, MB", _fact("host_peak_mb", "{:,.0f}")),
    ("bytes an image", _fact("bytes_per_image", "{:,.0f}")),
)


def _table(head: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    if not rows:
        return _NOT_YET
    lines = [f"| {' | '.join([head, *(name for name, _ in columns)])} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        nothing = (
            [f"left out: {row['left_out']}".replace("|", "\\|"), *[""] * (len(columns) - 1)]
            if "left_out" in row
            else []
        )
        lines.append(f"| {' | '.join([row['name'], *(nothing or [cell(row) for _, cell in columns])])} |")
    return "\n".join(lines) + "\n"


def _race(record: Record, group: str, columns: Sequence[Column]) -> str:
    """One group of ``record`` as a table."""
    rows = [row for row in record["rows"] if row["group"].endswith(group)]
    baseline = next((row["baseline"] for row in rows if "baseline" in row), "")
    return _table("", [*_RATES, (f"against {baseline}", _ratio), *columns], rows)


def _load_short(record: Record) -> str:
    """Both dtypes side by side, limits last."""
    names = list(dict.fromkeys(row["name"] for row in record["rows"]))
    against = [
        next((row["baseline"] for row in record["rows"] if row["group"].endswith(dtype) and "baseline" in row), "")
        for dtype in ("float32", "uint8")
    ]
    lines = [
        f"| images/s | float32, normalised | against {against[0]} | uint8 | against {against[1]} |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        rows = [find_row(record, name, dtype) for dtype in ("float32", "uint8")]
        if any(row is not None and not _is_limit(row) for row in rows):
            cells = [
                part
                for row in rows
                for part in (("", "") if row is None else (rate(row["median_images_per_s"]), _ratio(row)))
            ]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def _train(record: Record) -> str:
    """A line for each model: ceiling, trained, limit of the arithmetic."""
    lines = [
        "| images/s | ceiling | trained | share of the ceiling | waiting for data | arithmetic allows | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(row["group"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["group"] == group]
        ceiling = next(row for row in rows if row["name"] == row["baseline"])
        trained = next(row for row in rows if row["name"].startswith("train, "))
        limit = next((row for row in rows if _is_limit(row)), None)
        cells = [
            rate(ceiling["median_images_per_s"]),
            rate(trained["median_images_per_s"]),
            _ratio(trained),
            f"{trained['facts']['data_wait']:.1%}".replace("%", " %"),
            "" if limit is None else rate(limit["median_images_per_s"]),
            _bound(trained),
        ]
        lines.append(f"| {' | '.join([group, *cells])} |")
    return "\n".join(lines) + "\n"


def _scaling(record: Record) -> str:
    lines = ["| samples | opened, s | first batch, s | images/s | memory added, MB |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        opened = f"{row['open_s']:.2f}" if "open_s" in row else ""
        samples = f"{row['samples']:,}"
        figures = [
            opened,
            f"{row['first_batch_s']:.2f}",
            rate(row["images_per_s"]),
            f"{row['resident_mb_added_at_most']:,.0f}",
        ]
        lines.append(f"| {' | '.join([samples, *figures])} |")
    return "\n".join(lines) + "\n"


def _machine(record: Record) -> str:
    environment, setting = record["environment"], record["setting"]
    hardware = environment.get("gpu", {}).get("name") or f"{environment['cpus_usable']} cores, no GPU"
    text = (
        f"{environment['cpu']}, {hardware}; Python {environment['python']}, torch "
        f"{environment['packages']['torch']}; {record['date']}."
    )
    if "memory_write_gb_per_s" in setting:
        text += (
            f" Its limits: memory written at {setting['memory_write_gb_per_s']:.1f} GB/s, copied at "
            f"{setting['memory_copy_gb_per_s']:.1f} GB/s (bytes read and written), a float32 matrix product at "
            f"{setting['matmul_float32_gflop_per_s']:.0f} GFLOP/s."
        )
    return text + "\n"


BLOCKS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "load_short": ("load", _load_short),
    "machine": ("load", _machine),
    "load_float32": ("load", lambda record: _race(record, "float32", [*_LIMIT, *_LOADING])),
    "load_uint8": ("load", lambda record: _race(record, "uint8", [*_LIMIT, *_LOADING])),
    "decode": ("decode", lambda record: _race(record, "float32", [*_LIMIT, *_LOADING])),
    "train": ("train", _train),
    "pack": ("pack", lambda record: _race(record, "packing", _LIMIT)),
    "synthesis": (
        "pack",
        lambda record: _table("", _RATES, [row for row in record["rows"] if row["name"] == "synthesis"]),
    ),
    "scaling": ("scaling", _scaling),
}
"""Name of each block to the kind of result file it is made of, and how; ``targets`` takes several, ``figure_KIND`` is
an image.
"""


def block(name: str, folder: Path = RESULTS) -> str:
    """The Markdown of one block. Raises :class:`DataError` for a name that is none."""
    if name == "targets":
        return targets.markdown(folder) + "\n"
    if name.startswith("figure_"):
        return _figure(name.removeprefix("figure_"), folder)
    if name not in BLOCKS:
        raise DataError(
            f"<!-- table: {name} -->: no such table; choose among targets, figure_KIND, {', '.join(BLOCKS)}"
        )
    what, make = BLOCKS[name]
    record = newest(what, folder=folder)
    return _NOT_YET if record is None else make(record)


def _figure(what: str, folder: Path) -> str:
    """The image that plot.py made of the newest result of ``what``, where it has; seen from benchmarks/README.md."""
    path = newest_path(what, folder=folder)
    image = None if path is None else path.with_suffix(".png")
    return f"![{what}](results/{image.name})\n" if image is not None and image.is_file() else _NOT_YET


def rendered(text: str, folder: Path = RESULTS) -> str:
    """``text`` with every block made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{block(match[2], folder)}{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="readme_tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 2 if something would change")
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(options.check), parser.prog)


def _write(only_check: bool) -> None:
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if before == after:
            continue
        if only_check:
            raise DataError(
                f"{path.relative_to(ROOT)}: its tables are not those of benchmarks/results; run "
                "benchmarks/readme_tables.py"
            )
        path.write_text(after, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: tables rewritten")


if __name__ == "__main__":
    sys.exit(main())
