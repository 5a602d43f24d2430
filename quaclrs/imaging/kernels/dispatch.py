"""Picks the render for a device: the fused kernel on a GPU, the compiled one on a CPU, the reference where neither can
run.

All three give the same bits. numba and triton are imported on first use only, for they take a second.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from quaclrs.imaging.render import Grids, RenderTables, render_reference

_log = logging.getLogger(__name__)

Render = Callable[[Grids, torch.Tensor, RenderTables, torch.dtype, "torch.Tensor | None"], torch.Tensor]


def render(
    grids: Grids,
    index: torch.Tensor,
    tables: RenderTables,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`quaclrs.imaging.render.render_reference`, by the fastest way there is on the tables' device.

    On a GPU nothing is checked and nothing waits: call :func:`quaclrs.imaging.render.check_grids` once per set of grids
    before.
    """
    draw, _ = render_for(tables.device.type)
    return draw(grids, index, tables, dtype, out)


@functools.cache
def render_for(device_type: str) -> tuple[Render, str]:
    """(the render, its name) for "cpu", "cuda" or another device: "numba kernel", "Triton kernel" or "torch reference".

    Logs one line when a missing package costs speed.
    """
    try:
        if device_type == "cuda":
            from quaclrs.imaging.kernels.render_triton import render_triton

            return render_triton, "Triton kernel"
        if device_type == "cpu":
            from quaclrs.imaging.kernels.render_cpu import render_cpu

            return render_cpu, "numba kernel"
    except ImportError as error:
        _log.warning(
            "%s: images are rendered in plain torch, the same but many times slower; pip install %s", error, error.name
        )
    return render_reference, "torch reference"
