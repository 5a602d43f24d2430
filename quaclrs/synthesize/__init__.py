"""A made-up dataset with the geometry and the traps of the real one, for tests, demos and benchmarks.

``plan`` says which rows and files there are, ``sounds`` makes a sample's decibels, ``image`` draws them as
matplotlib would, ``write`` puts everything on disk. Nothing here imports torch, pandas or pyplot: workers start fast.
"""

from quaclrs.synthesize.image import draw, palette, png_bytes
from quaclrs.synthesize.plan import AUGMENTATIONS, CLASSES, OLDER_IDS, Row, Sample, plan_rows
from quaclrs.synthesize.sounds import mel_grid
from quaclrs.synthesize.write import CSV_NAME, SynthesisConfig, SynthesisSummary, synthesize_dataset

__all__ = [
    "AUGMENTATIONS",
    "CLASSES",
    "CSV_NAME",
    "OLDER_IDS",
    "Row",
    "Sample",
    "SynthesisConfig",
    "SynthesisSummary",
    "draw",
    "mel_grid",
    "palette",
    "plan_rows",
    "png_bytes",
    "synthesize_dataset",
]
