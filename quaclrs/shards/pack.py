"""CSV + PNG tree → shards: plan every shard, write them side by side, and the manifest last.

The plan depends on the input alone, so the bytes do not depend on the number of workers. Killed anywhere, the same command goes on:
finished shards have a receipt in ``.packing/`` and are kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from tqdm import tqdm

from quaclrs.config import PackConfig
from quaclrs.errors import DataError, ShardError, StorageError
from quaclrs.files import TEMPORARY_SUFFIX, make_folder, storage_error, write_bytes
from quaclrs.imaging.canonical import Plan
from quaclrs.imaging.canonical import plan as plan_canonical
from quaclrs.metadata import Audit, Metadata
from quaclrs.parallel import run_tasks
from quaclrs.shards import format as fmt
from quaclrs.shards.plan import Source, open_source, plan_shards, sample_bytes
from quaclrs.shards.scan import indexed_fingerprint, scan_shard, write_indexed_shard
from quaclrs.shards.write import PACKING_FOLDER, RECORDED, Receipt, ShardPlan, finished_receipt, npy_bytes, write_shard


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What a packing did."""

    manifest: fmt.Manifest
    audit: Audit
    seconds: float
    images_packed: int
    """Pictures checked and written by this call; fewer than the samples when an earlier call had finished some shards."""
    already_complete: bool


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """Pack ``config``'s PNG tree; returns at once when the output folder already holds exactly that.

    Raises :class:`DataError` for the CSV or a picture (finished shards stay), :class:`ShardError` when the output folder holds shards
    of other data or settings, :class:`StorageError` for the disk.
    """
    started = time.monotonic()
    source = open_source(config)
    metadata = source.metadata
    plans, source_fingerprint = plan_shards(source, config)
    manifest = _empty_manifest(source, config, source_fingerprint)
    images_packed = 0
    existing = _existing_manifest(config.output_dir)
    # a finished folder needs no lock, and may be read-only; one that was killed while tidying up is tidied up again
    if existing is None or (config.output_dir / PACKING_FOLDER).is_dir():
        with _only_one_packs(config.output_dir):
            existing = _existing_manifest(config.output_dir)  # of a process that was waited for
            if existing is None:
                _check_free_space(plans, config)
                receipts, images_packed, shared = _write_shards(plans, config, progress)
                manifest = _finish(_with_shared(manifest, shared), metadata, receipts, config)
    if existing is not None:
        _refuse_other_shards(existing, manifest, config)
        manifest = existing
    return PackSummary(
        manifest=manifest,
        audit=metadata.audit(),
        seconds=time.monotonic() - started,
        images_packed=images_packed,
        already_complete=existing is not None,
    )


def _empty_manifest(source: Source, config: PackConfig, source_fingerprint: str) -> fmt.Manifest:
    metadata = source.metadata
    return fmt.Manifest(
        encoding=config.encoding,
        image_size=config.image_size if config.encoding == "rgb" else None,
        seed=config.seed,
        shard_size=config.shard_size,
        csv_fingerprint=metadata.fingerprint,
        csv_name=source.csv_name,
        columns=asdict(source.columns),
        source_fingerprint=source_fingerprint,
        classes=metadata.classes,
        folds=metadata.fold_numbers,
        num_samples=0,
        samples_sha256="",
        shards=(),
    )


_WHAT_MUST_AGREE = {
    "csv_fingerprint": "another CSV",
    "encoding": "another --encoding",
    "image_size": "another --image_size",
    "columns": "other columns",
    "seed": "another --seed",
    "shard_size": "another --shard_size",
    "source_fingerprint": "pictures that have changed since (other files or sizes)",  # last, for it depends on seed and columns
}


def _existing_manifest(output_dir: Path) -> fmt.Manifest | None:
    path = output_dir / fmt.MANIFEST_FILE
    return fmt.Manifest.from_json(path.read_bytes(), str(path)) if path.is_file() else None


def _refuse_other_shards(existing: fmt.Manifest, wanted: fmt.Manifest, config: PackConfig) -> None:
    for name, what in _WHAT_MUST_AGREE.items():
        if getattr(existing, name) != getattr(wanted, name):
            raise ShardError(
                f"{config.output_dir}: holds shards made from {what} ({name}: {getattr(existing, name)}, now {getattr(wanted, name)}); "
                "choose another folder, or delete this one to pack anew"
            )
    if existing.skipped and config.on_error == "stop":
        first = existing.skipped[0]
        raise ShardError(
            f"{config.output_dir}: was packed with --on_error skip and lacks {len(existing.skipped)} row(s), the first {first.file}; "
            "mend the pictures and pack into another folder, or go on with --on_error skip"
        )


@contextlib.contextmanager
def _only_one_packs(output_dir: Path) -> Iterator[None]:
    """Hold the folder's lock: jobs started together must not pack the same cache twice. A dead process's lock frees itself."""
    with _open_lock(output_dir / PACKING_FOLDER / "lock") as file:
        with contextlib.suppress(ImportError):  # not a POSIX system: packing twice at once is then up to the user
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{output_dir}: another process is packing here; waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if (output_dir / fmt.MANIFEST_FILE).is_file():
                shutil.rmtree(output_dir / PACKING_FOLDER, ignore_errors=True)


def _open_lock(lock_file: Path) -> BinaryIO:
    for last_try in (False, True):
        make_folder(lock_file.parent)
        try:
            return lock_file.open("wb")
        except FileNotFoundError as error:  # another process has just finished here and tidied up
            if last_try:
                raise storage_error(lock_file, error) from None
        except OSError as error:
            raise storage_error(lock_file, error) from None
    raise AssertionError("unreachable")


def _check_free_space(plans: list[ShardPlan], config: PackConfig) -> None:
    needed = sum(
        sample_bytes(source, config) for plan in plans if not (config.output_dir / plan.file).is_file() for source in plan.sources
    )
    free = shutil.disk_usage(config.output_dir).free
    if needed > free:
        raise StorageError(
            f"{config.output_dir}: the shards need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another --output_dir"
        )


def _write_shards(plans: list[ShardPlan], config: PackConfig, progress: bool) -> tuple[list[Receipt], int, Plan | None]:
    """Write the shards that are not there yet; returns all receipts, the pictures packed now, and what ``indexed`` shards share."""
    if config.encoding != "indexed":
        return *_run(write_shard, plans, {plan.file: plan.fingerprint for plan in plans}, config, progress), None
    with _bar(sum(len(plan.sources) for plan in plans), "looking", progress) as bar:
        scan = functools.partial(scan_shard, output_dir=config.output_dir)
        seen = run_tasks(scan, plans, num_workers=config.num_workers, on_progress=bar.update)
    shared = plan_canonical(set().union(*seen))
    work = functools.partial(write_indexed_shard, shared=shared)
    return *_run(work, plans, {plan.file: indexed_fingerprint(plan, shared) for plan in plans}, config, progress), shared


def _run(
    work: Callable[..., Receipt], plans: list[ShardPlan], fingerprints: dict[str, str], config: PackConfig, progress: bool
) -> tuple[list[Receipt], int]:
    """``work`` for every plan whose shard is not there yet; returns all receipts and the pictures packed now."""
    receipts = {plan.file: finished_receipt(plan, config.output_dir, fingerprints[plan.file]) for plan in plans}
    missing = [plan for plan in plans if receipts[plan.file] is None]
    total, to_do = (sum(len(plan.sources) for plan in chosen) for chosen in (plans, missing))
    with _bar(total, "packing", progress, done=total - to_do) as bar:
        work = functools.partial(work, output_dir=config.output_dir)
        for receipt in run_tasks(work, missing, num_workers=config.num_workers, on_progress=bar.update):
            receipts[receipt.entry.file] = receipt
    return [receipt for receipt in receipts.values() if receipt is not None], to_do


def _bar(total: int, what: str, progress: bool, done: int = 0) -> tqdm[NoReturn]:
    # `disable=None` shows the bar only where stderr is a terminal
    return tqdm(total=total, initial=done, unit="image", desc=what, disable=None if progress else True)


def _with_shared(manifest: fmt.Manifest, shared: Plan | None) -> fmt.Manifest:
    if shared is None:
        return manifest
    return replace(
        manifest,
        layouts=tuple(layout.to_dict() for layout in shared.layouts),
        palettes=tuple(palette.tobytes().hex() for palette in shared.palettes),
    )


def _finish(manifest: fmt.Manifest, metadata: Metadata, receipts: list[Receipt], config: PackConfig) -> fmt.Manifest:
    """Write everything but the tars; the manifest last, since it is what makes the folder a shard folder."""
    _remove_leftovers(receipts, config.output_dir)
    filled = [receipt for receipt in receipts if receipt.entry.samples]
    if not filled:
        raise DataError(f"{metadata.csv_file}: not one row has a good picture; nothing was packed")
    samples = _samples_table(filled)
    samples_bytes = npy_bytes(samples)
    write_bytes(config.output_dir / fmt.METADATA_FILE, metadata.raw)
    write_bytes(config.output_dir / fmt.SAMPLES_FILE, samples_bytes)
    for receipt in receipts:
        if not receipt.entry.samples:  # every picture of it was skipped; readers stumble over empty tars
            tar = config.output_dir / receipt.entry.file
            tar.unlink(missing_ok=True)
            tar.with_suffix(".idx").unlink(missing_ok=True)
    finished = replace(
        manifest,
        num_samples=len(samples),
        samples_sha256=hashlib.sha256(samples_bytes).hexdigest(),
        shards=tuple(receipt.entry for receipt in filled),
        skipped=tuple(sorted((row for receipt in receipts for row in receipt.skipped), key=lambda skipped: skipped.row)),
        facts=_facts(samples, filled),
    )
    write_bytes(config.output_dir / fmt.MANIFEST_FILE, finished.to_json())
    return finished


def _remove_leftovers(receipts: list[Receipt], output_dir: Path) -> None:
    """Delete shards, whole or half-written, that a packing of other input or settings left behind when it was stopped here."""
    wanted = {receipt.entry.file for receipt in receipts}
    for receipt_file in (output_dir / PACKING_FOLDER).glob("*.json"):
        receipt = Receipt.load(receipt_file)
        if receipt is not None and receipt.entry.file not in wanted:
            (output_dir / receipt.entry.file).unlink(missing_ok=True)
            (output_dir / fmt.index_file(receipt.entry.file)).unlink(missing_ok=True)
    for half_written in output_dir.glob(f"fold*/fold*{TEMPORARY_SUFFIX}"):
        half_written.unlink(missing_ok=True)


def _samples_table(receipts: list[Receipt]) -> np.ndarray:
    table = np.zeros(sum(receipt.entry.samples for receipt in receipts), dtype=fmt.SAMPLE_DTYPE)
    start = 0
    for shard, receipt in enumerate(receipts):
        part = table[start : start + receipt.entry.samples]
        part["shard"], part["fold"] = shard, receipt.entry.fold
        columns = np.array(receipt.samples, dtype=np.uint64).T
        for name, column in zip(RECORDED, columns, strict=True):
            part[name] = column
        start += len(part)
    return table


def _facts(samples: np.ndarray, receipts: list[Receipt]) -> dict[str, Any]:
    modes: Counter[str] = Counter()
    for receipt in receipts:
        modes.update(receipt.modes)
    sizes, counts = np.unique(np.stack([samples["width"], samples["height"]], axis=1), axis=0, return_counts=True)
    return {
        "modes": dict(sorted(modes.items())),
        "picture_sizes": {f"{width}x{height}": int(count) for (width, height), count in zip(sizes, counts, strict=True)},
        "transparent_pictures": int(np.count_nonzero(samples["flags"] & fmt.FLAG_TRANSPARENT)),
    }
