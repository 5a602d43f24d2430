"""Measuring on machines that are shared and noisy: interleaved repeats, medians with spread, ratios taken pair by pair."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.client import PeerError

if TYPE_CHECKING:  # spawned workers import the scripts anew, and shall not wait for torch
    import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(kw_only=True)
class Contender:
    """One way of doing the work. ``run`` does all of it once and returns the images handled."""

    name: str
    run: Callable[[], int]
    facts: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    """images/s of each counted repeat."""
    left_out: str | None = None
    """Why it is not in the race, or not any more."""

    @property
    def median(self) -> float:
        """The middle of the repeats, in images/s."""
        return statistics.median(self.rates)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Contenders that do the same work, and the one they are compared with."""

    name: str
    contenders: list[Contender]
    baseline: Contender


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one mode of throughput.py measured, to be saved."""

    what: str
    groups: list[Group]
    setting: dict[str, Any]
    device: torch.device


def race_and_print(group: Group, repeats: int) -> None:
    """Race the contenders of ``group`` and show their table."""
    race(group.contenders, repeats)
    print(table(group), flush=True)


def race(contenders: Sequence[Contender], repeats: int) -> None:
    """Warm every contender up once, then run all of them in turn, ``repeats`` times: A B C A B C ..., so that a drift of the
    machine meets all alike. A peer that fails on the way is left out from there on, with its reason."""
    for contender in contenders:
        _run(contender)
    for _ in range(repeats):
        for contender in contenders:
            started = time.perf_counter()
            images = _run(contender)
            if images is not None:
                contender.rates.append(images / (time.perf_counter() - started))


def _run(contender: Contender) -> int | None:
    if contender.left_out is None:
        try:
            return contender.run()
        except PeerError as error:
            contender.left_out, contender.rates = error.reason, []
    return None


def ratio(contender: Contender, baseline: Contender) -> float:
    """Median of the ratios of runs that followed each other; NaN where one of the two was left out."""
    if contender.left_out is not None or baseline.left_out is not None:
        return math.nan
    return statistics.median(a / b for a, b in zip(contender.rates, baseline.rates, strict=True))


def table(group: Group) -> str:
    """One line per contender: median, spread and ratio to the baseline, or why it was left out."""
    width = max(len(name) for name in (group.name, *(contender.name for contender in group.contenders)))
    lines = [f"{group.name:{width}}  {'images/s':>10}  {'min':>10}  {'max':>10}  {'ratio':>7}"]
    lines += [
        f"{contender.name:{width}}  {contender.median:>10,.0f}  {min(contender.rates):>10,.0f}  {max(contender.rates):>10,.0f}  "
        f"{ratio(contender, group.baseline):>7.2f}"
        if contender.left_out is None
        else f"{contender.name:{width}}  left out: {contender.left_out}"
        for contender in group.contenders
    ]
    return "\n".join([*lines, f"ratio: to {group.baseline.name}, median of the pairs", ""])


def save(what: str, groups: Sequence[Group], setting: dict[str, Any], device: torch.device) -> Path:
    """Write the races of ``groups`` as a result file and return its path."""
    rows = [_row(group, contender) for group in groups for contender in group.contenders]
    return write_result(what, rows, setting, device)


def _row(group: Group, contender: Contender) -> dict[str, Any]:
    row: dict[str, Any] = {"group": group.name, "name": contender.name}
    if contender.left_out is not None:
        return row | {"left_out": re.sub(r"(?<!\S)['\"]?/\S*/", "", contender.left_out)}  # without the machine's folders
    against = ratio(contender, group.baseline)
    return row | {
        "median_images_per_s": contender.median,
        "ratio_to_baseline": None if math.isnan(against) else against,
        "baseline": group.baseline.name,
        "images_per_s": contender.rates,
        "facts": contender.facts,
    }


def write_result(what: str, rows: list[dict[str, Any]], setting: dict[str, Any], device: torch.device) -> Path:
    """Write ``<what>_<hardware>_torch<version>_<date>.json`` below benchmarks/results and return its path."""
    import torch

    from quaclrs.environment import describe_environment

    environment = describe_environment(device) | {"commit": _commit()}
    hardware = environment["gpu"]["name"] if "gpu" in environment else f"{environment['cpus_usable']}cores"
    today = date.today().isoformat()
    document = {
        "what": what,
        "date": today,
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *map(_without_folder, sys.argv[1:])]),
        "setting": setting,
        "rows": rows,
        "environment": environment,
    }
    name = "_".join([what, hardware, f"torch{torch.__version__.partition('+')[0]}", today])
    path = RESULTS / (name.replace(" ", "-") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _without_folder(argument: str) -> str:
    """A command line says what was measured, not where it lay on one machine."""
    return Path(argument).name if argument.startswith("/") else argument


def _commit() -> str | None:
    """The commit measured, marked when the tree had uncommitted changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or None
