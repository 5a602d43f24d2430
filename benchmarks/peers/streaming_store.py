#!/usr/bin/env python3
"""Peer: MosaicML Streaming, MDSWriter and StreamingDataset, in an environment over ours (requirements-streaming.txt).

--stored png: a column of the files' own bytes, opened by Pillow like its "png" column, which would compress the same
pixels again; the original trainer's transforms in __getitem__, as in its manual. Every value is checked: equal to
Pillow's.
--stored raw: a column "ndarray:uint8:S,S,3" of ready pixels; workers only collate. Every value is checked: equal to
Pillow's.

A DataLoader over StreamingDataset(local=...) with persistent workers, shards of the default 64 MiB uncompressed, the
default shuffle (py1e).

Speaks the protocol of serving.py; harness/peer_process.py starts it and sets the PYTHONPATH.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found, unused-ignore]
from torch.utils.data import DataLoader

from peers.images import collate, make_pillow_transform
from peers.serving import Delivery, make_loader_options, make_parser, parse, read_image_files, serve_epochs


class Decoded(StreamingDataset):  # type: ignore[misc, unused-ignore]
    """PNG bytes decoded and resized while loading."""

    def __init__(self, transform: Any, **options: Any) -> None:
        super().__init__(**options)
        self.transform = transform

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        with Image.open(io.BytesIO(sample["image"])) as image:
            return self.transform(image.convert("RGB")), sample["number"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--stored", choices=("png", "raw"), default="raw")
    options = parse(parser)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
    pixels = np.load(options.pixels, mmap_mode="r")
    size = pixels.shape[1]
    png = options.stored == "png"
    store = options.work_dir / (f"streaming_png_{len(pixels)}" if png else f"streaming_raw_{len(pixels)}x{size}")
    if not store.is_dir():
        if png:
            _write(store, "bytes", (Path(file).read_bytes() for file in read_image_files(options.images)))
        else:
            _write(store, f"ndarray:uint8:{size},{size},3", map(np.array, pixels))
    reading = {
        "local": str(store),
        "shuffle": True,
        "shuffle_seed": 9176 + options.seed,
        "batch_size": options.batch_size,
    }
    dataset = Decoded(make_pillow_transform(size, options.dtype), **reading) if png else StreamingDataset(**reading)
    loader = DataLoader(dataset, collate_fn=collate if png else None, **make_loader_options(options))
    delivery = Delivery(options, size)

    def epoch() -> Iterator[tuple[torch.Tensor, Any]]:
        for batch in loader:
            if png:
                yield delivery.images(batch[0]), batch[1]
            else:
                yield delivery.pixels(batch["image"]), batch["number"]

    serve_epochs(epoch, options, ("mosaicml-streaming", "numpy", "Pillow", "torch"), stored=[store])


def _write(store: Path, kind: str, images: Iterable[Any]) -> None:
    unfinished = store.with_name(store.name + ".unfinished")
    with MDSWriter(out=str(unfinished), columns={"image": kind, "number": "int"}, exist_ok=True) as writer:
        for number, image in enumerate(images):
            writer.write({"image": image, "number": number})
    unfinished.rename(store)


if __name__ == "__main__":
    main()
