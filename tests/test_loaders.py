"""Contract of loaders/: every loader gives the same samples in the requested order, and leaves nothing behind.

The reference is Pillow and torchvision, called here directly; ``tarfile`` tells which sample has which number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packing import pack_tree
from PIL import Image, PngImagePlugin
from png_trees import CLASSES, PngTree, make_rows, write_csv, write_tree
from torchvision import transforms

from quaclrs.cli.train import main
from quaclrs.config import Columns, PackConfig, TrainConfig
from quaclrs.data.metadata import Metadata, parse_metadata
from quaclrs.errors import DataError, QuaclrsError, ShardError, UsageError
from quaclrs.experiment.cross_validation import run_cross_validation
from quaclrs.loaders import Choice, MemoryEstimate, build_loader, choose_loader
from quaclrs.loaders.base import Batch, Loader, LoaderConfig
from quaclrs.loaders.dali import BORDER_DIFFERENCE, INNER_DIFFERENCE, DaliLoader
from quaclrs.loaders.dataset import Dataset, open_dataset
from quaclrs.loaders.files import FilesLoader
from quaclrs.loaders.resident import ResidentLoader
from quaclrs.shards.packing.pack import pack
from quaclrs.shards.reader import ShardSet
from quaclrs.training.trainer import Hooks

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)  # from 3.12

SIZE = 224
MAX_BATCH = 6
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Case:
    """One loader over one kind of storage. A new loader is one more row of ``CASES``: every test below runs over it."""

    loader: str
    source: str
    """``tree``, or an encoding of shards."""
    num_workers: int
    exact: bool = True
    exhaustive: bool = False
    """Left out of the default run, in which other cases cover the same code."""

    def __str__(self) -> str:
        return f"{self.loader}-{self.source}-{self.num_workers}"


def params(cases: Iterable[Case]) -> list[Any]:
    """For ``pytest.mark.parametrize``: the cases, marked."""
    return [pytest.param(case, id=str(case), marks=[pytest.mark.exhaustive] * case.exhaustive) for case in cases]


CASES = [
    Case("files", "tree", 0),
    Case("files", "tree", 2, exhaustive=True),
    Case("files", "png", 0, exhaustive=True),
    Case("files", "png", 2),
    Case("files", "rgb", 0),
    Case("files", "rgb", 2, exhaustive=True),
    Case("files", "indexed", 0),
    Case("dali", "png", 2, exact=False),
    Case("mapped", "indexed", 2),
    Case("mapped", "rgb", 2),
    Case("resident", "indexed", 2),
    Case("resident", "rgb", 2),
    Case("resident", "png", 2, exact=False),
]


# --- the data: images as the real ones, and every odd kind of PNG ---


def magma_image(seed: int, columns: int = 376, width: int = 1000, height: int = 400) -> NDArray[Any]:
    """(height, width, 4) uint8: a grid of 128 × ``columns`` cells in magma, enlarged as matplotlib draws it."""
    grid = np.random.default_rng(seed).normal(size=(128, columns))
    for axis in (0, 1):
        grid = np.sum([np.roll(grid, shift, axis) for shift in range(-3, 4)], axis=0)
    levels = ((grid - grid.min()) / (grid.max() - grid.min()) * 255).astype(int)
    rows, cells = (
        np.floor(np.arange(n + 1) * size / n + 0.5).astype(int) for n, size in ((128, height), (columns, width))
    )
    pixels = levels.repeat(np.diff(rows), axis=0).repeat(np.diff(cells), axis=1)
    colours: NDArray[np.uint8] = matplotlib.colormaps["magma"](np.arange(256), bytes=True)
    image: NDArray[np.uint8] = colours[pixels]
    return image


def png_16_bit_rgb(image: NDArray[Any]) -> bytes:
    """A colour PNG of 16 bits per channel, which Pillow reads but cannot write."""
    wide = image[..., :3].astype(">u2") * 256 + np.random.default_rng(0).integers(0, 256, (*image.shape[:2], 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1, **options)
    return file.getvalue()


def odd_images() -> dict[str, bytes]:
    base = magma_image(seed=99)
    see_through = base.copy()
    see_through[..., 3] = np.random.default_rng(1).integers(0, 256, base.shape[:2])
    image, palette = Image.fromarray(base), Image.fromarray(base).convert("RGB").quantize(256)
    grey = image.convert("L")
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", struct.pack(">I", 100_000))
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to show"
    return {
        "palette.png": png(palette),
        "palette-transparent.png": png(palette, transparency=7),
        "grey.png": png(grey),
        "grey-alpha.png": png(Image.fromarray(see_through).convert("LA")),
        "16-bit.png": png(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        "16-bit-dim.png": png(Image.fromarray(np.asarray(grey).astype(np.uint16) * 150 + 300)),
        "16-bit-colour.png": png_16_bit_rgb(base),
        "transparent.png": png(Image.fromarray(see_through)),
        "rgb.png": png(image.convert("RGB")),
        "rgb-transparent-colour.png": png(image.convert("RGB"), transparency=tuple(int(v) for v in base[0, 0, :3])),
        "gamma.png": png(image, pnginfo=gamma),
        "turned.png": png(image, exif=turned),
        "smaller.png": png(Image.fromarray(base[:130, :190])),
    }


@dataclass(frozen=True)
class Data:
    """The tree, and its shards in every encoding."""

    tree: PngTree
    folders: dict[str, Path]
    """Encoding to shard folder."""

    def open(self, source: str) -> Dataset:
        """Open ``source`` with the function that a run uses."""
        tree = self.tree
        config = (
            TrainConfig(csv_file=tree.csv_file, spectrograms_dir=tree.spectrograms_dir)
            if source == "tree"
            else TrainConfig(shards=self.folders[source])
        )
        return open_dataset(config, want_shards=False, log=lambda text: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("loaders")
    images = {f"magma{i}.png": png(Image.fromarray(magma_image(i, (376, 469, 313)[i % 3]))) for i in range(6)}
    images |= odd_images()
    rows = [
        {"spec_file_name": name, "fold": str(1 + i % 3), "class": ("saw", "horn", "dog")[i % 2 + i % 3 // 2]}
        for i, name in enumerate(images)
    ]
    rows.append(dict(rows[2]))  # two slices of one recording: one file, two samples
    tree = PngTree(write_csv(root / "data.csv", rows), root / "spectrograms", rows)
    for row in range(len(rows)):
        tree.path(row).parent.mkdir(parents=True, exist_ok=True)
        tree.path(row).write_bytes(images[rows[row]["spec_file_name"]])
    folders = {encoding: root / encoding for encoding in sorted({case.source for case in CASES} - {"tree"})}
    for encoding, folder in folders.items():
        pack(
            PackConfig(
                csv_file=tree.csv_file,
                spectrograms_dir=tree.spectrograms_dir,
                output_dir=folder,
                encoding=encoding,
                image_size=SIZE,
                shard_size=500_000,
                num_workers=1,
            )
        )
    return Data(tree, folders)


@dataclass(frozen=True)
class Oracle:
    """The expected row, label and image of every sample number."""

    rows: list[dict[str, str]]
    labels: torch.Tensor
    """(N,) int64"""
    images: torch.Tensor
    """(N, 3, SIZE, SIZE) float32"""

    def __len__(self) -> int:
        return len(self.rows)

    def number_of(self, file_name: str) -> int:
        return next(number for number, row in enumerate(self.rows) if row["spec_file_name"] == file_name)


@pytest.fixture(scope="module")
def oracle(data: Data) -> Oracle:
    rows = []
    for file in sorted(data.folders["png"].glob("fold*/*.tar")):
        with tarfile.open(file) as tar:
            rows += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]  # type: ignore[arg-type]
    assert sorted(sorted(row.items()) for row in rows) == sorted(sorted(row.items()) for row in data.tree.rows)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = []
    for row in rows:
        with Image.open(data.tree.spectrograms_dir / f"fold{row['fold']}" / row["spec_file_name"]) as opened:
            image: Image.Image = opened
            if image.mode == "I;16":  # Pillow would clip it at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            images.append(to_tensor(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    names = sorted({row["class"] for row in rows})
    return Oracle(rows, torch.tensor([names.index(row["class"]) for row in rows]), torch.stack(images))


# --- a loader and its contract ---


def loader_config(num_workers: int = 0, dtype: torch.dtype = torch.float32, image_size: int = SIZE) -> LoaderConfig:
    return LoaderConfig(
        image_size=image_size, device=torch.device("cpu"), dtype=dtype, max_batch=MAX_BATCH, num_workers=num_workers
    )


def make_loader(case: Case, dataset: Dataset, dtype: torch.dtype = torch.float32) -> Loader:
    return build_loader(Choice(name=case.loader, reason="test"), dataset, loader_config(case.num_workers, dtype))


@contextlib.contextmanager
def loader_of(case: Case, data: Data, dtype: torch.dtype = torch.float32) -> Iterator[Loader]:
    dataset = data.open(case.source)
    try:
        loader = make_loader(case, dataset, dtype)
        try:
            assert loader.name == case.loader
            yield loader
        finally:
            loader.close()
    finally:
        dataset.close()


@pytest.fixture(scope="module", params=params(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


@pytest.fixture(scope="module")
def loader(case: Case, data: Data) -> Iterator[Loader]:
    """One loader for all tests of a case, as one serves all epochs of a run."""
    with loader_of(case, data) as loader:
        yield loader


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """A loader that hangs must fail its test, not stop the whole run."""

    def give_up(*_: object) -> None:
        raise TimeoutError("a loader hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(
    batches: list[Batch], asked: list[NDArray[Any]], oracle: Oracle, case: Case, dtype: torch.dtype = torch.float32
) -> None:
    """Check everything that a batch promises against the oracle."""
    assert len(batches) == len(asked)
    for batch, numbers in zip(batches, asked, strict=True):
        assert batch.images.shape == (len(numbers), 3, SIZE, SIZE)
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.dtype, batch.index.dtype) == (torch.int64, torch.int64)
        assert batch.index.tolist() == numbers.tolist()
        assert batch.labels.tolist() == oracle.labels[numbers].tolist()
        assert len(batch) == len(numbers)
        expected = oracle.images[numbers]
        if case.exact:
            assert torch.equal(batch.images, expected.to(dtype))
            continue
        rounding = 1e-6 if dtype == torch.float32 else 0.5 / 255
        difference = (batch.images.float() - expected).abs() * torch.tensor(STD)[:, None, None]
        assert difference.amax() <= BORDER_DIFFERENCE + rounding
        assert difference[:, :, 1:-1, 1:-1].amax() <= INNER_DIFFERENCE + rounding


@pytest.mark.parametrize("size", [31, 64, 150, 320])
def test_the_bounds_of_dali_hold_for_any_image(size: int, tmp_path: Path) -> None:
    """Frames, lines and noise at the border; shrunk by up to ten, and enlarged. Between 0 and 255 in steps of 1."""
    images = {}
    y, x = np.mgrid[0:200, 0:300]
    for width in (1, 2, 3, 5, 9):
        outside = np.minimum(np.minimum(y, 199 - y), np.minimum(x, 299 - x)) < width
        images[f"dark frame {width}"], images[f"bright frame {width}"] = outside * 0 + ~outside * 255, outside * 255
        images[f"lines {width}"] = ((y % (4 * width) == 0) | (x % (3 * width) == 0)) * 255
    random = np.random.default_rng(0)
    images["noise"], images["black and white"] = random.integers(0, 256, y.shape), random.integers(0, 2, y.shape) * 255
    pictures = [Image.fromarray(image.astype(np.uint8)).convert("RGB") for image in images.values()]
    rows = [{"spec_file_name": f"{name}.png", "class": "dog_bark", "fold": "1"} for name in images]
    (tmp_path / "images" / "fold1").mkdir(parents=True)
    for row, picture in zip(rows, pictures, strict=True):
        picture.save(tmp_path / "images" / "fold1" / row["spec_file_name"])
    tree = PngTree(write_csv(tmp_path / "data.csv", rows), tmp_path / "images", rows)
    pack_tree(tree, tmp_path / "shards")
    config = LoaderConfig(
        image_size=size, device=torch.device("cpu"), dtype=torch.uint8, max_batch=len(rows), num_workers=0
    )
    with ShardSet(tmp_path / "shards") as shards:
        loader = DaliLoader(shards, np.zeros(len(rows), np.int64), config)
        (batch,) = loader.load([np.arange(len(rows))])
        loader.close()
        order = shards.samples["row"]
    expected = np.stack([np.asarray(pictures[row].resize((size, size), Image.Resampling.BILINEAR)) for row in order])
    difference = np.abs(batch.images.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert difference[:, 1:-1, 1:-1].max() <= round(255 * INNER_DIFFERENCE)
    assert difference.max() <= round(255 * BORDER_DIFFERENCE)
    assert size > 200 or difference.max() > 5  # the border is the exception


def test_samples_order_labels_and_pixels(loader: Loader, case: Case, oracle: Oracle) -> None:
    """In batches of several sizes, one of which has a sample twice. All are kept, so no two may share memory."""
    order = np.random.default_rng(3).permutation(len(oracle))
    asked = [order[:6], order[6:7], order[7:10], np.array([4, 4]), order[10:15], order[15:]]
    check(list(loader.load(asked)), asked, oracle, case)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=str)
def test_half_precision(case: Case, data: Data, oracle: Oracle, dtype: torch.dtype) -> None:
    asked = [np.array([5, 2, 8]), np.array([0])]
    with loader_of(case, data, dtype) as loader:
        check(list(loader.load(asked)), asked, oracle, case, dtype)


def test_an_abandoned_epoch_leaves_no_batches(loader: Loader, case: Case, oracle: Oracle) -> None:
    """Batches prefetched for an abandoned epoch must not appear in the next one."""
    first = [np.array([i, i + 1]) for i in range(0, len(oracle) - 1, 2)]
    second = [np.array([len(oracle) - 1 - i]) for i in range(5)]
    for taken in (0, 1, 3):
        batches = loader.load(first)
        check([next(batches) for _ in range(taken)], first[:taken], oracle, case)
        del batches
        check(list(loader.load(second)), second, oracle, case)


def test_an_epoch_of_one_batch_and_of_none(loader: Loader, case: Case, oracle: Oracle) -> None:
    for asked in ([np.array([3, 1])], [], [np.array([2])]):
        check(list(loader.load(asked)), asked, oracle, case)


def test_the_random_numbers_of_training_are_left_alone(case: Case, data: Data) -> None:
    """Otherwise dropout would depend on the loader, and resuming, which makes a new loader, would change weights."""
    before = torch.get_rng_state()
    with loader_of(case, data) as loader:
        for _ in range(2):
            list(loader.load([np.array([0, 1])]))
    assert torch.equal(torch.get_rng_state(), before)


def machinery() -> tuple[set[int], set[str]]:
    """Process ids of children, and threads as the operating system lists them, those of C++ libraries included."""
    tasks = {path.name for path in Path("/proc/self/task").iterdir()}
    return {child.pid or 0 for child in multiprocessing.active_children()}, tasks


def test_nothing_is_rebuilt_between_epochs(loader: Loader, case: Case, oracle: Oracle) -> None:
    asked = [np.array([i]) for i in range(4)]
    list(loader.load(asked))
    settled()  # the threads of the render kernels end with their batch
    before = machinery()
    for _ in range(3):
        assert len(list(loader.load(asked))) == len(asked)
        next(loader.load(asked))
    settled()
    children, tasks = machinery()
    assert children == before[0]
    assert len(children) == (case.num_workers if case.loader == "files" else 0)
    assert before[1] <= tasks  # no thread has ended; a pool may have started more
    assert len(tasks) <= len(before[1]) + case.num_workers


def open_files() -> list[str]:
    """What the file descriptors point to; for pipes and sockets only the kind, since their numbers change."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that iterdir itself had open
            found.append(str(descriptor.readlink()).partition(":[")[0])
    return sorted(found)


def left_over() -> tuple[int, list[str], int, list[str]]:
    children, tasks = machinery()
    return len(children), sorted(thread.name for thread in threading.enumerate()), len(tasks), open_files()


def nothing_new_since(before: tuple[int, list[str], int, list[str]]) -> bool:
    """Whether :func:`left_over` is as ``before``; torch may have ended threads of its own pool since."""
    now = left_over()
    return (*now[:2], now[3]) == (*before[:2], before[3]) and now[2] <= before[2]


def settled() -> tuple[int, list[str], int, list[str]]:
    """Wait until :func:`left_over` no longer changes: the kernel lists a joined thread for a moment longer."""
    seen = None
    while (now := left_over()) != seen:
        seen = now
        time.sleep(0.05)
    return now


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_close_leaves_nothing(case: Case, data: Data) -> None:
    """Not even when a caller abandoned an epoch and still holds its iterator."""

    def use() -> Iterator[Batch]:
        dataset = data.open(case.source)
        loader = make_loader(case, dataset)
        list(loader.load([np.array([0, 1])]))
        batches = loader.load([np.array([i]) for i in range(10)])
        next(batches)
        loader.close()
        dataset.close()
        return batches

    use()  # the first use lets libraries open their files
    before = settled()
    held = use()
    assert eventually(lambda: nothing_new_since(before)), (before, left_over())
    del held
    assert left_over() == before


def test_a_closed_loader_refuses(case: Case, data: Data) -> None:
    with loader_of(case, data) as loader:
        list(loader.load([np.array([0])]))
        loader.close()
        with pytest.raises(ValueError, match="closed"):
            list(loader.load([np.array([0])]))
        loader.close()  # twice is fine


# --- errors of background work are raised in the caller ---


def copy_of(data: Data, source: str, folder: Path) -> Data:
    """``data`` with a copy of ``source``, which the test may damage."""
    if source == "tree":
        shutil.copytree(data.tree.spectrograms_dir, folder)
        return Data(PngTree(data.tree.csv_file, folder, data.tree.rows), data.folders)
    shutil.copytree(data.folders[source], folder)
    return Data(data.tree, data.folders | {source: folder})


def damage_image(data: Data, oracle: Oracle, number: int) -> Path:
    """Overwrite the second half of an image in the tree."""
    row = oracle.rows[number]
    path = data.tree.spectrograms_dir / f"fold{row['fold']}" / row["spec_file_name"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    return path


def damage_record(folder: Path, number: int) -> Path:
    """Overwrite the second half of a payload in its tar, without changing the manifest."""
    for file in sorted(folder.glob("fold*/*.tar")):
        with tarfile.open(file) as tar:
            payloads = [member for member in tar if member.name.endswith((".png", ".npy"))]
        if number < len(payloads):
            member = payloads[number]
            with file.open("r+b") as raw:
                raw.seek(member.offset_data + member.size // 2)
                raw.write(bytes(member.size - member.size // 2))
            return file
        number -= len(payloads)
    raise AssertionError("no such sample")


# `resident` decodes everything while it is made, so that there is no batch to blame
DECODING_CASES = [case for case in CASES if case.source in ("tree", "png") and case.loader != "resident"]


@pytest.mark.parametrize("victim", ["magma4.png", "palette.png"])
@pytest.mark.parametrize("case", params(DECODING_CASES), scope="function")
def test_a_damaged_image(case: Case, victim: str, data: Data, oracle: Oracle, tmp_path: Path) -> None:
    """Its batch raises, the batches before do not. A caller that leaves before it gets no error and can continue."""
    bad = oracle.number_of(victim)
    damaged = copy_of(data, case.source, tmp_path / "copy")
    file = (
        damage_image(damaged, oracle, bad)
        if case.source == "tree"
        else damage_record(damaged.folders[case.source], bad)
    )
    good = [number for number in range(len(oracle)) if oracle.rows[number]["spec_file_name"] != victim]
    asked = [np.array([number]) for number in (*good[:2], bad, *good[2:])]
    before = settled()
    with loader_of(case, damaged) as loader:
        batches = loader.load(asked)
        next(batches)
        del batches  # the damaged one is being read already, or with the next
        batches = loader.load(asked[1:])
        next(batches)
        del batches
        check(list(loader.load(asked[:2])), asked[:2], oracle, case)
        batches = loader.load(asked)
        check([next(batches), next(batches)], asked[:2], oracle, case)
        with pytest.raises((DataError, ShardError)) as error:
            next(batches)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        if case.source == "png":
            assert f"sample {bad} " in str(error.value)
    assert eventually(lambda: nothing_new_since(before)), (
        before,
        left_over(),
    )  # while `error` is alive


READING_CASES = [case for case in CASES if case.source != "tree" and case.loader != "resident"]


@pytest.mark.parametrize("case", params(READING_CASES), scope="function")
def test_a_shard_that_vanishes(case: Case, data: Data, tmp_path: Path) -> None:
    moved = copy_of(data, case.source, tmp_path / "copy")
    with loader_of(case, moved) as loader:
        for file in moved.folders[case.source].glob("fold*/*.tar"):
            file.unlink()
        with pytest.raises(ShardError, match=r"fold0\d-\d+\.tar: cannot be read"):
            list(loader.load([np.array([3])]))


class _KillsItsReader:
    def image(self, number: int) -> NDArray[Any]:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((SIZE, SIZE, 3), np.uint8)


def test_a_killed_worker_process() -> None:
    loader = FilesLoader(_KillsItsReader(), np.zeros(9, np.int64), loader_config(num_workers=2))
    with pytest.raises(QuaclrsError, match=r"died .*fewer --num_workers"):
        list(loader.load([np.array([number]) for number in range(9)]))
    assert eventually(lambda: not multiprocessing.active_children())
    with pytest.raises(ValueError, match="closed"):
        list(loader.load([np.array([0])]))


# --- the choice of a loader, and refusals ---


def test_rgb_shards_serve_one_size_only(data: Data) -> None:
    dataset = data.open("rgb")
    with pytest.raises(UsageError, match=rf"--image_size 96: .* already resized to {SIZE}; use --image_size {SIZE}"):
        build_loader(Choice(name="files", reason="test"), dataset, loader_config(image_size=96))


def test_png_shards_serve_every_size(data: Data) -> None:
    for case in (Case("files", "png", 0), Case("dali", "png", 1)):
        dataset = data.open("png")
        loader = build_loader(Choice(name=case.loader, reason="test"), dataset, loader_config(1, image_size=33))
        (batch,) = loader.load([np.array([1, 2])])
        assert batch.images.shape == (2, 3, 33, 33)
        loader.close()


def test_dali_has_nothing_to_decode_in_rgb_shards(data: Data) -> None:
    dataset = data.open("rgb")
    with pytest.raises(UsageError, match=r"--loader dali: .* is encoded rgb, .* use --loader mapped"):
        build_loader(Choice(name="dali", reason="test"), dataset, loader_config())


@pytest.mark.parametrize(
    ("wanted", "encoding", "name", "reason"),
    [
        ("auto", "png", "dali", "DALI is here"),
        ("auto", None, "dali", "DALI is here"),
        ("auto", "rgb", "mapped", "ready pixels"),
        ("auto", "indexed", "mapped", "grids to render"),
        ("resident", "indexed", "resident", "as asked for"),
        ("files", "png", "files", "as asked for"),
        ("files", None, "files", "as asked for"),
        ("dali", "png", "dali", "as asked for"),
    ],
)
def test_choice(wanted: str, encoding: str | None, name: str, reason: str) -> None:
    choice = choose_loader(wanted, encoding)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.parametrize(("free", "name"), [(10**9, "resident"), (1_900_000, "mapped")])
def test_what_fits_in_the_device_stays_there(free: int, name: str) -> None:
    choice = choose_loader("auto", "indexed", MemoryEstimate(needed=1_000_000, free=free))
    assert choice.name == name
    assert f"0.00 of {free / 1e9:.2f} GB" in choice.reason


@pytest.mark.parametrize(
    ("free", "name", "parts"), [(2_000_000, "resident", 1), (500_000, "resident", 4), (499_999, "mapped", 1)]
)
def test_what_fits_in_several_devices_is_shared_out(free: int, name: str, parts: int) -> None:
    choice = choose_loader("auto", "indexed", MemoryEstimate(needed=1_000_000, free=free, ranks=4))
    assert (choice.name, choice.parts) == (name, parts)
    assert ("shared out over 4 processes, each of which shuffles its own part" in choice.reason) == (parts == 4)
    asked = choose_loader("resident", "indexed", MemoryEstimate(needed=1_000_000, free=1_200_000, ranks=4))
    assert (
        asked.parts,
        choose_loader("resident", "indexed", MemoryEstimate(needed=1_000_000, free=300_000, ranks=4)).parts,
    ) == (
        1,
        4,
    )


@pytest.mark.parametrize("encoding", ["indexed", "rgb", "png"])
def test_parts_hold_what_the_whole_does(encoding: str, data: Data) -> None:
    """Each sample is in one of three parts, with the same bits; a part refuses samples of another part."""
    choice, dataset = Choice(name="resident", reason="test"), data.open(encoding)
    whole = build_loader(choice, dataset, loader_config())
    assert whole.replicated
    seen: list[int] = []
    for rank in range(3):
        part = build_loader(choice, dataset, dataclasses.replace(loader_config(), part=(rank, 3)))
        assert not part.replicated
        numbers = np.arange(rank, len(dataset), 3)[::-1].copy()
        batches = np.array_split(numbers, -(-len(numbers) // 4))
        for mine, theirs in zip(part.load(batches), whole.load(batches), strict=True):
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine.index, theirs.index)
            seen.extend(mine.index.tolist())
        with pytest.raises(ValueError, match=f"leaves {rank} when divided by 3"):
            next(iter(part.load([np.array([rank + 1])])))
        part.close()
    whole.close()
    assert sorted(seen) == list(range(len(dataset)))


def test_grids_in_memory_serve_every_size(data: Data) -> None:
    """Without reading the data again; ``resize`` returns False for ready pixels."""
    choice, sizes = Choice(name="resident", reason="test"), (24, 40)
    configs = [dataclasses.replace(loader_config(), image_size=size) for size in sizes]
    dataset, numbers = data.open("indexed"), [np.array([5, 0, 3])]
    loader = build_loader(choice, dataset, configs[0])
    assert isinstance(loader, ResidentLoader)
    for config in (*configs, configs[0]):
        assert loader.resize(config)
        (batch,) = loader.load(numbers)
        (expected,) = build_loader(Choice(name="files", reason="test"), dataset, config).load(numbers)
        assert batch.images.shape == (3, 3, config.image_size, config.image_size)
        assert torch.equal(batch.images, expected.images)
    loader.close()
    pixels = build_loader(choice, data.open("rgb"), loader_config())
    assert isinstance(pixels, ResidentLoader)
    assert not pixels.resize(configs[0])
    pixels.close()


def test_mapped_decodes_nothing() -> None:
    with pytest.raises(UsageError, match=r"--loader mapped: .* holds PNGs, .* pack with --encoding indexed"):
        choose_loader("mapped", "png")


def test_resident_refuses_what_does_not_fit(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quaclrs.loaders.resident.free_memory", lambda device: 100_000)
    with pytest.raises(UsageError, match=r"the data take 0\.00 GB and cpu has 0\.00 GB free; use --loader mapped"):
        build_loader(Choice(name="resident", reason="test"), data.open("indexed"), loader_config())


def test_resident_checks_the_hashes(data: Data, tmp_path: Path) -> None:
    moved = copy_of(data, "indexed", tmp_path / "copy")
    tar = sorted(moved.folders["indexed"].glob("fold*/*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ShardError, match=rf"{tar.name}: SHA-256 differs"):
        build_loader(Choice(name="resident", reason="test"), moved.open("indexed"), loader_config())


def test_memory_is_used_again_but_never_while_a_batch_is_held(data: Data) -> None:
    dataset = data.open("indexed")
    loader = build_loader(Choice(name="mapped", reason="test"), dataset, loader_config())
    asked = [np.array([number]) for number in range(4)]
    held = list(loader.load(asked))
    assert len({batch.images.data_ptr() for batch in held}) == len(asked)
    copies = [batch.images.clone() for batch in held]
    views = [batch.images[:, :, ::2] for batch in held]  # views keep the memory in use after the batches are gone
    del held
    list(loader.load(asked[::-1]))
    assert all(torch.equal(view, copy[:, :, ::2]) for view, copy in zip(views, copies, strict=True))
    del views
    places = set()
    for batch in loader.load([np.array([0])] * 20):
        places.add(batch.images.data_ptr())
        del batch
    assert len(places) <= 2
    loader.close()
    dataset.close()


def test_an_unknown_loader() -> None:
    with pytest.raises(UsageError, match="--loader dail: choose one of auto, resident, mapped, dali, files"):
        choose_loader("dail", "png")


def test_without_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``--loader dali`` says what to install before any work; ``auto`` takes another loader."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # so that importing it fails
    tree = write_tree(tmp_path / "data", make_rows(CLASSES[:2], (1, 2, 3)))
    data = (f"--csv_file={tree.csv_file}", f"--spectrograms_dir={tree.spectrograms_dir}")
    small = "--image_size=8 --fold=1 --num_folds=3 --epochs=1 --num_workers=0 --gradcam_per_class=0"
    flags = [*data, *small.split(), "--model_name=mobilenet", f"--output_dir={tmp_path / 'results'}"]
    assert main([*flags, "--loader=dali"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--loader dali" in line
    assert "pip install nvidia-dali-cuda120" in line
    assert "--loader files" in line
    assert main([*flags, "--loader=auto"]) == 0
    assert "loader: files on cpu (nvidia-dali-cuda120 cannot be imported" in capsys.readouterr().out
    found = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert found == ["data.csv", "spectrograms"]  # nothing was packed


def test_the_csv_is_parsed_once_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the tree is packed into the cache, when the cache is reused, and when the CSV of given shards is named."""
    tree = write_tree(tmp_path / "tree", make_rows(CLASSES[:2], (1, 2)))
    pack_tree(tree, tmp_path / "shards")
    parsed: list[Path] = []

    def counted(raw: bytes, name: Path, columns: Columns) -> Metadata:
        parsed.append(name)
        return parse_metadata(raw, name, columns)

    for module in ("quaclrs.data.metadata", "quaclrs.shards.reader"):
        monkeypatch.setattr(f"{module}.parse_metadata", counted)
    from_tree = TrainConfig(csv_file=tree.csv_file, spectrograms_dir=tree.spectrograms_dir)
    of_shards = TrainConfig(csv_file=tree.csv_file, shards=tmp_path / "shards")
    for config, wants_shards in ((from_tree, True), (from_tree, True), (from_tree, False), (of_shards, False)):
        parsed.clear()
        open_dataset(config, want_shards=wants_shards, log=lambda text: None).close()
        assert len(parsed) == 1


# --- reader processes that cannot deliver ---


def test_no_shared_memory_is_one_line_and_no_hang(data: Data) -> None:
    """The kernel refuses to make the file in /dev/shm larger than RLIMIT_FSIZE, as in a container with little of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with loader_of(Case("files", "png", 2), data) as loader:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # for the processes, which start now
        try:
            with pytest.raises(
                QuaclrsError, match=r"^a process that reads images cannot hand over .*/dev/shm"
            ) as caught:
                next(iter(loader.load([np.arange(3), np.arange(3)])))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "give --num_workers 0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reader_killed_while_a_step_runs_is_one_line(png_tree: PngTree, tmp_path: Path) -> None:
    """torch raises its error from a signal handler, in whatever the training does at that moment."""

    def step_meter(phase: str, epoch: int, samples: int) -> Any:
        def on_step(*_: object) -> None:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)

        return on_step

    config = TrainConfig(
        csv_file=png_tree.csv_file,
        spectrograms_dir=png_tree.spectrograms_dir,
        output_dir=tmp_path,
        model_name="mobilenet",
        image_size=8,
        batch_size=2,
        fold=2,
        loader="files",
        num_workers=1,
        device="cpu",
    )
    with pytest.raises(QuaclrsError, match=r"^a process that reads images died .*--num_workers 0, .*/dev/shm"):
        run_cross_validation(config, lambda text: None, Hooks(step_meter=step_meter))
    assert multiprocessing.active_children() == []
