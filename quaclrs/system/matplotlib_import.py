"""Imports matplotlib in spite of a ``MPLBACKEND`` that it refuses: nothing here opens a window.

Notebooks set the variable for every process that they start, also for a virtual environment that lacks their backend.
"""

from __future__ import annotations

import contextlib
import os

_VARIABLE = "MPLBACKEND"


def import_matplotlib() -> None:
    """Import matplotlib with the backend that ``MPLBACKEND`` names if it can be had, else with matplotlib's choice.

    The variable is as before afterwards. Call it before the first import of matplotlib or of what imports it.
    """
    wanted = os.environ.pop(_VARIABLE, None)
    try:
        import matplotlib as mpl
    finally:
        if wanted is not None:
            os.environ[_VARIABLE] = wanted
    if wanted:
        with contextlib.suppress(ValueError):
            mpl.rcParams["backend"] = wanted
