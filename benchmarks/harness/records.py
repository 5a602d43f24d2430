"""Result files: one JSON document per mode and machine, with every repeat and the environment it was measured in."""

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

from harness.contender import Contender, Group, Outcome
from harness.measure import ratio

if TYPE_CHECKING:  # spawned workers import these modules anew and must not wait for torch
    import torch

RESULTS = Path(__file__).parents[1] / "results"
"""The published result files, from which the READMEs' tables are made."""
OWN_RESULTS = Path("results", "benchmarks")
"""Where anybody's own runs go, below the current folder."""

Row = dict[str, Any]
Record = dict[str, Any]
"""A result file's document."""

_RENAMED_WORDS = {"redraw": "render", "making synthetic pictures": "making synthetic images"}
"""Words in older result files to the words used now."""


# --- writing ---


def save_outcome(outcome: Outcome, setting: dict[str, Any], folder: Path) -> Path:
    """Write the races of ``outcome`` as a result file and return its path."""
    rows = [_make_row(group, contender) for group in outcome.groups for contender in group.contenders]
    return write_result(outcome.what, rows, outcome.setting | setting, outcome.device, folder)


def _make_row(group: Group, contender: Contender) -> Row:
    row: Row = {"group": group.name, "name": contender.name}
    if contender.left_out is not None:
        without_folders = re.sub(r"(?<!\S)['\"]?/\S*/", "", contender.left_out)
        return row | {"left_out": without_folders}
    to_baseline = ratio(contender, group.baseline)
    limit = {} if contender.limit is None else {"bounded_by": contender.limit.name}
    return row | {
        "median_images_per_s": contender.median,
        "ratio_to_baseline": None if math.isnan(to_baseline) else to_baseline,
        "baseline": group.baseline.name,
        **limit,
        "images_per_s": contender.rates,
        "facts": contender.facts,
    }


def write_result(what: str, rows: Sequence[Row], setting: dict[str, Any], device: torch.device, folder: Path) -> Path:
    """Write ``<what>_<hardware>_torch<version>_<date>.json`` in ``folder`` and return its path."""
    import torch

    from quaclrs.system.environment import describe_environment

    environment = describe_environment(device) | {"commit": _describe_commit()}
    hardware = environment["gpu"]["name"] if "gpu" in environment else f"{environment['cpus_usable']}cores"
    processes = setting.get("world_size", 1)
    program = "python"
    if processes > 1:
        hardware, program = f"{hardware}_{processes}processes", f"torchrun ({processes} processes)"
    today = date.today().isoformat()
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    document: Record = {
        "what": what,
        "date": today,
        "command": " ".join([program, script, *map(_strip_folder, sys.argv[1:])]),
        "setting": setting,
        "rows": list(rows),
        "environment": environment,
    }
    name = "_".join([what, hardware, f"torch{torch.__version__.partition('+')[0]}", today])
    path = folder / (name.replace(" ", "-") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _strip_folder(argument: str) -> str:
    """Drop absolute folders from a command-line argument: they say where data lay on one machine, not what was run."""
    return re.sub(r"(^|=)/\S*/(?=\S)", r"\1", argument)


def _describe_commit() -> str | None:
    """Return the commit that was measured, marked if the tree had uncommitted changes; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or None


# --- reading ---


def read_record(path: Path) -> Record:
    """Return the document of a result file, with words that have been renamed since in their present form."""
    record: Record = json.loads(path.read_bytes())
    for row in record["rows"]:
        for place, key in ((row, "group"), (row.get("facts", {}), "bound_by")):
            if key in place:
                place[key] = _RENAMED_WORDS.get(place[key], place[key])
    return record


def newest_record(what: str, *, gpu: bool = False, folder: Path = RESULTS) -> Record | None:
    """Return the newest one-process result of ``what`` from a machine with a GPU, or from one without; None if there is
    none.
    """
    path = newest_path(what, gpu=gpu, folder=folder)
    return None if path is None else read_record(path)


def newest_path(what: str, *, gpu: bool = False, folder: Path = RESULTS) -> Path | None:
    """Return the file of :func:`newest_record`."""
    records = {path: json.loads(path.read_bytes()) for path in sorted(folder.glob(f"{what}_*.json"))}
    fitting = {
        path: record["date"]
        for path, record in records.items()
        if (record["what"], "gpu" in record["environment"], record["setting"].get("world_size", 1)) == (what, gpu, 1)
    }
    return max(fitting, key=lambda path: fitting[path], default=None)


def find_row(record: Record | None, name: str, group: str = "") -> Row | None:
    """Return the row ``name`` of the first group whose name ends with ``group``; None if it is missing or left out."""
    rows = record["rows"] if record else []
    raced = [row for row in rows if "name" in row and "left_out" not in row]  # rows of footprint.py have no name
    return next((row for row in raced if row["name"] == name and row["group"].endswith(group)), None)
