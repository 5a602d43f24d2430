"""Contract of models.py: seven networks take our images, learn where they should and start from the right weights."""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from quaclrs.errors import MissingDependencyError, StorageError, UsageError
from quaclrs.training import architectures, models

ORIGINAL_NAMES = ["alexnet", "vgg16", "resnet18", "mobilenet", "inception", "efficientnet", "convnext"]
NAMES = list(architectures.ARCHITECTURES)
CLASSES = 13

TRAINABLE_WHEN_FROZEN = {
    "alexnet": [f"classifier.{layer}.{kind}" for layer in (1, 4, 6) for kind in ("weight", "bias")],
    "vgg16": [f"classifier.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")],
    "resnet18": ["fc.weight", "fc.bias"],
    "mobilenet": ["classifier.1.weight", "classifier.1.bias"],
    "inception": [
        *(f"AuxLogits.conv{layer}.{part}" for layer in (0, 1) for part in ("conv.weight", "bn.weight", "bn.bias")),
        *("AuxLogits.fc.weight", "AuxLogits.fc.bias", "fc.weight", "fc.bias"),
    ],
    "efficientnet": ["classifier.1.weight", "classifier.1.bias"],
    "convnext": [f"classifier.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")],
}

LEARNING_WHEN_FROZEN = {
    "alexnet": (9216 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * CLASSES,
    "vgg16": (25088 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * CLASSES,
    "resnet18": 6_669,
    "mobilenet": 16_653,
    "inception": 2_594_330,  # the whole auxiliary head
    "efficientnet": 16_653,
    "convnext": 11_533,  # the LayerNorm before the head too
}
"""Trainable parameters of the original trainer's models, with 13 classes and frozen features."""

PRETRAINED = {
    "alexnet": "AlexNet_Weights.IMAGENET1K_V1",
    "vgg16": "VGG16_Weights.IMAGENET1K_V1",
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "mobilenet": "MobileNet_V2_Weights.IMAGENET1K_V2",
    "inception": "Inception_V3_Weights.IMAGENET1K_V1",
    "efficientnet": "EfficientNet_B0_Weights.IMAGENET1K_V1",
    "convnext": "ConvNeXt_Tiny_Weights.IMAGENET1K_V1",
}
"""The weights that the original trainer starts from."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small batches gain nothing from a second thread, and lose much when another process has its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_meta(name: str, **options: Any) -> nn.Module:
    """A model without memory: enough for shapes and names."""
    with torch.device("meta"):
        return models.build_model(name, CLASSES, **options)


def can_train(model: nn.Module, batch_size: int, size: int) -> bool:
    try:
        logits, _ = models.forward_logits(model.train(), torch.empty(batch_size, 3, size, size, device="meta"))
    except (RuntimeError, ValueError):
        return False
    return logits.shape == (batch_size, CLASSES)


def test_table_has_the_original_names_and_sizes() -> None:
    assert NAMES[: len(ORIGINAL_NAMES)] == ORIGINAL_NAMES
    sizes = {name: architectures.input_size(name) for name in ORIGINAL_NAMES}
    assert sizes == dict.fromkeys(ORIGINAL_NAMES, 224) | {"inception": 299}


@pytest.mark.parametrize("name", NAMES)
def test_trains_at_its_smallest_size(name: str) -> None:
    model = models.build_model(name, CLASSES)
    assert model.training
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters()
        if parameter.ndim == 4
    )
    size = max(architectures.ARCHITECTURES[name].min_input_size, 32)
    images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    logits, aux_logits = models.forward_logits(model, images)
    assert logits.shape == (2, CLASSES)
    loss = logits.sum()
    assert (aux_logits is not None) == (name == "inception")
    if aux_logits is not None:
        assert aux_logits.shape == (2, CLASSES)
        loss = loss + models.AUX_LOSS_WEIGHT * aux_logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        logits, aux_logits = models.forward_logits(model.eval(), images)
    assert logits.shape == (2, CLASSES)
    assert aux_logits is None


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_smallest_sizes_are_the_smallest(name: str) -> None:
    row, model = architectures.ARCHITECTURES[name], on_meta(name)
    smallest = row.min_input_size
    assert can_train(model, 2, smallest)  # no batch is smaller, see sampling.py
    assert smallest == 1 or not can_train(model, 2, smallest - 1)


@pytest.mark.parametrize("name", NAMES)
def test_check_input_size(name: str) -> None:
    smallest = architectures.ARCHITECTURES[name].min_input_size
    architectures.check_input_size(name, smallest)
    with pytest.raises(UsageError, match=f"--image_size {smallest - 1}: {name} needs at least {smallest} pixels"):
        architectures.check_input_size(name, smallest - 1)


@pytest.mark.parametrize("name", NAMES)
def test_freezing_leaves_exactly_what_the_original_trains(name: str) -> None:
    frozen = on_meta(name, freeze_features=True)
    learning = [key for key, parameter in frozen.named_parameters() if parameter.requires_grad]
    assert sorted(learning) == sorted(TRAINABLE_WHEN_FROZEN[name])
    counted = sum(parameter.numel() for parameter in frozen.parameters() if parameter.requires_grad)
    assert counted == LEARNING_WHEN_FROZEN.get(name, counted)  # the original has no other models
    assert all(parameter.requires_grad for parameter in on_meta(name).parameters())


@pytest.mark.parametrize(("name", "member"), PRETRAINED.items())
def test_pretrained_weights_are_the_originals(name: str, member: str) -> None:
    """The original trainer takes torchvision's DEFAULT for each of its models."""
    weights = torchvision_models.get_weight(architectures.ARCHITECTURES[name].weights)
    builder = architectures.ARCHITECTURES[name].constructor
    assert isinstance(builder, str)
    default = torchvision_models.get_model_weights(builder)["DEFAULT"]
    assert weights is default
    assert f"{type(weights).__name__}.{weights.name}" == member


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_takes_all_but_the_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = architectures.ARCHITECTURES[name]
    with torch.device("meta"):
        shapes = models._construct(row, {}).state_dict() if name != "inception" else inception_shapes()
    state = {
        key: torch.full(value.shape, index, dtype=value.dtype) for index, (key, value) in enumerate(shapes.items())
    }
    monkeypatch.setattr(
        type(torchvision_models.get_weight(row.weights)), "get_state_dict", lambda _self, **_options: state
    )
    loaded = models.build_model(name, CLASSES, pretrained=True, freeze_features=True)
    heads = {f"{head}.{kind}" for head in row.heads for kind in ("weight", "bias")}
    for key, value in loaded.state_dict().items():
        if key in heads:
            assert value.shape[0] == CLASSES
        else:
            assert torch.equal(value, state[key]), key
    assert sorted(key for key, value in loaded.named_parameters() if value.requires_grad) == sorted(
        TRAINABLE_WHEN_FROZEN[name]
    )
    if name == "inception":
        assert loaded.transform_input


def inception_shapes() -> dict[str, torch.Tensor]:
    shapes: dict[str, torch.Tensor] = torchvision_models.inception_v3(weights=None, init_weights=False).state_dict()
    return shapes


def test_same_seed_same_fresh_weights() -> None:
    twins = []
    for _ in range(2):
        torch.manual_seed(3)
        twins.append(models.build_model("resnet18", CLASSES).state_dict())
    assert all(torch.equal(value, twins[1][key]) for key, value in twins[0].items())


def test_unknown_name_lists_the_known() -> None:
    for call in (architectures.input_size, lambda name: models.build_model(name, 2), models.weights_path):
        with pytest.raises(UsageError, match=r"--model_name resnet19: choose one of alexnet, vgg16, .*convnext"):
            call("resnet19")


@pytest.fixture
def weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where mobilenet's ImageNet weights belong, in an empty torch cache and without any network."""

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    path = tmp_path / "torch_home" / "hub" / "checkpoints" / "mobilenet_v2-7ebf99e0.pth"
    path.parent.mkdir(parents=True)
    return path


def test_pretrained_reads_the_file_in_torchs_cache(weights_file: Path) -> None:
    source = torchvision_models.mobilenet_v2(weights=None).state_dict()
    torch.save(source, weights_file)
    loaded = models.build_model("mobilenet", CLASSES, pretrained=True).state_dict()
    assert models.weights_path("mobilenet") == weights_file
    same = [
        key for key, value in loaded.items() if value.shape == source[key].shape and torch.equal(value, source[key])
    ]
    assert set(source) - set(same) == {"classifier.1.weight", "classifier.1.bias"}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_no_network_says_what_to_put_where(weights_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingDependencyError) as error:
        models.build_model("mobilenet", CLASSES, pretrained=True)
    text = one_line(error)
    assert "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth" in text
    assert "Temporary failure in name resolution" in text
    assert str(weights_file) in text
    assert capsys.readouterr().out == ""
    assert list(weights_file.parent.iterdir()) == []
    assert socket.getdefaulttimeout() is None


class Response(io.BytesIO):
    """What urlopen returns for a page that is no weights file, as a hotel's login page would be."""

    def info(self) -> Any:
        return {}


class Headers(dict[str, str]):
    def get_all(self, _name: str) -> None:
        return None


def answer_not_found(request: Any) -> None:
    raise HTTPError(request.full_url, 404, "Not Found", Headers(), None)  # type: ignore[arg-type]


def answer_too_late(_request: Any) -> None:
    raise TimeoutError("timed out")


def answer_other_page(_request: Any) -> Response:
    response = Response(b"<html>please log in</html>")
    response.info = Headers  # type: ignore[method-assign]
    return response


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answer_not_found, "HTTP 404 Not Found"),
        (answer_too_late, "no answer for 30 s"),
        (answer_other_page, "invalid hash value"),
    ],
)
def test_failed_downloads(
    weights_file: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any], Any], reason: str
) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", answer)
    with pytest.raises(MissingDependencyError, match=re.escape(reason)) as error:
        models.build_model("mobilenet", CLASSES, pretrained=True)
    assert str(weights_file) in one_line(error)
    assert list(weights_file.parent.iterdir()) == []


def truncated() -> bytes:
    buffer = io.BytesIO()
    torch.save(torchvision_models.mobilenet_v2(weights=None).state_dict(), buffer)
    return buffer.getvalue()[:100_000]


def other_tensors() -> bytes:
    buffer = io.BytesIO()
    torch.save({"features.0.0.weight": torch.zeros(1)}, buffer)
    return buffer.getvalue()


def no_tensors() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Path("code that a pickle could run")}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make", [truncated, other_tensors, no_tensors, lambda: b"", lambda: b"<html>please log in</html>"]
)
def test_a_damaged_weights_file_is_named(weights_file: Path, make: Callable[[], bytes]) -> None:
    weights_file.write_bytes(make())
    with pytest.raises(MissingDependencyError, match="does not hold the weights of mobilenet") as error:
        models.build_model("mobilenet", CLASSES, pretrained=True)
    text = one_line(error)
    assert str(weights_file) in text
    assert "delete it, or replace it with https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth" in text


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "file"))):
        models.build_model("mobilenet", CLASSES, pretrained=True)
