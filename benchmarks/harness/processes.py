"""What processes cost the machine, from /proc: processor time and peaks of memory. Where there is no /proc, nothing is
known.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def own_processes() -> list[int]:
    """This process and the workers it started by multiprocessing; peers, which it started otherwise, are
    not its own.
    """
    workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    return [os.getpid(), *workers]


def process_tree(pid: int) -> list[int]:
    """``pid`` and all that descends from it and is alive."""
    found = [pid]
    for parent in found:  # grows while it is read
        for listing in _PROC.glob(f"{parent}/task/*/children"):
            with contextlib.suppress(OSError):
                found += map(int, listing.read_text().split())
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time that ``pids``, and those of their children that have ended, have had so far."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return total / _TICKS_PER_S


def reset_peaks(pids: list[int]) -> None:
    """Let the peaks of ``pids`` begin anew at what they have now; a kernel that does not allow it keeps
    the old ones.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            (_PROC / str(pid) / "clear_refs").write_text("5")


def peak_bytes(pids: list[int]) -> int:
    """The sum of the peaks of the resident sets of ``pids``; pages that several of them share count for each."""
    return sum(_status(pid, "VmHWM") for pid in pids)


def resident_bytes(pids: list[int]) -> int:
    """The sum of the resident sets of ``pids`` now."""
    return sum(_status(pid, "VmRSS") for pid in pids)


def _status(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
