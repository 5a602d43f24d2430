"""ImageNet normalisation: ``(level / 255 − mean) / std`` per channel, with the same float32 bits on every device.

Source of the constants: torchvision's model weights (``weights.transforms()``), which are trained on such inputs.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torchvision.transforms import functional as transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def normalisation_table() -> torch.Tensor:
    """(3, 256) float32 on the CPU: the result of ToTensor + Normalize for each channel and level.

    torchvision itself computes it. A look-up therefore gives torchvision's bits on a GPU too, where torch replaces a
    division by a multiplication with the reciprocal. The tensor is shared: do not write to it.
    """
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)  # an image one pixel high
    scaled = transforms.to_tensor(levels)  # (3, 1, 256) float32 in [0, 1]
    table: torch.Tensor = transforms.normalize(scaled, list(IMAGENET_MEAN), list(IMAGENET_STD)).reshape(3, 256)
    return table


@functools.cache
def _table_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(flat table, start of each channel in it) on ``device``. Cached, because a copy from the host synchronises."""
    return normalisation_table().flatten().to(device), torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=device)


def normalise(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalise ``pixels`` (B, S, S, 3) uint8 to (B, 3, S, S) ``dtype`` in channels_last memory, on the same device.

    In float32 the values are bit-identical to torchvision's ToTensor + Normalize on every device.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"images must be (B, S, S, 3) uint8, not {tuple(pixels.shape)} {pixels.dtype}")
    if pixels.device.type == "cpu":
        # on the CPU three streaming passes are faster than a gather with 64-bit indices, and round the same way
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        values = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
    else:
        table, offsets = _table_on(pixels.device)
        values = table[pixels.to(torch.int32) + offsets]
    return values.to(dtype).permute(0, 3, 1, 2)
