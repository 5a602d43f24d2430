"""CSV + PNG tree → shards: plan every shard, write them in parallel, and the manifest last.

The plan depends on the input alone. So the bytes depend neither on the number of workers nor on how jobs with
``--folds`` divide the work. After a kill the same command continues: finished shards have a record in ``.packing/``
and are kept. A job with ``--folds`` packs the shards of its folds. The job that finds all folds packed finalizes the
folder.
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
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings import get_encoding
from quaclrs.shards.encodings.base import Encoding, Finding, SharedTables, TwoPassEncoding
from quaclrs.shards.packing.changed_sources import first_changed_source
from quaclrs.shards.packing.coordination import (
    WHAT_MUST_AGREE,
    difference_text,
    packing_alone,
    packing_together,
    settings_of,
)
from quaclrs.shards.packing.finalize import describe, finalize
from quaclrs.shards.packing.plan import Source, open_source, plan_shards, planned_sample_bytes
from quaclrs.shards.packing.work_queue import work_through
from quaclrs.shards.packing.write_shard import ShardPlan, finished_shard_record, write_shard
from quaclrs.shards.packing.write_two_pass import (
    examine_shard,
    finished_shared_shard_record,
    stored_findings,
    write_shared_shard,
)
from quaclrs.shards.reader import read_manifest
from quaclrs.shards.work_folder import PACKING_FOLDER, PackSettings, ShardRecord, has_manifest
from quaclrs.system.processes import Tick

Result = TypeVar("Result")
_Find = Callable[[ShardPlan], ShardRecord | None]
_Work = Callable[[ShardPlan, Tick], ShardRecord]


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What a call of :func:`pack` did."""

    manifest: fmt.Manifest
    """With ``missing_folds``: it covers the packed folds only, and is not on disk."""
    audit: Audit
    seconds: float
    images_packed: int
    """Images that this call encoded; fewer than the samples when other calls have packed some shards."""
    already_complete: bool
    missing_folds: tuple[int, ...] = ()
    """Folds that jobs with ``--folds`` must still pack before the manifest can be written."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call of :func:`pack`, planned."""

    config: PackConfig
    encoding: Encoding
    metadata: Metadata
    plans: list[ShardPlan]
    """Of the whole dataset."""
    manifest: fmt.Manifest
    """The shards, counts and hashes are still empty."""
    settings: PackSettings
    progress: bool

    def audit(self) -> Audit:
        """What a user must know about the dataset, given which rows turned out to have one image."""
        images = {source.row: source.image for plan in self.plans for source in plan.sources}
        return self.metadata.audit([images[row] for row in range(len(self.metadata))])

    @functools.cached_property
    def own(self) -> list[ShardPlan]:
        """The shards that this call must pack."""
        folds = self.config.folds
        return [plan for plan in self.plans if folds is None or plan.fold in folds]

    @functools.cached_property
    def others(self) -> list[ShardPlan]:
        """The shards that other jobs must pack."""
        own = {plan.fold for plan in self.own}
        return [plan for plan in self.plans if plan.fold not in own]


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """The state of the folder after :func:`_pack_shards`."""

    records: list[ShardRecord]
    images_packed: int
    shared: SharedTables | None
    """Of a two-pass encoding."""
    missing_folds: tuple[int, ...]


def pack(config: PackConfig, *, progress: bool = False, metadata: Metadata | None = None) -> PackSummary:
    """Pack ``config``'s PNG tree; returns at once when the output folder already holds exactly that.

    ``metadata`` is the parsed CSV, if the caller has it already (parsed with ``config.columns``). Raises
    :class:`DataError` for the CSV or an image (finished shards stay), :class:`ShardError` when the output folder holds
    shards of other data or settings, :class:`StorageError` if the output disk cannot be written, :class:`UsageError`
    for an unknown encoding or for folds that the CSV does not have.
    """
    started = time.monotonic()
    job = _plan_job(config, progress, metadata)
    manifest = existing = _existing_manifest(config)
    images_packed = 0
    missing_folds: tuple[int, ...] = ()
    if existing is None and config.folds is not None:
        manifest, images_packed, missing_folds = _pack_own_folds(job)
    already_complete = existing is not None
    # A finished folder may be read-only, so it is not locked, unless a call was killed while it deleted .packing/.
    if not missing_folds and (existing is None or (config.output_dir / PACKING_FOLDER).is_dir()):
        manifest, more, already_complete = _pack_rest(job)
        images_packed += more
    assert manifest is not None
    _refuse_other_shards(manifest, job.manifest, config)
    if already_complete:
        _refuse_changed_images(manifest, job)
    return PackSummary(
        manifest=manifest,
        audit=job.audit(),
        seconds=time.monotonic() - started,
        images_packed=images_packed,
        already_complete=already_complete and not images_packed,
        missing_folds=missing_folds,
    )


def _plan_job(config: PackConfig, progress: bool, metadata: Metadata | None) -> _Job:
    encoding = get_encoding(config.encoding)
    source = open_source(config, metadata)
    _refuse_unknown_folds(config, source.metadata)
    plans, source_fingerprint = plan_shards(source, config)
    manifest = _empty_manifest(source, config, encoding, source_fingerprint)
    return _Job(
        config=config,
        encoding=encoding,
        metadata=source.metadata,
        plans=plans,
        manifest=manifest,
        settings=settings_of(manifest, [plan.file for plan in plans], config),
        progress=progress,
    )


def _refuse_unknown_folds(config: PackConfig, metadata: Metadata) -> None:
    unknown = sorted(set(config.folds or ()) - set(metadata.fold_numbers))
    if unknown:
        raise UsageError(
            f"--folds {folds_text(config.folds or ())}: {metadata.csv_file} has no fold {folds_text(unknown)}; "
            f"choose among {folds_text(metadata.fold_numbers)}"
        )


def _empty_manifest(source: Source, config: PackConfig, encoding: Encoding, source_fingerprint: str) -> fmt.Manifest:
    metadata = source.metadata
    return fmt.Manifest(
        encoding=encoding.name,
        image_size=config.image_size if encoding.depends_on_image_size else None,
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
    return read_manifest(config.output_dir) if has_manifest(config.output_dir) else None


def _refuse_other_shards(existing: fmt.Manifest, wanted: fmt.Manifest, config: PackConfig) -> None:
    for name, what in WHAT_MUST_AGREE.items():
        theirs, ours = getattr(existing, name), getattr(wanted, name)
        if theirs != ours:
            raise ShardError(
                f"{config.output_dir}: holds shards made from {what}{difference_text(name, theirs, ours)}; choose "
                "another folder, or delete this one to pack anew"
            )
    if existing.skipped and config.on_error == "stop":
        first = existing.skipped[0]
        raise ShardError(
            f"{config.output_dir}: was packed with --on_error skip and lacks {len(existing.skipped)} row(s), the first "
            f"{first.file}; mend the images and pack into another folder, or go on with --on_error skip"
        )


def _refuse_changed_images(existing: fmt.Manifest, job: _Job) -> None:
    """Raise :class:`ShardError` naming the first image that is no longer what the finished folder was packed from."""
    changed = first_changed_source(job.plans, existing, job.config, progress=job.progress)
    if changed is not None:
        raise ShardError(
            f"{job.config.output_dir}: holds shards made from images that have changed since, the first {changed}; "
            "choose another folder, or delete this one to pack anew"
        )


def _pack_own_folds(job: _Job) -> tuple[fmt.Manifest | None, int, tuple[int, ...]]:
    """Pack the folds of ``--folds`` beside other jobs.

    Returns the manifest of these folds (None if another job has finalized the folder), the number of images packed, and
    the folds that are still missing.
    """
    with packing_together(job.config.output_dir, job.settings):
        if has_manifest(job.config.output_dir):
            return None, 0, ()
        packed = _pack_shards(job)
    own_files = {plan.file for plan in job.own}
    own_records = [record for record in packed.records if record.entry.file in own_files]
    return describe(job.manifest, own_records, packed.shared)[0], packed.images_packed, packed.missing_folds


def _pack_rest(job: _Job) -> tuple[fmt.Manifest, int, bool]:
    """Pack all missing shards, holding the folder exclusively, and finalize it.

    Returns the manifest, the number of images packed, and whether there was a manifest already.
    """
    with packing_alone(job.config.output_dir, job.settings):
        existing = _existing_manifest(job.config)  # of a process that this one has waited for
        if existing is not None:
            return existing, 0, True
        whole = replace(job, config=replace(job.config, folds=None))
        packed = _pack_shards(whole)
        manifest = finalize(job.manifest, job.metadata, job.plans, packed.records, packed.shared, job.config.output_dir)
        return manifest, packed.images_packed, False


def _pack_shards(job: _Job) -> _Packed:
    """Write those shards of ``job.own`` that are missing."""
    _check_free_space(job)
    output_dir = job.config.output_dir
    shared = None
    find: _Find = functools.partial(finished_shard_record, output_dir=output_dir)
    work: _Work = functools.partial(write_shard, output_dir=output_dir)
    if isinstance(job.encoding, TwoPassEncoding):
        shared = job.encoding.share(_examine_all(job))
        find = functools.partial(finished_shared_shard_record, output_dir=output_dir, shared=shared)
        work = functools.partial(write_shared_shard, output_dir=output_dir, shared=shared)
    _, images_packed = _work_through(job, [], find, work, "packing")
    records = [find(plan) for plan in job.plans]
    missing = {plan.fold for plan, record in zip(job.plans, records, strict=True) if record is None}
    return _Packed(
        records=[record for record in records if record is not None],
        images_packed=images_packed,
        shared=shared,
        missing_folds=tuple(sorted(missing)),
    )


def _examine_all(job: _Job) -> set[Finding]:
    """The findings of all images of the dataset.

    Other jobs examine their own images; if none of them is running, this call examines those images too.
    """
    find = functools.partial(stored_findings, output_dir=job.config.output_dir)
    work = functools.partial(examine_shard, output_dir=job.config.output_dir)
    findings, _ = _work_through(job, job.others, find, work, "looking")
    return set().union(*findings)


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
        planned_sample_bytes(source, job.encoding, job.config.image_size)
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
