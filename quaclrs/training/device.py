"""Chooses the device to train on, and refuses what torch cannot do there."""

from __future__ import annotations

import torch

from quaclrs.config import TrainConfig
from quaclrs.errors import UsageError
from quaclrs.training.distributed import World


def pick_device(wanted: str, world: World | None = None) -> torch.device:
    """Return :func:`resolve_device`, and make it torch's current device."""
    device = resolve_device(wanted, world)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches keep one shape, so trying out algorithms pays
        torch.cuda.set_device(device)  # events, pinned memory and kernels go to the current device
    return device


def resolve_device(wanted: str, world: World | None = None) -> torch.device:
    """Return the device of ``--device``: ``auto`` is the GPU if there is one; each of several ranks has its own GPU.

    Raises :class:`UsageError` for a device that does not exist.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {wanted}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if device.index is not None and world and world.size > 1:
        raise UsageError(
            f"--device {wanted}: names one GPU, and {world.size} processes take one each; use --device cuda, and "
            "CUDA_VISIBLE_DEVICES to choose among them"
        )
    index = device.index if device.index is not None else world.local_rank if world else 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        raise UsageError(f"--device {wanted}: torch sees {found} CUDA device(s) here; use --device auto or cpu")
    return torch.device("cuda", index)


def refuse_unsupported(config: TrainConfig, device: torch.device, world: World) -> None:
    """Raise :class:`UsageError` for what torch cannot do on ``device``."""
    if config.sync_bn and device.type != "cuda":
        raise UsageError("--sync_bn: torch synchronises BatchNorm between GPUs only; leave it out on the CPU")
    if config.compile == "cudagraph" and (device.type != "cuda" or world.size > 1):
        where = f"{world.size} processes" if world.size > 1 else str(device)
        raise UsageError(
            f"--compile cudagraph: captures the work of one GPU, and this is {where}; for several GPUs use --parallel "
            "folds, or --compile inductor"
        )
