"""Choosing a loader, and saying why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quaclrs.errors import UsageError

if TYPE_CHECKING:
    from quaclrs.dataset import Dataset
    from quaclrs.loaders.base import Loader, LoaderConfig

LOADERS = ("files", "dali")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which loader, and the reason in a few words."""

    name: str
    reason: str


def choose_loader(wanted: str, encoding: str | None) -> Choice:
    """Pick a loader for shards of ``encoding``, or for a PNG tree (None); ``wanted`` is ``auto`` or a name of :data:`LOADERS`.

    Raises :class:`UsageError` for an unknown name, :class:`MissingDependencyError` for ``dali`` where it is not installed.
    """
    from quaclrs.loaders.dali import dali_missing, require_dali

    if wanted != "auto":
        if wanted not in LOADERS:
            raise UsageError(f"--loader {wanted}: choose one of auto, {', '.join(LOADERS)}")
        if wanted == "dali":
            require_dali()
        return Choice(name=wanted, reason="as asked for")
    if encoding == "rgb":
        return Choice(name="files", reason="rgb shards hold ready pixels, there is nothing for DALI to decode")
    missing = dali_missing()
    if missing is not None:
        return Choice(name="files", reason=missing)
    return Choice(name="dali", reason="pictures must be decoded, and DALI is here")


def build_loader(choice: Choice, dataset: Dataset, config: LoaderConfig) -> Loader:
    """The loader of ``choice`` over ``dataset``; errors as the loaders' own."""
    if choice.name == "dali":
        from quaclrs.loaders.dali import DaliLoader

        assert dataset.shards is not None  # open_dataset packs them for this loader
        return DaliLoader(dataset.shards, dataset.label, config)
    from quaclrs.loaders.files import FilesLoader, ShardPictures, TreePictures

    if dataset.shards is not None:
        return FilesLoader(ShardPictures(dataset.shards, config.image_size), dataset.label, config)
    assert dataset.paths is not None
    return FilesLoader(TreePictures(dataset.paths, config.image_size), dataset.label, config)
