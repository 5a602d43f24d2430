"""Choosing a loader, and saying why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quaclrs.errors import UsageError

if TYPE_CHECKING:
    from quaclrs.loaders.base import Loader, LoaderConfig
    from quaclrs.loaders.dataset import Dataset

LOADERS = ("resident", "mapped", "dali", "files")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which loader, and the reason in a few words."""

    name: str
    reason: str
    parts: int = 1
    """Into how many parts a resident loader's data are shared out over the ranks."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Data against device memory, in bytes."""

    needed: int
    free: int
    """Of the device with least, where there are several."""
    ranks: int = 1

    def parts(self, share: float) -> int:
        """Into how many parts the data must be shared out to take ``share`` of what is free: 1, or one for each rank; 0
        if that fails.
        """
        return next((parts for parts in sorted({1, self.ranks}) if self.needed / parts <= share * self.free), 0)

    def __str__(self) -> str:
        return f"{self.needed / 1e9:.2f} of {self.free / 1e9:.2f} GB"


_AUTO_SHARE = 0.5
"""Of the device's free memory that ``auto`` gives to the data; the other half is the model's."""
_SHARED_OUT = "shared out over {} processes, each of which shuffles its own part"


def choose_loader(wanted: str, encoding: str | None, resident: MemoryEstimate | None = None) -> Choice:
    """Pick a loader for shards of ``encoding``, or for a PNG tree (None); ``wanted`` is ``auto`` or a name of
    :data:`LOADERS`.

    ``resident`` says what the data would take in device memory, None that they shall not be kept there. Raises
    :class:`UsageError` for an unknown name or a loader that cannot read the encoding, :class:`MissingDependencyError`
    for ``dali`` where it is not installed.
    """
    from quaclrs.loaders.dali import dali_missing, require_dali
    from quaclrs.loaders.resident import FREE_SHARE

    if wanted != "auto":
        if wanted not in LOADERS:
            raise UsageError(f"--loader {wanted}: choose one of auto, {', '.join(LOADERS)}")
        if wanted == "dali":
            require_dali()
        if wanted == "mapped":
            from quaclrs.loaders.mapped import refuse_encoded

            refuse_encoded(encoding, "the PNG tree" if encoding is None else f"a shard folder of encoding {encoding}")
        if wanted == "resident" and resident is not None:
            return _resident(f"as asked for; the data take {resident}", resident.parts(FREE_SHARE) or 1)
        return Choice(name=wanted, reason="as asked for")
    if encoding in ("indexed", "rgb"):
        what = "grids to render" if encoding == "indexed" else "ready pixels"
        if resident is not None and (parts := resident.parts(_AUTO_SHARE)):
            return _resident(f"{what}: {resident} fit in the device's memory", parts)
        why = (
            f"{resident} are more than half of the device's free memory"
            if resident is not None
            else "read as they come, from the page cache"
        )
        return Choice(name="mapped", reason=f"{what}: {why}")
    missing = dali_missing()
    if missing is not None:
        return Choice(name="files", reason=missing)
    return Choice(name="dali", reason="images must be decoded, and DALI is here")


def _resident(reason: str, parts: int) -> Choice:
    return Choice(
        name="resident", reason=f"{reason}, {_SHARED_OUT.format(parts)}" if parts > 1 else reason, parts=parts
    )


def build_loader(choice: Choice, dataset: Dataset, config: LoaderConfig) -> Loader:
    """The loader of ``choice`` over ``dataset``; errors as the loaders' own."""
    if dataset.shards is None:
        return _files_loader(dataset, config)
    if choice.name == "resident":
        from quaclrs.loaders.resident import ResidentLoader

        decoder = None
        if dataset.shards.encoding == "png":
            import torch

            decoding = choose_loader("auto", "png")
            decoder = build_loader(decoding, dataset, dataclasses.replace(config, dtype=torch.uint8))
        return ResidentLoader(dataset.shards, dataset.label, config, decoder)
    if choice.name == "mapped":
        from quaclrs.loaders.mapped import MappedLoader

        return MappedLoader(dataset.shards, dataset.label, config)
    if choice.name == "dali":
        from quaclrs.loaders.dali import DaliLoader

        return DaliLoader(dataset.shards, dataset.label, config)
    return _files_loader(dataset, config)


def _files_loader(dataset: Dataset, config: LoaderConfig) -> Loader:
    from quaclrs.loaders.files import FilesLoader, ShardImages, TreeImages

    if dataset.shards is not None:
        return FilesLoader(ShardImages(dataset.shards, config.image_size), dataset.label, config)
    assert dataset.paths is not None
    return FilesLoader(TreeImages(dataset.paths, config.image_size), dataset.label, config)
