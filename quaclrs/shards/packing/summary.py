"""The reports that the packing and inspecting tools print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quaclrs.data.metadata import Audit
from quaclrs.imaging.png import PLAIN_MODES, SIXTEEN_BIT_GREY
from quaclrs.shards import format as fmt
from quaclrs.shards.encodings.base import size_text
from quaclrs.shards.packing.pack import PackSummary
from quaclrs.shards.reader import ShardSet

_MOST_NAMED = 5
_EXAMINED_FOR_ADVICE = 64


def describe_packing(summary: PackSummary, output_dir: Path) -> str:
    """The closing report of quaclrs-pack."""
    manifest, samples = summary.manifest, None
    if not summary.missing_folds:
        with ShardSet(output_dir) as shards:
            samples = shards.samples
    total_bytes = sum(entry.bytes for entry in manifest.shards)
    if summary.already_complete:
        done = f"{output_dir}: already packed from this CSV and these settings; nothing to do"
    else:
        rate = summary.images_packed / max(summary.seconds, 1e-9)
        done = (
            f"{output_dir}: {manifest.num_samples} samples in {len(manifest.shards)} shards, "
            f"{size_text(total_bytes)}, encoding {manifest.encoding}; packed {summary.images_packed} images in "
            f"{summary.seconds:.1f} s ({rate:.0f} images/s)"
        )
    return "\n".join(
        [
            counts_table(manifest, summary.audit),
            *_facts(manifest, samples),
            *data_warnings(summary.audit, manifest),
            done,
        ]
    )


def indexing_advice(shards: ShardSet) -> str | None:
    """Whether another encoding would suit the images of ``shards`` better; None where the encoding has no advice.

    Examines 64 evenly spaced samples, since examining all would take as long as packing.
    """
    chosen = np.unique(np.linspace(0, len(shards) - 1, _EXAMINED_FOR_ADVICE).astype(int)).tolist()
    total_bytes = int(shards.samples["size"].sum())
    return shards.encoding.advice([shards.record(number) for number in chosen], total_bytes, shards.root)


def describe_shards(shards: ShardSet) -> str:
    """The report of ``quaclrs-inspect info``."""
    manifest, metadata = shards.manifest, shards.metadata()
    audit = metadata.audit(shards.image_keys(metadata))
    size = f", {manifest.image_size}x{manifest.image_size}" if manifest.image_size else ""
    payload_bytes = int(shards.samples["size"].sum())
    lines = [
        f"{shards.root}: {fmt.FORMAT_NAME} version {fmt.FORMAT_VERSION}, encoding {manifest.encoding}{size}, seed "
        f"{manifest.seed}",
        f"samples {manifest.num_samples}, shards {len(manifest.shards)}, "
        f"{size_text(sum(e.bytes for e in manifest.shards))} on disk, "
        f"{payload_bytes / max(manifest.num_samples, 1) / 1e3:.1f} kB per image",
        f"packed from {manifest.csv_name} (SHA-256 {manifest.csv_fingerprint[:16]}…), data fingerprint "
        f"{manifest.data_fingerprint[:16]}…",
        counts_table(manifest, audit),
    ]
    return "\n".join([*lines, *_facts(manifest, shards.samples), *data_warnings(audit, manifest)])


def counts_table(manifest: fmt.Manifest, audit: Audit) -> str:
    """Rows of the CSV by class and fold, with totals, as a text table."""
    width = max(len(name) for name in (*manifest.classes, "total"))
    header = " ".join([f"{'':{width}}", *(f"{f'fold{k}':>7}" for k in manifest.folds), f"{'total':>8}"])
    names, counts = (*manifest.classes, "total"), _with_total_row(audit.counts)
    return "\n".join([header, *(_table_row(name, width, row) for name, row in zip(names, counts, strict=True))])


def _with_total_row(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([counts, counts.sum(axis=0, keepdims=True)])


def _table_row(name: str, width: int, counts: NDArray[np.int64]) -> str:
    return " ".join([f"{name:{width}}", *(f"{count:>7}" for count in counts), f"{counts.sum():>8}"])


def _facts(manifest: fmt.Manifest, samples: NDArray[np.void] | None) -> Iterator[str]:
    """What the images are; with the ``samples`` of a finished folder also how many have 16 bits."""
    sizes = ", ".join(f"{size} ({count})" for size, count in manifest.facts.get("picture_sizes", {}).items())
    modes = ", ".join(f"{mode} ({count})" for mode, count in manifest.facts.get("modes", {}).items())
    yield f"images: size {sizes}; mode {modes}"
    transparent = manifest.facts.get("transparent_pictures", 0)
    if transparent:
        yield f"note: {transparent} image(s) have real transparency; training drops it, as Pillow's convert('RGB') does"
    deep = 0 if samples is None else _count_16_bit(manifest.facts.get("modes", {}), samples)
    if deep:
        yield f"note: {deep} image(s) have 16 bits per channel; values are rendered as value >> 8, the upper 8 bits"


def _count_16_bit(modes: dict[str, int], samples: NDArray[np.void]) -> int:
    """Number of 16-bit images: grey has modes of its own, and colour is not plain although its mode is."""
    grey = sum(modes.get(mode, 0) for mode in SIXTEEN_BIT_GREY)
    of_other_modes = sum(count for mode, count in modes.items() if mode not in PLAIN_MODES)
    return grey + int(np.count_nonzero(samples["flags"] & fmt.FLAG_NOT_PLAIN)) - of_other_modes


def data_warnings(audit: Audit, manifest: fmt.Manifest | None = None) -> Iterator[str]:
    """Peculiarities of the data that affect how far a score can be trusted, one line each."""
    if audit.rows_sharing_a_file:
        yield f"note: {audit.rows_sharing_a_file} rows share their image with another row; each row is one sample"
    if audit.conflicting_files:
        yield (
            f"warning: {len(audit.conflicting_files)} image(s) carry rows of "
            f"different classes: {_first_few(audit.conflicting_files)}"
        )
    if audit.files_across_folds:
        yield (
            f"warning: {len(audit.files_across_folds)} image(s) carry rows of more than one fold, which leaks training "
            f"data into the test: {_first_few(audit.files_across_folds)}"
        )
    if audit.recordings_across_folds:
        yield (
            f"warning: {len(audit.recordings_across_folds)} recording(s) (fsID) lie in more than one fold, which leaks "
            f"training data into the test: {_first_few(audit.recordings_across_folds)}"
        )
    if audit.class_id_conflicts:
        yield (
            "warning: classID disagrees with the sorted class names in "
            f"{audit.class_id_conflicts} row(s); labels follow the names"
        )
    if manifest is not None and manifest.skipped:
        skipped = [f"row {skipped.row + 1}: {skipped.file}: {skipped.reason}" for skipped in manifest.skipped]
        yield f"warning: {len(skipped)} row(s) were skipped: {_first_few(skipped)}"


def _first_few(names: tuple[str, ...] | list[str]) -> str:
    more = f", … and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
