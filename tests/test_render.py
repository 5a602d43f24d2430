"""Contract of the render: reference, CPU kernel and Triton kernel have the bits of Pillow and torchvision."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from quaclrs.imaging.indexed import IndexedImage, decode
from quaclrs.imaging.kernels import dispatch
from quaclrs.imaging.kernels.dispatch import render, render_for
from quaclrs.imaging.layout import Layout, even_layout
from quaclrs.imaging.render import RENDER_DTYPES, Grids, RenderTables, check_grids, render_reference
from quaclrs.imaging.resample import vertical_first

SIZES = (64, 96, 224, 299)

Images = list[tuple[NDArray[np.uint8], int, int]]
"""(grid, position of its layout, position of its palette) of each image."""
Dataset = tuple[Images, list[Layout], list[NDArray[np.uint8]]]
"""(images, layouts, palettes)."""
Render = Callable[[Grids, torch.Tensor, RenderTables, torch.dtype], torch.Tensor]


def random_layout(rng: np.random.Generator, height: int, width: int) -> Layout:
    edges = [
        (0, *sorted(rng.permutation(np.arange(1, pixels))[: rng.integers(pixels)].tolist()))
        for pixels in (height, width)
    ]
    return Layout(height=height, width=width, row_edges=edges[0], column_edges=edges[1])


@functools.cache
def dataset() -> Dataset:
    """The real dataset's three layouts, others (one that Pillow 13 resizes vertically first), and three palettes."""
    rng = np.random.default_rng(0)
    layouts = [even_layout(400, 1000, 128, columns) for columns in (376, 469, 313)]
    layouts += [
        random_layout(rng, 400, 1000),
        random_layout(rng, 37, 53),
        random_layout(rng, 300, 96),
        even_layout(224, 224, 7, 224),
    ]
    layouts += [even_layout(1, 1, 1, 1), even_layout(1, 600, 1, 600)]
    palettes = [rng.integers(0, 256, (colours, 3)).astype(np.uint8) for colours in (256, 3)]
    palettes.append(
        np.repeat(np.array([[0], [255]], np.uint8), 3, axis=1)
    )  # the extremes: no sum may overflow or need clipping
    images: Images = []
    for number, layout in enumerate(layouts + layouts[:3]):
        palette = number % len(palettes)
        grid = rng.integers(0, len(palettes[palette]), (layout.rows, layout.columns)).astype(np.uint8)
        images.append((grid, number % len(layouts), palette))
    return images, layouts, palettes


def built_tables(size: int) -> RenderTables:
    _, layouts, palettes = dataset()
    return RenderTables.build(layouts, palettes, size)


def flat_grids(images: Images, rng: np.random.Generator) -> Grids:
    """Grids in a buffer, in random order and with gaps."""
    parts: list[NDArray[np.uint8]] = []
    offsets, position = {}, 0
    for number in rng.permutation(len(images)):
        gap = rng.integers(0, 50)
        parts += [np.full(gap, 99, np.uint8), images[number][0].ravel()]
        offsets[number] = position + gap
        position += gap + images[number][0].size
    return Grids(
        torch.from_numpy(np.concatenate(parts)),
        torch.tensor([offsets[number] for number in range(len(images))]),
        torch.tensor([layout for _, layout, _ in images], dtype=torch.int32),
        torch.tensor([palette for _, _, palette in images], dtype=torch.int32),
    )


def pillow_levels(
    images: Images, layouts: list[Layout], palettes: list[NDArray[np.uint8]], size: int
) -> NDArray[np.uint8]:
    """The oracle: (N, S, S, 3) uint8 of Pillow's resize of the whole image, which came as RGBA."""
    resized = []
    for grid, layout, palette in images:
        image = Image.fromarray(decode(IndexedImage(grid, palettes[palette], layouts[layout]))).convert("RGBA")
        resized.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
    return np.stack(resized)


def torchvision_batch(levels: NDArray[np.uint8]) -> torch.Tensor:
    """(N, 3, S, S) float32."""
    steps = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    return torch.stack([steps(one) for one in levels])


def assert_renders_as_pillow(
    function: Render, data: Dataset, size: int, dtypes: Sequence[torch.dtype] = RENDER_DTYPES
) -> None:
    """``function`` has Pillow's and torchvision's bits in ``dtypes``, for a shuffled batch with a repeated image."""
    images, layouts, palettes = data
    rng = np.random.default_rng(size)
    grids, tables = flat_grids(images, rng), RenderTables.build(layouts, palettes, size)
    order = np.append(rng.permutation(len(images)), 0)
    levels = pillow_levels(images, layouts, palettes, size)[order]
    values = torchvision_batch(levels)
    for dtype in dtypes:
        batch = function(grids, torch.from_numpy(order), tables, dtype)
        assert batch.shape == values.shape
        assert batch.dtype == dtype
        assert batch.is_contiguous(memory_format=torch.channels_last)
        wanted = torch.from_numpy(levels).permute(0, 3, 1, 2) if dtype == torch.uint8 else values.to(dtype)
        assert torch.equal(batch, wanted), (
            f"{int((batch != wanted).sum())} of {batch.numel()} {dtype} values differ at size {size}"
        )


def test_the_order_of_passes_is_the_installed_pillows() -> None:
    """Also at the border of the rule: height shrinking by exactly twice as many pixels as width, and by one more."""
    rng = np.random.default_rng(0)
    for height, width, size in (
        (164, 114, 64),
        (165, 114, 64),
        (64, 10, 64),
        (65, 10, 64),
        (66, 65, 64),
        (67, 65, 64),
        (400, 1000, 224),
        (1000, 400, 224),
    ):
        layout = Layout(height=height, width=width, row_edges=tuple(range(height)), column_edges=tuple(range(width)))
        grid = rng.integers(0, 256, (height, width)).astype(np.uint8)
        palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
        assert_renders_as_pillow(render_reference, ([(grid, 0, 0)], [layout], [palette]), size)
    assert vertical_first(1000, 400, 224) == (int(PIL.__version__.split(".")[0]) >= 13)
    assert not vertical_first(400, 1000, 224)


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_renders_as_pillow(size: int) -> None:
    assert_renders_as_pillow(render_reference, dataset(), size)


@pytest.mark.parametrize("size", SIZES)
def test_the_cpu_kernel_renders_as_pillow(size: int) -> None:
    render_cpu = pytest.importorskip(
        "quaclrs.imaging.kernels.render_cpu", reason="numba is not installed", exc_type=ImportError
    ).render_cpu
    assert_renders_as_pillow(render_cpu, dataset(), size)


# --- the Triton kernel ---


INTERPRETED = {
    "64 pixels": (4, 64, (torch.uint8, torch.float16), None),
    "24 pixels: more filter weights than are unrolled": (4, 24, (torch.float32,), None),
    "a tile that overhangs the image": (4, 12, (torch.uint8,), (10, 7)),
}
"""Name to (images, size, dtypes, rows and columns of the tile or None for the chosen one)."""
INTERPRETED_TOO = {
    "all images at 64 pixels": (6, 64, RENDER_DTYPES, None),
    "all images at 96 pixels": (6, 96, RENDER_DTYPES, None),
    "all images at 224 pixels": (6, 224, (torch.float32,), None),
    "all images at 299 pixels": (6, 299, (torch.float16,), None),
    "all images in tiles that overhang the image": (6, 64, (torch.uint8,), (50, 33)),
    "all images in tiles higher than the image": (6, 32, (torch.uint8,), (40, 7)),
    "all images in small tiles": (6, 12, (torch.uint8,), (12, 12)),
}


def check_interpreted_triton(name: str) -> None:
    """Run in a process with TRITON_INTERPRET=1, see below. The interpreter is slow: fewer images than elsewhere."""
    from quaclrs.imaging.kernels.render_triton import render_triton
    from quaclrs.imaging.kernels.triton_tiles import choose_tile

    number, size, dtypes, sides = (INTERPRETED | INTERPRETED_TOO)[name]
    rng = np.random.default_rng(1)
    layouts = [even_layout(400, 1000, 128, 376), random_layout(rng, 37, 53)]
    layouts += [even_layout(300, 96, 60, 24), even_layout(1, 1, 1, 1)]  # the first of these: vertically first
    layouts += [even_layout(400, 1000, 128, columns) for columns in (469, 313)]
    palettes = [rng.integers(0, 256, (colours, 3)).astype(np.uint8) for colours in (256, 9)]
    images: Images = []
    for i, layout in enumerate(layouts[:number]):
        grid = rng.integers(0, len(palettes[i % 2]), (layout.rows, layout.columns)).astype(np.uint8)
        images.append((grid, i, i % 2))
    tile = None
    if sides is not None:
        tile = choose_tile(RenderTables.build(layouts, palettes, size), *sides)
        assert (tile.rows, tile.columns) == sides
    function = functools.partial(render_triton, tile=tile)
    assert_renders_as_pillow(function, (images, layouts, palettes), size, dtypes)


def run_interpreted(names: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Check ``names`` in one process, in order. It prints each name once that check has passed."""
    code = (
        "import sys, quaclrs.imaging.kernels.dispatch\n"
        "print('numba' in sys.modules)\n"
        "import test_render\n"
        f"for name in {list(names)}:\n"
        "    test_render.check_interpreted_triton(name)\n"
        "    print(name, flush=True)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def interpreted() -> subprocess.CompletedProcess[str]:
    """One interpreter process for the checks of :data:`INTERPRETED`."""
    pytest.importorskip("triton", reason="triton is not installed")
    return run_interpreted(list(INTERPRETED))


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_triton_kernel_interpreted_renders_as_pillow(
    interpreted: subprocess.CompletedProcess[str], name: str
) -> None:
    assert name in interpreted.stdout.splitlines(), interpreted.stdout + interpreted.stderr


@pytest.mark.exhaustive
def test_the_triton_kernel_interpreted_renders_all_images_as_pillow() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = run_interpreted(list(INTERPRETED_TOO))
    assert done.stdout.splitlines()[1:] == list(INTERPRETED_TOO), done.stdout + done.stderr


def test_kernels_are_imported_only_when_used(interpreted: subprocess.CompletedProcess[str]) -> None:
    """The first line of the interpreter process says whether importing the dispatch loaded numba."""
    assert interpreted.stdout.splitlines()[0] == "False"


COMPILED = ((75, torch.float16), (90, torch.bfloat16), (90, torch.float32))
COMPILED_TOO = [pair for pair in itertools.product((75, 90), RENDER_DTYPES) if pair not in COMPILED]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [*COMPILED, *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in COMPILED_TOO)],
    ids=str,
)
def test_the_triton_kernel_compiles_without_a_gpu(capability: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from quaclrs.imaging.kernels.render_triton import compile_for

    layouts = [even_layout(400, 1000, 128, columns) for columns in (376, 469, 313)]
    kernel = compile_for(capability, RenderTables.build(layouts, dataset()[2], 224), dtype)
    assert f".target sm_{capability}" in kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_the_triton_kernel_on_a_gpu_renders_as_pillow(size: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def rendered_on_gpu(grids: Grids, index: torch.Tensor, tables: RenderTables, dtype: torch.dtype) -> torch.Tensor:
        there = Grids(*(getattr(grids, name).cuda() for name in ("flat", "offsets", "layouts", "palettes")))
        moved = tables.to("cuda")
        check_grids(there, moved)
        batch = render(there, index.cuda(), moved, dtype)
        assert torch.equal(batch, render_reference(there, index.cuda(), moved, dtype))
        return batch.cpu()

    assert render_for("cuda")[1] == "Triton kernel"
    assert_renders_as_pillow(rendered_on_gpu, dataset(), size)


@st.composite
def small_datasets(draw: st.DrawFn) -> Dataset:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layouts = [random_layout(rng, *rng.integers(1, 90, 2).tolist()) for _ in range(draw(st.integers(1, 3)))]
    palettes = [rng.integers(0, 256, (rng.integers(1, 257), 3)).astype(np.uint8) for _ in range(2)]
    images: Images = []
    for _ in range(draw(st.integers(1, 4))):
        layout, palette = int(rng.integers(len(layouts))), int(rng.integers(2))
        shape = layouts[layout].rows, layouts[layout].columns
        images.append((rng.integers(0, len(palettes[palette]), shape).astype(np.uint8), layout, palette))
    return images, layouts, palettes


def check_any_grid(data: Dataset, size: int) -> None:
    assert_renders_as_pillow(render_reference, data, size)
    assert_renders_as_pillow(render, data, size)


@given(small_datasets(), st.integers(1, 130))
@settings(deadline=None, max_examples=20)
def test_any_grid_at_any_size_is_rendered_as_by_pillow(data: Dataset, size: int) -> None:
    check_any_grid(data, size)


@pytest.mark.exhaustive
@given(small_datasets(), st.integers(1, 130))
@settings(deadline=None, max_examples=300)
def test_many_grids_at_any_size_are_rendered_as_by_pillow(data: Dataset, size: int) -> None:
    check_any_grid(data, size)


def test_the_longest_side_neither_overflows_nor_clips() -> None:
    layouts = [even_layout(1, 16384, 1, 16384)]
    white = np.full((1, 3), 255, np.uint8)
    assert_renders_as_pillow(render, ([(np.zeros((1, 16384), np.uint8), 0, 0)], layouts, [white]), 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_batches_of_any_size_and_number_of_threads(threads: int, images: int) -> None:
    grids, tables = flat_grids(dataset()[0], np.random.default_rng(0)), built_tables(32)
    index = torch.arange(images)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(render(grids, index, tables), render_reference(grids, index, tables))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", [render_reference, render])
def test_out_is_written_and_a_wrong_one_refused(function: Callable[..., torch.Tensor]) -> None:
    grids, tables = flat_grids(dataset()[0], np.random.default_rng(0)), built_tables(16)
    index = torch.tensor([1, 4])
    out = torch.zeros(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert function(grids, index, tables, torch.float32, out) is out
    assert torch.equal(out, render_reference(grids, index, tables))
    for wrong in (torch.zeros(2, 3, 16, 16), out[:1], out.half()):
        with pytest.raises(ValueError, match="out must be"):
            function(grids, index, tables, torch.float32, wrong)
    with pytest.raises(ValueError, match=r"a batch is one of .*, not torch.float64"):
        function(grids, index, tables, torch.float64, None)


def test_grids_are_rendered_from_a_memory_map(tmp_path: Path) -> None:
    images, layouts, palettes = dataset()
    grids, tables = flat_grids(images, np.random.default_rng(0)), RenderTables.build(layouts, palettes, 40)
    grids.flat.numpy().tofile(tmp_path / "grids")
    mapped = np.memmap(tmp_path / "grids", np.uint8, mode="c")
    there = Grids(torch.from_numpy(mapped), grids.offsets, grids.layouts, grids.palettes)
    index = torch.arange(len(grids))
    assert torch.equal(render(there, index, tables), render_reference(grids, index, tables))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([-1])}, "grids lie at -1..19, outside the buffer of 20 bytes"),
        ({"offsets": torch.tensor([1])}, "grids lie at 1..21, outside"),
        ({"layouts": torch.tensor([1], dtype=torch.int32)}, "a grid has layout 1, there are 1"),
        ({"palettes": torch.tensor([-2], dtype=torch.int32)}, "a grid has palette -2, there are 1"),
        ({"layouts": torch.tensor([0])}, "layouts must be one-dimensional, contiguous torch.int32"),
        ({"palettes": torch.zeros(2, dtype=torch.int32)}, r"1 offsets need as many layouts \(1\) and palettes \(2\)"),
    ],
)
def test_grids_outside_the_buffer_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tables = RenderTables.build([even_layout(4, 5, 4, 5)], [np.zeros((1, 3), np.uint8)], 8)
    zero = torch.zeros(1, dtype=torch.int32)
    fields: dict[str, torch.Tensor] = {
        "flat": torch.zeros(20, dtype=torch.uint8),
        "offsets": torch.tensor([0]),
        "layouts": zero,
        "palettes": zero,
    }
    check_grids(Grids(**fields), tables)
    with pytest.raises(ValueError, match=message):
        render(Grids(**(fields | change)), torch.tensor([0]), tables)


def test_tables_refuse_what_cannot_be_rendered() -> None:
    layouts = [even_layout(4, 5, 4, 5)]
    with pytest.raises(ValueError, match=r"a palette must be \(1..256, 3\) uint8, not \(257, 3\)"):
        RenderTables.build(layouts, [np.zeros((257, 3), np.uint8)], 8)
    with pytest.raises(ValueError, match="cannot render 1 layouts with 0 palettes at size 8"):
        RenderTables.build(layouts, [], 8)


def test_without_numba_the_reference_renders_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    for module in ("render_cpu", "normalise_cpu", "intrinsics"):
        monkeypatch.delitem(sys.modules, f"quaclrs.imaging.kernels.{module}", raising=False)
    dispatch.render_for.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert render_for("cpu") == (render_reference, "torch reference")
        assert render_for("cpu")[0] is render_reference
    dispatch.render_for.cache_clear()
    assert len(caplog.records) == 1
    assert "pip install numba" in caplog.text
