"""CSV + PNG tree → shards: plan every shard, write them side by side, and the manifest last.

The plan depends on the input alone, so the bytes depend neither on the number of workers nor on how jobs with
``--folds`` divide the work. Killed anywhere, the same command goes on: finished shards have a receipt in ``.packing/``
and are kept. A job with ``--folds`` packs the shards of its folds, and finishes the folder if those of all others are
there by then.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from quaclrs.config import PackConfig, folds_text
from quaclrs.data.metadata import Audit, Metadata
from quaclrs.errors import ShardError, StorageError, UsageError
from quaclrs.imaging.shared_layouts import Facts, SharedLayouts, share_layouts
from quaclrs.shards import format as fmt
from quaclrs.shards.packing.coordination import (
    WHAT_MUST_AGREE,
    PackSettings,
    packing_alone,
    packing_together,
    settings_of,
)
from quaclrs.shards.packing.finalize import describe, finish
from quaclrs.shards.packing.plan import Source, open_source, plan_shards, sample_bytes
from quaclrs.shards.packing.work_queue import work_through
from quaclrs.shards.packing.write_indexed import (
    finished_indexed_shard_record,
    scan_shard,
    seen_facts,
    write_indexed_shard,
)
from quaclrs.shards.packing.write_shard import (
    PACKING_FOLDER,
    ShardPlan,
    ShardRecord,
    finished_shard_record,
    write_shard,
)
from quaclrs.system.processes import Tick

Result = TypeVar("Result")
_Find = Callable[[ShardPlan], ShardRecord | None]
_Work = Callable[[ShardPlan, Tick], ShardRecord]


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What a packing did."""

    manifest: fmt.Manifest
    """With ``missing_folds`` only of the folds that were asked for, and not on disk."""
    audit: Audit
    seconds: float
    images_packed: int
    """Images checked and written by this call; fewer than the samples when other calls have done some shards."""
    already_complete: bool
    missing_folds: tuple[int, ...] = ()
    """Folds that jobs with ``--folds`` still have to pack before there can be a manifest."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of :func:`pack`, planned."""

    config: PackConfig
    metadata: Metadata
    plans: list[ShardPlan]
    """Of the whole dataset."""
    manifest: fmt.Manifest
    """Not filled in."""
    settings: PackSettings
    progress: bool

    @functools.cached_property
    def own(self) -> list[ShardPlan]:
        """The shards that this call is to pack."""
        folds = self.config.folds
        return [plan for plan in self.plans if folds is None or plan.fold in folds]

    @functools.cached_property
    def others(self) -> list[ShardPlan]:
        """The shards of other jobs."""
        own = {plan.fold for plan in self.own}
        return [plan for plan in self.plans if plan.fold not in own]


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """What is there after :func:`_pack_shards`."""

    shard_records: list[ShardRecord]
    images_packed: int
    shared: SharedLayouts | None
    """What ``indexed`` shards share."""
    missing_folds: tuple[int, ...]


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """Pack ``config``'s PNG tree; returns at once when the output folder already holds exactly that.

    Raises :class:`DataError` for the CSV or an image (finished shards stay), :class:`ShardError` when the output folder
    holds shards of other data or settings, :class:`StorageError` for the disk, :class:`UsageError` for folds that the
    CSV does not have.
    """
    started = time.monotonic()
    job = _plan_job(config, progress)
    manifest = existing = _existing_manifest(config)
    images_packed = 0
    missing_folds: tuple[int, ...] = ()
    if existing is None and config.folds is not None:
        manifest, images_packed, missing_folds = _pack_part(job)
    already_complete = existing is not None
    # a finished folder needs no lock, and may be read-only; one that was killed while tidying up is tidied up again
    if not missing_folds and (existing is None or (config.output_dir / PACKING_FOLDER).is_dir()):
        manifest, more, already_complete = _pack_rest(job)
        images_packed += more
    assert manifest is not None
    _refuse_other_shards(manifest, job.manifest, config)
    return PackSummary(
        manifest=manifest,
        audit=job.metadata.audit(),
        seconds=time.monotonic() - started,
        images_packed=images_packed,
        already_complete=already_complete and not images_packed,
        missing_folds=missing_folds,
    )


def _plan_job(config: PackConfig, progress: bool) -> _Job:
    source = open_source(config)
    _refuse_unknown_folds(config, source.metadata)
    plans, source_fingerprint = plan_shards(source, config)
    manifest = _empty_manifest(source, config, source_fingerprint)
    settings = settings_of(manifest, [plan.file for plan in plans], config)
    return _Job(
        config=config, metadata=source.metadata, plans=plans, manifest=manifest, settings=settings, progress=progress
    )


def _refuse_unknown_folds(config: PackConfig, metadata: Metadata) -> None:
    unknown = sorted(set(config.folds or ()) - set(metadata.fold_numbers))
    if unknown:
        raise UsageError(
            f"--folds {folds_text(config.folds or ())}: {metadata.csv_file} has no fold {folds_text(unknown)}; "
            f"choose among {folds_text(metadata.fold_numbers)}"
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


def _existing_manifest(config: PackConfig) -> fmt.Manifest | None:
    path = config.output_dir / fmt.MANIFEST_FILE
    return fmt.Manifest.from_json(path.read_bytes(), str(path)) if path.is_file() else None


def _refuse_other_shards(existing: fmt.Manifest, wanted: fmt.Manifest, config: PackConfig) -> None:
    # the fingerprint last, for it depends on seed and columns
    differences = WHAT_MUST_AGREE | {"source_fingerprint": "images that have changed since (other files or sizes)"}
    for name, what in differences.items():
        if getattr(existing, name) != getattr(wanted, name):
            raise ShardError(
                f"{config.output_dir}: holds shards made from {what} ({name}: {getattr(existing, name)}, now "
                f"{getattr(wanted, name)}); "
                "choose another folder, or delete this one to pack anew"
            )
    if existing.skipped and config.on_error == "stop":
        first = existing.skipped[0]
        raise ShardError(
            f"{config.output_dir}: was packed with --on_error skip and lacks {len(existing.skipped)} row(s), the first "
            f"{first.file}; "
            "mend the images and pack into another folder, or go on with --on_error skip"
        )


def _pack_part(job: _Job) -> tuple[fmt.Manifest | None, int, tuple[int, ...]]:
    """Pack the folds that were asked for, beside other jobs; returns their manifest, the images packed and the folds
    still missing.
    """
    with packing_together(job.config.output_dir, job.settings):
        if _existing_manifest(job.config) is not None:
            return None, 0, ()
        packed = _pack_shards(job)
    own_files = {plan.file for plan in job.own}
    own_records = [shard_record for shard_record in packed.shard_records if shard_record.entry.file in own_files]
    return describe(job.manifest, own_records, packed.shared)[0], packed.images_packed, packed.missing_folds


def _pack_rest(job: _Job) -> tuple[fmt.Manifest, int, bool]:
    """Pack what is not there yet, alone, and finish the folder; returns its manifest, the images packed and whether
    there was one.
    """
    with packing_alone(job.config.output_dir, job.settings):
        existing = _existing_manifest(job.config)  # of a process that was waited for
        if existing is not None:
            return existing, 0, True
        whole = replace(job, config=replace(job.config, folds=None))
        packed = _pack_shards(whole)
        manifest = finish(job.manifest, job.metadata, packed.shard_records, packed.shared, job.config.output_dir)
        return manifest, packed.images_packed, False


def _pack_shards(job: _Job) -> _Packed:
    """Write the shards of ``job.own`` that are not there yet."""
    _check_free_space(job)
    output_dir = job.config.output_dir
    shared = None
    find: _Find = functools.partial(finished_shard_record, output_dir=output_dir)
    work: _Work = functools.partial(write_shard, output_dir=output_dir)
    if job.config.encoding == "indexed":
        shared = share_layouts(_look_at_all(job))
        find = functools.partial(finished_indexed_shard_record, output_dir=output_dir, shared=shared)
        work = functools.partial(write_indexed_shard, output_dir=output_dir, shared=shared)
    _, images_packed = _work_through(job, [], find, work, "packing")
    shard_records = [find(plan) for plan in job.plans]
    return _Packed(
        shard_records=[shard_record for shard_record in shard_records if shard_record is not None],
        images_packed=images_packed,
        shared=shared,
        missing_folds=tuple(
            sorted(
                {plan.fold for plan, shard_record in zip(job.plans, shard_records, strict=True) if shard_record is None}
            )
        ),
    )


def _look_at_all(job: _Job) -> set[Facts]:
    """What every image of the dataset tells: those of other jobs too, looked at by them or, where none of them is at
    it, here.
    """
    find = functools.partial(seen_facts, output_dir=job.config.output_dir)
    work = functools.partial(scan_shard, output_dir=job.config.output_dir)
    told, _ = _work_through(job, job.others, find, work, "looking")
    return set().union(*told)


def _work_through(
    job: _Job,
    others: list[ShardPlan],
    find: Callable[[ShardPlan], Result | None],
    work: Callable[[ShardPlan, Tick], Result],
    bar_name: str,
) -> tuple[list[Result], int]:
    return work_through(
        job.own,
        others,
        find=find,
        work=work,
        output_dir=job.config.output_dir,
        num_workers=job.config.num_workers,
        bar_name=bar_name if job.progress else None,
    )


def _check_free_space(job: _Job) -> None:
    output_dir = job.config.output_dir
    needed = sum(
        sample_bytes(source, job.config)
        for plan in job.own
        if not (output_dir / plan.file).is_file()
        for source in plan.sources
    )
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise StorageError(
            f"{output_dir}: the shards need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another --output_dir"
        )
