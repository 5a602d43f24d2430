"""One round of a packing, shared by whatever processes pack into the folder: each shard is worked on once, by whoever
claims it first.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

from tqdm import tqdm

from quaclrs.config import folds_text
from quaclrs.shards.packing.claims import claimed, is_free
from quaclrs.shards.packing.write_shard import ShardPlan
from quaclrs.system.processes import Tick, run_tasks

Result = TypeVar("Result")

_POLL_S = 0.2
_PATIENCE_S = 1.0
"""How long to wait for other processes before saying so."""


def work_through(
    own: list[ShardPlan],
    others: list[ShardPlan],
    *,
    find: Callable[[ShardPlan], Result | None],
    work: Callable[[ShardPlan, Tick], Result],
    output_dir: Path,
    num_workers: int,
    bar_name: str | None,
) -> tuple[list[Result], int]:
    """``work`` for each plan of which ``find`` finds no result yet: first ``own``, then those of ``others`` that nobody
    is at.

    A shard that another living process has claimed is waited for, and taken over if that process dies. Returns all
    results, ``own`` first, and the images that this call worked on. ``bar_name`` heads a progress bar of these; None
    shows none.
    """
    results: dict[str, Result] = {}
    own_files = {plan.file for plan in own}
    images = 0
    waited_s = 0.0

    def left_of(plans: list[ShardPlan]) -> list[ShardPlan]:
        for plan in plans:
            if plan.file not in results and (found := find(plan)) is not None:
                results[plan.file] = found
        return [plan for plan in plans if plan.file not in results]

    task = functools.partial(claimed, output_dir=output_dir, find=find, work=work)
    with _bar(bar_name, done=_images(own) - _images(left_of(own))) as bar:
        while left := left_of(own) + left_of(others):
            free = [plan for plan in left if is_free(plan, output_dir)]
            chosen = [plan for plan in free if plan.file in own_files] or free
            if not chosen:
                waited_s = _wait(waited_s, left, output_dir)
                continue
            _grow(bar, _images(chosen))
            for plan, result in zip(
                chosen, run_tasks(task, chosen, num_workers=num_workers, on_progress=bar.update), strict=True
            ):
                if result is None:  # another process was quicker
                    _grow(bar, -len(plan.sources))
                else:
                    results[plan.file] = result
                    images += len(plan.sources)
    return [results[plan.file] for plan in (*own, *others)], images


def _wait(waited_s: float, left: list[ShardPlan], output_dir: Path) -> float:
    if waited_s <= _PATIENCE_S < waited_s + _POLL_S:
        folds = folds_text(plan.fold for plan in left)
        tqdm.write(
            f"{output_dir}: other jobs are at work on shards of fold(s) {folds}; waiting for them", file=sys.stderr
        )
    time.sleep(_POLL_S)
    return waited_s + _POLL_S


def _images(plans: Iterable[ShardPlan]) -> int:
    return sum(len(plan.sources) for plan in plans)


def _bar(name: str | None, done: int) -> tqdm[NoReturn]:
    # `disable=None` shows the bar only where stderr is a terminal
    return tqdm(total=done, initial=done, unit="image", desc=name, disable=True if name is None else None)


def _grow(bar: tqdm[NoReturn], images: int) -> None:
    bar.total = (bar.total or 0) + images
    bar.refresh()
