"""Modes ``step`` and ``train`` of throughput.py: what a model can learn per second when data cost nothing, and what it does learn.

The ceiling is the trainer's own step (quaclrs.training.Training.step) on one batch that is on the device already; ``train`` is the
trainer's own epoch (quaclrs.engine.train_epoch) over a loader. Both run in turn, on the same model, so their ratio is honest.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from bench_data import packed
from measure import Contender, Group, Outcome, race_and_print

from quaclrs import engine
from quaclrs.config import TrainConfig
from quaclrs.crossval import pick_device
from quaclrs.dataset import Dataset
from quaclrs.folds import class_weights
from quaclrs.graph import GraphedStep
from quaclrs.loaders import Choice, build_loader
from quaclrs.loaders.base import DeviceLoader, Loader, LoaderConfig
from quaclrs.models import build_model, input_size
from quaclrs.training import Training, amp_dtype, set_tf32

DATA_WAIT_LIMIT = 0.02
"""Share of the time that the training thread may wait for data before they are what bounds it; design.md's target."""
_SPREAD = 0.05
"""Ratios to the ceiling closer to 1 than this are noise on machines that are shared."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: what is trained, and from where."""

    model_name: str
    batch_size: int
    use_amp: bool
    compile: str
    loader: str
    encoding: str
    steps: int
    """Optimizer steps that one repeat takes."""

    @property
    def name(self) -> str:
        """Without the loader: what its ceiling shares with it."""
        precision = "AMP" if self.use_amp else "float32"
        graph = "" if self.compile == "none" else f", {self.compile}"
        return f"{self.model_name}, batch {self.batch_size}, {precision}{graph}"


def measure_training(options: Any, work_dir: Path, *, train: bool) -> Outcome:
    """Every case of ``options``, one after the other: the ceilings, and with ``train`` what the trainer makes of them."""
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    set_tf32(False)
    dataset = packed(options, work_dir, options.train_encoding)
    groups = []
    for model_name in options.models:
        for batch_size in options.train_batch_sizes or ([256, 32] if on_gpu else [16]):
            for compiler in options.compile or (["none", "cudagraph"] if on_gpu and batch_size <= 32 else ["none"]):
                case = Case(
                    model_name=model_name,
                    batch_size=batch_size,
                    use_amp=options.use_amp if options.use_amp is not None else on_gpu,
                    compile=compiler,
                    loader=options.train_loader or ("resident" if on_gpu else "mapped"),
                    encoding=options.train_encoding,
                    steps=options.steps or (50 if on_gpu else 3),
                )
                groups.append(measure_case(case, dataset, device, options.num_workers, options.repeats, train=train))
    return Outcome(what="train" if train else "step", groups=groups, setting={"images": len(dataset)}, device=device)


def measure_case(case: Case, dataset: Dataset, device: torch.device, num_workers: int, repeats: int, *, train: bool) -> Group:
    """Race the ceiling of ``case`` and, with ``train``, its training; the model and the loader are gone afterwards."""
    config = TrainConfig(model_name=case.model_name, batch_size=case.batch_size, use_amp=case.use_amp, compile=case.compile)
    torch.manual_seed(0)
    weights = class_weights(dataset.label, dataset.classes)
    training = Training.begin(build_model(case.model_name, len(dataset.classes)), weights, device, config)
    loader_config = LoaderConfig(
        image_size=input_size(case.model_name),
        device=device,
        dtype=amp_dtype(device, config),
        max_batch=case.batch_size + 1,
        num_workers=num_workers,
    )
    loader = build_loader(Choice(name=case.loader, reason="benchmark"), dataset, loader_config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        first = time.perf_counter()
        batch = next(iter(loader.load([np.arange(case.batch_size)])))
        _synchronise(device)
        first_batch_s = time.perf_counter() - first
        ceiling = Contender(name="step on one batch (ceiling)", run=_steps_on(batch.images, batch.labels, training, case))
        contenders = [ceiling]
        waits: list[float] = []
        if train:
            run = _epochs_of(training, loader, dataset, case, waits)
            contenders.append(Contender(name=f"train, {case.loader}, {case.encoding}", run=run))
        group = Group(name=case.name, contenders=contenders, baseline=ceiling)
        race_and_print(group, repeats)
        for contender in contenders:
            contender.facts |= dataclasses.asdict(case) | _memory(device)
        if train:
            trained = contenders[-1]
            ratio = trained.median / ceiling.median
            trained.facts |= {
                "data_wait": float(np.median(waits[1:])),  # the first was the warm-up
                "first_batch_s": first_batch_s,
                "bound_by": _verdict(float(np.median(waits[1:])), ratio),
            }
    finally:
        loader.close()
    for contender in contenders:
        contender.run = _spent  # it would keep the model
    return group


def _steps_on(images: torch.Tensor, labels: torch.Tensor, training: Training, case: Case) -> Callable[[], int]:
    share = 1 / training.class_weights[labels].sum()
    if case.compile == "cudagraph":
        graphed = GraphedStep(training, _OneBatch(images, labels), len(labels))
        index = torch.arange(len(labels), device=images.device)

        def step() -> None:
            graphed(index, share)
    else:

        def step() -> None:
            training.step(images, labels, share)

    def run() -> int:
        training.model.train()
        for _ in range(case.steps):
            step()
        _synchronise(images.device)
        return case.steps * len(labels)

    return run


class _OneBatch:
    """A loader of one batch, for graphs: a gather that costs nothing."""

    name, pixels, holds_all = "one batch", "", True

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._images, self._labels = images, labels

    def on_device(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._images, self._labels

    def load(self, batches: Any) -> Iterator[Any]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _epochs_of(training: Training, loader: Loader, dataset: Dataset, case: Case, waits: list[float]) -> Callable[[], int]:
    """Each call trains the first ``case.steps`` batches of another epoch; notes the share of time spent waiting for data."""
    graphed = None
    if case.compile == "cudagraph":
        graphed = GraphedStep(training, cast(DeviceLoader, loader), case.batch_size)
    samples = np.arange(len(dataset))
    epoch = 0

    def run() -> int:
        nonlocal epoch
        epoch += 1
        plan = engine.plan_epoch(training, samples, dataset.label, case.batch_size, seed=0, epoch=epoch)
        part = slice(case.steps)
        plan = engine.EpochPlan(
            batches=plan.batches[part], samples=plan.samples[part], shares=plan.shares[part], seeds=plan.seeds[part]
        )
        trained = engine.train_epoch(training, loader, plan, graphed=graphed)
        training.progress = None
        waits.append(trained.waited_s / trained.seconds)
        return trained.samples

    return run


def _verdict(data_wait: float, ratio: float) -> str:
    if data_wait > DATA_WAIT_LIMIT:
        return "data"
    return "model" if ratio >= 1 - _SPREAD else "host"  # neither waits for data nor keeps up: Python and launches between the steps


def _memory(device: torch.device) -> dict[str, float]:
    unit = 1 if sys.platform == "darwin" else 1024
    facts = {"host_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}
    if device.type == "cuda":
        facts["device_peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return facts


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spent() -> int:
    raise RuntimeError("this contender's race is over")
