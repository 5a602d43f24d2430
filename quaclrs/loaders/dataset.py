"""The samples of a run: from given shards, from shards packed into a cache, or from the PNG tree itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, Columns, PackConfig, TrainConfig
from quaclrs.data.folds import SampleSplit, select, split_for
from quaclrs.data.metadata import Audit, Metadata, file_key, read_metadata
from quaclrs.data.sampling import storage_order
from quaclrs.errors import DataError, ShardError, StorageError
from quaclrs.shards.packing.pack import pack
from quaclrs.shards.packing.plan import check_tree
from quaclrs.shards.packing.summary import data_warnings
from quaclrs.shards.reader import ShardSet

CACHE_FOLDER = "quaclrs_shards"
_STORAGE_SEED = 0
"""Seed of the order of sample numbers, the same for a tree and for the shards packed from it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """N samples, by sample number."""

    name: str
    """The CSV or shard folder, for messages."""
    classes: tuple[str, ...]
    label: NDArray[np.int64]
    """(N,)"""
    fold: NDArray[np.int64]
    """(N,), from 1"""
    is_original: NDArray[np.bool_] | None
    """(N,): not augmented; None where the CSV does not say."""
    fingerprint: str
    """SHA-256 of the CSV: results with equal fingerprints are about the same samples."""
    shards: ShardSet | None
    paths: tuple[Path, ...] | None
    """(N,) PNG files; None where there are shards."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def identity(self) -> str:
        """SHA-256 over CSV, classes, and the class and fold of each sample.

        Unlike ``fingerprint`` it also changes with the chosen columns and with images skipped when packing.
        """
        digest = hashlib.sha256("\0".join([self.fingerprint, *self.classes]).encode())
        digest.update(self.label.tobytes())
        digest.update(self.fold.tobytes())
        return digest.hexdigest()

    def split(self, test_fold: int, num_folds: int | None = None) -> SampleSplit:
        """Sample numbers for training, validation and test by the protocol: the fold before ``test_fold`` validates.

        ``num_folds`` defaults to the highest fold of the data. Raises :class:`UsageError` for a fold that does not
        exist, :class:`TrainingError` when one of the three has no samples.
        """
        return select(self.fold, split_for(test_fold, int(self.fold.max()) if num_folds is None else num_folds))

    def close(self) -> None:
        """Close the shards."""
        if self.shards is not None:
            self.shards.close()


def open_dataset(config: TrainConfig, *, want_shards: bool, log: Callable[[str], None]) -> Dataset:
    """Open the data of ``config``; with ``want_shards`` and no ``--shards``, pack the tree into a cache beside the CSV.

    The cache is packed once and then reused; the CSV is parsed once. Raises :class:`DataError` for the CSV or an image,
    :class:`ShardError` for the shards.
    """
    if config.shards is not None:
        shards = ShardSet(config.shards)
        metadata = shards.metadata()
        dataset = _from_shards(shards, metadata, metadata.audit(shards.image_keys(metadata)), log)
        if config.csv_file is not None:
            _refuse_other_csv(metadata, config.shards, config.csv_file, config.columns)
        return dataset
    csv_file = config.csv_file or DEFAULT_CSV_FILE
    spectrograms_dir = config.spectrograms_dir or DEFAULT_SPECTROGRAMS_DIR
    metadata = read_metadata(csv_file, config.columns)
    if not want_shards:
        return _from_tree(metadata, spectrograms_dir, log)
    cache = cache_folder(metadata)
    log(f"shards: {cache} (packed once, then reused)")
    packing = PackConfig(
        csv_file=csv_file,
        spectrograms_dir=spectrograms_dir,
        output_dir=cache,
        seed=_STORAGE_SEED,
        columns=config.columns,
        num_workers=max(1, config.num_workers),
    )
    try:
        audit = pack(packing, progress=True, metadata=metadata).audit
    except StorageError as error:
        raise StorageError(f"{error}, or pack elsewhere with quaclrs-pack and give --shards") from None
    shards = ShardSet(cache)
    return _from_shards(shards, shards.metadata(metadata), audit, log)


def cache_folder(metadata: Metadata) -> Path:
    """The folder of the shards packed from ``metadata``'s CSV: beside it, one per content and choice of columns."""
    content = hashlib.sha256("\0".join([metadata.fingerprint, *metadata.columns]).encode()).hexdigest()
    return metadata.csv_file.parent / CACHE_FOLDER / f"{metadata.csv_file.stem}-{content[:12]}-png"


def _from_shards(shards: ShardSet, metadata: Metadata, audit: Audit, log: Callable[[str], None]) -> Dataset:
    for warning in data_warnings(audit, shards.manifest):
        log(warning)
    return _dataset(metadata, shards.samples["row"].astype(np.int64), str(shards.root), shards=shards)


def _from_tree(metadata: Metadata, spectrograms_dir: Path, log: Callable[[str], None]) -> Dataset:
    check_tree(metadata, spectrograms_dir)
    rows = storage_order(metadata.fold, _STORAGE_SEED)
    paths = tuple(metadata.path(int(row), spectrograms_dir) for row in rows)
    keys = [""] * len(metadata)
    for row, path in zip(rows, paths, strict=True):
        if not path.is_file():
            raise DataError(
                f"{metadata.csv_file}: row {row + 1}: no image at {path}; check --spectrograms_dir or restore the file"
            )
        keys[row] = file_key(path, path.stat())
    for warning in data_warnings(metadata.audit(keys)):
        log(warning)
    return _dataset(metadata, rows, str(metadata.csv_file), paths=paths)


def _dataset(
    metadata: Metadata,
    rows: NDArray[np.int64],
    name: str,
    shards: ShardSet | None = None,
    paths: tuple[Path, ...] | None = None,
) -> Dataset:
    return Dataset(
        name=name,
        classes=metadata.classes,
        label=metadata.label[rows],
        fold=metadata.fold[rows],
        is_original=None if metadata.is_original is None else metadata.is_original[rows],
        fingerprint=metadata.fingerprint,
        shards=shards,
        paths=paths,
    )


def _refuse_other_csv(metadata: Metadata, shards: Path, csv_file: Path, columns: Columns) -> None:
    """Raise :class:`ShardError` unless ``csv_file`` is the CSV of the shards.

    A CSV that cannot be read or is not valid raises its own :class:`DataError` first.
    """
    if columns == metadata.columns and csv_file.is_file() and csv_file.read_bytes() == metadata.raw:
        return
    given = read_metadata(csv_file, columns).fingerprint
    if given != metadata.fingerprint:
        raise ShardError(
            f"{shards}: packed from another CSV (SHA-256 {metadata.fingerprint[:12]}…) than {csv_file} "
            f"({given[:12]}…); leave out --csv_file to train on what the shards hold, or pack them anew"
        )
