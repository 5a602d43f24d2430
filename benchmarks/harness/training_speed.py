"""Modes ``step`` and ``train`` of throughput.py: training throughput if data cost nothing, and with a loader.

The ceiling is the trainer's own step (quaclrs.training.state.TrainState.step) on one batch that is on the device
already; ``train`` is the trainer's own epoch (quaclrs.training.loop.train_epoch) over a loader. Both take turns on the
same model, so that a drift of the machine cannot distort their ratio. Under torchrun both average gradients over the
ranks, as the trainer does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peers.serving import DeviceClock, count_bytes_on_disk

from harness.bench_data import open_shards
from harness.bottleneck import find_training_bottleneck
from harness.contender import Contender, Group, Options, Outcome, Pass
from harness.limits import count_flops_per_image, make_arithmetic_limit
from harness.measure import race, refuse_to_run
from harness.processes import list_own_pids, read_peak_bytes, reset_peaks
from harness.tables import group_table
from quaclrs.config import TrainConfig
from quaclrs.data.folds import class_weights
from quaclrs.loaders import Choice, build_loader
from quaclrs.loaders.base import Batch, DeviceLoader, Loader, LoaderConfig
from quaclrs.loaders.dataset import Dataset
from quaclrs.training import loop
from quaclrs.training.architectures import input_size
from quaclrs.training.cuda_graph import GraphedStep
from quaclrs.training.device import pick_device, refuse_unsupported
from quaclrs.training.distributed import World
from quaclrs.training.models import build_model
from quaclrs.training.state import TrainState, amp_dtype, set_tf32

CEILING = "step on one batch (ceiling)"
_FLOP_OF_A_REPEAT, _MOST_STEPS_ON_CPU = 5e11, 3
"""The size of one repeat on a CPU: about so many floating-point operations, and at most so many steps."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One group of the table: what is trained, and from which loader."""

    model_name: str
    batch_size: int
    """Of each rank."""
    use_amp: bool
    compile: str
    loader: str
    encoding: str
    steps: int
    """Optimizer steps that one repeat takes."""

    @property
    def name(self) -> str:
        """The group's name, without the loader: the ceiling has none."""
        precision = "AMP" if self.use_amp else "float32"
        graph = "" if self.compile == "none" else f", {self.compile}"
        return f"{self.model_name}, batch {self.batch_size}, {precision}{graph}"

    @property
    def config(self) -> TrainConfig:
        """The trainer's configuration of this case."""
        return TrainConfig(
            model_name=self.model_name,
            batch_size=self.batch_size,
            use_amp=self.use_amp,
            compile=self.compile,
            loader=self.loader,
        )


def measure_training(options: Options, work_dir: Path, *, train: bool) -> Outcome:
    """Measure every case of ``options`` in turn: its ceiling and, with ``train``, its training."""
    world = options.world
    device = pick_device(options.device, world)
    set_tf32(False)
    cases = _make_cases(options, device.type == "cuda", world)
    for case in cases:  # refuse before packing
        refuse_unsupported(case.config, device, world)
    with world.main_process_first():
        dataset = open_shards(options, work_dir, options.train_encoding)
    groups = []
    for case in cases:
        group = measure_case(case, dataset, device, options.num_workers, options.repeats, world, train=train)
        options.log(group_table(group))
        groups.append(group)
    return Outcome(what="train" if train else "step", groups=groups, setting={"images": len(dataset)}, device=device)


def _make_cases(options: Options, on_gpu: bool, world: World) -> list[Case]:
    graphs = on_gpu and world.size == 1
    return [
        Case(
            model_name=model_name,
            batch_size=batch_size,
            use_amp=options.use_amp if options.use_amp is not None else on_gpu,
            compile=compiler,
            loader=options.train_loader or ("resident" if on_gpu else "mapped"),
            encoding=options.train_encoding,
            steps=options.steps or (50 if on_gpu else _steps_on_cpu(model_name, batch_size)),
        )
        for model_name in options.models
        for batch_size in options.train_batch_sizes or ([256, 32] if on_gpu else [16])
        for compiler in options.compile or (["none", "cudagraph"] if graphs and batch_size <= 32 else ["none"])
    ]


def _steps_on_cpu(model_name: str, batch_size: int) -> int:
    """Return the steps of one repeat: fewer for larger models, which would otherwise take most of the time.

    A step of VGG16 takes ten times as long as one of ResNet18.
    """
    return min(max(round(_FLOP_OF_A_REPEAT / (batch_size * count_flops_per_image(model_name))), 1), _MOST_STEPS_ON_CPU)


def measure_case(
    case: Case, dataset: Dataset, device: torch.device, num_workers: int, repeats: int, world: World, *, train: bool
) -> Group:
    """Race the ceiling of ``case`` and, with ``train``, its training; frees the model and closes the loader."""
    reset_peaks(list_own_pids())
    torch.manual_seed(0)
    weights = class_weights(dataset.label, dataset.classes)
    training = TrainState.create(
        build_model(case.model_name, len(dataset.classes)), weights, device, case.config, world
    )
    loader_config = LoaderConfig(
        image_size=input_size(case.model_name),
        device=device,
        dtype=amp_dtype(device, case.config),
        max_batch=case.batch_size + 1,
        num_workers=num_workers,
    )
    opened = time.perf_counter()
    loader = build_loader(Choice(name=case.loader, reason="benchmark"), dataset, loader_config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        batch = next(iter(loader.load([np.arange(case.batch_size) % len(dataset)])))
        opened_s = time.perf_counter() - opened
        limit = make_arithmetic_limit(case.model_name, training.dtype, device)
        ceiling = Contender(name=CEILING, run=_repeat_step(batch, training, case), work="model", limit=limit)
        contenders = [ceiling]
        if train:
            run = _run_epochs(training, loader, dataset, case)
            name = f"train, {case.loader}, {case.encoding}"
            contenders.append(Contender(name=name, run=run, work="model", limit=limit))
        group = Group(name=case.name, contenders=[*contenders, limit], baseline=ceiling)
        race(group.contenders, repeats, world)
        for contender in contenders:
            contender.facts |= dataclasses.asdict(case) | _read_peaks(device)
        if train:
            _add_training_facts(contenders[-1], ceiling, dataset, opened_s)
    finally:
        loader.close()
    for contender in group.contenders:
        contender.run = refuse_to_run
    return group


def _add_training_facts(trained: Contender, ceiling: Contender, dataset: Dataset, opened_s: float) -> None:
    trained.facts |= {
        "open_to_first_batch_s": opened_s,
        "bytes_per_image": count_bytes_on_disk([dataset.shards.root] if dataset.shards else []) / len(dataset),
        "bound_by": find_training_bottleneck(
            data_wait=trained.facts["data_wait"],
            share_of_ceiling=trained.median / ceiling.median,
            share_of_limit=trained.facts["share_of_limit"],
        ),
    }


def _repeat_step(batch: Batch, training: TrainState, case: Case) -> Callable[[], Pass]:
    """Return a run of ``case.steps`` steps on the same ``batch``."""
    images, labels = batch.images, batch.labels
    loss_scale = 1 / training.class_weights[labels].sum()
    if case.compile == "cudagraph":
        graphed = GraphedStep(training, _OneBatch(images, labels), len(labels))
        index = torch.arange(len(labels), device=images.device)

        def step() -> None:
            graphed(index, loss_scale)
    else:

        def step() -> None:
            training.step(images, labels, loss_scale)

    def run() -> Pass:
        training.model.train()
        with DeviceClock(images.device) as clock:
            for _ in range(case.steps):
                step()
        return Pass(images=case.steps * len(labels), device_s=clock.seconds())

    return run


class _OneBatch:
    """A loader of one batch for CUDA graphs: its gather costs nothing."""

    name, pixels, replicated = "one batch", "", True

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._images, self._labels = images, labels

    def on_device(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._images, self._labels

    def load(self, batches: Any) -> Iterator[Any]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _run_epochs(training: TrainState, loader: Loader, dataset: Dataset, case: Case) -> Callable[[], Pass]:
    """Return a run that trains the first ``case.steps`` batches of an epoch, of another epoch at each call."""
    graphed = None
    if case.compile == "cudagraph":
        graphed = GraphedStep(training, cast(DeviceLoader, loader), case.batch_size)
    samples, world = np.arange(len(dataset)), training.world
    epoch = 0

    def run() -> Pass:
        nonlocal epoch
        epoch += 1
        plan = loop.plan_epoch(training, samples, dataset.label, case.batch_size * world.size, seed=0, epoch=epoch)
        part = slice(case.steps)
        plan = loop.EpochPlan(
            batches=plan.batches[part],
            samples=plan.samples[part],
            loss_scales=plan.loss_scales[part],
            seeds=plan.seeds[part],
        )
        first: list[float] = []
        with DeviceClock(training.device) as clock:
            trained = loop.train_epoch(
                training, loader, plan, on_step=lambda batch, totals, waited_s: first.append(waited_s), graphed=graphed
            )
        training.progress = None
        return Pass(
            images=sum(map(len, plan.batches)),
            first_batch_s=first[0],
            data_wait=trained.waited_s / trained.seconds,
            device_s=clock.seconds(),
        )

    return run


def _read_peaks(device: torch.device) -> dict[str, float]:
    facts = {"host_peak_mb": read_peak_bytes(list_own_pids()) / 1e6}
    if device.type == "cuda":
        facts["device_peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return facts
