#!/usr/bin/env python3
"""What this project set out to reach, beside what was measured: one line per target, as Markdown, from
benchmarks/results.

    python benchmarks/targets.py

Each line takes the newest result file of its kind. ``measured / target`` above 1 is good for a lower bound, below 1 for
an upper one. A target that is missed names what bounds it and, where that was measured, the limit of the machine beside
it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.packing_speed import BARE
from harness.records import RESULTS, Record, Row, find_row, newest

from quaclrs.cli.arguments import Parser
from quaclrs.training.models import ARCHITECTURES

FFCV, DALI = "FFCV, raw", "bare DALI, its own reader"
_GPU = "H200"
_ROWS_OF_THE_DATASET = 57_918


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A target's figure, and the row it comes from, for what bounds it."""

    value: float
    row: Row
    record: Record
    of: str = ""
    """Whose figure it is, where the worst of several counts."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One promise."""

    what: str
    goal: float
    measure: Callable[[Path], Measured | None]
    form: str = "{:,.2f}"
    at_most: bool = False
    """The goal is an upper bound."""
    unmeasured: str = "not measured"

    def is_met(self, value: float) -> bool:
        """Whether ``value`` is on the right side of the goal."""
        return value <= self.goal if self.at_most else value >= self.goal


def _rate(what: str, name: str, group: str = "", hardware: str = "") -> Callable[[Path], Measured | None]:
    """images/s of one row."""
    return lambda folder: _field(folder, what, name, group, lambda row: row["median_images_per_s"], hardware)


def _ratio(what: str, name: str, baseline: str, group: str = "") -> Callable[[Path], Measured | None]:
    """The ratio of one row to ``baseline``; not measured where the race had another one."""
    return lambda folder: _field(
        folder, what, name, group, lambda row: row["ratio_to_baseline"] if row["baseline"] == baseline else None
    )


def _share_of_limit(what: str, name: str, group: str, hardware: str) -> Callable[[Path], Measured | None]:
    return lambda folder: _field(folder, what, name, group, lambda row: row["facts"].get("share_of_limit"), hardware)


def _field(
    folder: Path, what: str, name: str, group: str, value_of: Callable[[Row], float | None], hardware: str = ""
) -> Measured | None:
    record = newest(what, gpu=bool(hardware), folder=folder)
    row = find_row(record, name, group)
    if record is None or row is None or hardware not in record["environment"].get("gpu", {}).get("name", ""):
        return None
    value = value_of(row)
    return None if value is None else Measured(value=value, row=row, record=record)


def _worst_model(value_of: Callable[[Row], float], worst: Callable[..., Row]) -> Callable[[Path], Measured | None]:
    """Of the trained rows of all seven models; None where one is missing."""

    def measure(folder: Path) -> Measured | None:
        record = newest("train", folder=folder)
        rows = [row for row in record["rows"] if row["name"].startswith("train, ")] if record else []
        if record is None or {row["facts"]["model_name"] for row in rows} != set(ARCHITECTURES):
            return None
        row = worst(rows, key=value_of)
        return Measured(value=value_of(row), row=row, record=record, of=row["facts"]["model_name"])

    return measure


def _of_scaling(field: str) -> Callable[[Path], Measured | None]:
    """The largest ``field`` among the processes that opened as many samples as the dataset has."""

    def measure(folder: Path) -> Measured | None:
        record = newest("scaling", folder=folder)
        rows = [row for row in record["rows"] if row["samples"] == _ROWS_OF_THE_DATASET] if record else []
        if record is None or not rows:
            return None
        row = max(rows, key=lambda row: row[field])
        return Measured(value=row[field], row=row, record=record)

    return measure


_NO_GPU = "not measured: no GPU was at hand"
TARGETS = (
    Target(what="synthetic images, images/s", goal=50, form="{:,.0f}", measure=_rate("pack", "synthesis")),
    Target(
        what="packing `png`, of bare decoding",
        goal=0.9,
        measure=_ratio("pack", "pack png", BARE),
    ),
    Target(
        what="`dali`, of bare DALI with its own reader",
        goal=0.95,
        measure=_ratio("decode", "dali, png shards", DALI, "float32"),
    ),
    *(
        Target(
            what=f"`{loader}`, `{encoding}`, {dtype}, of FFCV raw",
            goal=goal,
            measure=_ratio("load", f"{loader}, {encoding} shards", FFCV, dtype),
        )
        for encoding, dtype, goal in (("indexed", "float32", 2.5), ("rgb", "uint8", 1.5))
        for loader in ("mapped", "resident")
    ),
    Target(
        what="`mapped`, memory added over an epoch, MB at most",
        goal=200,
        form="{:,.0f}",
        at_most=True,
        measure=_of_scaling("resident_mb_added_at_most"),
    ),
    Target(
        what=f"`mapped`, first batch of {_ROWS_OF_THE_DATASET:,} samples, s at most",
        goal=1,
        at_most=True,
        measure=_of_scaling("first_batch_s"),
    ),
    Target(
        what="trained, of the model's ceiling, the least of seven models",
        goal=0.95,
        measure=_worst_model(lambda row: row["ratio_to_baseline"], min),
    ),
    Target(
        what="waiting for data while training, at most, the most of seven models",
        goal=0.02,
        form="{:.1%}",
        at_most=True,
        measure=_worst_model(lambda row: row["facts"]["data_wait"], max),
    ),
    Target(
        what=f"{_GPU}: `resident`, `indexed`, float16, images/s",
        goal=1_000_000,
        form="{:,.0f}",
        measure=_rate("load", "resident, indexed shards", "float16", _GPU),
        unmeasured=_NO_GPU,
    ),
    Target(
        what=f"{_GPU}: render, of the time that writing its output takes",
        goal=0.6,
        measure=_share_of_limit("load", "resident, indexed shards", "float16", _GPU),
        unmeasured=_NO_GPU,
    ),
)


def markdown(folder: Path = RESULTS) -> str:
    """The table of all targets, measured by the result files in ``folder``."""
    lines = ["| target | | measured | measured / target | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        measured = target.measure(folder)
        bound = f"{'≤' if target.at_most else '≥'} {target.form.format(target.goal)}"
        cells = [target.what, bound, *(("", "", target.unmeasured) if measured is None else _cells(target, measured))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(target: Target, measured: Measured) -> tuple[str, str, str]:
    of = f" ({measured.of})" if measured.of else ""
    verdict = "met" if target.is_met(measured.value) else _bound(measured)
    return target.form.format(measured.value) + of, f"{measured.value / target.goal:.2f}", verdict


def _bound(measured: Measured) -> str:
    """What bounds a row that misses its target, and the limit that it comes up against."""
    row = measured.row
    bound = row.get("facts", {}).get("bound_by")
    limit = find_row(measured.record, row.get("bounded_by", ""), row.get("group", ""))
    parts = [f"bound by {bound}"] if bound else ["missed"]
    if limit is not None:
        share = row["facts"]["share_of_limit"]
        parts.append(f"at {share:.2f} of the limit ({limit['name']}: {limit['median_images_per_s']:,.0f} images/s)")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="targets.py", description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    print(markdown(parser.parse_args(arguments).results_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
