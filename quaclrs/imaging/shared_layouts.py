"""The few layouts and palettes that a whole dataset shares, whatever order its images came in.

What one image shows is only part of the truth: equal neighbouring cells merge, and no image uses all colours. So each
image gives :class:`Facts`, and :func:`share_layouts` chooses from the *set* of all facts. Every step
below works on sorted sets, so the result depends neither on the order of the images nor on how workers shared them out.

**Layouts.** A layout *covers* an image of its size if its edges include all edges the image shows. Facts are taken by
the number of cells they show, most first (ties: the edges themselves), for the richest image knows most about the true
grid:

1. If a layout chosen so far covers it, nothing is needed.
2. Else, on each axis, the smallest n whose even edges ``floor(i·pixels/n + 0.5)`` include the seen ones, as matplotlib
   draws them.
   n may be at most twice the seen cells: some n always fits (n = pixels), and with few edges that proves nothing.
3. If an axis has no such n, the grid is another kind, and only images tell its edges. The seen edges join those of the
   first
   such layout of the same size with which they share at least half of their inner edges on both axes; if there is none,
   they are a layout of their own.

An image is then drawn on the covering layout with the fewest cells (ties: the smaller edges in order); layouts that no
image uses are dropped. A dataset of 376-, 469- and 313-column grids has exactly those three, however many cells are
merged in however many images, provided that of each kind one image shows half of its edges.

**Palettes.** If all images together have at most 256 colours, these are the one palette. Else colour sets are taken
largest first; each joins the palette with which it shares most colours, if they fit in 256 together; then palettes that
fit together are joined, largest first. An image uses the smallest palette that holds its colours (ties: the smaller
colours in order). Colours ascend in a palette.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quaclrs.imaging.indexed import MAX_COLOURS, IndexedImage, NotIndexable, pack_colours, unpack_colours
from quaclrs.imaging.layout import Layout, even_edges

MAX_SHARED = 1024
"""Of layouts, and of palettes. A dataset that needs more is no set of drawn matrices; their tables would crowd a GPU's
cache.
"""


class Facts(NamedTuple):
    """What one image tells, in about 1 KB: hashable, sortable, cheap to send between processes."""

    height: int
    width: int
    row_bits: bytes
    """One bit per pixel row, lowest first: a row of cells starts here."""
    column_bits: bytes
    colours: bytes
    """Ascending RGB triples."""


def image_facts(image: IndexedImage) -> Facts:
    """The facts of an image as :func:`quaclrs.imaging.indexed.find_cells` saw it."""
    layout = image.layout
    codes = np.sort(pack_colours(image.palette))
    row_bits, column_bits = _bits(layout.row_edges, layout.height), _bits(layout.column_edges, layout.width)
    return Facts(layout.height, layout.width, row_bits, column_bits, unpack_colours(codes).tobytes())


@dataclass(frozen=True, eq=False)
class SharedLayouts:
    """The layouts and palettes of a dataset, in canonical order."""

    layouts: tuple[Layout, ...]
    palettes: tuple[NDArray[np.uint8], ...]
    """Each (1..256, 3) uint8, ascending."""

    def choose(self, facts: Facts) -> tuple[int, int]:
        """(layout, palette): positions of the first of each that fits an image. Raises :class:`NotIndexable` if none
        does.
        """
        seen = _Seen.of(facts)
        layout = next((i for i, candidate in enumerate(self._layout_sets) if candidate.covers(seen)), None)
        colours = _codes(facts.colours)
        palette = next((i for i, candidate in enumerate(self._palette_sets) if candidate >= colours), None)
        if layout is None or palette is None:
            misfit = "cells" if layout is None else "colours"
            raise NotIndexable(f"the image's {misfit} fit nothing planned: it was not among the planned images")
        return layout, palette

    # Derived once, for choose() runs once per image.
    @functools.cached_property
    def _layout_sets(self) -> list[_Seen]:
        return [_Seen.of_layout(layout) for layout in self.layouts]

    @functools.cached_property
    def _palette_sets(self) -> list[frozenset[int]]:
        return [frozenset(pack_colours(palette).tolist()) for palette in self.palettes]


def share_layouts(facts: Iterable[Facts]) -> SharedLayouts:
    """Choose the layouts and palettes of a dataset from its images' facts, in any order; repeated facts change nothing.

    Raises :class:`NotIndexable` when it would take more than MAX_SHARED of either.
    """
    distinct = set(facts)
    seen = sorted({_Seen.of(one) for one in distinct}, key=_Seen.rank)
    layouts = _used_layouts(seen, _choose_layouts(seen))
    palettes = _choose_palettes({one.colours for one in distinct})
    return SharedLayouts(layouts, tuple(unpack_colours(np.array(sorted(palette), np.uint32)) for palette in palettes))


class _Seen(NamedTuple):
    """Edges as bit sets in Python integers, on which inclusion is one operation."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, facts: Facts) -> _Seen:
        return cls(
            facts.height,
            facts.width,
            int.from_bytes(facts.row_bits, "little"),
            int.from_bytes(facts.column_bits, "little"),
        )

    @classmethod
    def of_layout(cls, layout: Layout) -> _Seen:
        return cls(layout.height, layout.width, _bit_set(layout.row_edges), _bit_set(layout.column_edges))

    def layout(self) -> Layout:
        return Layout(
            height=self.height, width=self.width, row_edges=_edges(self.rows), column_edges=_edges(self.columns)
        )

    def covers(self, other: _Seen) -> bool:
        same_size = self[:2] == other[:2]
        return same_size and not other.rows & ~self.rows and not other.columns & ~self.columns

    def rank(self) -> tuple[int, ...]:
        """Sorts by size of the image, then most cells first, then by the edges: a total order."""
        return self.height, self.width, -_count(self.rows) * _count(self.columns), self.rows, self.columns

    def cost(self) -> tuple[int, ...]:
        """Sorts layouts: by size of the image, then fewest cells first, then by the edges."""
        return self.height, self.width, _count(self.rows) * _count(self.columns), self.rows, self.columns


def _choose_layouts(seen: list[_Seen]) -> list[_Seen]:
    """Steps 1 to 3 above; ``seen`` in order of rank."""
    even: list[_Seen] = []
    other: list[_Seen] = []
    for one in seen:
        if any(layout.covers(one) for layout in itertools.chain(even, other)):
            continue
        rows, columns = _smallest_even(one.rows, one.height), _smallest_even(one.columns, one.width)
        if rows and columns:
            even.append(_Seen(one.height, one.width, rows, columns))
            _check_number("layouts", len(even) + len(other))
            continue
        one = one._replace(
            rows=rows or one.rows, columns=columns or one.columns
        )  # the axis that is even is known at least
        for i, layout in enumerate(other):
            if _akin(layout, one):
                other[i] = layout._replace(rows=layout.rows | one.rows, columns=layout.columns | one.columns)
                break
        else:
            other.append(one)
        _check_number("layouts", len(even) + len(other))
    return even + other


def _used_layouts(seen: list[_Seen], chosen: list[_Seen]) -> tuple[Layout, ...]:
    """The chosen layouts that are some image's cheapest, in order of cost."""
    chosen = sorted(set(chosen), key=_Seen.cost)
    used = {next(layout for layout in chosen if layout.covers(one)) for one in seen}
    return tuple(layout.layout() for layout in chosen if layout in used)


def _smallest_even(seen: int, pixels: int) -> int:
    """The bit set of the smallest even grid that has all ``seen`` edges and at most twice as many; 0 if
    there is none.
    """
    edges = np.array(_edges(seen))  # (k,)
    cells = np.arange(len(edges), min(2 * len(edges), pixels) + 1)[:, None]  # (m, 1) candidates
    nearest = (2 * edges * cells + pixels) // (2 * pixels)  # (m, k): the only cell that could start at the edge
    fits = ((2 * nearest * pixels + cells) // (2 * cells) == edges).all(axis=1)
    return _bit_set(even_edges(int(cells[fits.argmax(), 0]), pixels)) if fits.any() else 0


def _akin(layout: _Seen, one: _Seen) -> bool:
    """Whether ``one`` shares half of its inner edges with ``layout``, on both axes: two parts of the same grid do,
    strangers do not.
    """
    if layout[:2] != one[:2]:
        return False
    axes = ((layout.rows, one.rows), (layout.columns, one.columns))
    return all(2 * (_count(known & seen) - 1) >= _count(seen) - 1 for known, seen in axes)  # both have edge 0


def _choose_palettes(colour_sets: set[bytes]) -> list[frozenset[int]]:
    together = _union_if_small(colour_sets)
    if together is not None:
        return [together] if together else []
    palettes: list[frozenset[int]] = []
    for colours in map(_codes, sorted(colour_sets, key=lambda colours: (-len(colours), colours))):
        shared = [len(palette & colours) if len(palette | colours) <= MAX_COLOURS else 0 for palette in palettes]
        if any(shared):
            best = shared.index(max(shared))
            palettes[best] |= colours
        else:
            palettes.append(colours)
            _check_number("palettes", len(palettes))
    return sorted(_joined(palettes), key=lambda palette: (len(palette), sorted(palette)))


def _union_if_small(colour_sets: set[bytes]) -> frozenset[int] | None:
    """All colours if they fit in one palette. Most datasets end here, without a set of numbers in memory per image."""
    together: set[int] = set()
    for colours in colour_sets:
        together |= _codes(colours)
        if len(together) > MAX_COLOURS:
            return None
    return frozenset(together)


def _joined(palettes: list[frozenset[int]]) -> list[frozenset[int]]:
    """Put palettes together that fit into one, the largest first, each into the first that has room."""
    joined: list[frozenset[int]] = []
    for palette in sorted(palettes, key=lambda palette: (-len(palette), sorted(palette))):
        room = next((i for i, other in enumerate(joined) if len(other | palette) <= MAX_COLOURS), None)
        if room is None:
            joined.append(palette)
        else:
            joined[room] |= palette
    return joined


def _codes(colours: bytes) -> frozenset[int]:
    return frozenset(pack_colours(np.frombuffer(colours, np.uint8).reshape(-1, 3)).tolist())


def _bits(edges: tuple[int, ...], pixels: int) -> bytes:
    starts = np.zeros(pixels, bool)
    starts[list(edges)] = True
    return np.packbits(starts, bitorder="little").tobytes()


def _bit_set(edges: tuple[int, ...]) -> int:
    return int.from_bytes(_bits(edges, edges[-1] + 1), "little")


def _edges(bit_set: int) -> tuple[int, ...]:
    octets = np.frombuffer(bit_set.to_bytes(-(-bit_set.bit_length() // 8), "little"), np.uint8)
    return tuple(np.flatnonzero(np.unpackbits(octets, bitorder="little")).tolist())


def _count(bit_set: int) -> int:
    return bit_set.bit_count()


def _check_number(what: str, number: int) -> None:
    if number > MAX_SHARED:
        raise NotIndexable(f"the images need more than {MAX_SHARED} {what}: they are not matrices drawn alike")
