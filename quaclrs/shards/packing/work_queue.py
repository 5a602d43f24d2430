"""One pass over the shards of a packing, divided among all processes that pack into the folder.

Each shard has a ``.claim`` lock in ``.packing/``. A worker holds it while it works on that shard, so each shard is
processed once. No process waits while it holds a claim, so there is no deadlock. Imports neither pandas nor torch:
every worker process starts with this module.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from tqdm import tqdm

from quaclrs.config import folds_text
from quaclrs.shards.packing.write_shard import ShardPlan
from quaclrs.shards.work_folder import claim_file
from quaclrs.system.file_locks import locked
from quaclrs.system.processes import Tick, run_tasks

Result = TypeVar("Result")

_POLL_S = 0.2
_PATIENCE_S = 1.0
"""How long to wait for other processes before telling the user."""


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
    """Call ``work`` for each plan without a stored result: first for ``own``, then for unclaimed plans of ``others``.

    ``find`` returns a plan's stored result or None. The call waits for a shard that another living process has claimed,
    and takes it over if that process dies. Returns all results, ``own`` first, and the number of images that this call
    processed. ``bar_name`` heads a progress bar of those images; None shows no bar.
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

    task = functools.partial(_work_if_unclaimed, output_dir=output_dir, find=find, work=work)
    with _bar(bar_name, done=_count_images(own) - _count_images(left_of(own))) as bar:
        while left := left_of(own) + left_of(others):
            unclaimed = [plan for plan in left if _is_unclaimed(plan, output_dir)]
            chosen = [plan for plan in unclaimed if plan.file in own_files] or unclaimed
            if not chosen:
                waited_s = _wait(waited_s, left, output_dir)
                continue
            _grow(bar, _count_images(chosen))
            done = run_tasks(task, chosen, num_workers=num_workers, on_progress=bar.update)
            for plan, result in zip(chosen, done, strict=True):
                if result is None:  # another process claimed it first
                    _grow(bar, -len(plan.sources))
                else:
                    results[plan.file] = result
                    images += len(plan.sources)
    return [results[plan.file] for plan in (*own, *others)], images


@contextlib.contextmanager
def _claim(plan: ShardPlan, output_dir: Path) -> Iterator[bool]:
    """Claim ``plan``'s shard for the block unless another process has; yields whether the claim succeeded."""
    with locked(claim_file(plan.file, output_dir)) as claimed:
        yield claimed


def _is_unclaimed(plan: ShardPlan, output_dir: Path) -> bool:
    with _claim(plan, output_dir) as claimed:
        return claimed


def _work_if_unclaimed(
    plan: ShardPlan,
    tick: Tick,
    *,
    output_dir: Path,
    find: Callable[[ShardPlan], Result | None],
    work: Callable[[ShardPlan, Tick], Result],
) -> Result | None:
    """``work(plan, tick)`` under ``plan``'s claim; None where another process has the claim or has stored a result."""
    with _claim(plan, output_dir) as claimed:
        return work(plan, tick) if claimed and find(plan) is None else None


def _wait(waited_s: float, left: list[ShardPlan], output_dir: Path) -> float:
    """Sleep once; returns the total time waited. Tells the user after :data:`_PATIENCE_S`."""
    if waited_s <= _PATIENCE_S < waited_s + _POLL_S:
        folds = folds_text(plan.fold for plan in left)
        tqdm.write(
            f"{output_dir}: other jobs are at work on shards of fold(s) {folds}; waiting for them", file=sys.stderr
        )
    time.sleep(_POLL_S)
    return waited_s + _POLL_S


def _count_images(plans: Iterable[ShardPlan]) -> int:
    return sum(len(plan.sources) for plan in plans)


def _bar(name: str | None, done: int) -> tqdm[NoReturn]:
    # `disable=None` shows the bar only where stderr is a terminal
    return tqdm(total=done, initial=done, unit="image", desc=name, disable=True if name is None else None)


def _grow(bar: tqdm[NoReturn], images: int) -> None:
    bar.total = (bar.total or 0) + images
    bar.refresh()
