"""The rules that name a row's bottleneck, from measured figures only. Pure functions, no torch.

Loading and packing; the first rule that holds decides:

1. ``share_of_limit >= NEAR_LIMIT``: the physical limit itself;
2. ``cores_busy >= BUSY``: the contender's own work on the cores (rendering, decoding, ...);
3. otherwise "handing over": cores were idle while a thread, a worker process or Python was waited for.

On a GPU only rule 1 can be decided from outside; ``quaclrs-train --profile`` tells the rest.

Training; the first rule that holds decides:

1. ``data_wait >= DATA_WAIT``: "data". This is the profiler's own constant, ``quaclrs.training.bottleneck.DATA_WAIT``;
2. ``share_of_ceiling < 1 - SPREAD``: "host", that is Python and launches between the steps;
3. ``share_of_limit >= NEAR_LIMIT``: "arithmetic";
4. otherwise "model": training is as fast as the model's own step.
"""

from __future__ import annotations

from quaclrs.training.bottleneck import DATA_WAIT

NEAR_LIMIT = 0.7
"""Share of a limit at which the limit is the bottleneck: no way of doing the work can be half as fast again."""
BUSY = 0.8
"""Share of their time that the cores must be busy for the work on them to be the bottleneck."""
SPREAD = 0.05
"""Ratios to the ceiling closer to 1 than this are noise on shared machines."""

HANDING_OVER = "handing over"


def find_bottleneck(*, share_of_limit: float | None, limit: str, cores_busy: float | None, work: str) -> str | None:
    """Return what bounds a contender that loads or packs: ``limit``, ``work`` or HANDING_OVER; None if unknown."""
    if share_of_limit is not None and share_of_limit >= NEAR_LIMIT:
        return limit
    if cores_busy is None:
        return None
    return work if cores_busy >= BUSY else HANDING_OVER


def find_training_bottleneck(*, data_wait: float, share_of_ceiling: float, share_of_limit: float | None) -> str:
    """Return what bounds a training: "data", "host", "arithmetic" or "model"."""
    if data_wait >= DATA_WAIT:
        return "data"
    if share_of_ceiling < 1 - SPREAD:
        return "host"
    return "arithmetic" if share_of_limit is not None and share_of_limit >= NEAR_LIMIT else "model"
