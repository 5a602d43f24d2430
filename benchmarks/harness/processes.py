"""CPU time and peak memory of processes, read from /proc. On systems without /proc every figure is 0."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def list_own_pids() -> list[int]:
    """Return this process and its multiprocessing workers. Peers are started by subprocess and do not count."""
    workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    return [os.getpid(), *workers]


def list_tree_pids(pid: int) -> list[int]:
    """Return ``pid`` and all of its living descendants."""
    found = [pid]
    for parent in found:  # grows during the loop
        for listing in _PROC.glob(f"{parent}/task/*/children"):
            with contextlib.suppress(OSError):
                found += map(int, listing.read_text().split())
    return found


def read_cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time so far of ``pids`` and of those of their children that have ended."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return total / _TICKS_PER_S


def reset_peaks(pids: list[int]) -> None:
    """Set the peak memory of ``pids`` to their present memory. A kernel that does not allow it keeps the old peaks."""
    for pid in pids:
        with contextlib.suppress(OSError):
            (_PROC / str(pid) / "clear_refs").write_text("5")


def read_peak_bytes(pids: list[int]) -> int:
    """Return the sum of the peak resident sets of ``pids``; a page that several of them share counts for each."""
    return sum(_read_status_bytes(pid, "VmHWM") for pid in pids)


def read_resident_bytes(pids: list[int]) -> int:
    """Return the sum of the present resident sets of ``pids``."""
    return sum(_read_status_bytes(pid, "VmRSS") for pid in pids)


def _read_status_bytes(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
