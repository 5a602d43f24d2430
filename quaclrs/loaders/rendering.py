"""From what ``indexed`` and ``rgb`` shards hold to images: shared by the loaders that keep such records in memory or
read them raw.
"""

from __future__ import annotations

import numpy as np
import torch

from quaclrs.errors import UsageError
from quaclrs.imaging.kernels.dispatch import render
from quaclrs.imaging.normalise import normalise
from quaclrs.imaging.render import Grids, RenderTables
from quaclrs.loaders.base import BatchMemory, LoaderConfig
from quaclrs.shards.reader import ShardSet


def check_image_size(shards: ShardSet, image_size: int) -> None:
    """Raise :class:`UsageError` when ``shards`` hold images of one size and it is not ``image_size``."""
    stored = shards.manifest.image_size
    if stored is not None and stored != image_size:
        raise UsageError(
            f"--image_size {image_size}: {shards.root} holds images already resized to {stored}; "
            f"use --image_size {stored}, or pack anew with --image_size {image_size} (or --encoding indexed or png, "
            "which serve all sizes)"
        )


def array_bytes(shards: ShardSet) -> np.ndarray:
    """(N,) int64: bytes of each sample's array in ``indexed`` or ``rgb`` shards."""
    if shards.encoding == "indexed":
        return np.array([layout.cells for layout in shards.layouts], dtype=np.int64)[shards.samples["layout"]]
    assert shards.manifest.image_size is not None
    return np.full(len(shards), 3 * shards.manifest.image_size**2, dtype=np.int64)


class GridRenderer:
    """Draws batches of ``indexed`` records on ``config.device``."""

    def __init__(self, shards: ShardSet, config: LoaderConfig) -> None:
        self.tables = RenderTables.build(shards.layouts, shards.palettes, config.image_size, config.device)
        self._config = config
        self._memory = BatchMemory(config.image_size, config.dtype)
        self.layouts = torch.from_numpy(shards.samples["layout"].astype(np.int32))
        self.palettes = torch.from_numpy(shards.samples["palette"].astype(np.int32))

    def draw(self, grids: Grids, index: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) of the images ``index`` (B,) int64 of ``grids``."""
        out = self._memory.take(len(index)) if self._config.device.type == "cpu" else None
        return render(grids, index, self.tables, self._config.dtype, out)


class PixelNormaliser:
    """Normalises batches of ready pixels on ``config.device``."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._memory = BatchMemory(config.image_size, config.dtype)

    def draw(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) of ``pixels`` (B, S, S, 3) uint8."""
        if self._config.dtype == torch.uint8:
            return pixels.permute(0, 3, 1, 2)
        if self._config.device.type == "cpu":
            try:
                from quaclrs.imaging.kernels.normalise_cpu import normalise_cpu
            except ImportError:  # no numba: the same values, more slowly
                return normalise(pixels, self._config.dtype)
            return normalise_cpu(pixels, self._memory.take(len(pixels)))
        return normalise(pixels, self._config.dtype)
