#!/usr/bin/env python3
"""Writes the tables of both READMEs from the newest result files, so that no figure is typed by hand.

python benchmarks/readme_tables.py
    rewrite what stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``
python benchmarks/readme_tables.py --check
    change nothing; fail if the READMEs differ from what the result files give
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import targets
from harness.records import RESULTS, Record, Row, find_row, newest_path, newest_record
from harness.tables import format_rate

from quaclrs.cli.arguments import Parser
from quaclrs.errors import DataError, run_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_NOT_YET = "Not measured yet.\n"

Column = tuple[str, Callable[[Row], str]]
"""A column's head, and the cell of a row."""


def _fact_cell(name: str, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get("facts", {}).get(name)
        return "" if value is None else form.format(value)

    return cell


def _spread_cell(row: Row) -> str:
    return f"{format_rate(min(row['images_per_s']))} – {format_rate(max(row['images_per_s']))}"


def _ratio_cell(row: Row) -> str:
    value = None if _is_limit(row) else row["ratio_to_baseline"]
    return "" if value is None else f"{value:.2f}"


def _bottleneck_cell(row: Row) -> str:
    return "the limit itself" if _is_limit(row) else row["facts"].get("bound_by", "")


def _is_limit(row: Row) -> bool:
    return bool(row.get("facts", {}).get("limit"))


_RATES: tuple[Column, ...] = (
    ("images/s", lambda row: format_rate(row["median_images_per_s"])),
    ("slowest – fastest", _spread_cell),
)
_LIMIT: tuple[Column, ...] = (("of the limit", _fact_cell("share_of_limit", "{:.2f}")), ("bound by", _bottleneck_cell))
_LOADING: tuple[Column, ...] = (
    ("workers", _fact_cell("num_workers", "{}")),
    ("first batch, s", _fact_cell("first_batch_s", "{:.3f}")),
    ("memory, MB", _fact_cell("host_peak_mb", "{:,.0f}")),
    ("bytes an image", _fact_cell("bytes_per_image", "{:,.0f}")),
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


def _race_table(record: Record, group: str, columns: Sequence[Column]) -> str:
    """Return one group of ``record`` as a table."""
    rows = [row for row in record["rows"] if row["group"].endswith(group)]
    baseline = next((row["baseline"] for row in rows if "baseline" in row), "")
    return _table("", [*_RATES, (f"against {baseline}", _ratio_cell), *columns], rows)


def _short_load_table(record: Record) -> str:
    """Return both dtypes of ``load`` side by side, without the limits."""
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
                for part in (("", "") if row is None else (format_rate(row["median_images_per_s"]), _ratio_cell(row)))
            ]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def _train_table(record: Record) -> str:
    """Return a line per model: ceiling, trained, limit of the arithmetic."""
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
            format_rate(ceiling["median_images_per_s"]),
            format_rate(trained["median_images_per_s"]),
            _ratio_cell(trained),
            f"{trained['facts']['data_wait']:.1%}".replace("%", " %"),
            "" if limit is None else format_rate(limit["median_images_per_s"]),
            _bottleneck_cell(trained),
        ]
        lines.append(f"| {' | '.join([group, *cells])} |")
    return "\n".join(lines) + "\n"


def _scaling_table(record: Record) -> str:
    lines = ["| samples | opened, s | first batch, s | images/s | memory added, MB |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        opened = f"{row['open_s']:.2f}" if "open_s" in row else ""
        samples = f"{row['samples']:,}"
        figures = [
            opened,
            f"{row['first_batch_s']:.2f}",
            format_rate(row["images_per_s"]),
            f"{row['resident_mb_added_at_most']:,.0f}",
        ]
        lines.append(f"| {' | '.join([samples, *figures])} |")
    return "\n".join(lines) + "\n"


def _describe_machine(record: Record) -> str:
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


BLOCKS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "load_short": ("load", _short_load_table),
    "machine": ("load", _describe_machine),
    "load_float32": ("load", lambda record: _race_table(record, "float32", [*_LIMIT, *_LOADING])),
    "load_uint8": ("load", lambda record: _race_table(record, "uint8", [*_LIMIT, *_LOADING])),
    "decode": ("decode", lambda record: _race_table(record, "float32", [*_LIMIT, *_LOADING])),
    "train": ("train", _train_table),
    "pack": ("pack", lambda record: _race_table(record, "packing", _LIMIT)),
    "synthesis": (
        "pack",
        lambda record: _table("", _RATES, [row for row in record["rows"] if row["name"] == "synthesis"]),
    ),
    "scaling": ("scaling", _scaling_table),
}
"""Name of each block to the kind of result file it is made from and the function that makes it. Two more names are not
listed: ``targets``, which reads several files, and ``figure_KIND``, which links an image.
"""


def make_block(name: str, folder: Path = RESULTS) -> str:
    """Return the Markdown of one block. Raises :class:`DataError` for an unknown name."""
    if name == "targets":
        return targets.targets_table(folder) + "\n"
    if name.startswith("figure_"):
        return _figure_link(name.removeprefix("figure_"), folder)
    if name not in BLOCKS:
        raise DataError(
            f"<!-- table: {name} -->: no such table; choose among targets, figure_KIND, {', '.join(BLOCKS)}"
        )
    what, make = BLOCKS[name]
    record = newest_record(what, folder=folder)
    return _NOT_YET if record is None else make(record)


def _figure_link(what: str, folder: Path) -> str:
    """Return a link, relative to benchmarks/README.md, to the figure that plot.py drew of the newest result of
    ``what``."""
    path = newest_path(what, folder=folder)
    image = None if path is None else path.with_suffix(".png")
    return f"![{what}](results/{image.name})\n" if image is not None and image.is_file() else _NOT_YET


def fill_blocks(text: str, folder: Path = RESULTS) -> str:
    """Return ``text`` with every block replaced by what the result files give."""
    return _BLOCK.sub(lambda match: f"{match[1]}{make_block(match[2], folder)}{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="readme_tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 2 if something would change")
    options = parser.parse_args(arguments)
    return run_command(lambda: _update_documents(options.check), parser.prog)


def _update_documents(only_check: bool) -> None:
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = fill_blocks(before)
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
