"""quaclrs: train spectrogram classifiers, from a tree of PNGs to a cross-validated report.

``import quaclrs`` loads no other library. The first use of a name below loads :mod:`quaclrs.api`, and with it torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BatchLoader",
    "Dataset",
    "Evaluation",
    "PackSummary",
    "QuaclrsError",
    "SampleSplit",
    "__version__",
    "batches",
    "build_model",
    "class_weights",
    "evaluate",
    "make_loader",
    "open_shards",
    "pack",
    "train",
]

if TYPE_CHECKING:
    from quaclrs.api import (
        Batch,
        BatchLoader,
        Dataset,
        Evaluation,
        PackSummary,
        QuaclrsError,
        SampleSplit,
        batches,
        build_model,
        class_weights,
        evaluate,
        make_loader,
        open_shards,
        pack,
        train,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = globals()[name] = getattr(importlib.import_module("quaclrs.api"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
