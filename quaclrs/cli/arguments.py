"""What all command lines share: flags that take hyphens for underscores, and flags that appear in several of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, Columns


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those of flags that are off or not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser in which ``--batch_size`` may be written ``--batch-size``, and no flag be abbreviated."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after turning hyphens inside flag names (not values) into underscores."""
        import sys

        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._underscored(argument) for argument in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line, as for every other bad input, instead of the whole usage."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    @staticmethod
    def _underscored(argument: str) -> str:
        if not argument.startswith("--"):
            return argument
        flag, equals, value = argument.partition("=")
        return "--" + flag[2:].replace("-", "_") + equals + value


def add_dataset_arguments(group: Any, *, show_defaults: bool = False) -> None:
    """``--csv_file --spectrograms_dir`` and the names of the CSV's columns.

    They default to None: the caller decides what that means, knowing whether the user named them. ``show_defaults``
    tells of DEFAULT_CSV_FILE and DEFAULT_SPECTROGRAMS_DIR in the help.
    """
    csv_default, folder_default = (
        (f" [{DEFAULT_CSV_FILE}]", f" [{DEFAULT_SPECTROGRAMS_DIR}]") if show_defaults else ("", "")
    )
    group.add_argument("--csv_file", type=Path, metavar="CSV", help=f"one row per sample{csv_default}")
    group.add_argument(
        "--spectrograms_dir", type=Path, metavar="DIR", help=f"holds fold1/, fold2/, ...{folder_default}"
    )
    names = Columns()
    group.add_argument(
        "--file_column", default=names.file, metavar="NAME", help="CSV column with the image's file name"
    )
    group.add_argument("--label_column", default=names.label, metavar="NAME", help="CSV column with the class name")
    group.add_argument("--fold_column", default=names.fold, metavar="NAME", help="CSV column with the fold, 1, 2, ...")


def columns_of(arguments: argparse.Namespace) -> Columns:
    """The columns that :func:`add_dataset_arguments` took."""
    return Columns(file=arguments.file_column, label=arguments.label_column, fold=arguments.fold_column)
