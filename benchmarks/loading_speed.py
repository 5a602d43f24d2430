"""Modes ``decode`` and ``load`` of throughput.py: every loader of ours and every peer, in the group of those that do the same work."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import packed, pixels_of, tree_of, write_pictures
from measure import Contender, Group, Outcome, race_and_print
from peers.registry import DECODING, PEERS, Entry
from peers.starting import Setting, open_peer

from quaclrs.config import ENCODINGS, default_num_workers
from quaclrs.crossval import pick_device
from quaclrs.dataset import Dataset
from quaclrs.loaders import Choice, build_loader
from quaclrs.loaders.base import LoaderConfig
from quaclrs.order import epoch_order, evaluation_batches

OURS = "quaclrs"
"""The key of our own loaders for ``--only``."""
_YARDSTICKS = ("dali", "ffcv-raw", "memmap")
"""Keys of the peers that a group is compared with, where they are in it: the first that works."""


def measure_loading(kind: str, options: Any, work_dir: Path) -> Outcome:
    """Race the loaders of ``kind``, DECODING or READY, for every one of ``--dtypes``."""
    device = pick_device(options.device)
    datasets = {name: packed(options, work_dir, name) for name in ENCODINGS}
    tree = tree_of(options)
    pixels, pictures = pixels_of(datasets["rgb"], work_dir), write_pictures(tree, work_dir)
    groups = []
    for dtype in options.dtypes:
        config = LoaderConfig(
            image_size=options.image_size,
            device=device,
            dtype=getattr(torch, dtype),
            max_batch=options.batch_size,
            num_workers=options.num_workers,
        )
        setting = Setting(
            pixels=pixels,
            pictures=pictures,
            shards=work_dir / "shards-png",
            work_dir=work_dir,
            batch_size=options.batch_size,
            dtype=dtype,
            device=str(device),
            cores=default_num_workers(),
            environments=options.peers,
        )
        entries = [entry for entry in PEERS if entry.group == kind and dtype in entry.dtypes and _wanted(entry, options)]
        with contextlib.ExitStack() as stack:  # one group at a time, since loaders and peers keep memory and processes
            with_ours = not options.only or OURS in options.only
            ours = _ours(kind, tree, datasets, config, stack) if with_ours else []
            peers = {entry.key: open_peer(entry, setting, stack) for entry in entries}
            contenders = [*peers.values(), *ours]
            if any(contender.left_out is None for contender in contenders):
                group = Group(name=f"{kind}, {dtype}", contenders=contenders, baseline=_yardstick(peers, contenders))
                race_and_print(group, options.repeats)
                groups.append(group)
        for contender in ours:
            contender.run = _spent  # it would keep the loader's memory
    figures = {"images": len(tree), "batch_size": options.batch_size, "image_size": options.image_size}
    return Outcome(what="decode" if kind == DECODING else "load", groups=groups, setting=figures, device=device)


def _wanted(entry: Entry, options: Any) -> bool:
    if options.only:
        return entry.key in options.only
    return options.peers is not None or (entry.key in _YARDSTICKS and entry.environment is None)


def _yardstick(peers: dict[str, Contender], contenders: Sequence[Contender]) -> Contender:
    candidates = [*(peers[key] for key in _YARDSTICKS if key in peers), *contenders]
    return next(contender for contender in candidates if contender.left_out is None)


def _ours(
    kind: str, tree: Dataset, datasets: dict[str, Dataset], config: LoaderConfig, stack: contextlib.ExitStack
) -> list[Contender]:
    if kind == DECODING:
        loaders = [("dali", datasets["png"], "png shards"), ("files", tree, "PNG tree")]
    else:
        loaders = [(name, datasets[it], f"{it} shards") for name in ("mapped", "resident") for it in ("indexed", "rgb")]
    return [_loading(name, dataset, source, config, stack) for name, dataset, source in loaders]


def _loading(name: str, dataset: Dataset, source: str, config: LoaderConfig, stack: contextlib.ExitStack) -> Contender:
    """One shuffled epoch over everything, with every batch touched."""
    loader = build_loader(Choice(name=name, reason="benchmark"), dataset, config)
    stack.callback(loader.close)
    batches = evaluation_batches(epoch_order(np.arange(len(dataset)), seed=0, epoch=1), config.max_batch)

    def run() -> int:
        images = 0
        for batch in loader.load(batches):
            images += len(batch)
            batch.images[:, 0, 0, 0].sum()  # one value of each picture, as serving.py does
        if config.device.type == "cuda":
            torch.cuda.synchronize(config.device)
        return images

    return Contender(name=f"{name}, {source}", run=run, facts={"num_workers": config.num_workers})


def _spent() -> int:
    raise RuntimeError("this contender's race is over")
