"""Reads and checks the CSV: the images of a dataset, their classes and folds, and properties worth a warning.

Every row is one sample. Rows are not files: several slices of one recording may name the same image, and each row still
counts. Labels come from the class column alone, never from a file name, because file names contain an older numbering.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from quaclrs.config import Columns
from quaclrs.errors import DataError
from quaclrs.settings import did_you_mean

_NOT_SAID = ("", "nan", "na", "none", "null")
"""Lower-case texts that say nothing in columns that a row may leave empty (fsID, classID)."""

ORIGINAL_AUGMENTATION = "original"
"""Value of the ``augmentation`` column for an image that is not augmented."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What a user must know about a dataset before trusting an accuracy on it."""

    counts: NDArray[np.int64]
    """(classes, folds): number of rows of each class in each fold; folds as in :attr:`Metadata.fold_numbers`."""
    rows_sharing_a_file: int
    """Number of rows whose image is also named by another row."""
    conflicting_files: tuple[str, ...]
    """Images named by rows of different classes."""
    files_across_folds: tuple[str, ...]
    """Images named by rows of different folds: leakage between training and test."""
    recordings_across_folds: tuple[str, ...]
    """fsIDs with rows in more than one fold: leakage between training and test. Rows without an fsID do not count."""
    class_id_conflicts: int
    """Number of rows with a ``classID`` that is not the position of their class among the sorted class names."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """A checked CSV. Row ``i`` is the i-th row below the header, counted from 0; messages count from 1."""

    csv_file: Path
    fingerprint: str
    """SHA-256 of the CSV file's bytes, in hexadecimal."""
    columns: Columns
    table: pd.DataFrame
    """Every column of the CSV, as text."""
    raw: bytes
    """The bytes of the CSV file, for a copy in the shards."""
    classes: tuple[str, ...]
    """Sorted class names; a label is a position in this tuple."""
    label: NDArray[np.int64]
    """(rows,)"""
    fold: NDArray[np.int64]
    """(rows,), from 1"""

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def file(self) -> list[str]:
        """Each row's image, relative to its fold's folder."""
        return self.table[self.columns.file].tolist()

    @cached_property
    def fold_numbers(self) -> tuple[int, ...]:
        """The folds with rows, ascending."""
        return tuple(int(k) for k in np.unique(self.fold))

    @cached_property
    def is_original(self) -> NDArray[np.bool_] | None:
        """(rows,) bool: whether each row is not augmented; None without an ``augmentation`` column."""
        if "augmentation" not in self.table:
            return None
        return (self.table["augmentation"] == ORIGINAL_AUGMENTATION).to_numpy(dtype=bool)

    def row_json(self, row: int) -> dict[str, str]:
        """Row ``row`` of the CSV: column name to text."""
        return {str(name): str(value) for name, value in zip(self.table.columns, self._values[row], strict=True)}

    @cached_property
    def _values(self) -> NDArray[np.object_]:
        return self.table.to_numpy(dtype=object)

    def relative_path(self, row: int) -> str:
        """The image of row ``row`` in the tree of the original trainer: ``fold{k}/{file}``."""
        return f"fold{self.fold[row]}/{self.file[row]}"

    def path(self, row: int, spectrograms_dir: Path) -> Path:
        """The image of row ``row`` in ``spectrograms_dir``: ``fold{k}/{file}``, or ``{file}`` if only that exists."""
        in_fold, flat = spectrograms_dir / self.relative_path(row), spectrograms_dir / self.file[row]
        # os.path.isfile, because Path.is_file raises OSError for a name that is too long
        return flat if not os.path.isfile(in_fold) and os.path.isfile(flat) else in_fold  # noqa: PTH113

    def audit(self, images: Sequence[str] | None = None) -> Audit:
        """Count what deserves a warning. None of it is an error: the original trainer accepts it all.

        ``images`` (rows) are equal where rows have one image; by default where they name the same file of one fold.
        """
        counts = np.zeros((len(self.classes), len(self.fold_numbers)), dtype=np.int64)
        np.add.at(counts, (self.label, np.searchsorted(self.fold_numbers, self.fold)), 1)
        keys = images or [self.relative_path(row) for row in range(len(self))]
        _, first_row, image = np.unique(np.array(keys), return_index=True, return_inverse=True)
        by_file = pd.DataFrame({"image": image, "fold": self.fold, "label": self.label}).groupby("image")
        of_many_folds, of_many_classes = by_file["fold"].nunique() > 1, by_file["label"].nunique() > 1
        names = [
            self.file[row] if in_many_folds else self.relative_path(row)
            for row, in_many_folds in zip(first_row, of_many_folds, strict=True)
        ]
        return Audit(
            counts=counts,
            rows_sharing_a_file=int((by_file["label"].transform("size") > 1).sum()),
            conflicting_files=tuple(names[position] for position in np.flatnonzero(of_many_classes)),
            files_across_folds=tuple(names[position] for position in np.flatnonzero(of_many_folds)),
            recordings_across_folds=self._recordings_across_folds(),
            class_id_conflicts=self._class_id_conflicts(),
        )

    def _recordings_across_folds(self) -> tuple[str, ...]:
        if "fsID" not in self.table:
            return ()
        said = _is_said(self.table["fsID"])
        folds_per_recording = pd.Series(self.fold[said]).groupby(self.table["fsID"].to_numpy()[said]).nunique()
        return tuple(str(recording) for recording in folds_per_recording.index[folds_per_recording > 1])

    def _class_id_conflicts(self) -> int:
        if "classID" not in self.table or self.columns.label == "classID":
            return 0
        differs = (self.table["classID"] != pd.Series(self.label.astype(str), index=self.table.index)).to_numpy(
            dtype=bool
        )
        return int((differs & _is_said(self.table["classID"])).sum())


def _is_said(values: pd.Series) -> NDArray[np.bool_]:
    """(rows,) bool: whether a row has a value in an optional column. A row with too few fields has NaN."""
    return ~values.fillna("").str.strip().str.lower().isin(_NOT_SAID).to_numpy(dtype=bool)


def file_key(path: Path, stat: os.stat_result) -> str:
    """A text that is equal for names of one file, also where links give it several names."""
    return f"{stat.st_dev}:{stat.st_ino}" if stat.st_ino else str(path)


def read_metadata(csv_file: Path, columns: Columns | None = None) -> Metadata:
    """Read and check ``csv_file``. A byte-order mark, CRLF line ends and extra columns are accepted.

    Raises :class:`DataError` naming the file, the row and the value, if the file cannot be read, is empty or lacks a
    column, a value is missing, a fold is not a positive integer, or an image path leaves the dataset's folder.
    """
    try:
        raw = Path(csv_file).read_bytes()
    except OSError as error:
        raise DataError(f"{csv_file}: cannot read the CSV ({error.strerror}); check --csv_file") from None
    return parse_metadata(raw, Path(csv_file), columns or Columns())


def parse_metadata(raw: bytes, csv_file: Path, columns: Columns) -> Metadata:
    """As :func:`read_metadata`, from bytes. ``csv_file`` is used in messages only."""
    table = _parse_table(raw, csv_file)
    for column in columns:
        if column not in table.columns:
            found = ", ".join(map(str, table.columns))
            raise DataError(
                f"{csv_file}: no column {column!r}; it has: {found}; name yours with --file_column, --label_column, "
                f"--fold_column{did_you_mean(column, map(str, table.columns))}"
            )
        _refuse_missing_values(table[column], column, csv_file)
    if table.empty:
        raise DataError(f"{csv_file}: has a header but no rows; nothing to work on")
    _refuse_unsafe_paths(table[columns.file], csv_file)
    names = table[columns.label].to_numpy(dtype=object)
    classes, label = np.unique(names.astype(str), return_inverse=True)
    return Metadata(
        csv_file=csv_file,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        columns=columns,
        table=table,
        raw=raw,
        classes=tuple(map(str, classes)),
        label=label.astype(np.int64),
        fold=_parse_folds(table[columns.fold], columns.fold, csv_file),
    )


def _parse_table(raw: bytes, csv_file: Path) -> pd.DataFrame:
    try:
        # read everything as text: labels such as "NA" or "007" must not become gaps or numbers
        table = pd.read_csv(io.StringIO(raw.decode("utf-8-sig"), newline=""), dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise DataError(f"{csv_file}: the CSV is empty; it needs a header and one row per image") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{csv_file}: not UTF-8 text at byte {error.start}; save the CSV as UTF-8") from None
    except pd.errors.ParserError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{csv_file}: not a CSV with one header ({reason}); mend that line") from None
    # pandas takes surplus values for row names, which moves every value into a wrong column
    if not isinstance(table.index, pd.RangeIndex):
        raise DataError(
            f"{csv_file}: row 1 has more values than the header has columns (a comma at its end?); mend the rows or "
            "the header"
        )
    return table


def _refuse_missing_values(values: pd.Series, column: str, csv_file: Path) -> None:
    # a row with too few fields has NaN even with keep_default_na=False
    text = values.fillna("").str.strip().str.lower()
    missing = np.flatnonzero(text.isin(["", "nan"]).to_numpy())
    if missing.size:
        raise DataError(
            f"{csv_file}: row {missing[0] + 1}: column {column!r} is {values.iloc[missing[0]]!r}, a missing value "
            f"({missing.size} such row(s)); fill in or delete the row"
        )


def _parse_folds(values: pd.Series, column: str, csv_file: Path) -> NDArray[np.int64]:
    is_positive = values.str.strip().str.fullmatch(r"0*[1-9][0-9]{0,3}").to_numpy(dtype=bool)
    if not is_positive.all():
        row = int(np.flatnonzero(~is_positive)[0])
        raise DataError(
            f"{csv_file}: row {row + 1}: column {column!r} is {values.iloc[row]!r}, not a whole number from 1 to 9999; "
            "folds count from 1"
        )
    return values.astype(np.int64).to_numpy()


def _refuse_unsafe_paths(files: pd.Series, csv_file: Path) -> None:
    for file in files.unique():
        posix, windows = PurePosixPath(file), PureWindowsPath(file)
        if (
            posix.is_absolute()
            or windows.drive
            or windows.root
            or ".." in posix.parts
            or ".." in windows.parts
            or "\0" in file
        ):
            row = int(np.flatnonzero((files == file).to_numpy())[0])
            raise DataError(
                f"{csv_file}: row {row + 1}: the image {file!r} is absolute or climbs out with '..'; "
                "paths must stay below --spectrograms_dir"
            )
