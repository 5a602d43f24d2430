"""Contract of the machine's limits: every way of writing and copying does its work, and operation counts are right."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import benchmarking
import numpy as np
import pytest
import torch
from harness import limits
from harness.contender import Pass
from PIL import Image

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def short_trials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        benchmarking.shorten_trials(patch)
        yield


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "L", "I;16"])
def test_inflating_all_pixels(mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 100), dtype=np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    path = tmp_path / "image.png"
    image.save(path)
    stream, room = limits._zlib_stream(path.read_bytes())
    content = zlib.decompress(stream)
    bytes_of_a_pixel = {"RGBA": 4, "RGB": 3, "I;16": 2}.get(mode, 1)
    assert len(content) == 40 * (1 + 100 * bytes_of_a_pixel)
    assert len(content) < room < len(content) + 100
    assert limits.make_inflate_limit([path] * 3, num_threads=2).run() == Pass(images=3)


def test_every_way_of_copying_copies() -> None:
    source = torch.randint(0, 255, (9, 24), dtype=torch.uint8)
    asked = [torch.tensor([3, 8, 0]), torch.tensor([1, 1])]
    buffers = [torch.zeros(3 * 24, dtype=torch.uint8) for _ in range(2)]
    for name, copy in limits._list_copying_ways(source, buffers, asked).items():
        for i, numbers in enumerate(asked):
            buffers[i].zero_()
            copy(i)
            assert torch.equal(buffers[i].view(3, 24)[: len(numbers)], source[numbers]), name


def test_every_way_of_writing_writes_all() -> None:
    for dtype in (torch.float32, torch.uint8, torch.float16):
        buffers = [torch.zeros(8 * 33, dtype=dtype) for _ in range(2)]
        for name, write in limits._list_writing_ways(buffers).items():
            buffers[1].zero_()
            write(1)
            assert (buffers[1].view(torch.uint8).view(-1, buffers[1].element_size()) != 0).any(dim=1).all(), name


def test_limits_of_memory_count_every_image() -> None:
    assert limits.make_writing_limit(4, 3, 8, torch.float32, CPU).run() == Pass(images=12)
    pixels = np.zeros((5, 8, 8, 3), np.uint8)
    assert limits.make_copying_limit(pixels, [np.array([1, 2, 3]), np.array([0, 4])], CPU).run() == Pass(images=5)


@pytest.mark.parametrize(("model_name", "multiply_adds"), [("resnet18", 1.8e9), ("mobilenet", 0.3e9)])
def test_operations_of_a_model(model_name: str, multiply_adds: float) -> None:
    """The papers' multiply-adds of a forward pass, two operations each; backward costs twice as much. MobileNetV2 has
    depthwise convolutions."""
    assert limits.count_flops_per_image(model_name) == pytest.approx(3 * 2 * multiply_adds, rel=0.03)


def test_arithmetic_is_that_of_the_faster_type() -> None:
    limit = limits.make_arithmetic_limit("alexnet", torch.bfloat16, CPU)
    assert limit.is_limit
    assert limit.run().images > 0
    assert limit.facts["gflop_per_image"] == limits.count_flops_per_image("alexnet") / 1e9
