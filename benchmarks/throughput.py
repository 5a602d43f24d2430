#!/usr/bin/env python3
"""Images per second of packing and of loading, each beside its yardstick, in one run.

    python benchmarks/throughput.py pack     packing png shards, against bare decoding of the same files on the same cores
    python benchmarks/throughput.py load     every loader: those that decode against a bare DALI pipeline with DALI's own WebDataset
                                             reader, the others against FFCV (--peers) or a memory-mapped array with torch

Without --csv_file it makes its own synthetic data. Every batch is touched; one warm-up, then interleaved repeats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measure import Contender, Group, race, save, table

from quaclrs.arguments import Parser, add_dataset_arguments, columns_of
from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, ENCODINGS, PackConfig, TrainConfig, default_num_workers
from quaclrs.errors import run_command
from quaclrs.parallel import Tick, run_tasks

if TYPE_CHECKING:  # spawned workers import this file anew, and shall not wait for torch
    import torch

    from quaclrs.dataset import Dataset
    from quaclrs.loaders.base import LoaderConfig


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="throughput.py", description=__doc__)
    parser.add_argument("mode", choices=("pack", "load"))
    add_dataset_arguments(parser)
    parser.add_argument("--work_dir", type=Path, help="where data and shards are made; a temporary folder if not given")
    parser.add_argument("--samples_per_class", type=int, default=8, help="of the synthetic data, per fold")
    parser.add_argument("--encodings", nargs="+", default=ENCODINGS, choices=ENCODINGS, help="to pack")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=default_num_workers())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="measure FFCV too, in an environment made in DIR if it is not there"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options), parser.prog)


def _run(options: Any) -> None:
    work_dir = options.work_dir or Path(tempfile.mkdtemp(prefix="quaclrs-bench-"))
    try:
        if options.csv_file is None:
            _make_data(options, work_dir / "data")
        measure = {"pack": _measure_packing, "load": _measure_loading}[options.mode]
        measure(options, work_dir)
    finally:
        if options.work_dir is None:
            shutil.rmtree(work_dir, ignore_errors=True)


def _make_data(options: Any, folder: Path) -> None:
    from quaclrs.synthesize import SynthesisConfig, synthesize_dataset

    synthesize_dataset(
        SynthesisConfig(output_dir=folder, samples_per_class=options.samples_per_class, num_workers=options.num_workers),
        progress=True,
    )
    options.csv_file, options.spectrograms_dir = folder / DEFAULT_CSV_FILE, folder / DEFAULT_SPECTROGRAMS_DIR


def _finish(what: str, groups: list[Group], options: Any, device: torch.device, **setting: Any) -> None:
    for group in groups:
        race(group.contenders, options.repeats)
        print(table(group), flush=True)
    setting |= {"num_workers": options.num_workers, "repeats": options.repeats}
    print(f"written to {save(what, groups, setting, device)}")


def _pack_config(options: Any, output_dir: Path, encoding: str) -> PackConfig:
    return PackConfig(
        csv_file=options.csv_file,
        spectrograms_dir=options.spectrograms_dir,
        output_dir=output_dir,
        encoding=encoding,
        image_size=options.image_size,
        num_workers=options.num_workers,
        columns=columns_of(options),
    )


def _measure_packing(options: Any, work_dir: Path) -> None:
    import torch

    from quaclrs.metadata import read_metadata
    from quaclrs.shards.pack import pack

    metadata = read_metadata(options.csv_file, columns_of(options))
    files = [str(metadata.path(row, options.spectrograms_dir)) for row in range(len(metadata))]

    def decode_all() -> int:
        chunks = [files[start::40] for start in range(40)]
        return sum(run_tasks(_decode, chunks, num_workers=options.num_workers))

    def pack_all(encoding: str) -> int:
        output_dir = work_dir / "packed"
        shutil.rmtree(output_dir, ignore_errors=True)
        return pack(_pack_config(options, output_dir, encoding)).images_packed

    bare = Contender(name="bare decoding (Pillow open + load)", run=decode_all)
    contenders = [bare, *(Contender(name=f"pack {name}", run=functools.partial(pack_all, name)) for name in options.encodings)]
    group = Group(name="packing", contenders=contenders, baseline=bare)
    _finish("pack", [group], options, torch.device("cpu"), images=len(files))


def _decode(files: list[str], tick: Tick) -> int:
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            image.load()
        tick()
    return len(files)


def _measure_loading(options: Any, work_dir: Path) -> None:
    import torch

    from quaclrs.crossval import pick_device
    from quaclrs.dataset import open_dataset
    from quaclrs.loaders.base import LoaderConfig

    device = pick_device(options.device)
    datasets = {name: _packed(options, work_dir, name) for name in ENCODINGS}
    tree = open_dataset(
        TrainConfig(csv_file=options.csv_file, spectrograms_dir=options.spectrograms_dir), want_shards=False, log=print
    )
    config = LoaderConfig(
        image_size=options.image_size,
        device=device,
        dtype=torch.float32,
        max_batch=options.batch_size,
        num_workers=options.num_workers,
    )
    bare = Contender(name="bare DALI, its own reader", run=_bare_dali(datasets["png"], config))
    decoding = [bare, _loading("dali", datasets["png"], config, "png shards"), _loading("files", tree, config, "PNG tree")]
    groups = [Group(name="decoding, float32", contenders=decoding, baseline=bare)]
    with contextlib.ExitStack() as stack:
        for dtype in (torch.float32, torch.uint8):
            peers = _peers(options, work_dir, datasets["rgb"], dtype, stack)
            ours = [
                _loading(name, datasets[encoding], dataclasses.replace(config, dtype=dtype), f"{encoding} shards")
                for name in ("mapped", "resident")
                for encoding in ("indexed", "rgb")
            ]
            groups.append(Group(name=f"nothing to decode, {_short(dtype)}", contenders=[*peers, *ours], baseline=peers[-1]))
        setting = {"images": len(tree), "batch_size": options.batch_size, "image_size": options.image_size}
        _finish("load", groups, options, device, **setting)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _peers(options: Any, work_dir: Path, rgb: Dataset, dtype: torch.dtype, stack: contextlib.ExitStack) -> list[Contender]:
    """The peers that can run here, on the pixels of ``rgb``; the last one is the yardstick."""
    from peers.client import HERE, Peer, PeerError, make_environment, read_requirements

    pixels = work_dir / "pixels.npy"
    if not pixels.exists():
        assert rgb.shards is not None
        np.save(pixels, np.stack([rgb.shards.array(number) for number in range(len(rgb))]))
    arguments = [
        "--pixels",
        pixels,
        "--batch_size",
        options.batch_size,
        "--num_workers",
        options.num_workers,
        "--dtype",
        _short(dtype),
    ]
    peers = [Peer("memory map + torch", Path(sys.executable), HERE / "memmap_torch.py", [*arguments, "--work_dir", work_dir])]
    if options.peers is not None:
        try:
            python = make_environment("ffcv", read_requirements(HERE / "requirements-ffcv.txt"), options.peers.resolve())
            peers.append(Peer("FFCV, raw", python, HERE / "ffcv_raw.py", [*arguments, "--work_dir", work_dir]))
        except PeerError as error:
            print(f"left out: {error}")
    entered = [stack.enter_context(peer) for peer in peers]
    return [Contender(name=peer.name, run=peer.run, facts=dict(peer.versions)) for peer in entered]


def _packed(options: Any, work_dir: Path, encoding: str) -> Dataset:
    from quaclrs.dataset import open_dataset
    from quaclrs.shards.pack import pack

    output_dir = work_dir / f"shards-{encoding}"
    pack(_pack_config(options, output_dir, encoding), progress=True)
    return open_dataset(TrainConfig(shards=output_dir), want_shards=True, log=print)


def _loading(name: str, dataset: Dataset, config: LoaderConfig, source: str) -> Contender:
    """One shuffled epoch over everything, with every batch touched."""
    from quaclrs.loaders import Choice, build_loader
    from quaclrs.order import epoch_order, evaluation_batches

    loader = build_loader(Choice(name=name, reason="benchmark"), dataset, config)
    batches = evaluation_batches(epoch_order(np.arange(len(dataset)), seed=0, epoch=1), config.max_batch)

    def run() -> int:
        images = 0
        for batch in loader.load(batches):
            images += len(batch)
            _touch(batch.images)
        _synchronise(config.device)
        return images

    return Contender(name=f"{name}, {source}", run=run)


def _bare_dali(dataset: Dataset, config: LoaderConfig) -> Any:
    """DALI as its manual has it: its own WebDataset reader with our index files, same decoding, resize and normalisation."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    from quaclrs.imaging.normalise import IMAGENET_MEAN, IMAGENET_STD

    assert dataset.shards is not None
    tars = [str(dataset.shards.root / entry.file) for entry in dataset.shards.manifest.shards]
    on_gpu = config.device.type == "cuda"

    @pipeline_def(
        batch_size=config.max_batch, num_threads=config.num_workers, device_id=(config.device.index or 0) if on_gpu else None
    )
    def pictures() -> Any:
        readers: Any = fn.readers  # its type stub says that a reader returns nothing
        encoded, label = readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["png", "cls"],
            random_shuffle=True,
            seed=1,
        )
        decoded = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        resized = fn.resize(decoded, size=(config.image_size, config.image_size), interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return fn.crop_mirror_normalize(resized, dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std), label

    pipeline = pictures()
    pipeline.build()

    def run() -> int:
        images = 0
        for _ in range(len(dataset) // config.max_batch):
            output, _ = pipeline.run()
            images += config.max_batch
            _touch(torch.from_dlpack(output.as_tensor()))
        _synchronise(config.device)
        return images

    return run


def _touch(images: torch.Tensor) -> None:
    """Read one value of each picture: a loader that only promises its batches gains nothing."""
    images[:, 0, 0, 0].sum()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
