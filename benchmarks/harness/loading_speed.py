"""Modes ``decode`` and ``load`` of throughput.py: our loaders and the peers, grouped by the work they do."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peers.registry import DECODING, PEERS, READY, Entry
from peers.serving import DeviceClock, count_bytes_on_disk

from harness.bench_data import open_png_tree, open_shards, write_image_list, write_pixels
from harness.contender import Contender, Group, Options, Outcome, Pass
from harness.limits import make_copying_limit, make_inflate_limit, make_writing_limit
from harness.measure import refuse_to_run, repeat_run
from harness.peer_contender import Setting, open_peer
from harness.processes import list_own_pids, read_peak_bytes, read_resident_bytes, reset_peaks
from harness.tables import race_and_print
from quaclrs.config import ENCODINGS, usable_processors
from quaclrs.data.sampling import epoch_order, evaluation_batches
from quaclrs.loaders import Choice, build_loader
from quaclrs.loaders.base import Loader, LoaderConfig
from quaclrs.loaders.dataset import Dataset
from quaclrs.training.device import pick_device
from quaclrs.training.distributed import World

OURS = "quaclrs"
"""The key of our own loaders for ``--only``."""
_BASELINES = ("dali", "ffcv-raw", "memmap")
"""Keys of the peers that a group's ratios are taken to: the first of them that is in the group and works."""
_LOSSY = "ffcv-jpeg"
"""The peer that decodes other, smaller images: the inflate limit of the PNGs does not apply to it."""


def measure_loading(kind: str, options: Options, work_dir: Path) -> Outcome:
    """Race the loaders of ``kind``, DECODING or READY, once for each of ``--dtypes``."""
    device, world = pick_device(options.device, options.world), options.world
    with world.main_process_first():  # the main process packs, the others find the shards
        sources = _make_sources(options, work_dir, ("png", "rgb") if kind == DECODING else tuple(ENCODINGS))
    base_bytes = read_resident_bytes(list_own_pids())
    groups = []
    for dtype in options.dtypes or _default_dtypes(kind, device):
        config = LoaderConfig(
            image_size=options.image_size,
            device=device,
            dtype=getattr(torch, dtype),
            max_batch=options.batch_size,
            num_workers=options.num_workers,
        )
        with contextlib.ExitStack() as stack:  # one group at a time: open loaders and peers hold memory and processes
            opener = _LoaderOpener(config=config, world=world, base_bytes=base_bytes, stack=stack)
            group = _open_group(kind, dtype, sources, opener, options)
            if group is not None:
                race_and_print(group, options.repeats, world)
                groups.append(group)
                for contender in group.contenders:
                    contender.run = refuse_to_run
    figures = {
        "images": len(sources.tree),
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "epochs_per_repeat": 1 if kind == DECODING else options.load_epochs,
    }
    return Outcome(what="decode" if kind == DECODING else "load", groups=groups, setting=figures, device=device)


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """The dataset in every form that a loader or a peer reads."""

    tree: Dataset
    datasets: dict[str, Dataset]
    """Shards, by encoding."""
    pixels: Path
    images: Path
    shards: Path
    """The folder of the ``png`` shards."""


def _make_sources(options: Options, work_dir: Path, encodings: Sequence[str]) -> _Sources:
    datasets = {name: open_shards(options, work_dir, name) for name in encodings}
    tree = open_png_tree(options)
    return _Sources(
        tree=tree,
        datasets=datasets,
        pixels=write_pixels(datasets["rgb"], work_dir),
        images=write_image_list(tree, work_dir),
        shards=work_dir / "shards-png",
    )


def _default_dtypes(kind: str, device: torch.device) -> tuple[str, ...]:
    if kind == DECODING:
        return ("float32",)  # decoding dominates, whatever the dtype
    return ("float32", "uint8", "float16") if device.type == "cuda" else ("float32", "uint8")


# --- a group ---


def _open_group(kind: str, dtype: str, sources: _Sources, opener: _LoaderOpener, options: Options) -> Group | None:
    """Return all that can be raced, opened and warm; None if nothing can."""
    ours = _open_ours(kind, sources, opener) if not options.only or OURS in options.only else []
    setting = Setting(
        pixels=sources.pixels,
        images=sources.images,
        shards=sources.shards,
        work_dir=sources.shards.parent,
        batch_size=options.batch_size,
        dtype=dtype,
        device=str(opener.config.device),
        cores=usable_processors(),
        environments=options.peers,
    )
    entries = [entry for entry in PEERS if entry.group == kind and dtype in entry.dtypes and _is_wanted(entry, options)]
    peers = {entry.key: open_peer(entry, setting, opener.stack, options.log) for entry in entries}
    contenders = [*peers.values(), *ours]
    if all(contender.left_out is not None for contender in contenders):
        return None
    raced = [*contenders, *_add_limits(kind, peers, ours, sources, opener)]
    for contender in raced if kind == READY else ():
        contender.run = repeat_run(contender.run, options.load_epochs)
    return Group(name=f"{kind}, {dtype}", contenders=raced, baseline=_pick_baseline(peers, contenders))


def _is_wanted(entry: Entry, options: Options) -> bool:
    if options.world.size > 1:
        return False  # peers know nothing of our ranks: each would load everything
    if options.only:
        return entry.key in options.only
    return options.peers is not None or (entry.key in _BASELINES and entry.environment is None)


def _pick_baseline(peers: dict[str, Contender], contenders: Sequence[Contender]) -> Contender:
    candidates = [*(peers[key] for key in _BASELINES if key in peers), *contenders]
    return next(contender for contender in candidates if contender.left_out is None)


def _add_limits(
    kind: str, peers: dict[str, Contender], ours: Sequence[Contender], sources: _Sources, opener: _LoaderOpener
) -> list[Contender]:
    """Return the limits of a group, after giving each contender the one that applies to it."""
    config = opener.config
    limited = [*(peer for key, peer in peers.items() if key != _LOSSY), *ours]
    if kind == DECODING:
        assert sources.tree.paths is not None
        limits = [make_inflate_limit(sources.tree.paths, usable_processors() // opener.world.local_size or 1)]
    else:
        batches = _rank_batches(len(sources.tree), config, opener.world)
        limits = [make_writing_limit(config.max_batch, len(batches), config.image_size, config.dtype, config.device)]
        if config.dtype == torch.uint8:  # ready pixels must be read as well, which takes longer than writing them
            limits.append(make_copying_limit(np.load(sources.pixels, mmap_mode="r"), batches, config.device))
    for contender in limited:
        contender.limit = limits[0] if "indexed" in contender.name else limits[-1]
    for peer in peers.values():
        # ready pixels: copying, normalising, or whatever else the peer's workers do
        peer.work = "decoding" if kind == DECODING else "work on the cores"
    return limits


# --- our own loaders ---


@dataclass(frozen=True, kw_only=True)
class _LoaderOpener:
    """Opens our loaders as contenders, and measures what opening one takes."""

    config: LoaderConfig
    world: World
    base_bytes: int
    """Resident memory of this process before it opened any loader."""
    stack: contextlib.ExitStack
    """Closes the loaders."""

    def open(self, name: str, dataset: Dataset, source: str, work: str) -> Contender:
        """Return a loader whose run is one shuffled epoch with every batch touched; one run has warmed it up."""
        device = self.config.device
        held, on_device = read_resident_bytes(list_own_pids()), _reset_device_peak(device)
        reset_peaks(list_own_pids())
        started = time.perf_counter()
        loader = build_loader(Choice(name=name, reason="benchmark"), dataset, self.config)
        self.stack.callback(loader.close)
        batches = _rank_batches(len(dataset), self.config, self.world)
        next(iter(loader.load(batches[:1])), None)
        opened_s = time.perf_counter() - started
        run = functools.partial(_load_all, loader, batches, device)
        run()
        # all our loaders share this process: its memory before any of them, plus what this one added
        peak = self.base_bytes + read_peak_bytes(list_own_pids()) - held
        facts = {
            "num_workers": self.config.num_workers,
            "open_to_first_batch_s": opened_s,
            "bytes_per_image": _bytes_per_image(dataset),
            "host_peak_mb": peak / 1e6,
        }
        if device.type == "cuda":
            facts["device_peak_mb"] = (torch.cuda.max_memory_allocated(device) - on_device) / 1e6
        return Contender(name=f"{name}, {source}", run=run, facts=facts, work=work)


def _reset_device_peak(device: torch.device) -> int:
    """Reset the peak of GPU memory, and return the bytes allocated now; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _open_ours(kind: str, sources: _Sources, opener: _LoaderOpener) -> list[Contender]:
    if kind == DECODING:
        return [
            opener.open("dali", sources.datasets["png"], "png shards", "decoding"),
            opener.open("files", sources.tree, "PNG tree", "decoding"),
        ]
    works = {"indexed": "render", "rgb": "copying and normalising"}
    return [
        opener.open(name, sources.datasets[encoding], f"{encoding} shards", work)
        for name in ("mapped", "resident")
        for encoding, work in works.items()
    ]


def _rank_batches(samples: int, config: LoaderConfig, world: World) -> list[np.ndarray]:
    """Return this rank's batches of a shuffled epoch."""
    order = epoch_order(np.arange(samples), seed=0, epoch=1)
    return evaluation_batches(order, config.max_batch * world.size, world.size, world.rank)


def _load_all(loader: Loader, batches: Sequence[np.ndarray], device: torch.device) -> Pass:
    images, first = 0, None
    started = time.perf_counter()
    with DeviceClock(device) as clock:
        for batch in loader.load(batches):
            first = first or time.perf_counter()
            images += len(batch)
            batch.images[:, 0, 0, 0].sum()  # reads one value of each image, as peers/serving.py does
    return Pass(images=images, first_batch_s=first and first - started, device_s=clock.seconds())


def _bytes_per_image(dataset: Dataset) -> float:
    stored = [dataset.shards.root] if dataset.shards is not None else dataset.paths
    assert stored is not None
    return count_bytes_on_disk(stored) / len(dataset)
