"""Contract of the fast step: captured or compiled, it learns what the plain step does, frozen layers cost nothing, and
only exact results are called exact.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from packing import pack_tree
from png_trees import CLASSES, PngTree, make_rows, write_tree
from torch import nn

from quaclrs.config import TrainConfig
from quaclrs.loaders.base import LoaderConfig
from quaclrs.loaders.resident import ResidentLoader
from quaclrs.shards.reader import ShardSet
from quaclrs.training import loop
from quaclrs.training.architectures import ARCHITECTURES
from quaclrs.training.cuda_graph import GraphedStep
from quaclrs.training.models import build_model
from quaclrs.training.state import TrainState, amp_dtype, set_tf32

SIZE = 32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    return write_tree(tmp_path_factory.mktemp("tree"), make_rows(CLASSES[:4], (1, 2, 3)))


@pytest.fixture(scope="module", params=["indexed", "rgb"])
def shards(
    request: pytest.FixtureRequest, tree: PngTree, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ShardSet]:
    folder = tmp_path_factory.mktemp(request.param)
    pack_tree(tree, folder, encoding=request.param, image_size=SIZE)
    with ShardSet(folder) as opened:
        yield opened


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def labels_of(shards: ShardSet) -> np.ndarray:
    return shards.metadata().label[shards.samples["row"].astype(np.int64)]


def loader_on(shards: ShardSet, device: torch.device) -> ResidentLoader:
    config = LoaderConfig(image_size=SIZE, device=device, dtype=torch.float32, max_batch=9, num_workers=1)
    return ResidentLoader(shards, labels_of(shards), config)


def mobilenet() -> nn.Module:
    """With dropout, so that random numbers count."""
    torch.manual_seed(3)
    return build_model("mobilenet", 4)


# --- the captured step ---


@pytest.mark.parametrize("device_name", DEVICES)
def test_captured_steps_learn_what_plain_steps_do(device_name: str, shards: ShardSet) -> None:
    """Two epochs of 5 batches of 5 and a last one of 2 or 3: warm-up, capture, replays, a smaller batch, and replays
    again.
    """
    device = device_of(device_name)
    losses: dict[str, list[float]] = {}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    label = labels_of(shards)
    samples = np.arange(len(shards))[:27]
    for way in ("none", "cudagraph"):
        loader = loader_on(shards, device)
        config = TrainConfig(compile=way, batch_size=5, learning_rate=1e-3)
        training = TrainState.create(mobilenet(), np.array([0.5, 1.0, 2.0, 1.5], np.float32), device, config)
        graphed = GraphedStep(training, loader, 5) if way == "cudagraph" else None
        for epoch in (1, 2):
            plan = loop.plan_epoch(training, samples, label, global_batch=5, seed=1, epoch=epoch)
            seen: list[list[int]] = []
            trained = loop.train_epoch(
                training, loader, plan, lambda batch, *_, seen=seen: seen.append(batch.index.tolist()), graphed=graphed
            )
            training.progress = None
            assert seen == [batch.tolist() for batch in plan.batches]
            losses.setdefault(way, []).append(trained.loss)
        weights[way] = {name: value.cpu() for name, value in training.model.state_dict().items()}
        loader.close()
    if device_name == "cpu":
        assert losses["cudagraph"] == losses["none"]
    for name, value in weights["none"].items():
        torch.testing.assert_close(weights["cudagraph"][name], value, rtol=1e-3, atol=1e-4)
    assert losses["none"][0] != losses["none"][1]


@pytest.mark.gpu
def test_the_schedule_reaches_a_captured_graph(shards: ShardSet) -> None:
    """The learning rate of a graph lies on the device: set to nothing, the weights must stop."""
    device = device_of("cuda")
    loader = loader_on(shards, device)
    training = TrainState.create(
        mobilenet(), np.ones(4, np.float32), device, TrainConfig(compile="cudagraph", weight_decay=0.0)
    )
    graphed = GraphedStep(training, loader, 5)
    index, loss_scale = torch.arange(5, device=device), torch.full((), 0.2, device=device)
    for _ in range(5):
        graphed(index, loss_scale)
    training.optimizer.param_groups[0]["lr"].fill_(0.0)
    before = [parameter.clone() for parameter in training.model.parameters()]
    graphed(index, loss_scale)
    assert all(torch.equal(now, then) for now, then in zip(training.model.parameters(), before, strict=True))


def test_a_checkpoint_moves_between_ways_of_computing() -> None:
    """Saved with a learning rate on the device and other kernels, it goes on with this process's own."""
    training = TrainState.create(
        nn.Linear(2, 4), np.ones(4, np.float32), torch.device("cpu"), TrainConfig(learning_rate=0.5)
    )
    training.optimizer.zero_grad()
    training.model(torch.ones(1, 2)).sum().backward()
    training.optimizer.step()
    state = training.state_dict()
    group = state["optimizer"]["param_groups"][0]
    group |= {"lr": torch.tensor(0.25), "capturable": True, "fused": False}
    other = TrainState.create(
        nn.Linear(2, 4), np.ones(4, np.float32), torch.device("cpu"), TrainConfig(learning_rate=0.5)
    )
    other.load_state_dict(state)
    restored = other.optimizer.param_groups[0]
    assert (restored["lr"], restored["capturable"], restored["fused"]) == (0.25, False, True)
    assert isinstance(restored["lr"], float)
    other.optimizer.zero_grad()
    other.model(torch.ones(1, 2)).sum().backward()
    other.optimizer.step()


# --- torch.compile ---


@pytest.mark.exhaustive  # a compiler's run
def test_inductor_learns_what_plain_steps_do() -> None:
    """And leaves the names of the weights alone, so that checkpoints fit."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none here")
    images, labels, loss_scale = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor(1 / 6)
    losses = {}
    for way in ("none", "inductor"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
        names = list(model.state_dict())
        training = TrainState.create(model, np.ones(4, np.float32), torch.device("cpu"), TrainConfig(compile=way))
        losses[way] = [training.step(images, labels, loss_scale)[0].item() for _ in range(3)]
        assert list(training.state_dict()["model"]) == names
    assert losses["inductor"] == pytest.approx(losses["none"], rel=1e-4)
    assert losses["none"][2] < losses["none"][0]


# --- precision ---


def test_amp_dtype_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    assert amp_dtype(cpu, TrainConfig()) == torch.float32
    assert amp_dtype(cpu, TrainConfig(use_amp=True)) == torch.bfloat16
    assert amp_dtype(cpu, TrainConfig(use_amp=True, amp_dtype="float16")) == torch.float16


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_amp_dtype_follows_the_gpu(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert amp_dtype(torch.device("cuda", 0), TrainConfig(use_amp=True)) == expected
    assert amp_dtype(torch.device("cuda", 0), TrainConfig(use_amp=True, amp_dtype="float16")) == torch.float16


def test_tf32_is_off_unless_asked_for() -> None:
    flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [flag.allow_tf32 for flag in flags]
    try:
        for allowed in (True, False):
            set_tf32(allowed)
            assert [flag.allow_tf32 for flag in flags] == [allowed, allowed]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def test_float16_scales_its_loss() -> None:
    """The scaler is part of the one path: enabled by float16 alone, and its state is saved."""
    for options, enabled in (
        ({}, False),
        ({"use_amp": True}, False),
        ({"use_amp": True, "amp_dtype": "float16"}, True),
    ):
        config = TrainConfig(**options)
        training = TrainState.create(nn.Linear(2, 4), np.ones(4, np.float32), torch.device("cpu"), config)
        assert training.scaler.is_enabled() is enabled
        loss, _ = training.step(torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.tensor(1 / 3))
        assert loss.dtype == torch.float32
        assert bool(training.state_dict()["scaler"]) is enabled


# --- frozen layers ---


def saved_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """What autograd keeps from the forward to the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output: Any = model(images)
        loss = sum(part.sum() for part in output) if isinstance(output, tuple) else output.sum()
        loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("inception", "vgg16")])
def test_frozen_layers_keep_nothing(name: str) -> None:
    """No gradients, and of the activations only what the head needs. (VGG16 is frozen as AlexNet is, and takes seconds
    to make.)
    """
    row = ARCHITECTURES[name]
    images = torch.randn(2, 3, 64, 64)
    kept = {}
    for frozen in (False, True):
        model = build_model(name, 4, freeze_features=frozen)
        kept[frozen] = saved_bytes(model, images)
        for parameter_name, parameter in model.named_parameters():
            learns = not frozen or any(parameter_name.startswith(f"{module}.") for module in row.trainable)
            assert (parameter.grad is not None) == learns, parameter_name
    assert kept[True] < kept[False] / 3
    training = TrainState.create(
        build_model(name, 4, freeze_features=True), np.ones(4, np.float32), torch.device("cpu"), TrainConfig()
    )
    learning = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in learning) == sum(
        parameter.numel() for module in row.trainable for parameter in training.model.get_submodule(module).parameters()
    )
