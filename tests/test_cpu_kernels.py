"""Contract of the CPU kernels' arithmetic: it is exact for every level and every difference, aligned or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import transforms

from quaclrs.imaging.layout import even_layout
from quaclrs.imaging.memory import allocate_batch_memory, as_batch
from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD, normalise
from quaclrs.imaging.render import Grids, RenderTables, render_reference
from quaclrs.imaging.resample import HALF, WEIGHT_BITS

pytest.importorskip("numba", reason="numba is not installed")

from numba import njit

from quaclrs.imaging.kernels import intrinsics, normalise_cpu, render_cpu, render_cpu_tables


def every_level(size: int) -> torch.Tensor:
    """(1, size, size, 3) uint8; with ``size`` ≥ 16 every channel has all 256 levels."""
    return (
        torch.arange(3 * size * size, dtype=torch.int64)
        .div(3, rounding_mode="floor")
        .to(torch.uint8)
        .reshape(1, size, size, 3)
    )


def test_every_level_of_every_channel_has_torchvisions_bits() -> None:
    """Multiplying by the reciprocal gives the rounded quotients."""
    levels = every_level(16)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    out = as_batch(allocate_batch_memory(1, 16, torch.float32), 1, 16, torch.float32)
    assert torch.equal(normalise_cpu.normalise_cpu(levels, out)[0], steps(levels[0].numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 4, 32])
@pytest.mark.parametrize("size", [16, 17, 24])
def test_any_alignment_is_written_to(size: int, offset: int, dtype: torch.dtype) -> None:
    """Also where rows are not aligned for streaming stores. Nothing around the target is written."""
    values = 3 * size * size
    memory = np.full((values + 64) * dtype.itemsize + 128, 0x55, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    place = memory[start : start + values * dtype.itemsize]
    out = torch.from_numpy(place).view(dtype).view(1, size, size, 3).permute(0, 3, 1, 2)
    if dtype == torch.float32:
        streams = normalise_cpu.can_stream(normalise_cpu.pixels_of(out).reshape(size, 3 * size))
        assert streams == (offset % 32 == 0 and size % 8 == 0)
    levels = every_level(size)
    assert torch.equal(normalise_cpu.normalise_cpu(levels, out), normalise(levels, dtype))
    assert set(memory[:start]) | set(memory[start + len(place) :]) == {0x55}


def test_a_change_in_any_kernel_file_recompiles_all() -> None:
    """The cache on disk is used only if the stamp of all files matches; see ``compiled``."""
    test_every_level_of_every_channel_has_torchvisions_bits()
    kept = normalise_cpu.normalise_rows._cache._cache_file
    assert kept._source_stamp == intrinsics.SOURCES_STAMP
    assert kept._load_index() != {}
    kept._source_stamp = "of other files"
    try:
        assert kept._load_index() == {}
    finally:
        kept._source_stamp = intrinsics.SOURCES_STAMP
    users = {
        path.name for path in Path(intrinsics.__file__).parent.glob("*.py") if "intrinsics import" in path.read_text()
    }
    assert users | {"intrinsics.py"} == set(intrinsics._SOURCES)


def two_weights(excess: int) -> NDArray[np.int32]:
    """(2, 65) int32 pairs with sum 2^22 + ``excess``; the second weights are random and at the ends of the range."""
    second = np.append(np.random.default_rng(0).integers(0, 1 << WEIGHT_BITS, 60), [0, 1, 1 << 15, 1 << 21, 1 << 22])
    pairs: NDArray[np.int32] = np.stack([(1 << WEIGHT_BITS) + excess - second, second]).astype(np.int32)
    return pairs


@pytest.mark.parametrize("excess", [-2, 0, 1, 300])
def test_blend_is_used_exactly_where_it_is_exact(excess: int) -> None:
    """Compared with the weighted sum for all 65,536 pairs of levels: never claimed wrongly, never denied needlessly."""
    weights = two_weights(excess)
    claimed = render_cpu_tables.blends_exactly(np.vstack([weights, np.zeros_like(weights)]))
    upper, lower = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    blended = np.empty((256, 256), np.uint8)
    for (first, second), exact in zip(weights.T.astype(np.int64), claimed, strict=True):
        low = np.int16(second - ((second + (1 << 15)) >> 16 << 16))
        high = np.int16((second - low) >> 16)
        blend_all(upper.astype(np.uint8), lower.astype(np.uint8), high, low, blended)
        assert np.array_equal(blended, upper * first + lower * second + HALF >> WEIGHT_BITS) == exact
    assert claimed.any() or excess == 300
    if excess == 0:
        assert claimed.all()


@njit
def blend_all(upper, lower, high, low, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = intrinsics.blend(upper[i, j], lower[i, j], high, low)


def test_three_rows_are_never_blended_as_two() -> None:
    weights = np.array([[1 << 21], [1 << 21], [1]], np.int32)
    assert not render_cpu_tables.blends_exactly(weights).any()


@pytest.mark.parametrize("offset", [0, 8])
def test_a_batch_in_the_callers_own_memory(offset: int) -> None:
    """Aligned for streaming stores, and not aligned."""
    rng = np.random.default_rng(0)
    layout, palette = even_layout(40, 100, 13, 38), rng.integers(0, 256, (256, 3)).astype(np.uint8)
    zero = torch.zeros(1, dtype=torch.int32)
    grids = Grids(torch.from_numpy(rng.integers(0, 256, layout.cells).astype(np.uint8)), torch.tensor([0]), zero, zero)
    tables, index = RenderTables.build([layout], [palette], 32), torch.tensor([0])
    values = torch.from_numpy(allocate_batch_memory(2, 32, torch.float32)[offset : offset + 4 * 3 * 32 * 32])
    out = values.view(torch.float32).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    assert torch.equal(
        render_cpu.render_cpu(grids, index, tables, torch.float32, out), render_reference(grids, index, tables)
    )


def test_memory_of_batches_begins_on_a_cache_line() -> None:
    for images, size in ((1, 7), (3, 64)):
        batch = as_batch(allocate_batch_memory(images, size, torch.bfloat16), images, size, torch.bfloat16)
        assert batch.shape == (images, 3, size, size)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert batch.data_ptr() % 64 == 0
