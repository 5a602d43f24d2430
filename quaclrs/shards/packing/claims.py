"""Who packs what: locks between packing processes, files in ``.packing/`` (see quaclrs.system.file_locks).

``lock`` is the folder's, which one process holds alone or several hold together. Each shard has a ``.claim``, which a
worker holds while it works on that shard; nobody waits while holding one, so nobody deadlocks. Imports neither pandas
nor torch: workers start with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from quaclrs.shards.packing.write_shard import PACKING_FOLDER, ShardPlan
from quaclrs.system.file_locks import locked
from quaclrs.system.processes import Tick

Result = TypeVar("Result")


@contextlib.contextmanager
def claim(plan: ShardPlan, output_dir: Path) -> Iterator[bool]:
    """Claim ``plan``'s shard for the block, if nobody else has; yields whether it is ours."""
    with locked(output_dir / PACKING_FOLDER / (Path(plan.file).stem + ".claim")) as mine:
        yield mine


def is_free(plan: ShardPlan, output_dir: Path) -> bool:
    """Whether nobody works on ``plan``'s shard at this moment."""
    with claim(plan, output_dir) as mine:
        return mine


def claimed(
    plan: ShardPlan,
    tick: Tick,
    *,
    output_dir: Path,
    find: Callable[[ShardPlan], Result | None],
    work: Callable[[ShardPlan, Tick], Result],
) -> Result | None:
    """``work(plan, tick)`` under ``plan``'s claim; None where another process is at it, or has left what ``find``
    finds.
    """
    with claim(plan, output_dir) as mine:
        return work(plan, tick) if mine and find(plan) is None else None
