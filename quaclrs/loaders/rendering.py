"""Record arrays → batches of images: shared by the loaders that read arrays (``mapped`` and ``resident``)."""

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
    """Raise :class:`UsageError` when ``shards`` hold images resized to another size than ``image_size``."""
    stored = shards.manifest.image_size
    if stored is not None and stored != image_size:
        raise UsageError(
            f"--image_size {image_size}: {shards.root} holds images already resized to {stored}; "
            f"use --image_size {stored}, or pack anew with --image_size {image_size} (or --encoding indexed or png, "
            "which serve all sizes)"
        )


class GridRenderer:
    """Renders batches of grids (:attr:`Content.GRIDS`) on ``config.device``."""

    def __init__(self, shards: ShardSet, config: LoaderConfig) -> None:
        self.tables = RenderTables.build(shards.layouts, shards.palettes, config.image_size, config.device)
        self._config = config
        self._memory = BatchMemory(config.image_size, config.dtype)
        self.layouts = torch.from_numpy(shards.samples["layout"].astype(np.int32))
        """(N,) int32 on the CPU: each sample's layout."""
        self.palettes = torch.from_numpy(shards.samples["palette"].astype(np.int32))
        """(N,) int32 on the CPU: each sample's palette."""

    def render(self, grids: Grids, index: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S): the images of ``grids[index]``; ``index`` is (B,) int64."""
        out = self._memory.take(len(index)) if self._config.device.type == "cpu" else None
        return render(grids, index, self.tables, self._config.dtype, out)


class PixelNormaliser:
    """Normalises batches of pixels (:attr:`Content.PIXELS`) on ``config.device``."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._memory = BatchMemory(config.image_size, config.dtype)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S), channels_last, of ``pixels`` (B, S, S, 3) uint8; a view of them where dtype is uint8."""
        if self._config.dtype == torch.uint8:
            return pixels.permute(0, 3, 1, 2)
        if self._config.device.type == "cpu":
            try:
                from quaclrs.imaging.kernels.normalise_cpu import normalise_cpu
            except ImportError:  # no numba: the same values, computed more slowly
                return normalise(pixels, self._config.dtype)
            return normalise_cpu(pixels, self._memory.take(len(pixels)))
        return normalise(pixels, self._config.dtype)
