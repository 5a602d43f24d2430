"""The software and hardware of this process, recorded with every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import quaclrs
from quaclrs.config import usable_processors

_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "numpy", "pillow", "scikit-learn", "webdataset")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor and device, as JSON-able values. Contains no host names and no paths."""
    environment: dict[str, Any] = {
        "quaclrs": quaclrs.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": usable_processors(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 2),
            "cuda": torch.version.cuda,
        }
    return environment


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None if unknown.

    For the host this is MemAvailable of ``/proc/meminfo``.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
