"""What bounds a row, by what was measured and nothing else. Pure.

Loading and packing, in this order:

1. at ``NEAR_LIMIT`` of a physical limit or more: that limit;
2. the cores were busy for ``BUSY`` of the time or more: the contender's own work on them (rendering, decoding, ...);
3. else: handing over. Cores stood idle, waiting for a thread, a worker or Python.

On a GPU only the first is known from outside; ``quaclrs-train --profile`` tells the rest.

Training: ``data`` where the training thread waited for them for more than ``DATA_WAIT_LIMIT`` of the time; ``model``,
or ``arithmetic`` where that is near its limit, where training keeps up with the model's own step; else ``host``: Python
and launches between the steps.
"""

from __future__ import annotations

NEAR_LIMIT = 0.7
"""Share of a limit from which on it is what bounds: nothing can be half as fast again."""
BUSY = 0.8
"""Share of their time in which cores have to work for the work to be what bounds."""
DATA_WAIT_LIMIT = 0.02
"""Share of the time that the training thread may wait for data before they are what bounds it."""
SPREAD = 0.05
"""Ratios to the ceiling closer to 1 than this are noise on machines that are shared."""

HANDING_OVER = "handing over"


def bound_by(*, share_of_limit: float | None, limit: str, cores_busy: float | None, work: str) -> str | None:
    """What bounds a contender that loads or packs; None where nothing was measured that tells."""
    if share_of_limit is not None and share_of_limit >= NEAR_LIMIT:
        return limit
    if cores_busy is None:
        return None
    return work if cores_busy >= BUSY else HANDING_OVER


def training_bound_by(*, data_wait: float, share_of_ceiling: float, share_of_limit: float | None) -> str:
    """What bounds a training."""
    if data_wait > DATA_WAIT_LIMIT:
        return "data"
    if share_of_ceiling < 1 - SPREAD:
        return "host"
    return "arithmetic" if share_of_limit is not None and share_of_limit >= NEAR_LIMIT else "model"
