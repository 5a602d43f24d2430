"""Contract of checking peers: the benchmark compares a peer's batches with Pillow's pixels before it times the peer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import benchmarking  # noqa: F401 - puts benchmarks/ on sys.path
import numpy as np
import pytest
import torch
from peers.serving import IMAGENET_MEAN, IMAGENET_STD, ReusedBuffer, Tolerance, check_batch, check_epoch


def test_normalisation_of_the_peers_is_ours() -> None:
    from quaclrs.imaging import normalise

    assert (IMAGENET_MEAN, IMAGENET_STD) == (normalise.IMAGENET_MEAN, normalise.IMAGENET_STD)
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    kept = ReusedBuffer(3, 4).normalise(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(kept, normalise.normalise(images), rtol=0, atol=1e-6)


def _pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), dtype=np.uint8)


def _batch(pixels: np.ndarray, dtype: str) -> Any:
    from quaclrs.imaging.normalise import normalise

    tensor = torch.from_numpy(pixels.copy())
    return normalise(tensor) if dtype == "float32" else tensor.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_check_passes_equal_pixels_and_refuses_one_wrong_level(dtype: str) -> None:
    pixels = _pixels()
    assert check_batch(_batch(pixels, dtype), pixels, dtype) == (0, 0)
    wrong = pixels.copy()
    wrong[1, 2, 3, 0] += 1
    with pytest.raises(SystemExit, match=r"up to 1 levels, 0\.0069\d in the mean; allowed are 0 and 0"):
        check_batch(_batch(wrong, dtype), pixels, dtype)
    most, mean = check_batch(_batch(wrong, dtype), pixels, dtype, Tolerance(most=1, mean=0.1))
    assert (most, mean) == pytest.approx((1, 1 / pixels.size), abs=1e-3)
    with pytest.raises(SystemExit, match=r"allowed are 1 and 0\.001"):
        check_batch(_batch(wrong, dtype), pixels, dtype, Tolerance(most=1, mean=0.001))


def test_check_refuses_other_layouts_types_and_shapes() -> None:
    pixels = _pixels()
    with pytest.raises(SystemExit, match="not in channels_last memory"):
        check_batch(_batch(pixels, "float32").contiguous(), pixels, "float32")
    with pytest.raises(SystemExit, match=r"the batch is torch\.uint8, not float32"):
        check_batch(_batch(pixels, "uint8"), pixels, "float32")
    with pytest.raises(SystemExit, match=r"the batch is \(2, 4, 4, 3\), not \(3, 4, 4, 3\)"):
        check_batch(_batch(pixels[:2], "uint8"), pixels, "uint8")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([[0, 1], [2]], None),
        ([[2], [0, 1]], None),
        ([[0, 1]], "an epoch has 2 samples, 2 of them different, where there are 3"),
        ([[0, 1], [2], [0]], "an epoch has 4 samples, 3 of them different, where there are 3"),
        ([[0, 1], [1]], "an epoch has 3 samples, 2 of them different, where there are 3"),
        ([], "an epoch has 0 samples, 0 of them different, where there are 3"),
    ],
)
def test_check_wants_every_sample_once(order: list[list[int]], message: str | None) -> None:
    pixels = _pixels()

    def epoch() -> Iterator[tuple[Any, Any]]:
        for numbers in order:
            yield _batch(pixels[numbers], "uint8"), numbers

    with contextlib.nullcontext() if message is None else pytest.raises(SystemExit, match=message):
        check = check_epoch(epoch, pixels, "uint8", Tolerance(), np.asarray)
        assert check == {"most_levels_from_pillow": 0, "mean_levels_from_pillow": 0}
