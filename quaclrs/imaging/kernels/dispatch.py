"""Picks the render for a device: the Triton kernel on a GPU, the numba kernel on a CPU, else the reference.

All three give the same bits. numba and triton are imported on first use only, because each import takes about a second.
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
    """As :func:`quaclrs.imaging.render.render_reference`, with the fastest implementation for the tables' device.

    On a GPU the call does not synchronise and does not check the grids. Call
    :func:`quaclrs.imaging.render.check_grids` once per set of grids before.
    """
    function, _ = render_for(tables.device.type)
    return function(grids, index, tables, dtype, out)


@functools.cache
def render_for(device_type: str) -> tuple[Render, str]:
    """(function, name) of the render for a device type; "numba kernel" for "cpu", "Triton kernel" for "cuda".

    Where the package is missing, and for any other device type, it is the "torch reference". A missing package is
    logged in one line, because it costs speed.
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
