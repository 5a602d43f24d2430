"""``quaclrs-train --demo``: synthesize, pack, train and report, in a few minutes on two cores."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, Columns, TrainConfig, usable_processors
from quaclrs.errors import UsageError
from quaclrs.synthesize import SynthesisConfig, synthesize_dataset

DEMO_DEFAULTS: dict[str, Any] = {
    "fold": 1,
    "epochs": 4,
    "image_size": 96,
    "num_workers": usable_processors(),
    "output_dir": Path("results") / "demo",
    "gradcam_per_class": 1,
}
"""Defaults of the command line that differ under ``--demo``."""

PARALLEL_DEMO_DEFAULTS: dict[str, Any] = DEMO_DEFAULTS | {"fold": None, "epochs": 2, "image_size": 64}
"""The same under ``--demo --parallel folds``: all ten folds, each shorter."""


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/quaclrs``, by default ``~/.cache/quaclrs``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quaclrs"


def prepare_demo(config: TrainConfig) -> TrainConfig:
    """Make the demo's dataset unless it exists; returns ``config`` with its CSV and folder.

    Raises :class:`UsageError` when ``config`` names other data.
    """
    for flag in ("csv_file", "spectrograms_dir", "shards"):
        if getattr(config, flag) is not None:
            raise UsageError(f"--{flag} {getattr(config, flag)}: --demo brings its own data; leave out one of the two")
    if config.columns != Columns():
        raise UsageError("--file_column, --label_column, --fold_column: --demo brings its own CSV; leave them out")
    folder = cache_root() / "demo"
    print(f"demo: a synthetic dataset in {folder} (made once, then reused)")
    synthesize_dataset(SynthesisConfig(output_dir=folder, num_workers=config.num_workers or 1), progress=True)
    return dataclasses.replace(
        config, shards=None, csv_file=folder / DEFAULT_CSV_FILE, spectrograms_dir=folder / DEFAULT_SPECTROGRAMS_DIR
    )
