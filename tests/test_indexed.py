"""Contract of indexed images: they are lossless or refused with a reason, and shared layouts do not depend on the
order.
"""

from __future__ import annotations

import io
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from quaclrs.errors import DataError
from quaclrs.imaging import shared_layouts
from quaclrs.imaging.indexed import IndexedImage, NotIndexable, decode, encode, find_cells, recode
from quaclrs.imaging.layout import Layout, even_edges, even_layout
from quaclrs.imaging.shared_layouts import Facts, SharedLayouts, image_facts, share_layouts

MAGMA = matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3].copy()

Drawn = tuple[NDArray[np.uint8], NDArray[np.uint8], Layout]
"""(grid, palette, layout)."""


def paint(grid: NDArray[np.uint8], palette: NDArray[np.uint8], layout: Layout) -> NDArray[np.uint8]:
    """The oracle: (H, W, 3) uint8, painted pixel by pixel."""
    row = [max(i for i, edge in enumerate(layout.row_edges) if edge <= y) for y in range(layout.height)]
    column = [max(i for i, edge in enumerate(layout.column_edges) if edge <= x) for x in range(layout.width)]
    pixels: NDArray[np.uint8] = palette[grid[np.ix_(row, column)]]
    return pixels


def random_colours(rng: np.random.Generator, number: int) -> NDArray[np.uint8]:
    codes = rng.choice(1 << 24, number, replace=False)
    colours: NDArray[np.uint8] = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)
    return colours


@st.composite
def drawn_images(draw: st.DrawFn, side: int = 40, colours: int = 256) -> Drawn:
    """(grid, palette, layout) with arbitrary edges and, often, equal neighbours."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width = draw(st.integers(1, side)), draw(st.integers(1, side))

    def edges(pixels: int) -> tuple[int, ...]:
        inner = rng.permutation(np.arange(1, pixels))[: draw(st.integers(0, pixels - 1))]
        return (0, *sorted(inner.tolist()))

    layout = Layout(height=height, width=width, row_edges=edges(height), column_edges=edges(width))
    palette = random_colours(
        rng, draw(st.sampled_from([1, 2, 3, 17, 255, 256]) if colours == 256 else st.integers(1, colours))
    )
    grid = rng.integers(0, len(palette), (layout.rows, layout.columns)).astype(np.uint8)
    for _ in range(draw(st.integers(0, 3))):  # merge: repeat a row, a column
        row, column = rng.integers(layout.rows), rng.integers(layout.columns)
        grid[row] = grid[row - 1]
        grid[:, column] = grid[:, column - 1]
    return grid, palette, layout


@given(drawn_images())
@settings(deadline=None, max_examples=60)
def test_nothing_is_lost(drawn: Drawn) -> None:
    check_nothing_is_lost(*drawn)


@pytest.mark.exhaustive
@given(drawn_images())
@settings(deadline=None, max_examples=600)
def test_nothing_is_lost_in_many_images(drawn: Drawn) -> None:
    check_nothing_is_lost(*drawn)


def check_nothing_is_lost(grid: NDArray[np.uint8], palette: NDArray[np.uint8], layout: Layout) -> None:
    pixels = paint(grid, palette, layout)

    seen = encode(pixels)
    assert np.array_equal(decode(seen), pixels)
    assert set(seen.layout.row_edges) <= set(layout.row_edges)
    assert set(seen.layout.column_edges) <= set(layout.column_edges)
    assert set(map(tuple, seen.palette.tolist())) == set(map(tuple, palette[np.unique(grid)].tolist()))

    known = encode(pixels, layout, palette)
    assert known.layout == layout
    assert known.grid.flags.c_contiguous
    assert np.array_equal(known.grid, grid)  # the colours of random_colours differ, so the indices are the drawn ones
    assert np.array_equal(decode(known), pixels)


@pytest.mark.parametrize("height", [1, 7, 400])
@pytest.mark.parametrize("width", [1, 3, 8, 1000])
def test_one_colour_is_one_cell(height: int, width: int) -> None:
    image = encode(np.full((height, width, 3), (1, 2, 3), np.uint8))
    assert image.grid.shape == (1, 1)
    assert image.palette.tolist() == [[1, 2, 3]]
    assert decode(image).shape == (height, width, 3)


def test_256_colours_fit_and_257_do_not() -> None:
    colours = random_colours(np.random.default_rng(0), 257)
    pixels = colours[:256].reshape(16, 16, 3)
    assert np.array_equal(decode(encode(pixels)), pixels)
    with pytest.raises(NotIndexable, match="the image has 257 colours; an indexed image has at most 256"):
        encode(colours[None])


def test_a_photograph_is_refused_with_its_number_of_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 250, 3)).astype(np.uint8)
    number = len(np.unique(pixels.reshape(-1, 3), axis=0))
    with pytest.raises(DataError, match=f"the image has {number:,} colours"):
        encode(pixels)


def test_too_long_a_side_is_refused() -> None:
    with pytest.raises(NotIndexable, match="is 16385×1 pixels; an indexed image has at most 16384 a side"):
        encode(np.zeros((1, 16385, 3), np.uint8))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3))],
)
def test_other_arrays_are_refused(pixels: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
        find_cells(pixels)


def test_a_view_that_is_not_contiguous_is_indexed_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (6, 10, 4)).astype(np.uint8)[:, ::2, :3]
    assert np.array_equal(decode(encode(pixels)), pixels)


def test_misfits_are_refused_with_what_does_not_fit() -> None:
    pixels = paint(
        np.array([[0, 1]], np.uint8), np.array([[0, 0, 0], [255, 128, 0]], np.uint8), even_layout(4, 8, 1, 2)
    )
    with pytest.raises(NotIndexable, match="the image is 8×4 pixels, the layout 9×4"):
        encode(pixels, even_layout(4, 9, 1, 2))
    with pytest.raises(NotIndexable, match=r"1 of the image's column edges are not in the layout, e\.g\. pixel 4"):
        encode(pixels, even_layout(4, 8, 1, 1))
    with pytest.raises(NotIndexable, match=r"1 of the image's 2 colours are not in the palette, e\.g\. #ff8000"):
        encode(pixels, palette=np.zeros((1, 3), np.uint8))


def test_even_edges_are_the_datasets_formula() -> None:
    for cells, pixels in ((376, 1000), (469, 1000), (313, 1000), (128, 400), (1, 5), (5, 5)):
        assert even_edges(cells, pixels) == tuple(math.floor(i * pixels / cells + 0.5) for i in range(cells))
    with pytest.raises(ValueError, match="cannot draw 6 cells on 5 pixels"):
        even_edges(6, 5)


def test_matplotlib_draws_even_edges() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.pcolormesh(np.random.default_rng(0).normal(size=(128, 376)), cmap="magma")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib does not annotate its methods
    canvas.draw()
    image = encode(np.asarray(canvas.buffer_rgba())[..., :3], even_layout(400, 1000, 128, 376))
    assert image.grid.shape == (128, 376)


def test_layouts_travel_through_json() -> None:
    layout = even_layout(400, 1000, 128, 376)
    copy = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert copy == layout
    assert hash(copy) == hash(layout)
    assert (copy.rows, copy.columns, copy.cells, copy.size) == (128, 376, 48128, (400, 1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_edges": []}, "row edges must rise from 0 and stay below 4"),
        ({"row_edges": [1]}, "row edges must rise from 0"),
        ({"column_edges": [0, 3, 3]}, r"column edges must rise from 0 and stay below 8, not \[0, 3, 3\]"),
        ({"column_edges": [0, 8]}, "stay below 8"),
        ({"column_edges": [0, 2.5]}, "2.5 is not an integer"),
        ({"height": 0}, "1 to 16384 pixels, not 0"),
        ({"height": None}, "None is not an integer"),
        ({"width": 16385}, "1 to 16384 pixels, not 16385"),
    ],
)
def test_broken_layouts_are_refused(change: dict[str, Any], message: str) -> None:
    document = {"height": 4, "width": 8, "row_edges": [0], "column_edges": [0, 4]} | change
    with pytest.raises(ValueError, match=message):
        Layout.from_dict(document)
    with pytest.raises(ValueError, match="not a layout"):
        Layout.from_dict({"height": 4})


def seen_parts(layout: Layout, palette: NDArray[np.uint8], rng: np.random.Generator, number: int) -> Iterator[Facts]:
    """Facts of images on ``layout`` with few, some or nearly all cells merged and colours left out."""
    for kept in rng.choice([0.01, 0.3, 0.9, 1.0], number):
        edges = [
            (0, *(edge for edge in axis[1:] if rng.random() < kept)) for axis in (layout.row_edges, layout.column_edges)
        ]
        seen = Layout(height=layout.height, width=layout.width, row_edges=edges[0], column_edges=edges[1])
        colours = palette[rng.random(len(palette)) < kept]
        grid = np.zeros((seen.rows, seen.columns), np.uint8)
        yield image_facts(IndexedImage(grid, colours if len(colours) else palette[:1], seen))


def assert_same_layouts_and_palettes(one: SharedLayouts, other: SharedLayouts) -> None:
    assert one.layouts == other.layouts
    assert [palette.tolist() for palette in one.palettes] == [palette.tolist() for palette in other.palettes]


def test_a_dataset_of_three_widths_has_three_layouts_and_one_palette_in_any_order() -> None:
    rng = np.random.default_rng(0)
    true = [even_layout(400, 1000, 128, columns) for columns in (313, 376, 469)]
    facts = [fact for layout in true for fact in seen_parts(layout, MAGMA, rng, 60)]
    shared = share_layouts(facts)
    assert list(shared.layouts) == true
    assert len(shared.palettes) == 1
    for seed in range(5):
        random.Random(seed).shuffle(facts)
        assert_same_layouts_and_palettes(shared, share_layouts(facts + facts[:7]))
    for fact in facts:
        layout, palette = shared.choose(fact)
        assert layout in (0, 1, 2)
        assert palette == 0


def test_an_image_that_shows_nothing_takes_the_smallest_layout() -> None:
    facts = [image_facts(find_cells(np.zeros((400, 1000, 3), np.uint8)))]
    assert share_layouts(facts).layouts == (even_layout(400, 1000, 1, 1),)
    whole = even_layout(400, 1000, 128, 376)
    facts.append(image_facts(IndexedImage(np.zeros((128, 376), np.uint8), MAGMA, whole)))
    shared = share_layouts(facts)
    assert shared.layouts == (whole,)
    assert shared.choose(facts[0]) == (0, 0)


def test_grids_that_are_not_even_are_put_together_from_what_images_show() -> None:
    rng = np.random.default_rng(0)
    edges = [
        (0, *sorted(rng.choice(np.arange(1, pixels), cells, replace=False).tolist()))
        for pixels, cells in ((300, 60), (500, 90))
    ]
    odd = Layout(height=300, width=500, row_edges=edges[0], column_edges=edges[1])
    facts = []
    for _ in range(30):
        kept = [(0, *(edge for edge in axis[1:] if rng.random() < 0.7)) for axis in edges]
        part = Layout(height=300, width=500, row_edges=kept[0], column_edges=kept[1])
        facts.append(image_facts(IndexedImage(np.zeros((part.rows, part.columns), np.uint8), MAGMA, part)))
    shared = share_layouts(facts)
    assert shared.layouts == (odd,)
    assert_same_layouts_and_palettes(shared, share_layouts(reversed(facts)))


def test_colour_maps_that_do_not_fit_together_keep_a_palette_each() -> None:
    rng = np.random.default_rng(0)
    maps = [
        matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3].copy() for name in ("magma", "viridis", "gray")
    ]
    layout = even_layout(40, 100, 4, 10)
    facts = [image_facts(IndexedImage(np.zeros((4, 10), np.uint8), MAGMA, layout))]  # one image has all of magma
    facts += [fact for palette in maps for fact in seen_parts(layout, palette, rng, 40)]
    shared = share_layouts(facts)
    assert len(shared.palettes) == 3
    for seed in range(3):
        random.Random(seed).shuffle(facts)
        assert_same_layouts_and_palettes(shared, share_layouts(facts))


def test_small_palettes_are_put_together() -> None:
    colours = random_colours(np.random.default_rng(0), 600).reshape(6, 100, 3)
    layout = even_layout(4, 4, 1, 1)
    facts = [image_facts(IndexedImage(np.zeros((1, 1), np.uint8), palette, layout)) for palette in colours]
    assert [len(palette) for palette in share_layouts(facts).palettes] == [200, 200, 200]


def test_images_without_anything_in_common_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_layouts, "MAX_SHARED", 3)
    colours = random_colours(np.random.default_rng(0), 1200).reshape(6, 200, 3)
    facts = [
        image_facts(IndexedImage(np.zeros((1, 1), np.uint8), palette, even_layout(4, 4, 1, 1))) for palette in colours
    ]
    with pytest.raises(NotIndexable, match="need more than 3 palettes"):
        share_layouts(facts)
    facts = [image_facts(find_cells(np.zeros((1, width, 3), np.uint8))) for width in range(1, 6)]
    with pytest.raises(NotIndexable, match="need more than 3 layouts"):
        share_layouts(facts)


def test_an_image_outside_the_shared_layouts_is_refused() -> None:
    black, grey = (np.full((2, 2, 3), level, np.uint8) for level in (0, 9))
    shared = share_layouts([image_facts(find_cells(black))])
    with pytest.raises(NotIndexable, match="colours fit nothing planned"):
        shared.choose(image_facts(find_cells(grey)))
    with pytest.raises(NotIndexable, match="cells fit nothing planned"):
        shared.choose(image_facts(find_cells(black[:1])))


IMAGES = st.lists(drawn_images(side=12, colours=40), min_size=1, max_size=12)


@given(IMAGES, st.randoms())
@settings(deadline=None, max_examples=30)
def test_every_image_is_lossless_on_shared_layouts_whatever_the_order(
    drawn: list[Drawn], shuffler: random.Random
) -> None:
    check_lossless_on_shared_layouts(drawn, shuffler)


@pytest.mark.exhaustive
@given(IMAGES, st.randoms())
@settings(deadline=None, max_examples=300)
def test_many_images_are_lossless_on_shared_layouts_whatever_the_order(
    drawn: list[Drawn], shuffler: random.Random
) -> None:
    check_lossless_on_shared_layouts(drawn, shuffler)


def check_lossless_on_shared_layouts(drawn: list[Drawn], shuffler: random.Random) -> None:
    images = [find_cells(paint(*one)) for one in drawn]
    facts = [image_facts(image) for image in images]
    shared = share_layouts(facts)
    for image, fact in zip(images, facts, strict=True):
        layout, palette = shared.choose(fact)
        recoded = recode(image, shared.layouts[layout], shared.palettes[palette])
        assert np.array_equal(decode(recoded), decode(image))
    shuffler.shuffle(facts)
    assert_same_layouts_and_palettes(shared, share_layouts(facts))


@pytest.mark.exhaustive
def test_encoding_costs_less_than_decoding_the_png() -> None:
    rng = np.random.default_rng(0)
    grid = np.clip(rng.normal(128, 20, (128, 376)) + 60 * np.sin(np.arange(376) / 9), 0, 255).astype(np.uint8)
    layout = even_layout(400, 1000, 128, 376)
    pixels = decode(IndexedImage(grid, MAGMA, layout))
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA").save(file, "png")

    def fastest(work: Callable[[], object]) -> float:
        times = []
        for _ in range(9):
            start_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - start_s)
        return min(times)

    decoding_s = fastest(lambda: np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB")))
    encoding_s = fastest(lambda: encode(pixels, layout, MAGMA))  # measured: a third of it
    assert encoding_s < decoding_s
