"""Races as tables in the terminal: one per group when its race is over, and one of all groups at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.contender import Contender, Group
from harness.measure import race, ratio

if TYPE_CHECKING:
    from quaclrs.training.distributed import World

_HEADS = ("images/s", "min", "max", "ratio", "of limit", "data wait", "first batch", "host peak", "bound by")


def race_and_print(group: Group, repeats: int, world: World | None = None) -> None:
    """Race the contenders of ``group``; the main process prints their table."""
    race(group.contenders, repeats, world)
    if world is None or world.is_main:
        print(group_table(group), flush=True)


def group_table(group: Group) -> str:
    """Return one line per contender: median, spread, ratio to the baseline, share of its limit; or why it was left
    out."""
    return "\n".join([*_table_lines([group]), f"ratio: to {group.baseline.name}, median of the pairs", ""])


def summary_table(groups: Sequence[Group]) -> str:
    """Return all groups in one table, each with its baseline marked."""
    head = "all that was measured (ratio: to the contender marked *, median of the pairs)"
    return "\n".join([head, *_table_lines(groups), ""])


def _table_lines(groups: Sequence[Group]) -> list[str]:
    rows = [(group, contender) for group in groups for contender in group.contenders]
    cells = [_cells(contender, group.baseline) for group, contender in rows]
    full = [row for row in cells if isinstance(row, list)]
    used = [column for column in range(len(_HEADS)) if any(row[column] for row in full)]
    widths = [max(len(_HEADS[column]), *(len(row[column]) for row in full)) for column in used]
    name_width = max(len(name) for group, contender in rows for name in (group.name, _label(contender, group)))

    def line(name: str, texts: Sequence[str]) -> str:
        padded = [f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)]
        return "  ".join([f"{name:{name_width}}", *padded]).rstrip()

    lines: list[str] = []
    before: Group | None = None
    for (group, contender), row in zip(rows, cells, strict=True):
        if group is not before:
            lines += [""] if before is not None else []
            lines.append(line(group.name, [_HEADS[column] for column in used]))
            before = group
        label = _label(contender, group)
        whole = f"{label:{name_width}}  {row}" if isinstance(row, str) else line(label, [row[i] for i in used])
        lines.append(whole)
    return lines


def _label(contender: Contender, group: Group) -> str:
    if contender.is_limit:
        return f"  limit: {contender.name}"
    return f"{'*' if contender is group.baseline else ' '} {contender.name}"


def _cells(contender: Contender, baseline: Contender) -> list[str] | str:
    """Return a cell for each of ``_HEADS``, or the one text of a contender that was left out."""
    if contender.left_out is not None:
        return f"left out: {contender.left_out}"
    facts, to_baseline = contender.facts, ratio(contender, baseline)
    return [
        format_rate(contender.median),
        format_rate(min(contender.rates)),
        format_rate(max(contender.rates)),
        "" if math.isnan(to_baseline) else f"{to_baseline:.2f}",
        _format_known(facts.get("share_of_limit"), "{:.2f}"),
        _format_known(facts.get("data_wait"), "{:.1%}"),
        _format_known(facts.get("first_batch_s"), "{:.3f} s"),
        _format_known(facts.get("host_peak_mb"), "{:,.0f} MB"),
        facts.get("bound_by") or "",
    ]


def format_rate(images_per_s: float) -> str:
    """Return images/s with as many digits as are meaningful."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def _format_known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
