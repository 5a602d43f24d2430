"""Contract of normalisation: torchvision's ToTensor and Normalize, to the last bit, on every device."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision import transforms

from quaclrs.imaging.normalise import normalisation_table, normalise

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def every_level() -> torch.Tensor:
    """(2, 16, 16, 3) uint8: each channel takes all 256 values, and no two channels the same way."""
    levels = torch.arange(256, dtype=torch.uint8)
    first = torch.stack([levels, levels.flip(0), levels.roll(77)], dim=1).reshape(16, 16, 3)
    return torch.stack([first, first.flip(0)])


def torchvision_normalised(images: torch.Tensor) -> torch.Tensor:
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return torch.stack([to_tensor(Image.fromarray(image.numpy())) for image in images])


def test_normalise_is_torchvisions_to_the_last_bit() -> None:
    images = every_level()
    found = normalise(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, torchvision_normalised(images))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(normalise(images, dtype), torchvision_normalised(images).to(dtype))


def test_the_table_of_other_devices_gives_the_same_bits() -> None:
    images = every_level()
    table = normalisation_table()
    assert table.shape == (3, 256)
    looked_up = torch.stack([table[channel][images[..., channel].long()] for channel in range(3)], dim=1)
    assert torch.equal(looked_up, torchvision_normalised(images))


@pytest.mark.gpu
def test_normalise_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    images = every_level()
    assert torch.equal(normalise(images.cuda()).cpu(), torchvision_normalised(images))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)],
)
def test_normalise_refuses_other_arrays(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, S, S, 3\) uint8"):
        normalise(images)
