"""What all command lines share: a parser that reads hyphens as underscores, and flags that several of them have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from quaclrs import __version__
from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR, Columns
from quaclrs.settings import did_you_mean

FlagGroup: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"
"""What flags can be added to; argparse has no public name for its groups."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except for flags that are off or have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that reads ``--batch-size`` as ``--batch_size`` and accepts no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]  # typeshed overloads it on the namespace's type
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse after turning hyphens inside flag names (not values) into underscores."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_underscores(argument) for argument in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line, as for every other bad input, instead of the whole usage."""
        unknown = message.removeprefix("unrecognized arguments: ").split(maxsplit=1)
        if unknown and unknown[0] != message.split(maxsplit=1)[0]:
            message += did_you_mean(unknown[0], self._option_string_actions).rstrip("?")
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def add_version_argument(parser: argparse.ArgumentParser) -> None:
    """``--version``: prints the program's name and the version of quaclrs, and exits."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def add_dataset_arguments(group: FlagGroup, *, show_defaults: bool = False) -> None:
    """``--csv_file``, ``--spectrograms_dir`` and the names of the CSV's columns.

    The first two default to None, so that the caller can tell whether the user gave them. ``show_defaults`` names
    DEFAULT_CSV_FILE and DEFAULT_SPECTROGRAMS_DIR in the help.
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


def columns_of(options: argparse.Namespace) -> Columns:
    """The CSV's columns that the flags of :func:`add_dataset_arguments` name."""
    return Columns(file=options.file_column, label=options.label_column, fold=options.fold_column)
