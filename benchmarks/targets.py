#!/usr/bin/env python3
"""The project's targets beside what was measured: one line per target, as Markdown, from benchmarks/results.

    python benchmarks/targets.py

Each line uses the newest result file of its kind. For a lower bound ``measured / target`` above 1 is good, for an upper
bound below 1. A missed target names its bottleneck and, if it was measured, the limit of the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.packing_speed import BARE
from harness.records import RESULTS, Record, Row, find_row, newest_record

from quaclrs.cli.arguments import Parser

FFCV, DALI = "FFCV, raw", "bare DALI, its own reader"
_GPU = "H200"
_DATASET_ROWS = 57_918
DATA_WAIT_GOAL = 0.02
"""A goal for the share of time that training waits for data. It is stricter than the rule by which a training is called
bound by data (``quaclrs.training.bottleneck.DATA_WAIT``).
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured figure, and the row it comes from, which names the bottleneck."""

    value: float
    row: Row
    record: Record
    model_name: str = ""
    """The model with the worst figure, if the worst of several counts."""


Measure = Callable[[Path], Measured | None]
"""Reads a figure from the result files of a folder; None if it was not measured."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target: a figure to reach, and how to read it from the result files."""

    what: str
    goal: float
    measure: Measure
    form: str = "{:,.2f}"
    is_upper_bound: bool = False
    unmeasured: str = "not measured"

    def is_met(self, value: float) -> bool:
        """Return whether ``value`` is on the right side of the goal."""
        return value <= self.goal if self.is_upper_bound else value >= self.goal


def _rate_of(what: str, name: str, group: str = "", hardware: str = "") -> Measure:
    """Measure the images/s of one row."""
    return lambda folder: _read_figure(folder, what, name, group, lambda row: row["median_images_per_s"], hardware)


def _ratio_of(what: str, name: str, baseline: str, group: str = "") -> Measure:
    """Measure the ratio of one row to ``baseline``; not measured if the race had another baseline."""
    return lambda folder: _read_figure(
        folder, what, name, group, lambda row: row["ratio_to_baseline"] if row["baseline"] == baseline else None
    )


def _share_of_limit_of(what: str, name: str, group: str, hardware: str) -> Measure:
    return lambda folder: _read_figure(
        folder, what, name, group, lambda row: row["facts"].get("share_of_limit"), hardware
    )


def _read_figure(
    folder: Path, what: str, name: str, group: str, value_of: Callable[[Row], float | None], hardware: str = ""
) -> Measured | None:
    record = newest_record(what, gpu=bool(hardware), folder=folder)
    row = find_row(record, name, group)
    if record is None or row is None or hardware not in record["environment"].get("gpu", {}).get("name", ""):
        return None
    value = value_of(row)
    return None if value is None else Measured(value=value, row=row, record=record)


TRAINED_MODELS = ("alexnet", "vgg16", "resnet18", "mobilenet", "inception", "efficientnet", "convnext")
"""The models that the published results have; another one in the table of architectures does not undo them."""


def _worst_model(value_of: Callable[[Row], float], worst: Callable[..., Row]) -> Measure:
    """Measure the worst of the seven models' trained rows; not measured if a model is missing."""

    def measure(folder: Path) -> Measured | None:
        record = newest_record("train", folder=folder)
        rows = [row for row in record["rows"] if row["name"].startswith("train, ")] if record else []
        if record is None or {row["facts"]["model_name"] for row in rows} != set(TRAINED_MODELS):
            return None
        row = worst(rows, key=value_of)
        return Measured(value=value_of(row), row=row, record=record, model_name=row["facts"]["model_name"])

    return measure


def _largest_of_scaling(field: str) -> Measure:
    """Measure the largest ``field`` among the processes that opened as many samples as the real dataset has."""

    def measure(folder: Path) -> Measured | None:
        record = newest_record("scaling", folder=folder)
        rows = [row for row in record["rows"] if row["samples"] == _DATASET_ROWS] if record else []
        if record is None or not rows:
            return None
        row = max(rows, key=lambda row: row[field])
        return Measured(value=row[field], row=row, record=record)

    return measure


_NO_GPU = "not measured: no GPU was at hand"
TARGETS = (
    Target(what="synthetic images, images/s", goal=50, form="{:,.0f}", measure=_rate_of("pack", "synthesis")),
    Target(
        what="packing `png`, of bare decoding",
        goal=0.9,
        measure=_ratio_of("pack", "pack png", BARE),
    ),
    Target(
        what="`dali`, of bare DALI with its own reader",
        goal=0.95,
        measure=_ratio_of("decode", "dali, png shards", DALI, "float32"),
    ),
    *(
        Target(
            what=f"`{loader}`, `{encoding}`, {dtype}, of FFCV raw",
            goal=goal,
            measure=_ratio_of("load", f"{loader}, {encoding} shards", FFCV, dtype),
        )
        for encoding, dtype, goal in (("indexed", "float32", 2.5), ("rgb", "uint8", 1.5))
        for loader in ("mapped", "resident")
    ),
    Target(
        what="`mapped`, memory added over an epoch, MB at most",
        goal=200,
        form="{:,.0f}",
        is_upper_bound=True,
        measure=_largest_of_scaling("resident_mb_added_at_most"),
    ),
    Target(
        what=f"`mapped`, first batch of {_DATASET_ROWS:,} samples, s at most",
        goal=1,
        is_upper_bound=True,
        measure=_largest_of_scaling("first_batch_s"),
    ),
    Target(
        what="trained, of the model's ceiling, the least of seven models",
        goal=0.95,
        measure=_worst_model(lambda row: row["ratio_to_baseline"], min),
    ),
    Target(
        what="waiting for data while training, at most, the most of seven models",
        goal=DATA_WAIT_GOAL,
        form="{:.1%}",
        is_upper_bound=True,
        measure=_worst_model(lambda row: row["facts"]["data_wait"], max),
    ),
    Target(
        what=f"{_GPU}: `resident`, `indexed`, float16, images/s",
        goal=1_000_000,
        form="{:,.0f}",
        measure=_rate_of("load", "resident, indexed shards", "float16", _GPU),
        unmeasured=_NO_GPU,
    ),
    Target(
        what=f"{_GPU}: render, of the time that writing its output takes",
        goal=0.6,
        measure=_share_of_limit_of("load", "resident, indexed shards", "float16", _GPU),
        unmeasured=_NO_GPU,
    ),
)


def targets_table(folder: Path = RESULTS) -> str:
    """Return the Markdown table of all targets, measured by the result files in ``folder``."""
    lines = ["| target | | measured | measured / target | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        measured = target.measure(folder)
        bound = f"{'≤' if target.is_upper_bound else '≥'} {target.form.format(target.goal)}"
        cells = [target.what, bound, *(("", "", target.unmeasured) if measured is None else _cells(target, measured))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(target: Target, measured: Measured) -> tuple[str, str, str]:
    whose = f" ({measured.model_name})" if measured.model_name else ""
    outcome = "met" if target.is_met(measured.value) else _describe_miss(measured)
    return target.form.format(measured.value) + whose, f"{measured.value / target.goal:.2f}", outcome


def _describe_miss(measured: Measured) -> str:
    """Name the bottleneck of a row that misses its target, and the limit of the machine that applies to it."""
    row = measured.row
    bottleneck = row.get("facts", {}).get("bound_by")
    limit = find_row(measured.record, row.get("bounded_by", ""), row.get("group", ""))
    parts = [f"bound by {bottleneck}"] if bottleneck else ["missed"]
    if limit is not None:
        share = row["facts"]["share_of_limit"]
        parts.append(f"at {share:.2f} of the limit ({limit['name']}: {limit['median_images_per_s']:,.0f} images/s)")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="targets.py", description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    print(targets_table(parser.parse_args(arguments).results_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
