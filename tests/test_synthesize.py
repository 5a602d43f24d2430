"""Contract of the synthetic dataset: it has matplotlib's pixels, real geometry and pitfalls, and the same bytes in
every run.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from quaclrs.errors import StorageError, UsageError
from quaclrs.synthesize import (
    SynthesisConfig,
    SynthesisSummary,
    draw,
    mel_grid,
    plan_rows,
    png_bytes,
    synthesize_dataset,
)

TOOL = Path(__file__).parents[1] / "tools" / "synthesize_dataset.py"
CSV_NAME = "spectrograms_balanced_no_sirens.csv"
CLASSES = [
    *("air_conditioner", "ambulance", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling"),
    *("firetruck", "gun_shot", "jackhammer", "police", "street_music", "traffic"),
]
INVENTED = {"ambulance", "firetruck", "police", "traffic"}
LONG_FORMS = {
    "orig": "original",
    "ts0": "timestretch_0.8",
    "ts1": "timestretch_1.2",
    "ps0": "pitchshift_-2",
    "ps1": "pitchshift_2",
    "sa0": "specaugment_0",
    "sa1": "specaugment_1",
    "sa2": "specaugment_2",
    "pa0": "patchaugment_0",
    "pa1": "patchaugment_1",
    "n0": "noise_5dB",
    "n1": "noise_15dB",
}


def drawn_by_matplotlib(grid: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The oracle: (400, 1000, 4) uint8, as the real images were drawn."""
    figure = Figure(figsize=(10, 4), dpi=100)
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib does not annotate its methods
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.pcolormesh(grid, cmap="magma", vmin=grid.min(), vmax=grid.max())
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def decoded(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)))


def read_rows(root: Path) -> list[dict[str, str]]:
    with (root / CSV_NAME).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def image_path(root: Path, row: dict[str, str]) -> Path:
    return root / "spectrograms" / f"fold{row['fold']}" / row["spec_file_name"]


def tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(root: Path, *, samples_per_class: int, folds: int, seed: int = 0, num_workers: int = 1) -> SynthesisSummary:
    config = SynthesisConfig(
        output_dir=root, samples_per_class=samples_per_class, folds=folds, seed=seed, num_workers=num_workers
    )
    return synthesize_dataset(config, progress=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 rows of each of 13 classes in 2 folds: 78 rows. Read only."""
    root = tmp_path_factory.mktemp("synthetic")
    summary = make(root, samples_per_class=3, folds=2)
    assert summary.rows == 78
    return root


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 row of each of 13 classes in 1 fold: 13 images. Read only: copy it before changing it."""
    root = tmp_path_factory.mktemp("small")
    summary = make(root, samples_per_class=1, folds=1)
    assert (summary.rows, summary.files, summary.drawn) == (13, 13, 13)
    return root


# --- pixels ---


@pytest.mark.parametrize("fold", [1, *(pytest.param(k, marks=pytest.mark.exhaustive) for k in range(2, 11))])
def test_one_image_per_class_and_fold_is_what_matplotlib_draws(fold: int) -> None:
    rows = [row for row in plan_rows(1, 10) if row.fold == fold]
    assert [row.class_id for row in rows] == list(range(13))
    for row in rows:
        grid = mel_grid(row.sample, seed=0)
        np.testing.assert_array_equal(decoded(png_bytes(grid)), drawn_by_matplotlib(grid), err_msg=row.spec_file_name)


def test_the_images_compared_with_matplotlib_have_every_width_and_augmentation() -> None:
    """Fold 1 alone has all of them."""
    rows = [row for row in plan_rows(1, 10) if row.fold == 1]
    assert {row.sample.tag for row in rows} == set(LONG_FORMS)
    widths = {tag: mel_grid(row.sample, 0).shape for row in rows for tag in [row.sample.tag]}
    assert widths == {tag: (128, {"ts0": 469, "ts1": 313}.get(tag, 376)) for tag in LONG_FORMS}


def test_a_grid_of_one_value_is_drawn_as_matplotlib_draws_it() -> None:
    grid = np.full((128, 376), -80.0)
    np.testing.assert_array_equal(draw(grid), drawn_by_matplotlib(grid))


def test_values_on_the_borders_between_colours_are_drawn_as_matplotlib_draws_them() -> None:
    grid = np.linspace(-80, 0, 257)[np.random.default_rng(0).integers(257, size=(128, 313))]
    assert grid.min() == -80
    assert grid.max() == 0
    np.testing.assert_array_equal(draw(grid), drawn_by_matplotlib(grid))


def test_grids_are_decibels_below_the_loudest_cell_and_partly_silent() -> None:
    grids = {row.sample: mel_grid(row.sample, seed=0) for row in plan_rows(4, 2)}
    for sample, grid in grids.items():
        assert grid.dtype == np.float64
        assert grid.max() <= 0
        assert grid.max() == 0 or sample.tag[:2] in {"sa", "pa"}, sample
        assert grid.min() >= -80
    masked = [grid for sample, grid in grids.items() if sample.tag.startswith("sa")]
    assert masked
    for grid in masked:
        blank = grid == grid.min()
        assert blank.all(axis=1).any()
        assert blank.all(axis=0).any()
    assert any((grid[:, -5:] == -80).all() for grid in grids.values())


# --- files and rows ---


def test_images_have_the_real_geometry(dataset: Path) -> None:
    sizes = []
    for path in sorted(dataset.glob("spectrograms/*/*.png")):
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (1000, 400))
            pixels = np.asarray(image)
        assert (pixels[..., 3] == 255).all()
        assert len(np.unique(pixels.view(np.uint32))) <= 256
        sizes.append(path.stat().st_size)
    assert 90_000 < np.mean(sizes) < 170_000
    assert np.mean([90_000 <= size <= 170_000 for size in sizes]) > 0.75


def test_csv_has_the_real_columns_and_labels(dataset: Path) -> None:
    assert sorted(CLASSES) == CLASSES
    rows = read_rows(dataset)
    assert list(rows[0]) == ["spec_file_name", "orig_file_name", "fsID", "fold", "classID", "class", "augmentation"]
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 3 * 13 * 2
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        counts[row["class"], row["fold"]] += 1
        fs_id, older_id, tag = row["spec_file_name"].removesuffix(".png").split("-")
        assert row["classID"] == str(CLASSES.index(row["class"]))
        assert older_id != row["classID"]
        assert fs_id == row["fsID"]
        assert row["augmentation"] == LONG_FORMS[tag]
    assert set(counts.values()) == {3}
    assert len(counts) == 26
    assert {row["augmentation"] for row in rows} == set(LONG_FORMS.values())
    assert {image_path(dataset, row) for row in rows} == set(dataset.glob("spectrograms/*/*.png"))


def test_some_rows_share_a_file_of_their_fold_and_class(dataset: Path) -> None:
    rows = read_rows(dataset)
    sharing = defaultdict(list)
    for row in rows:
        sharing[row["spec_file_name"]].append(row)
    shared = [group for group in sharing.values() if len(group) > 1]
    assert 0.03 < sum(len(group) - 1 for group in shared) / len(rows) < 0.15
    for group in shared:
        assert len({(row["fold"], row["classID"], row["augmentation"]) for row in group}) == 1
        assert len({row["orig_file_name"] for row in group}) == len(group)


@pytest.mark.parametrize("samples_per_class", [1, 8, pytest.param(445, marks=pytest.mark.exhaustive)])
def test_a_recording_lies_in_one_fold_and_one_class(samples_per_class: int) -> None:
    places = defaultdict(set)
    for row in plan_rows(samples_per_class, 10):
        places[row.fs_id].add((row.fold, row.class_id))
    assert all(len(place) == 1 for place in places.values())


@pytest.mark.parametrize("samples_per_class", [8, 40, pytest.param(445, marks=pytest.mark.exhaustive)])
def test_a_few_invented_recordings_come_back_in_another_fold_with_equal_bytes(samples_per_class: int) -> None:
    rows = list(plan_rows(samples_per_class, 10))
    twins = [row for row in rows if row.sample.fold != row.fold]
    assert 0 < len(twins) / len(rows) <= 0.02
    assert {CLASSES[row.class_id] for row in twins} == INVENTED
    originals = {row.sample: row for row in rows if row.sample.fold == row.fold}
    for twin in twins:
        assert originals[twin.sample].fs_id != twin.fs_id
        assert originals[twin.sample].class_id == twin.class_id


def test_twins_have_equal_bytes_on_disk(tmp_path: Path) -> None:
    make(tmp_path, samples_per_class=1, folds=4)
    twins = [row for row in plan_rows(1, 4) if row.sample.fold != row.fold]
    assert twins
    digests = tree(tmp_path / "spectrograms")
    for twin in twins:
        digest = digests[f"fold{twin.fold}/{twin.spec_file_name}"]
        assert list(digests.values()).count(digest) == 2


# --- determinism, resuming ---


def test_two_processes_write_the_same_bytes_as_one(dataset: Path, tmp_path: Path) -> None:
    summary = make(tmp_path, samples_per_class=3, folds=2, num_workers=2)
    assert tree(tmp_path) == tree(dataset)
    images = list(tmp_path.glob("spectrograms/*/*"))
    assert (summary.files, summary.drawn) == (len(images), len(images))
    assert summary.total_bytes == sum(path.stat().st_size for path in images)


def test_another_seed_gives_other_images_under_the_same_names(small_dataset: Path, tmp_path: Path) -> None:
    make(tmp_path, samples_per_class=1, folds=1, seed=1)
    first, second = tree(small_dataset / "spectrograms"), tree(tmp_path / "spectrograms")
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_a_complete_dataset_is_left_alone_and_a_damaged_one_is_mended(small_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(small_dataset, tmp_path, dirs_exist_ok=True)
    before = tree(tmp_path)
    again = make(tmp_path, samples_per_class=1, folds=1)
    total_bytes = sum(path.stat().st_size for path in tmp_path.glob("spectrograms/*/*"))
    assert (again.drawn, again.files, again.total_bytes) == (0, 13, total_bytes)
    assert tree(tmp_path) == before
    sorted(tmp_path.glob("spectrograms/*/*.png"))[3].unlink()
    assert make(tmp_path, samples_per_class=1, folds=1).drawn == 1
    assert tree(tmp_path) == before


def test_an_interrupted_run_leaves_no_csv_and_goes_on(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    calls = iter(range(100))

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, samples_per_class=1, folds=1)
    assert not (tmp_path / CSV_NAME).exists()
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="made with seed 0, not 1"):
        make(tmp_path, samples_per_class=1, folds=1, seed=1)
    assert make(tmp_path, samples_per_class=1, folds=1).drawn == 13 - 5
    images = {f"spectrograms/fold1/{row.spec_file_name}" for row in plan_rows(1, 1)}
    assert tree(tmp_path).keys() == {CSV_NAME, "synthesis.json", *images}
    assert tree(tmp_path) == tree(small_dataset)


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "value"), [("samples_per_class", 0), ("folds", 0), ("seed", -1), ("num_workers", 0), ("folds", -3)]
)
def test_impossible_numbers_are_refused_by_name(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{name} is {value}"):
        make(tmp_path, **({"samples_per_class": 1, "folds": 1} | {name: value}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("samples_per_class", 5), ("folds", 3), ("seed", 7)])
def test_a_folder_with_other_parameters_is_refused_untouched(dataset: Path, name: str, value: int) -> None:
    before = tree(dataset)
    options = {"samples_per_class": 3, "folds": 2, name: value}
    with pytest.raises(UsageError, match=f"made with {name} .*not {value}.*--output_dir"):
        make(dataset, **options)
    assert tree(dataset) == before


@pytest.mark.parametrize("name", [CSV_NAME, "spectrograms/fold1/100000-4-orig.png"])
def test_somebody_elses_data_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("real data")
    with pytest.raises(UsageError, match="this tool did not make"):
        make(tmp_path, samples_per_class=1, folds=1)
    assert (tmp_path / name).read_text() == "real data"
    assert len(tree(tmp_path)) == 1


@pytest.mark.parametrize("content", ["{", "[]", "7", "\xff"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "synthesis.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"synthesis\.json is damaged"):
        make(tmp_path, samples_per_class=1, folds=1)


def test_a_full_disk_is_one_line_with_the_path(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no image fits: the kernel refuses as a full disk would
    try:
        with pytest.raises(
            StorageError, match=rf"cannot write {tmp_path}.*\.png: File too large; free some space"
        ) as caught:
            make(tmp_path, samples_per_class=1, folds=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / CSV_NAME).exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_in_a_worker_reaches_the_caller(small_dataset: Path, tmp_path: Path, workers: int) -> None:
    fold = tmp_path / "spectrograms" / "fold1"
    rows = list(plan_rows(1, 1))
    shutil.copytree(small_dataset, tmp_path, dirs_exist_ok=True)
    (fold / rows[0].spec_file_name).unlink()
    (fold / f"{rows[0].spec_file_name}.tmp").mkdir()  # even root cannot write a file there
    with pytest.raises(StorageError, match=rows[0].spec_file_name):
        make(tmp_path, samples_per_class=1, folds=1, num_workers=workers)


# --- the command line ---


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_the_tool_makes_a_dataset_and_says_what_it_made(tmp_path: Path) -> None:
    done = run_tool("--output-dir", tmp_path, "--samples-per-class", 1, "--folds", 1, "--seed", 3, "--num_workers", 1)
    assert done.returncode == 0, done.stderr
    assert "13 rows in 13 files" in done.stdout
    assert "images/s" in done.stdout
    assert json.loads((tmp_path / "synthesis.json").read_text())["seed"] == 3
    again = run_tool("--output_dir", tmp_path, "--samples_per_class", 1, "--folds", 1, "--seed", 3)
    assert "all were there already" in again.stdout


def test_the_tools_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        (("--output_dir", tmp_path / "new", "--folds", 0), "--folds is 0"),
        (("--output_dir", tmp_path / "file" / "below"), str(tmp_path / "file" / "below")),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_workers_need_neither_torch_nor_pandas_nor_pyplot() -> None:
    code = "import sys, quaclrs.synthesize; print({'torch', 'pandas', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
