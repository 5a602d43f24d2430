"""The registry of loaders, and the choice among them: by name, or ``auto``.

A loader is one class in one file, and one entry of :data:`LOADERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quaclrs.config import PackConfig, TrainConfig
from quaclrs.errors import UsageError
from quaclrs.loaders.dali import DaliLoader, dali_missing, require_dali
from quaclrs.loaders.files import FilesLoader, ShardImages, TreeImages
from quaclrs.loaders.mapped import MappedLoader
from quaclrs.loaders.resident import FREE_SHARE, ResidentLoader
from quaclrs.settings import choose
from quaclrs.shards.encodings import get_encoding
from quaclrs.shards.encodings.base import Content

if TYPE_CHECKING:
    from quaclrs.loaders.base import Loader, LoaderConfig
    from quaclrs.loaders.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A loader, and the reason for it in a few words."""

    name: str
    reason: str
    parts: int = 1
    """Number of parts into which the resident loader's data are divided among the ranks."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Size of the data against free device memory, in bytes."""

    needed: int
    free: int
    """Of the device with the least, where there are several."""
    ranks: int = 1

    def parts(self, share: float) -> int:
        """Number of parts the data must be divided into to take at most ``share`` of the free memory.

        1 or ``ranks``; 0 if even ``needed / ranks`` is too much.
        """
        return next((parts for parts in sorted({1, self.ranks}) if self.needed / parts <= share * self.free), 0)

    def __str__(self) -> str:
        return f"{self.needed / 1e9:.2f} of {self.free / 1e9:.2f} GB"


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What :func:`choose_loader` and :func:`build_loader` must know about a loader."""

    make: Callable[[Dataset, LoaderConfig], Loader]
    reads: frozenset[Content]
    """The shards it can read, by what their payloads hold."""
    auto: Callable[[Content, MemoryEstimate | None], Choice | None]
    """For payloads and the memory they would take: the choice of this loader, or None. ``auto`` takes the first choice.
    """
    require: Callable[[], None] = lambda: None
    """Raises :class:`MissingDependencyError` where the loader cannot run."""
    reads_tree: bool = False
    """Reads the PNG tree itself, so a run packs nothing."""
    from_disk: bool = True
    """Reads batch by batch, so that messages can suggest it when memory is short."""


_AUTO_SHARE = 0.5
"""Share of the device's free memory that ``auto`` gives to the data; the rest is for the model."""
_ANY_CONTENT = frozenset(Content)
_ARRAYS = frozenset(content for content in Content if content.is_array)


def choose_loader(wanted: str, encoding: str | None, resident: MemoryEstimate | None = None) -> Choice:
    """The loader for shards of ``encoding``, or for a PNG tree (None); ``wanted`` is ``auto`` or a name of LOADERS.

    ``resident`` compares the data with the free device memory; with None, ``auto`` does not keep them there. Raises
    :class:`UsageError` for an unknown name or a loader that cannot decode the payloads, :class:`MissingDependencyError`
    for ``dali`` where it is not installed.
    """
    content = Content.PNGS if encoding is None else get_encoding(encoding).content
    wanted = loader_called(wanted)
    if wanted == "auto":
        return next(choice for entry in LOADERS.values() if (choice := entry.auto(content, resident)))
    LOADERS[wanted].require()
    if not content.is_array:  # else the message names the folder, which only build_loader knows
        where = "the PNG tree" if encoding is None else f"a shard folder of encoding {encoding}"
        _refuse_unreadable(wanted, content, where, encoding)
    if wanted == "resident" and resident is not None:
        return _resident_choice(f"as asked for; the data take {resident}", resident.parts(FREE_SHARE) or 1)
    return Choice(name=wanted, reason="as asked for")


def loader_called(name: str) -> str:
    """The name in LOADERS, or ``auto``, that ``name`` is in any case. Raises :class:`UsageError` for others."""
    return choose("loader", name, ("auto", *LOADERS))


def needs_shards(config: TrainConfig) -> bool:
    """Whether a run of ``config`` must pack its PNG tree: no shards are given, and its loader reads only shards."""
    return config.shards is None and not LOADERS[choose_loader(config.loader, PackConfig.encoding).name].reads_tree


def build_loader(choice: Choice, dataset: Dataset, config: LoaderConfig) -> Loader:
    """The loader of ``choice`` over ``dataset``; ``files`` where there are no shards and it does not read the tree.

    Raises :class:`UsageError` for shards that the loader cannot read, and the errors of the loader itself.
    """
    if dataset.shards is None:
        return LOADERS[choice.name if LOADERS[choice.name].reads_tree else "files"].make(dataset, config)
    encoding, where = dataset.shards.encoding, str(dataset.shards.root)
    _refuse_unreadable(choice.name, encoding.content, where, encoding.name)
    return LOADERS[choice.name].make(dataset, config)


def _refuse_unreadable(name: str, content: Content, where: str, encoding: str | None) -> None:
    """Raise :class:`UsageError` if the loader ``name`` cannot read ``content``; ``where`` names the shards or tree."""
    if content in LOADERS[name].reads:
        return
    others = [other for other, entry in LOADERS.items() if entry.from_disk and content in entry.reads]
    if content.is_array:
        raise UsageError(
            f"--loader {name}: {where} is encoded {encoding}, which needs no decoder; use --loader {others[0]}"
        )
    raise UsageError(
        f"--loader {name}: {where} holds {content.value}; use --loader {' or '.join(others)}, or pack with "
        "--encoding indexed"
    )


# --- how each loader is made from a dataset ---


def _over_shards(loader: type[MappedLoader] | type[DaliLoader]) -> Callable[[Dataset, LoaderConfig], Loader]:
    def make(dataset: Dataset, config: LoaderConfig) -> Loader:
        assert dataset.shards is not None
        return loader(dataset.shards, dataset.label, config)

    return make


def _make_resident(dataset: Dataset, config: LoaderConfig) -> Loader:
    assert dataset.shards is not None
    encoding, decoder = dataset.shards.encoding, None
    if not encoding.content.is_array:
        decoding = choose_loader("auto", encoding.name)
        decoder = build_loader(decoding, dataset, dataclasses.replace(config, dtype=torch.uint8))
    return ResidentLoader(dataset.shards, dataset.label, config, decoder)


def _make_files(dataset: Dataset, config: LoaderConfig) -> Loader:
    if dataset.shards is not None:
        return FilesLoader(ShardImages(dataset.shards, config.image_size), dataset.label, config)
    assert dataset.paths is not None
    return FilesLoader(TreeImages(dataset.paths, config.image_size), dataset.label, config)


# --- when `auto` takes each loader ---


def _auto_resident(content: Content, resident: MemoryEstimate | None) -> Choice | None:
    if content.is_array and resident is not None and (parts := resident.parts(_AUTO_SHARE)):
        return _resident_choice(f"{content.value}: {resident} fit in the device's memory", parts)
    return None


def _resident_choice(reason: str, parts: int) -> Choice:
    divided = f", shared out over {parts} processes, each of which shuffles its own part" if parts > 1 else ""
    return Choice(name="resident", reason=reason + divided, parts=parts)


def _auto_mapped(content: Content, resident: MemoryEstimate | None) -> Choice | None:
    if not content.is_array:
        return None
    if resident is None:
        return Choice(name="mapped", reason=f"{content.value}: read as they come, from the page cache")
    return Choice(name="mapped", reason=f"{content.value}: {resident} are more than half of the device's free memory")


def _auto_dali(content: Content, resident: MemoryEstimate | None) -> Choice | None:
    if content is Content.PNGS and dali_missing() is None:
        return Choice(name="dali", reason="images must be decoded, and DALI is here")
    return None


def _auto_files(content: Content, resident: MemoryEstimate | None) -> Choice | None:
    missing = dali_missing() if content is Content.PNGS else None
    return Choice(name="files", reason=missing or content.value)


LOADERS = {
    "resident": Registration(make=_make_resident, reads=_ANY_CONTENT, auto=_auto_resident, from_disk=False),
    "mapped": Registration(make=_over_shards(MappedLoader), reads=_ARRAYS, auto=_auto_mapped),
    "dali": Registration(
        make=_over_shards(DaliLoader), reads=frozenset({Content.PNGS}), auto=_auto_dali, require=require_dali
    ),
    "files": Registration(make=_make_files, reads=_ANY_CONTENT, auto=_auto_files, reads_tree=True),
}
"""Name to loader, in the order in which ``auto`` considers them."""
