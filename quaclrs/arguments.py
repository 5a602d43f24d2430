"""What all command lines share: flags that take hyphens for underscores, and flags that appear in several of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, Columns


class Parser(argparse.ArgumentParser):
    """An argument parser in which ``--batch_size`` may be written ``--batch-size``, and no flag be abbreviated."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after turning hyphens inside flag names (not values) into underscores."""
        import sys

        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._underscored(argument) for argument in given], namespace)

    @staticmethod
    def _underscored(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        flag, equals, value = argument.partition("=")
        return "--" + flag[2:].replace("-", "_") + equals + value


def add_dataset_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--csv_file --spectrograms_dir`` and the names of the CSV's columns."""
    csv: dict[str, Any] = {"required": True} if required else {"default": DEFAULT_CSV_FILE}
    folder: dict[str, Any] = {"required": True} if required else {"default": DEFAULT_SPECTROGRAMS_DIR}
    parser.add_argument("--csv_file", type=Path, metavar="CSV", help="one row per sample", **csv)
    parser.add_argument("--spectrograms_dir", type=Path, metavar="DIR", help="holds fold1/, fold2/, ...", **folder)
    names = Columns()
    parser.add_argument("--file_column", default=names.file, metavar="NAME", help="CSV column with the picture's file name")
    parser.add_argument("--label_column", default=names.label, metavar="NAME", help="CSV column with the class name")
    parser.add_argument("--fold_column", default=names.fold, metavar="NAME", help="CSV column with the fold, 1, 2, ...")


def columns_of(arguments: argparse.Namespace) -> Columns:
    """The columns that :func:`add_dataset_arguments` took."""
    return Columns(file=arguments.file_column, label=arguments.label_column, fold=arguments.fold_column)
