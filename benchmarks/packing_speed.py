"""Mode ``pack`` of throughput.py: packing, against bare decoding of the same files on the same cores."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from bench_data import pack_config
from measure import Contender, Group, Outcome, race_and_print

from quaclrs.arguments import columns_of
from quaclrs.parallel import Tick, run_tasks


def measure_packing(options: Any, work_dir: Path) -> Outcome:
    """Race bare decoding and packing with each of ``--encodings``."""
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
        return pack(pack_config(options, output_dir, encoding)).images_packed

    bare = Contender(name="bare decoding (Pillow open + load)", run=decode_all)
    contenders = [bare, *(Contender(name=f"pack {name}", run=functools.partial(pack_all, name)) for name in options.encodings)]
    group = Group(name="packing", contenders=contenders, baseline=bare)
    race_and_print(group, options.repeats)
    return Outcome(what="pack", groups=[group], setting={"images": len(files)}, device=torch.device("cpu"))


def _decode(files: list[str], tick: Tick) -> int:
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            image.load()
        tick()
    return len(files)
