"""Finds the few layouts and palettes that all images of a dataset share, independent of the images' order.

One image shows only part of its grid: equal neighbouring cells merge, and no image uses every colour. So each image
contributes :class:`Facts` (the edges and colours seen in it), and :func:`share_layouts` chooses from the *set* of all
facts. Every step below works on sorted sets. The result therefore depends neither on the order of the images nor on how
they were distributed over workers.

**Layouts.** A layout *covers* an image of the same size if its edges include every edge seen in the image. Facts are
processed by the number of cells they show, largest first (ties: by the edges themselves), because the image with the
most cells says most about the true grid:

1. If a chosen layout covers the image, nothing is added.
2. Otherwise, on each axis, take the smallest n whose even edges ``floor(i·pixels/n + 0.5)`` (as matplotlib draws them)
   include the seen edges. n is at most twice the number of seen cells. Without that limit some n always fits
   (n = pixels), and with few edges a fit proves nothing.
3. If an axis has no such n, the grid is not even, and only the images show its edges. The seen edges join the first
   such layout of the same size that has at least half of their inner edges on both axes. If there is none, they become
   a layout of their own.

Each image then uses the covering layout with the fewest cells (ties: by the edges), and layouts that no image uses are
dropped. A dataset of 376-, 469- and 313-column grids gets exactly those three, however many cells are merged in however
many images, provided that for each kind one image shows half of its edges.

**Palettes.** If all images together have at most 256 colours, these are the one palette. Otherwise colour sets are
processed largest first. Each joins the palette with which it shares most colours, if the two fit in 256 colours
together. Finally palettes that fit together are joined, largest first. An image uses the smallest palette that holds
its colours (ties: by the colours). The colours of a palette are in ascending order.
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
"""Most layouts, and most palettes, of a dataset.

A dataset that needs more does not consist of colour-mapped grids, and its tables would fill a GPU's cache.
"""


class Facts(NamedTuple):
    """The edges and colours seen in one image, in about 1 KB: hashable, sortable, cheap to send between processes."""

    height: int
    width: int
    row_bits: bytes
    """One bit per pixel row, least significant first: 1 where a row of cells starts."""
    column_bits: bytes
    """The same for pixel columns."""
    colours: bytes
    """RGB triples in ascending order."""


def image_facts(image: IndexedImage) -> Facts:
    """The facts of an image that :func:`quaclrs.imaging.indexed.find_cells` returned."""
    layout = image.layout
    codes = np.sort(pack_colours(image.palette))
    row_bits, column_bits = _bits(layout.row_edges, layout.height), _bits(layout.column_edges, layout.width)
    return Facts(layout.height, layout.width, row_bits, column_bits, unpack_colours(codes).tobytes())


@dataclass(frozen=True, eq=False)
class SharedLayouts:
    """The layouts and palettes of a dataset, in canonical order."""

    layouts: tuple[Layout, ...]
    palettes: tuple[NDArray[np.uint8], ...]
    """Each (1..256, 3) uint8, in ascending order."""

    def choose(self, facts: Facts) -> tuple[int, int]:
        """(layout, palette): positions of the first layout and the first palette that fit the image.

        Raises :class:`NotIndexable` if none does.
        """
        seen = _EdgeSets.of(facts)
        layout = next((i for i, candidate in enumerate(self._layout_sets) if candidate.covers(seen)), None)
        colours = _codes(facts.colours)
        palette = next((i for i, candidate in enumerate(self._palette_sets) if candidate >= colours), None)
        if layout is None or palette is None:
            misfit = "cells" if layout is None else "colours"
            raise NotIndexable(f"the image's {misfit} fit nothing planned: it was not among the planned images")
        return layout, palette

    # Cached because choose() runs once per image.
    @functools.cached_property
    def _layout_sets(self) -> list[_EdgeSets]:
        return [_EdgeSets.of_layout(layout) for layout in self.layouts]

    @functools.cached_property
    def _palette_sets(self) -> list[frozenset[int]]:
        return [frozenset(pack_colours(palette).tolist()) for palette in self.palettes]


def share_layouts(facts: Iterable[Facts]) -> SharedLayouts:
    """Choose the layouts and palettes of a dataset from its images' facts. Order and repetition change nothing.

    Raises :class:`NotIndexable` if more than MAX_SHARED layouts or palettes would be needed.
    """
    distinct = set(facts)
    seen = sorted({_EdgeSets.of(one) for one in distinct}, key=_EdgeSets.image_key)
    layouts = _used_layouts(seen, _choose_layouts(seen))
    palettes = _choose_palettes({one.colours for one in distinct})
    return SharedLayouts(layouts, tuple(unpack_colours(np.array(sorted(palette), np.uint32)) for palette in palettes))


class _EdgeSets(NamedTuple):
    """The edges of one image or layout, as bit sets in Python integers: inclusion is then a single operation."""

    height: int
    width: int
    rows: int
    """Bit i is set where a row of cells starts at pixel row i."""
    columns: int

    @classmethod
    def of(cls, facts: Facts) -> _EdgeSets:
        return cls(
            facts.height,
            facts.width,
            int.from_bytes(facts.row_bits, "little"),
            int.from_bytes(facts.column_bits, "little"),
        )

    @classmethod
    def of_layout(cls, layout: Layout) -> _EdgeSets:
        return cls(layout.height, layout.width, _bit_set(layout.row_edges), _bit_set(layout.column_edges))

    def layout(self) -> Layout:
        return Layout(
            height=self.height, width=self.width, row_edges=_edges(self.rows), column_edges=_edges(self.columns)
        )

    def covers(self, other: _EdgeSets) -> bool:
        same_size = self[:2] == other[:2]
        return same_size and not other.rows & ~self.rows and not other.columns & ~self.columns

    def image_key(self) -> tuple[int, ...]:
        """Sort key of images: by size, then most cells first, then by the edges. A total order."""
        return self.height, self.width, -_count(self.rows) * _count(self.columns), self.rows, self.columns

    def layout_key(self) -> tuple[int, ...]:
        """Sort key of layouts: by size, then fewest cells first, then by the edges. A total order."""
        return self.height, self.width, _count(self.rows) * _count(self.columns), self.rows, self.columns


def _choose_layouts(seen: list[_EdgeSets]) -> list[_EdgeSets]:
    """Steps 1 to 3 of the module docstring; ``seen`` is sorted by :meth:`_EdgeSets.image_key`."""
    even: list[_EdgeSets] = []
    uneven: list[_EdgeSets] = []
    for one in seen:
        if any(layout.covers(one) for layout in itertools.chain(even, uneven)):
            continue
        rows, columns = _smallest_even(one.rows, one.height), _smallest_even(one.columns, one.width)
        if rows and columns:
            even.append(_EdgeSets(one.height, one.width, rows, columns))
        else:  # an axis that is even is known completely
            _add_uneven(uneven, one._replace(rows=rows or one.rows, columns=columns or one.columns))
        _check_number("layouts", len(even) + len(uneven))
    return even + uneven


def _add_uneven(layouts: list[_EdgeSets], one: _EdgeSets) -> None:
    """Add the edges of ``one`` to the first layout that looks like the same grid, or append a new layout."""
    for i, layout in enumerate(layouts):
        if _looks_like_same_grid(layout, one):
            layouts[i] = layout._replace(rows=layout.rows | one.rows, columns=layout.columns | one.columns)
            return
    layouts.append(one)


def _used_layouts(seen: list[_EdgeSets], chosen: list[_EdgeSets]) -> tuple[Layout, ...]:
    """The chosen layouts that are the first cover of at least one image, sorted by :meth:`_EdgeSets.layout_key`."""
    chosen = sorted(set(chosen), key=_EdgeSets.layout_key)
    used = {next(layout for layout in chosen if layout.covers(one)) for one in seen}
    return tuple(layout.layout() for layout in chosen if layout in used)


def _smallest_even(seen: int, pixels: int) -> int:
    """The bit set of the smallest even grid that includes all ``seen`` edges; 0 if there is none.

    The grid has at most twice as many cells as ``seen`` has edges.
    """
    edges = np.array(_edges(seen))  # (k,)
    cells = np.arange(len(edges), min(2 * len(edges), pixels) + 1)[:, None]  # (m, 1) candidates
    nearest = (2 * edges * cells + pixels) // (2 * pixels)  # (m, k): the only cell that could start at this edge
    fits = ((2 * nearest * pixels + cells) // (2 * cells) == edges).all(axis=1)
    return _bit_set(even_edges(int(cells[fits.argmax(), 0]), pixels)) if fits.any() else 0


def _looks_like_same_grid(layout: _EdgeSets, one: _EdgeSets) -> bool:
    """Whether ``layout`` has at least half of the inner edges of ``one`` on both axes.

    Two partial views of one grid do; views of unrelated grids do not.
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
    """All colours if they fit in one palette, else None.

    Most datasets need nothing else, and this keeps no set of colours per image in memory.
    """
    together: set[int] = set()
    for colours in colour_sets:
        together |= _codes(colours)
        if len(together) > MAX_COLOURS:
            return None
    return frozenset(together)


def _joined(palettes: list[frozenset[int]]) -> list[frozenset[int]]:
    """Merge palettes that fit in 256 colours together: largest first, each into the first one with room."""
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
