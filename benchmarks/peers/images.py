"""Transforms and collate function of the peers that decode. Needs torch and torchvision in the peer's environment."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import transforms
from torchvision.transforms import v2

from peers.serving import IMAGENET_MEAN, IMAGENET_STD


def make_pillow_transform(size: int, dtype: str) -> Any:
    """Return the original trainer's transforms: an RGB Pillow image to (3, S, S), bit for bit the .npy's pixels."""
    resize = transforms.Resize((size, size))
    if dtype == "uint8":
        return transforms.Compose([resize, transforms.PILToTensor()])
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def make_tensor_transform(size: int, dtype: str) -> Any:
    """Return the same with torchvision's v2 transforms: (3, H, W) uint8 to (3, S, S).

    The resize is torch's own on uint8; channels-last memory makes it take its fast path. It differs from Pillow's in
    few values, and there by one level.
    """
    resize = v2.Resize((size, size), antialias=True)
    if dtype == "uint8":
        return resize
    return v2.Compose([resize, v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def collate(samples: list[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, list[Any]]:
    """Return a batch (B, 3, S, S) in channels_last memory, and the samples' second values. Runs in the worker."""
    images = torch.stack([image for image, _ in samples])
    return images.contiguous(memory_format=torch.channels_last), [number for _, number in samples]
