"""Picks the redraw for a device: the fused kernel on a GPU, the compiled one on a CPU, the reference where neither can run.

All three give the same bits. numba and triton are imported on first use only, for they take a second.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from quaclrs.imaging.render import Grids, RedrawTables, redraw_reference

_log = logging.getLogger(__name__)

Redraw = Callable[[Grids, torch.Tensor, RedrawTables, torch.dtype, "torch.Tensor | None"], torch.Tensor]


def redraw(
    grids: Grids, index: torch.Tensor, tables: RedrawTables, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`quaclrs.imaging.render.redraw_reference`, by the fastest way there is on the tables' device.

    On a GPU nothing is checked and nothing waits: call :func:`quaclrs.imaging.render.check_grids` once per set of grids before.
    """
    draw, _ = redraw_for(tables.device.type)
    return draw(grids, index, tables, dtype, out)


@functools.cache
def redraw_for(device_type: str) -> tuple[Redraw, str]:
    """(the redraw, its name) for "cpu", "cuda" or another device: "numba kernel", "Triton kernel" or "torch reference".

    Logs one line when a missing package costs speed.
    """
    try:
        if device_type == "cuda":
            from quaclrs.imaging.kernels.render_triton import redraw_triton

            return redraw_triton, "Triton kernel"
        if device_type == "cpu":
            from quaclrs.imaging.kernels.render_cpu import redraw_cpu

            return redraw_cpu, "numba kernel"
    except ImportError as error:
        _log.warning("%s: pictures are redrawn in plain torch, the same but many times slower; pip install %s", error, error.name)
    return redraw_reference, "torch reference"
