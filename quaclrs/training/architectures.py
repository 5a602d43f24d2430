"""The architectures as one table: adding a model takes one entry here.

Constructors and ImageNet weights are torchvision's, named by strings, so that the command line can list the models
without importing torch. training/models.py builds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quaclrs.errors import UsageError
from quaclrs.settings import choose

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table: the properties of a model that this project needs."""

    constructor: str | Callable[..., nn.Module]
    """The name of a builder in torchvision.models, or any function that takes its arguments."""
    weights: str
    """The ImageNet weights of ``--pretrained``, as torchvision.models.get_weight() names them."""
    input_size: int = 224
    """Default side of the square input in pixels."""
    min_input_size: int
    """Smallest side at which the network can be trained. Below it torch raises, or pooling leaves nothing."""
    heads: tuple[str, ...]
    """The ``Linear`` modules that output class scores, main one first; build_model() replaces them by fresh ones."""
    trainable: tuple[str, ...]
    """Modules that still learn under ``freeze_features``: what the original trainer leaves unfrozen."""
    gradcam_layer: str
    """Module whose output Grad-CAM weighs: the last feature maps (B, channels, height, width), after the activation."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments for random weights."""
    pretrained_options: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments for weights from a file."""


ARCHITECTURES: dict[str, Architecture] = {
    "alexnet": Architecture(
        constructor="alexnet",
        weights="AlexNet_Weights.IMAGENET1K_V1",
        min_input_size=63,
        heads=("classifier.6",),
        trainable=("classifier",),
        gradcam_layer="features.11",  # the last ReLU; the pooling after it would halve the map
    ),
    "vgg16": Architecture(
        constructor="vgg16",
        weights="VGG16_Weights.IMAGENET1K_V1",
        min_input_size=32,
        heads=("classifier.6",),
        trainable=("classifier",),
        gradcam_layer="features.29",  # as in alexnet
    ),
    "resnet18": Architecture(
        constructor="resnet18",
        weights="ResNet18_Weights.IMAGENET1K_V1",
        min_input_size=1,
        heads=("fc",),
        trainable=("fc",),
        gradcam_layer="layer4",
    ),
    "mobilenet": Architecture(
        constructor="mobilenet_v2",
        weights="MobileNet_V2_Weights.IMAGENET1K_V2",
        min_input_size=1,
        heads=("classifier.1",),
        trainable=("classifier.1",),
        gradcam_layer="features.18",
    ),
    "inception": Architecture(
        constructor="inception_v3",
        weights="Inception_V3_Weights.IMAGENET1K_V1",
        input_size=299,
        min_input_size=299,  # of the auxiliary head's 5×5 convolution; without that head, as in evaluation, it is 75
        heads=("fc", "AuxLogits.fc"),
        trainable=("fc", "AuxLogits"),
        gradcam_layer="Mixed_7c",
        options={"init_weights": True},
        # transform_input: these weights come from TensorFlow, and expect inputs scaled to [-1, 1]
        pretrained_options={"init_weights": False, "transform_input": True},
    ),
    "efficientnet": Architecture(
        constructor="efficientnet_b0",
        weights="EfficientNet_B0_Weights.IMAGENET1K_V1",
        min_input_size=1,
        heads=("classifier.1",),
        trainable=("classifier.1",),
        gradcam_layer="features.8",
    ),
    "convnext": Architecture(
        constructor="convnext_tiny",
        weights="ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
        min_input_size=32,
        heads=("classifier.2",),
        trainable=("classifier",),  # its LayerNorm too, as in the original trainer
        gradcam_layer="features.7",
    ),
}


def architecture(name: str) -> Architecture:
    """Return the table's row for ``name``. Raises :class:`UsageError`, listing the names, for an unknown one."""
    return ARCHITECTURES[choose("model_name", name, ARCHITECTURES)]


def input_size(name: str) -> int:
    """Side in pixels of the square input that the architecture ``name`` was designed for."""
    return architecture(name).input_size


def check_input_size(name: str, size: int) -> None:
    """Raise :class:`UsageError` when the architecture ``name`` cannot be trained on ``size`` × ``size`` pixels."""
    row = architecture(name)
    if size < row.min_input_size:
        raise UsageError(
            f"--image_size {size}: {name} needs at least {row.min_input_size} pixels (made for {row.input_size})"
        )


def parse_model_names(text: str) -> list[str]:
    """The models of ``--model_name``: one, several with commas, or ``all``; each once.

    Raises :class:`UsageError` for an unknown one.
    """
    if text.strip().casefold() == "all":
        return list(ARCHITECTURES)
    given = [name.strip() or text for name in text.split(",")]
    also = ", several with commas, or all"
    return list(dict.fromkeys(choose("model_name", name, ARCHITECTURES, also=also) for name in given))
