"""The only reader of RANK and WORLD_SIZE."""

from __future__ import annotations

import os

from quaclrs.errors import UsageError


def refuse_distributed(asked_for: bool) -> None:
    """Raise :class:`UsageError` when more than one process is asked for, by flag or by torchrun: not built yet."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if asked_for or world_size != "1":
        flag = "--distributed" if asked_for else f"WORLD_SIZE={world_size} (torchrun)"
        raise UsageError(f"{flag}: training on several devices is not in this version; train on one, or one --fold per device")
