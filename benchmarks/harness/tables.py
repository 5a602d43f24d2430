"""Races as tables in the terminal: one for each group when it is over, and one of all groups at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.measure import Contender, Group, race, ratio

if TYPE_CHECKING:
    from quaclrs.training.distributed import World

_HEADS = ("images/s", "min", "max", "ratio", "of limit", "data wait", "first batch", "host peak", "bound by")
_LEFT_OUT = "left out: "


def race_and_print(group: Group, repeats: int, world: World | None = None) -> None:
    """Race the contenders of ``group`` and show their table, once."""
    race(group.contenders, repeats, world)
    if world is None or world.is_main:
        print(table(group), flush=True)


def table(group: Group) -> str:
    """One line per contender: median, spread, ratio to the baseline and share of its limit, or why it was left out."""
    return "\n".join([*_lines([group]), f"ratio: to {group.baseline.name}, median of the pairs", ""])


def summary(groups: Sequence[Group]) -> str:
    """All groups in one table, each with the contender that its ratios are to."""
    return "\n".join(
        ["all that was measured (ratio: to the contender marked *, median of the pairs)", *_lines(groups), ""]
    )


def _lines(groups: Sequence[Group]) -> list[str]:
    titles = [group.name for group in groups]
    rows = [(group, contender) for group in groups for contender in group.contenders]
    cells = [_cells(contender, group.baseline) for group, contender in rows]
    used = [column for column in range(len(_HEADS)) if any(isinstance(row, list) and row[column] for row in cells)]
    widths = [
        max(len(_HEADS[column]), *(len(row[column]) for row in cells if isinstance(row, list))) for column in used
    ]
    first = max(map(len, [*titles, *(_name(contender, group) for group, contender in rows)]))

    def line(name: str, texts: Sequence[str]) -> str:
        return "  ".join(
            [f"{name:{first}}", *(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))]
        ).rstrip()

    lines: list[str] = []
    before: Group | None = None
    for (group, contender), row in zip(rows, cells, strict=True):
        if group is not before:
            lines += [""] if before is not None else []
            lines.append(line(group.name, [_HEADS[column] for column in used]))
            before = group
        name = _name(contender, group)
        lines.append(f"{name:{first}}  {row}" if isinstance(row, str) else line(name, [row[column] for column in used]))
    return lines


def _name(contender: Contender, group: Group) -> str:
    if contender.limit:
        return f"  limit: {contender.name}"
    return f"{'*' if contender is group.baseline else ' '} {contender.name}"


def _cells(contender: Contender, baseline: Contender) -> list[str] | str:
    if contender.left_out is not None:
        return _LEFT_OUT + contender.left_out
    facts, against = contender.facts, ratio(contender, baseline)
    return [
        _rate(contender.median),
        _rate(min(contender.rates)),
        _rate(max(contender.rates)),
        "" if math.isnan(against) else f"{against:.2f}",
        _optional(facts.get("share_of_limit"), "{:.2f}"),
        _optional(facts.get("data_wait"), "{:.1%}"),
        _optional(facts.get("first_batch_s"), "{:.3f} s"),
        _optional(facts.get("host_peak_mb"), "{:,.0f} MB"),
        facts.get("bound_by") or "",
    ]


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
