"""Mode ``pack`` of throughput.py: packing, against bare decoding of the same files on the same cores; and making
synthetic images.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench_data import pack_config, synthesis
from harness.measure import Contender, Group, Outcome
from harness.peer_process import Pass
from harness.tables import race_and_print
from quaclrs.cli.arguments import columns_of
from quaclrs.system.processes import Tick, run_tasks

BARE = "bare decoding (Pillow open + load)"
SYNTHESIS_FOLDS = 10
"""Of 13 images each: enough that starting the workers does not count for much."""


def measure_packing(options: Any, work_dir: Path) -> Outcome:
    """Race bare decoding and packing with each of ``--encodings``; then synthesis, alone."""
    import torch  # not at the top: spawned workers import this file, and shall not wait for torch

    from quaclrs.data.metadata import read_metadata

    metadata = read_metadata(options.csv_file, columns_of(options))
    files = [metadata.path(row, options.spectrograms_dir) for row in range(len(metadata))]
    groups = [_packing(files, options, work_dir), _synthesis(options, work_dir)]
    for group in groups:
        race_and_print(group, options.repeats)
    return Outcome(what="pack", groups=groups, setting={"images": len(files)}, device=torch.device("cpu"))


def _packing(files: Sequence[Path], options: Any, work_dir: Path) -> Group:
    from harness.limits import inflate_limit

    limit = inflate_limit(files, options.num_workers)
    chunks = [[str(file) for file in files[start::40]] for start in range(40)]
    bare = Contender(
        name=BARE,
        run=lambda: Pass(images=sum(run_tasks(_decode, chunks, num_workers=options.num_workers))),
        work="decoding",
        bounded_by=limit,
    )
    packing = [
        Contender(
            name=f"pack {encoding}",
            run=functools.partial(_pack_all, options, work_dir / "packed", encoding),
            work="decoding and packing",
            bounded_by=limit,
        )
        for encoding in options.encodings
    ]
    return Group(name="packing", contenders=[bare, *packing, limit], baseline=bare)


def _pack_all(options: Any, output_dir: Path, encoding: str) -> Pass:
    from quaclrs.shards.packing.pack import pack

    shutil.rmtree(output_dir, ignore_errors=True)
    return Pass(images=pack(pack_config(options, output_dir, encoding)).images_packed)


def _decode(files: list[str], tick: Tick) -> int:
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            image.load()
        tick()
    return len(files)


def _synthesis(options: Any, work_dir: Path) -> Group:
    def draw_all() -> Pass:
        folder = work_dir / "synthesis"
        shutil.rmtree(folder, ignore_errors=True)
        return Pass(
            images=synthesis(folder, samples_per_class=1, folds=SYNTHESIS_FOLDS, num_workers=options.num_workers).drawn
        )

    drawing = Contender(name="synthesis", run=draw_all, work="drawing")
    return Group(name="making synthetic images", contenders=[drawing], baseline=drawing)
