"""The layout of an image: at which pixel each row and each column of its cells starts.

matplotlib's Agg renderer, without antialiasing, starts cell i of n at pixel ``floor(i · pixels / n + 0.5)``:
:func:`even_edges`. Other images may have any edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quaclrs.imaging.resample import MAX_SIDE


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an image of ``height`` × ``width`` pixels divides into ``rows`` × ``columns`` cells of one colour. Hashable.

    Raises ``ValueError`` if edges do not start at 0, do not increase, or lie outside the image.
    """

    height: int
    width: int
    row_edges: tuple[int, ...]
    """First pixel row of each row of cells; the first is 0."""
    column_edges: tuple[int, ...]
    """First pixel column of each column of cells; the first is 0."""

    def __post_init__(self) -> None:
        _check_edges("row", self.row_edges, self.height)
        _check_edges("column", self.column_edges, self.width)

    @property
    def rows(self) -> int:
        """Number of rows of cells."""
        return len(self.row_edges)

    @property
    def columns(self) -> int:
        """Number of columns of cells."""
        return len(self.column_edges)

    @property
    def cells(self) -> int:
        """Number of cells, which is the number of bytes of a grid."""
        return self.rows * self.columns

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON-able values; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Layout:
        """The inverse of :meth:`to_dict`. Raises ``ValueError``, also for missing keys and for other values."""
        try:
            return cls(
                height=_integer(document["height"]),
                width=_integer(document["width"]),
                row_edges=tuple(map(_integer, document["row_edges"])),
                column_edges=tuple(map(_integer, document["column_edges"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a layout: {error!r}") from None


def even_edges(cells: int, pixels: int) -> tuple[int, ...]:
    """First pixel of each of ``cells`` even cells: ``floor(i · pixels / cells + 0.5)``, in exact integer arithmetic.

    ``cells`` is at most ``pixels``, else ``ValueError``.
    """
    if not 1 <= cells <= pixels:
        raise ValueError(f"cannot draw {cells} cells on {pixels} pixels")
    return tuple((2 * i * pixels + cells) // (2 * cells) for i in range(cells))


def even_layout(height: int, width: int, rows: int, columns: int) -> Layout:
    """The layout of ``rows`` × ``columns`` cells that matplotlib draws on ``height`` × ``width`` pixels."""
    return Layout(
        height=height, width=width, row_edges=even_edges(rows, height), column_edges=even_edges(columns, width)
    )


def _check_edges(axis: str, edges: Iterable[int], pixels: int) -> None:
    edges = tuple(edges)
    if not 1 <= pixels <= MAX_SIDE:
        raise ValueError(f"a layout's {axis} axis has 1 to {MAX_SIDE} pixels, not {pixels}")
    rising = all(left < right for left, right in itertools.pairwise(edges))
    if not edges or edges[0] != 0 or not rising or edges[-1] >= pixels:
        raise ValueError(f"{axis} edges must rise from 0 and stay below {pixels}, not {_shorten(edges)}")


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return value


def _shorten(edges: tuple[int, ...]) -> str:
    return f"{list(edges[:8])}" if len(edges) <= 8 else f"{list(edges[:8])}... ({len(edges)} in all)"
