"""Contract of training/optimizer.py: a saved optimizer continues on any device, whatever its hyperparameters are."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from quaclrs.config import TrainConfig
from quaclrs.training.optimizer import build_optimizer, build_scheduler, load_optimizer_state, step_scheduler

CPU = torch.device("cpu")


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((3, 2), 1.0 + step)).square().sum().backward()
        optimizer.step()


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adam":
        return build_optimizer(model.parameters(), TrainConfig(learning_rate=0.5), CPU)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # of another user, or of a later version


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_saved_optimizer_continues_with_the_same_weights(kind: str) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(2, 4)
    optimizer = make_optimizer(kind, whole)
    take_steps(whole, optimizer, 2)
    resumed, saved = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    again = make_optimizer(kind, resumed)
    load_optimizer_state(again, saved)
    for model, stepped in ((whole, optimizer), (resumed, again)):
        take_steps(model, stepped, 2)
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name
    assert not torch.equal(whole.weight, nn.Linear(2, 4).weight)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build_optimizer(model.parameters(), TrainConfig(weight_decay=0.25), CPU).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model[1].parameters()]
    assert (group["weight_decay"], group["lr"]) == (0.25, 1e-3)


def test_each_schedule_steps_once_an_epoch() -> None:
    rates: dict[str, list[float]] = {}
    for scheduler in ("plateau", "cosine", "none"):
        config = TrainConfig(scheduler=scheduler, learning_rate=1.0, epochs=5)
        optimizer = build_optimizer(nn.Linear(1, 1).parameters(), config, CPU)
        schedule = build_scheduler(optimizer, config)
        rates[scheduler] = []
        for _ in range(5):
            optimizer.step()
            step_scheduler(schedule, val_accuracy=0.5)
            rates[scheduler].append(optimizer.param_groups[0]["lr"])
    assert rates["plateau"] == [1.0, 1.0, 1.0, 1.0, 0.5]  # 3 epochs of patience after the first
    assert rates["cosine"] == pytest.approx(
        [1e-6 + (1 - 1e-6) * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(1, 6)]
    )
    assert rates["none"] == [1.0] * 5
