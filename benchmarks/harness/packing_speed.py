"""Mode ``pack`` of throughput.py: packing, against bare decoding of the same files on the same cores; and synthesis."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness.bench_data import make_pack_config, synthesize
from harness.contender import Contender, Group, Options, Outcome, Pass
from harness.tables import race_and_print
from quaclrs.cli.arguments import columns_of
from quaclrs.system.processes import Tick, run_tasks

BARE = "bare decoding (Pillow open + load)"
SYNTHESIS_FOLDS = 10
"""Of 13 images each: enough to make the start of the workers negligible."""


def measure_packing(options: Options, work_dir: Path) -> Outcome:
    """Race bare decoding against packing with each of ``--encodings``; then time synthesis alone."""
    import torch  # not at the top: spawned workers import this file and must not wait for torch

    from quaclrs.data.metadata import read_metadata

    metadata = read_metadata(options.csv_file, columns_of(options))
    files = [metadata.path(row, options.spectrograms_dir) for row in range(len(metadata))]
    groups = [_packing_group(files, options, work_dir), _synthesis_group(options, work_dir)]
    for group in groups:
        race_and_print(group, options.repeats)
    return Outcome(what="pack", groups=groups, setting={"images": len(files)}, device=torch.device("cpu"))


def _packing_group(files: Sequence[Path], options: Options, work_dir: Path) -> Group:
    from harness.limits import make_inflate_limit

    limit = make_inflate_limit(files, options.num_workers)
    chunks = [[str(file) for file in files[start::40]] for start in range(40)]
    bare = Contender(
        name=BARE,
        run=lambda: Pass(images=sum(run_tasks(_decode_files, chunks, num_workers=options.num_workers))),
        work="decoding",
        limit=limit,
    )
    packing = [
        Contender(
            name=f"pack {encoding}",
            run=functools.partial(_pack_afresh, options, work_dir / "packed", encoding),
            work="decoding and packing",
            limit=limit,
        )
        for encoding in options.encodings
    ]
    return Group(name="packing", contenders=[bare, *packing, limit], baseline=bare)


def _pack_afresh(options: Options, output_dir: Path, encoding: str) -> Pass:
    from quaclrs.shards.packing.pack import pack

    shutil.rmtree(output_dir, ignore_errors=True)
    return Pass(images=pack(make_pack_config(options, output_dir, encoding)).images_packed)


def _decode_files(files: list[str], tick: Tick) -> int:
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            image.load()
        tick()
    return len(files)


def _synthesis_group(options: Options, work_dir: Path) -> Group:
    def draw_all() -> Pass:
        folder = work_dir / "synthesis"
        shutil.rmtree(folder, ignore_errors=True)
        summary = synthesize(folder, samples_per_class=1, folds=SYNTHESIS_FOLDS, num_workers=options.num_workers)
        return Pass(images=summary.drawn)

    drawing = Contender(name="synthesis", run=draw_all, work="drawing")
    return Group(name="making synthetic images", contenders=[drawing], baseline=drawing)
