"""A synthetic dataset with the geometry and the pitfalls of the real one, for tests, demos and benchmarks.

``plan`` lists the rows and files, ``sounds`` computes a sample's spectrogram in decibels, ``image`` draws it as
matplotlib would, ``write`` puts everything on disk. Nothing here imports torch, pandas or pyplot, so worker processes
start fast.
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
