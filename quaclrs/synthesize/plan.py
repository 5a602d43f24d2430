"""The rows, files and recordings of a synthetic dataset: arithmetic only, without randomness and pixels.

The plan reproduces three properties of the real metadata. Rows can share a file, because file names lack the slice of
the recording. The id in a file name is not the label. Some recordings of four classes occur in two folds under
different ids (a leak).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CLASSES = (
    "air_conditioner",
    "ambulance",
    "car_horn",
    "children_playing",
    "dog_bark",
    "drilling",
    "engine_idling",
    "firetruck",
    "gun_shot",
    "jackhammer",
    "police",
    "street_music",
    "traffic",
)
"""The classes, sorted by name; the position is the ``classID`` of the CSV."""

OLDER_IDS = (4, 0, 5, 6, 7, 8, 9, 1, 10, 11, 2, 13, 3)
"""The id in the file name, for each ``classID``.

It dates from a numbering in which the invented classes came first and a class ``siren`` (12) existed. It never equals
the classID, so code that parses labels from file names gets every label wrong.
"""

INVENTED_CLASSES = ("ambulance", "firetruck", "police", "traffic")
"""Classes with invented fsIDs: a recording may occur in another fold under another fsID."""

AUGMENTATIONS = {
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
"""Tag in the file name → value of the CSV's ``augmentation`` column."""

ROWS_PER_RECORDING = 3
_TAGS = tuple(AUGMENTATIONS)
_TWIN_PERIOD = 20
"""One in this many recordings of the invented classes is a copy of a recording in the fold before (a twin)."""
_SHARED_PERIOD = 4
"""In one of this many recordings two rows share a file."""
_FIRST_FSID = 100_000


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Determines the pixels of an image, together with the dataset's seed."""

    class_id: int
    fold: int
    """The fold of the original recording. A twin keeps it, so twins have equal pixels."""
    recording: int
    """Number of the recording within its class and fold, from 0."""
    tag: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the CSV, and the sample that its file shows."""

    spec_file_name: str
    orig_file_name: str
    fs_id: int
    fold: int
    class_id: int
    augmentation: str
    sample: Sample


def plan_rows(samples_per_class: int, folds: int) -> Iterator[Row]:
    """Yield all rows in CSV order: by class, fold, recording."""
    for class_id, fold, recording in plan_recordings(samples_per_class, folds):
        yield from recording_rows(samples_per_class, folds, class_id, fold, recording)


def plan_recordings(samples_per_class: int, folds: int) -> Iterator[tuple[int, int, int]]:
    """Yield all (class id, fold, recording number). The last recording of a class and fold may have fewer rows."""
    for class_id in range(len(CLASSES)):
        for fold in range(1, folds + 1):
            for recording in range(-(-samples_per_class // ROWS_PER_RECORDING)):
                yield class_id, fold, recording


def recording_rows(samples_per_class: int, folds: int, class_id: int, fold: int, recording: int) -> list[Row]:
    """The rows of one recording: the original and augmented copies. Two rows may share a file."""
    count = min(ROWS_PER_RECORDING, samples_per_class - ROWS_PER_RECORDING * recording)
    source_fold = _source_fold(class_id, fold, recording)
    fs_id = _FIRST_FSID + (recording * folds + fold - 1) * len(CLASSES) + class_id
    stem = f"{fs_id}-{OLDER_IDS[class_id]}"
    rows: list[Row] = []
    tags = _tags(count, turn=class_id + source_fold + recording)
    for position, tag in enumerate(tags):
        # Two rows with one tag are two slices: the audio file's name has the slice's number, the image's has not.
        audio_slice = tags[:position].count(tag)
        rows.append(
            Row(
                spec_file_name=f"{stem}-{tag}.png",
                orig_file_name=f"{stem}-0-{audio_slice}.wav",
                fs_id=fs_id,
                fold=fold,
                class_id=class_id,
                augmentation=AUGMENTATIONS[tag],
                sample=Sample(class_id=class_id, fold=source_fold, recording=recording, tag=tag),
            )
        )
    return rows


def _tags(count: int, turn: int) -> list[str]:
    """The tags of the ``count`` rows of a recording. ``turn`` varies them, so that a small dataset has all twelve."""
    if count == 1:
        return [_TAGS[turn % len(_TAGS)]]
    copies = _TAGS[1:]
    tags = ["orig"] + [copies[(turn * (ROWS_PER_RECORDING - 1) + i) % len(copies)] for i in range(count - 1)]
    if count > 2 and turn % _SHARED_PERIOD == 0:
        tags[-1] = tags[-2]
    return tags


def _source_fold(class_id: int, fold: int, recording: int) -> int:
    """The recording's own fold, or the fold before it for one in twenty recordings of the invented classes (a twin).

    Two neighbouring folds never both copy, so the source of a twin is always an original.
    """
    if CLASSES[class_id] not in INVENTED_CLASSES or fold == 1:
        return fold
    # The constants are chosen so that each of the four classes has a twin in the default dataset.
    position = 2 * INVENTED_CLASSES.index(CLASSES[class_id]) + fold + 7 * recording + 10
    return fold - 1 if position % _TWIN_PERIOD == 0 else fold
