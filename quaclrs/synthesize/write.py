"""Writes the synthetic dataset to disk: in parallel, resumable, with the same bytes in every run.

Order of writing: ``synthesis.started.json`` (the parameters), the images, the CSV, ``synthesis.json`` (parameters and
totals); then the first file is deleted. A folder with a CSV is therefore complete, and an interrupted run can tell its
own images from someone else's.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR
from quaclrs.errors import UsageError
from quaclrs.synthesize.image import png_bytes
from quaclrs.synthesize.plan import CLASSES, Row, plan_recordings, plan_rows, recording_rows
from quaclrs.synthesize.sounds import mel_grid
from quaclrs.system.atomic_files import make_folder, storage_error, write_bytes
from quaclrs.system.processes import Tick, run_tasks

CSV_NAME = DEFAULT_CSV_FILE.name
IMAGES_NAME = DEFAULT_SPECTROGRAMS_DIR.name
RECORD_NAME = "synthesis.json"
"""The parameters and totals of a complete dataset; written last."""
STARTED_NAME = "synthesis.started.json"
"""The parameters of an incomplete dataset. Its presence says that this tool wrote the images, so they can be kept."""

COLUMNS = ("spec_file_name", "orig_file_name", "fsID", "fold", "classID", "class", "augmentation")
GENERATOR_VERSION = 1
"""Increase it with every change of plan, sounds or image: images of two versions must not mix in one folder."""

_RECORDINGS_PER_JOB = 5


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """What to make, and where."""

    output_dir: Path
    samples_per_class: int = 8
    """Rows per class *and fold*; 445 gives about the real dataset's size."""
    folds: int = 10
    seed: int = 0
    num_workers: int = 1
    """Processes that draw; 1 draws in the calling process. No byte depends on it."""

    def __post_init__(self) -> None:
        for name, least in (("samples_per_class", 1), ("folds", 1), ("seed", 0), ("num_workers", 1)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"--{name} is {value}; it has to be {least} or more")

    def parameters(self) -> dict[str, int]:
        """Everything that determines the bytes of the dataset."""
        return {
            "generator_version": GENERATOR_VERSION,
            "samples_per_class": self.samples_per_class,
            "folds": self.folds,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class SynthesisSummary:
    """What is on disk after the call, and how long the call took."""

    csv_file: Path
    spectrograms_dir: Path
    rows: int
    files: int
    """Fewer than rows, because slices of one recording share a file."""
    total_bytes: int
    """Of all images."""
    drawn: int
    """Images drawn by this call; the others existed before."""
    seconds: float

    @property
    def images_per_second(self) -> float:
        """The rate of the images drawn by this call."""
        return self.drawn / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Some recordings for one worker. It is small to send: their rows follow from the plan."""

    config: SynthesisConfig
    recordings: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Done:
    files: int
    drawn: int
    total_bytes: int


def synthesize_dataset(config: SynthesisConfig, *, progress: bool = False) -> SynthesisSummary:
    """Write the dataset of ``config``, or finish an interrupted one. A complete dataset is not touched.

    Raises:
        UsageError: the folder holds another dataset.
        StorageError: the disk is full or cannot be written; the message names the path.
    """
    started = time.perf_counter()
    root = Path(config.output_dir)
    total = _complete_totals(root, config)
    if total is None:
        write_bytes(root / STARTED_NAME, _json(config.parameters()))
        total = _draw_all(config, progress)
        write_bytes(root / CSV_NAME, _csv(config))
        write_bytes(
            root / RECORD_NAME, _json({**config.parameters(), "files": total.files, "bytes": total.total_bytes})
        )
        (root / STARTED_NAME).unlink(missing_ok=True)
    return SynthesisSummary(
        csv_file=root / CSV_NAME,
        spectrograms_dir=root / IMAGES_NAME,
        rows=len(CLASSES) * config.folds * config.samples_per_class,
        files=total.files,
        total_bytes=total.total_bytes,
        drawn=total.drawn,
        seconds=time.perf_counter() - started,
    )


# --- existing files ---


def _complete_totals(root: Path, config: SynthesisConfig) -> _Done | None:
    """The totals of a complete dataset of ``config`` in ``root``; None if something is missing.

    Raises :class:`UsageError` if the folder holds anything else: a foreign dataset or other parameters.
    """
    try:
        record, started = _read_json(root / RECORD_NAME), _read_json(root / STARTED_NAME)
        holds_data = (root / CSV_NAME).exists() or (root / IMAGES_NAME).exists()
        present = len(list((root / IMAGES_NAME).glob("fold*/*.png"))) if record else 0
    except OSError as error:
        raise storage_error(root, error) from None
    if not record and not started:
        if holds_data:
            raise UsageError(f"{root} holds a dataset that this tool did not make; choose another --output_dir")
        return None
    for known in (record, started):
        for name, value in config.parameters().items() if known else ():
            if known.get(name) != value:
                raise UsageError(
                    f"{root} holds a dataset made with {name} {known.get(name)}, not {value};"
                    " choose another --output_dir, or delete it first"
                )
    complete = record and not started and (root / CSV_NAME).exists() and present == record.get("files")
    return _Done(files=present, drawn=0, total_bytes=record["bytes"]) if complete else None


def _read_json(path: Path) -> dict[str, int]:
    """The parameters in a record file; empty if the file does not exist."""
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict) or not known:
        raise UsageError(f"{path} is damaged; delete its folder, or choose another --output_dir")
    return known


# --- images ---


def _draw_all(config: SynthesisConfig, progress: bool) -> _Done:
    """Draw all missing files, in ``num_workers`` processes."""
    jobs = list(_jobs(config))
    for fold in range(1, config.folds + 1):
        make_folder(_fold_dir(config, fold))
    rows = len(CLASSES) * config.folds * config.samples_per_class
    # `disable=None` shows the bar only where stderr is a terminal
    with tqdm(total=rows, unit="image", desc="synthesizing", disable=None if progress else True) as bar:
        parts = run_tasks(_draw_job, jobs, num_workers=config.num_workers, on_progress=bar.update)
    return _Done(*(sum(getattr(part, name) for part in parts) for name in ("files", "drawn", "total_bytes")))


def _jobs(config: SynthesisConfig) -> Iterator[_Job]:
    recordings = plan_recordings(config.samples_per_class, config.folds)
    while batch := tuple(itertools.islice(recordings, _RECORDINGS_PER_JOB)):
        yield _Job(config=config, recordings=batch)


def _rows_of(job: _Job) -> Iterator[list[Row]]:
    for recording in job.recordings:
        yield recording_rows(job.config.samples_per_class, job.config.folds, *recording)


def _draw_job(job: _Job, tick: Tick) -> _Done:
    """Draw the missing files of a job, each once however many rows name it. Calls ``tick`` once per row."""
    sizes: dict[Path, int] = {}
    drawn = 0
    for row in (row for rows in _rows_of(job) for row in rows):
        path = _fold_dir(job.config, row.fold) / row.spec_file_name
        if path not in sizes:
            size = _size(path)
            if size is None:
                content = png_bytes(mel_grid(row.sample, job.config.seed))
                write_bytes(path, content, durable=False)  # a synthetic image can be drawn again
                size, drawn = len(content), drawn + 1
            sizes[path] = size
        tick()
    return _Done(len(sizes), drawn, sum(sizes.values()))


def _size(path: Path) -> int | None:
    """Size of the file in bytes; None if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error(path, error) from None


def _fold_dir(config: SynthesisConfig, fold: int) -> Path:
    return Path(config.output_dir) / IMAGES_NAME / f"fold{fold}"


# --- files ---


def _csv(config: SynthesisConfig) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in plan_rows(config.samples_per_class, config.folds):
        name = CLASSES[row.class_id]
        writer.writerow(
            (row.spec_file_name, row.orig_file_name, row.fs_id, row.fold, row.class_id, name, row.augmentation)
        )
    return text.getvalue().encode()


def _json(content: dict[str, int]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
