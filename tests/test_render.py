"""The render gives Pillow's and torchvision's very bits: the reference, the CPU kernel and the Triton kernel alike."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from quaclrs.imaging.indexed import IndexedImage, decode
from quaclrs.imaging.kernels import dispatch
from quaclrs.imaging.kernels.dispatch import render, render_for
from quaclrs.imaging.layout import Layout, even_layout
from quaclrs.imaging.render import RENDER_DTYPES, Grids, RenderTables, check_grids, render_reference
from quaclrs.imaging.resample import vertical_first

SIZES = (64, 96, 224, 299)


def random_layout(rng, height, width):
    edges = [
        (0, *sorted(rng.permutation(np.arange(1, pixels))[: rng.integers(pixels)].tolist()))
        for pixels in (height, width)
    ]
    return Layout(height=height, width=width, row_edges=edges[0], column_edges=edges[1])


# Pillow 13 resizes these vertically first at some size of SIZES: tall ones, and such as shrink in height and grow in
# width.
TALL = ((300, 96), (2000, 3), (500, 250), (250, 100))


@functools.cache
def dataset():
    """(images, layouts, palettes): this dataset's three layouts, others, and every palette with several layouts."""
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
    palettes.append(np.repeat(np.array([[0], [255]], np.uint8), 3, axis=1))  # the extremes: nothing overflows or clips
    images = []
    for number, layout in enumerate(layouts + layouts[:3]):
        palette = number % len(palettes)
        grid = rng.integers(0, len(palettes[palette]), (layout.rows, layout.columns)).astype(np.uint8)
        images.append((grid, number % len(layouts), palette))
    return images, layouts, palettes


def flat_grids(images, rng):
    """Grids in a buffer, in random order and with gaps."""
    parts, offsets, position = [], {}, 0
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


def pillow_levels(images, layouts, palettes, size):
    """The oracle: (N, S, S, 3) uint8 of Pillow's resize of the whole image, which came as RGBA."""
    resized = []
    for grid, layout, palette in images:
        image = Image.fromarray(decode(IndexedImage(grid, palettes[palette], layouts[layout]))).convert("RGBA")
        resized.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
    return np.stack(resized)


def torchvision_batch(levels):
    steps = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    return torch.stack([steps(one) for one in levels])


def assert_draws_as_pillow(draw, images, layouts, palettes, size, dtypes=RENDER_DTYPES):
    """``draw`` in all ``dtypes``, for a shuffled batch with a repeated image."""
    rng = np.random.default_rng(size)
    grids, tables = flat_grids(images, rng), RenderTables.build(layouts, palettes, size)
    order = np.append(rng.permutation(len(images)), 0)
    levels = pillow_levels(images, layouts, palettes, size)[order]
    values = torchvision_batch(levels)
    for dtype in dtypes:
        batch = draw(grids, torch.from_numpy(order), tables, dtype)
        assert batch.shape == values.shape
        assert batch.dtype == dtype
        assert batch.is_contiguous(memory_format=torch.channels_last)
        wanted = torch.from_numpy(levels).permute(0, 3, 1, 2) if dtype == torch.uint8 else values.to(dtype)
        assert torch.equal(batch, wanted), (
            f"{int((batch != wanted).sum())} of {batch.numel()} {dtype} values differ at size {size}"
        )


def test_the_order_of_passes_is_the_installed_pillows():
    """Also at its border: shrinking by 2 pixels in height for 1 in width, and one more."""
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
        assert_draws_as_pillow(
            render_reference, [(grid, 0, 0)], [layout], [rng.integers(0, 256, (256, 3)).astype(np.uint8)], size
        )
    assert vertical_first(1000, 400, 224) == (int(PIL.__version__.split(".")[0]) >= 13)
    assert not vertical_first(400, 1000, 224)


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_draws_as_pillow(size):
    assert_draws_as_pillow(render_reference, *dataset(), size)


@pytest.mark.parametrize("size", SIZES)
def test_the_cpu_kernel_draws_as_pillow(size):
    render_cpu = pytest.importorskip(
        "quaclrs.imaging.kernels.render_cpu", reason="numba is not installed", exc_type=ImportError
    ).render_cpu
    assert_draws_as_pillow(render_cpu, *dataset(), size)


def check_interpreted_triton():
    """Run in a process with TRITON_INTERPRET=1, see below. The interpreter is slow: fewer images than elsewhere."""
    from quaclrs.imaging.kernels.render_triton import choose_tile, render_triton

    rng = np.random.default_rng(1)
    layouts = [even_layout(400, 1000, 128, columns) for columns in (376, 469, 313)]
    layouts += [
        random_layout(rng, 37, 53),
        even_layout(300, 96, 60, 24),
        even_layout(1, 1, 1, 1),
    ]  # the fifth: vertically first
    palettes = [rng.integers(0, 256, (colours, 3)).astype(np.uint8) for colours in (256, 9)]
    images = []
    for number, layout in enumerate(layouts):
        grid = rng.integers(0, len(palettes[number % 2]), (layout.rows, layout.columns)).astype(np.uint8)
        images.append((grid, number, number % 2))
    for size, dtypes in zip(SIZES, (RENDER_DTYPES, RENDER_DTYPES, (torch.float32,), (torch.float16,)), strict=True):
        assert_draws_as_pillow(render_triton, images, layouts, palettes, size, dtypes)
    for size, rows, columns in (
        (64, 50, 33),
        (32, 40, 7),
        (12, 12, 12),
    ):  # the knob: any tile, also one that overhangs the image
        tile = choose_tile(RenderTables.build(layouts, palettes, size), rows, columns)
        assert (tile.rows, tile.columns) == (rows, columns)
        draw = functools.partial(render_triton, tile=tile)
        assert_draws_as_pillow(draw, images, layouts, palettes, size, (torch.uint8,))


def test_the_triton_kernel_interpreted_draws_as_pillow():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-W", "error", "-c", "import test_render; test_render.check_interpreted_triton()"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", RENDER_DTYPES, ids=str)
@pytest.mark.parametrize("capability", [75, 90])
def test_the_triton_kernel_compiles_without_a_gpu(capability, dtype):
    pytest.importorskip("triton", reason="triton is not installed")
    from quaclrs.imaging.kernels.render_triton import compile_for

    layouts = [even_layout(400, 1000, 128, columns) for columns in (376, 469, 313)]
    kernel = compile_for(capability, RenderTables.build(layouts, dataset()[2], 224), dtype)
    assert f".target sm_{capability}" in kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_the_triton_kernel_on_a_gpu_draws_as_pillow(size):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def draw(grids, index, tables, dtype):
        there = Grids(*(getattr(grids, name).cuda() for name in ("flat", "offsets", "layouts", "palettes")))
        moved = tables.to("cuda")
        check_grids(there, moved)
        for drawn in (render_reference(there, index.cuda(), moved, dtype), render(there, index.cuda(), moved, dtype)):
            batch = drawn.cpu()
        return batch

    assert render_for("cuda")[1] == "Triton kernel"
    assert_draws_as_pillow(draw, *dataset(), size)


@st.composite
def small_datasets(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layouts = [random_layout(rng, *rng.integers(1, 90, 2).tolist()) for _ in range(draw(st.integers(1, 3)))]
    palettes = [rng.integers(0, 256, (rng.integers(1, 257), 3)).astype(np.uint8) for _ in range(2)]
    images = []
    for _ in range(draw(st.integers(1, 4))):
        layout, palette = int(rng.integers(len(layouts))), int(rng.integers(2))
        shape = layouts[layout].rows, layouts[layout].columns
        images.append((rng.integers(0, len(palettes[palette]), shape).astype(np.uint8), layout, palette))
    return images, layouts, palettes


@given(small_datasets(), st.integers(1, 130))
@settings(deadline=None, max_examples=60)
def test_any_grid_at_any_size_is_drawn_as_pillow_draws_it(data, size):
    assert_draws_as_pillow(render_reference, *data, size)
    assert_draws_as_pillow(render, *data, size)


def test_the_longest_side_neither_overflows_nor_clips():
    layouts = [even_layout(1, 16384, 1, 16384)]
    white = np.full((1, 3), 255, np.uint8)
    assert_draws_as_pillow(render, [(np.zeros((1, 16384), np.uint8), 0, 0)], layouts, [white], 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_batches_of_any_size_and_number_of_threads(threads, images):
    grids, tables = flat_grids(dataset()[0], np.random.default_rng(0)), RenderTables.build(*dataset()[1:], 32)
    index = torch.arange(images)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(render(grids, index, tables), render_reference(grids, index, tables))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("draw", [render_reference, render])
def test_out_is_written_and_a_wrong_one_refused(draw):
    grids, tables = flat_grids(dataset()[0], np.random.default_rng(0)), RenderTables.build(*dataset()[1:], 16)
    index = torch.tensor([1, 4])
    out = torch.zeros(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert draw(grids, index, tables, torch.float32, out) is out
    assert torch.equal(out, render_reference(grids, index, tables))
    for wrong in (torch.zeros(2, 3, 16, 16), out[:1], out.half()):
        with pytest.raises(ValueError, match="out must be"):
            draw(grids, index, tables, torch.float32, wrong)
    with pytest.raises(ValueError, match=r"a batch is one of .*, not torch.float64"):
        draw(grids, index, tables, torch.float64, None)


def test_grids_are_drawn_from_a_memory_map(tmp_path):
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
def test_grids_that_would_read_wild_memory_are_refused(change, message):
    tables = RenderTables.build([even_layout(4, 5, 4, 5)], [np.zeros((1, 3), np.uint8)], 8)
    zero = torch.zeros(1, dtype=torch.int32)
    fields = {
        "flat": torch.zeros(20, dtype=torch.uint8),
        "offsets": torch.tensor([0]),
        "layouts": zero,
        "palettes": zero,
    }
    check_grids(Grids(**fields), tables)
    with pytest.raises(ValueError, match=message):
        render(Grids(**fields | change), torch.tensor([0]), tables)


def test_tables_refuse_what_they_cannot_draw():
    layouts = [even_layout(4, 5, 4, 5)]
    with pytest.raises(ValueError, match=r"a palette must be \(1..256, 3\) uint8, not \(257, 3\)"):
        RenderTables.build(layouts, [np.zeros((257, 3), np.uint8)], 8)
    with pytest.raises(ValueError, match="cannot render 1 layouts with 0 palettes at size 8"):
        RenderTables.build(layouts, [], 8)


def test_without_numba_the_reference_draws_and_one_line_says_so(monkeypatch, caplog):
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


def test_kernels_are_imported_only_when_used():
    code = (
        "import sys, quaclrs.imaging.kernels.dispatch; print([name for name in "
        "('numba', 'triton.language') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "numba" not in done.stdout
