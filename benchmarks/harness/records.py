"""Result files: one JSON document for each mode and machine, with every repeat and the environment it
was measured in.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measure import Contender, Group, Outcome, ratio

if TYPE_CHECKING:  # spawned workers import the scripts anew, and shall not wait for torch
    import torch

RESULTS = Path(__file__).parents[1] / "results"
"""The published ones, which the READMEs are made from."""
OWN_RESULTS = Path("results", "benchmarks")
"""Where everybody's own runs go, in the current folder."""

Row = dict[str, Any]
Record = dict[str, Any]
"""A result file's document."""


def save(outcome: Outcome, setting: dict[str, Any], folder: Path) -> Path:
    """Write the races of ``outcome`` as a result file and return its path."""
    rows = [_row(group, contender) for group in outcome.groups for contender in group.contenders]
    return write_result(outcome.what, rows, outcome.setting | setting, outcome.device, folder)


def _row(group: Group, contender: Contender) -> Row:
    row: Row = {"group": group.name, "name": contender.name}
    if contender.left_out is not None:
        return row | {
            "left_out": re.sub(r"(?<!\S)['\"]?/\S*/", "", contender.left_out)
        }  # without the machine's folders
    against = ratio(contender, group.baseline)
    limit = {} if contender.bounded_by is None else {"bounded_by": contender.bounded_by.name}
    return row | {
        "median_images_per_s": contender.median,
        "ratio_to_baseline": None if math.isnan(against) else against,
        "baseline": group.baseline.name,
        **limit,
        "images_per_s": contender.rates,
        "facts": contender.facts,
    }


def write_result(what: str, rows: Sequence[Row], setting: dict[str, Any], device: torch.device, folder: Path) -> Path:
    """Write ``<what>_<hardware>_torch<version>_<date>.json`` in ``folder`` and return its path."""
    import torch

    from quaclrs.system.environment import describe_environment

    environment = describe_environment(device) | {"commit": _commit()}
    hardware = environment["gpu"]["name"] if "gpu" in environment else f"{environment['cpus_usable']}cores"
    processes = setting.get("world_size", 1)
    program = "python"
    if processes > 1:
        hardware, program = f"{hardware}_{processes}processes", f"torchrun ({processes} processes)"
    today = date.today().isoformat()
    document: Record = {
        "what": what,
        "date": today,
        "command": " ".join([program, "benchmarks/" + Path(sys.argv[0]).name, *map(_without_folder, sys.argv[1:])]),
        "setting": setting,
        "rows": list(rows),
        "environment": environment,
    }
    name = "_".join([what, hardware, f"torch{torch.__version__.partition('+')[0]}", today])
    path = folder / (name.replace(" ", "-") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def newest(what: str, *, gpu: bool = False, folder: Path = RESULTS) -> Record | None:
    """The youngest result of ``what`` from one process on a machine with, or without, a GPU; None where
    there is none.
    """
    path = newest_path(what, gpu=gpu, folder=folder)
    return None if path is None else json.loads(path.read_bytes())


def newest_path(what: str, *, gpu: bool = False, folder: Path = RESULTS) -> Path | None:
    """The file of :func:`newest`."""
    records = {path: json.loads(path.read_bytes()) for path in sorted(folder.glob(f"{what}_*.json"))}
    fitting = {
        path: record["date"]
        for path, record in records.items()
        if (record["what"], "gpu" in record["environment"], record["setting"].get("world_size", 1)) == (what, gpu, 1)
    }
    return max(fitting, key=lambda path: fitting[path], default=None)


def find_row(record: Record | None, name: str, group: str = "") -> Row | None:
    """The row ``name`` of the first group that ends with ``group``; None where it is missing or was left out."""
    rows = record["rows"] if record else []
    raced = [row for row in rows if "name" in row and "left_out" not in row]  # footprint.py's have no name
    return next((row for row in raced if row["name"] == name and row["group"].endswith(group)), None)


def _without_folder(argument: str) -> str:
    """A command line says what was measured, not where it lay on one machine."""
    return re.sub(r"(^|=)/\S*/(?=\S)", r"\1", argument)


def _commit() -> str | None:
    """The commit measured, marked when the tree had uncommitted changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or None
