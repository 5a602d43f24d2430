"""Modes ``decode`` and ``load`` of throughput.py: every loader of ours and every peer, in the group of those that do
the same work.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.registry import DECODING, PEERS, READY, Entry
from peers.serving import DeviceClock, bytes_on_disk

from harness.bench_data import packed, pixels_of, tree_of, write_images
from harness.limits import copying_limit, inflate_limit, writing_limit
from harness.measure import Contender, Group, Outcome, repeated, spent
from harness.peer_contender import Setting, open_peer
from harness.peer_process import Pass
from harness.processes import own_processes, peak_bytes, reset_peaks, resident_bytes
from harness.tables import race_and_print
from quaclrs.config import ENCODINGS, default_num_workers
from quaclrs.data.sampling import epoch_order, evaluation_batches
from quaclrs.experiment.cross_validation import pick_device
from quaclrs.loaders import Choice, build_loader
from quaclrs.loaders.base import Loader, LoaderConfig
from quaclrs.loaders.dataset import Dataset
from quaclrs.training.distributed import World

OURS = "quaclrs"
"""The key of our own loaders for ``--only``."""
_YARDSTICKS = ("dali", "ffcv-raw", "memmap")
"""Keys of the peers that a group is compared with, where they are in it: the first that works."""
_LOSSY = "ffcv-jpeg"
"""The peer that decodes other, smaller images than the PNGs whose inflating is the limit of all others."""


def measure_loading(kind: str, options: Any, work_dir: Path) -> Outcome:
    """Race the loaders of ``kind``, DECODING or READY, for every one of ``--dtypes``."""
    device, world = pick_device(options.device, options.world), options.world
    with world.main_process_first():  # the first process packs, the others find the shards
        sources = _Sources.made(options, work_dir, ("png", "rgb") if kind == DECODING else ENCODINGS)
    base_bytes = resident_bytes(own_processes())
    groups = []
    for dtype in options.dtypes or _default_dtypes(kind, device):
        config = LoaderConfig(
            image_size=options.image_size,
            device=device,
            dtype=getattr(torch, dtype),
            max_batch=options.batch_size,
            num_workers=options.num_workers,
        )
        with contextlib.ExitStack() as stack:  # one group at a time, since loaders and peers keep memory and processes
            opening = _Opening(config=config, world=world, base_bytes=base_bytes, stack=stack)
            group = _group(kind, dtype, sources, opening, options)
            if group is not None:
                race_and_print(group, options.repeats, world)
                groups.append(group)
                for contender in group.contenders:
                    contender.run = spent
    figures = {
        "images": len(sources.tree),
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "epochs_per_repeat": 1 if kind == DECODING else options.load_epochs,
    }
    return Outcome(what="decode" if kind == DECODING else "load", groups=groups, setting=figures, device=device)


def _group(kind: str, dtype: str, sources: _Sources, opening: _Opening, options: Any) -> Group | None:
    """All that can be raced, warm and ready; None where nothing can."""
    ours = _ours(kind, sources, opening) if not options.only or OURS in options.only else []
    setting = Setting(
        pixels=sources.pixels,
        images=sources.images,
        shards=sources.shards,
        work_dir=sources.shards.parent,
        batch_size=options.batch_size,
        dtype=dtype,
        device=str(opening.config.device),
        cores=default_num_workers(),
        environments=options.peers,
    )
    entries = [entry for entry in PEERS if entry.group == kind and dtype in entry.dtypes and _wanted(entry, options)]
    peers = {entry.key: open_peer(entry, setting, opening.stack, options.log) for entry in entries}
    contenders = [*peers.values(), *ours]
    if all(contender.left_out is not None for contender in contenders):
        return None
    raced = [*contenders, *_set_limits(kind, peers, ours, sources, opening)]
    for contender in raced if kind == READY else ():
        contender.run = repeated(contender.run, options.load_epochs)
    return Group(name=f"{kind}, {dtype}", contenders=raced, baseline=_yardstick(peers, contenders))


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """What is loaded, in every form in which it is kept."""

    tree: Dataset
    datasets: dict[str, Dataset]
    """Shards, by encoding."""
    pixels: Path
    images: Path
    shards: Path
    """The ``png`` ones."""

    @classmethod
    def made(cls, options: Any, work_dir: Path, encodings: Sequence[str]) -> _Sources:
        """Below ``work_dir``, unless it is there."""
        datasets = {name: packed(options, work_dir, name) for name in encodings}
        tree = tree_of(options)
        return cls(
            tree=tree,
            datasets=datasets,
            pixels=pixels_of(datasets["rgb"], work_dir),
            images=write_images(tree, work_dir),
            shards=work_dir / "shards-png",
        )


def _default_dtypes(kind: str, device: torch.device) -> tuple[str, ...]:
    if kind == DECODING:
        return ("float32",)  # the work is in the decoding, whatever comes after it
    return ("float32", "uint8", "float16") if device.type == "cuda" else ("float32", "uint8")


def _wanted(entry: Entry, options: Any) -> bool:
    if options.world.size > 1:
        return False  # peers know nothing of our ranks, and would each load everything
    if options.only:
        return entry.key in options.only
    return options.peers is not None or (entry.key in _YARDSTICKS and entry.environment is None)


def _yardstick(peers: dict[str, Contender], contenders: Sequence[Contender]) -> Contender:
    candidates = [*(peers[key] for key in _YARDSTICKS if key in peers), *contenders]
    return next(contender for contender in candidates if contender.left_out is None)


def _set_limits(
    kind: str, peers: dict[str, Contender], ours: Sequence[Contender], sources: _Sources, opening: _Opening
) -> list[Contender]:
    """The limits of a group, each contender told which one is its own."""
    config = opening.config
    bounded = [*(peer for key, peer in peers.items() if key != _LOSSY), *ours]
    if kind == DECODING:
        assert sources.tree.paths is not None
        limits = [inflate_limit(sources.tree.paths, default_num_workers() // opening.world.local_size or 1)]
    else:
        batches = _batches(len(sources.tree), config, opening.world)
        limits = [writing_limit(config.max_batch, len(batches), config.image_size, config.dtype, config.device)]
        if config.dtype == torch.uint8:  # ready pixels have to be read too, which takes longer than to write them
            limits.append(copying_limit(np.load(sources.pixels, mmap_mode="r"), batches, config.device))
    for contender in bounded:
        contender.bounded_by = limits[0] if "indexed" in contender.name else limits[-1]
    for peer in peers.values():
        peer.work = (
            "decoding" if kind == DECODING else "work on the cores"
        )  # copying, normalising, or workers' own affairs
    return limits


# --- our own loaders ---


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """What is needed to open a loader and to say what that takes."""

    config: LoaderConfig
    world: World
    base_bytes: int
    """Of this process before it opened any loader."""
    stack: contextlib.ExitStack

    def contender(self, name: str, dataset: Dataset, source: str, work: str) -> Contender:
        """One shuffled epoch over everything, with every batch touched; run once, to see what it takes."""
        device = self.config.device
        held, on_device = resident_bytes(own_processes()), _device_bytes(device)
        reset_peaks(own_processes())
        started = time.perf_counter()
        loader = build_loader(Choice(name=name, reason="benchmark"), dataset, self.config)
        self.stack.callback(loader.close)
        batches = _batches(len(dataset), self.config, self.world)
        next(iter(loader.load(batches[:1])), None)
        opened_s = time.perf_counter() - started
        run = functools.partial(_load_all, loader, batches, device)
        run()
        # all of ours live in this process: its memory before any of them, and what this one added
        peak = self.base_bytes + peak_bytes(own_processes()) - held
        facts = {
            "num_workers": self.config.num_workers,
            "open_to_first_batch_s": opened_s,
            "bytes_per_image": _bytes_per_image(dataset),
            "host_peak_mb": peak / 1e6,
        }
        if device.type == "cuda":
            facts["device_peak_mb"] = (torch.cuda.max_memory_allocated(device) - on_device) / 1e6
        return Contender(name=f"{name}, {source}", run=run, facts=facts, work=work)


def _device_bytes(device: torch.device) -> int:
    """What this process has allocated on a GPU, whose peak begins anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _ours(kind: str, sources: _Sources, opening: _Opening) -> list[Contender]:
    if kind == DECODING:
        return [
            opening.contender("dali", sources.datasets["png"], "png shards", "decoding"),
            opening.contender("files", sources.tree, "PNG tree", "decoding"),
        ]
    works = {"indexed": "render", "rgb": "copying and normalising"}
    return [
        opening.contender(name, sources.datasets[encoding], f"{encoding} shards", work)
        for name in ("mapped", "resident")
        for encoding, work in works.items()
    ]


def _batches(samples: int, config: LoaderConfig, world: World) -> list[np.ndarray]:
    """This rank's part of a shuffled epoch."""
    order = epoch_order(np.arange(samples), seed=0, epoch=1)
    return evaluation_batches(order, config.max_batch * world.size, world.size, world.rank)


def _load_all(loader: Loader, batches: Sequence[np.ndarray], device: torch.device) -> Pass:
    images, first = 0, None
    started = time.perf_counter()
    with DeviceClock(device) as clock:
        for batch in loader.load(batches):
            first = first or time.perf_counter()
            images += len(batch)
            batch.images[:, 0, 0, 0].sum()  # one value of each image, as serving.py does
    return Pass(images=images, first_batch_s=first and first - started, device_s=clock.seconds())


def _bytes_per_image(dataset: Dataset) -> float:
    stored = [dataset.shards.root] if dataset.shards is not None else dataset.paths
    assert stored is not None
    return bytes_on_disk(stored) / len(dataset)
