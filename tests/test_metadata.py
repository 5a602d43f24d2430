"""Contract of data/metadata.py: it reads valid CSVs unchanged, and refuses others by file, row and value."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from png_trees import CLASSES, COLUMNS, FOLDS, PngTree, make_row, write_csv

from quaclrs.config import Columns
from quaclrs.data.metadata import Metadata, parse_metadata, read_metadata
from quaclrs.errors import DataError
from quaclrs.shards.packing.summary import data_warnings

HEADER = ",".join(COLUMNS)
GOOD = "1-3-orig.png,1.wav,1,1,0,dog,original"
OTHER = "2-3-orig.png,2.wav,2,2,1,horn,noise_5dB"


def parse(*lines: str, end: str = "\n", columns: Columns | None = None) -> Metadata:
    return parse_metadata("".join(line + end for line in lines).encode(), Path("here/data.csv"), columns or Columns())


def refusal(*lines: str) -> str:
    """The message about a CSV that must be refused: one line that names the file."""
    with pytest.raises(DataError) as caught:
        parse(*lines)
    message = str(caught.value)
    assert message.startswith(str(Path("here/data.csv")))
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def with_value(column: str, value: str) -> str:
    values = GOOD.split(",")
    values[COLUMNS.index(column)] = value
    return ",".join(values)


def test_rows_become_files_labels_and_folds() -> None:
    metadata = parse(HEADER, GOOD, OTHER)
    assert metadata.file == ["1-3-orig.png", "2-3-orig.png"]
    assert metadata.classes == ("dog", "horn")
    assert metadata.label.tolist() == [0, 1]
    assert metadata.fold.tolist() == [1, 2]
    assert metadata.label.dtype == metadata.fold.dtype == np.int64
    assert metadata.row_json(1) == dict(zip(COLUMNS, OTHER.split(","), strict=True))


def test_fingerprint_is_the_sha256_of_the_files_bytes(png_tree: PngTree) -> None:
    metadata = read_metadata(png_tree.csv_file)
    raw = png_tree.csv_file.read_bytes()
    assert metadata.raw == raw
    assert metadata.fingerprint == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_mark_and_line_ends_change_nothing(mark: str, end: str) -> None:
    plain, marked = parse(HEADER, GOOD, OTHER), parse(mark + HEADER, GOOD, OTHER, end=end)
    assert marked.table.equals(plain.table)
    assert marked.file == plain.file
    assert marked.fold.tolist() == plain.fold.tolist()


def test_extra_columns_are_kept() -> None:
    metadata = parse(HEADER + ",licence", GOOD + ",CC-BY", OTHER + ",")
    assert metadata.row_json(0)["licence"] == "CC-BY"
    assert metadata.row_json(1)["licence"] == ""
    assert metadata.label.tolist() == [0, 1]


def test_order_of_columns_does_not_matter() -> None:
    metadata = parse("class,fold,spec_file_name", "dog,3,a.png")
    assert (metadata.file, metadata.classes, metadata.fold.tolist()) == (["a.png"], ("dog",), [3])


@pytest.mark.parametrize("name", ["NA", "007", "null", "1.0", "None", "true"])
def test_class_names_stay_text(name: str) -> None:
    assert parse(HEADER, with_value("class", name)).classes == (name,)


def test_columns_can_have_other_names() -> None:
    columns = Columns(file="path", label="genre", fold="part")
    metadata = parse("part,path,genre", "2,a/b.png,rock", columns=columns)
    assert (metadata.relative_path(0), metadata.classes) == ("fold2/a/b.png", ("rock",))


@pytest.mark.parametrize("column", ["spec_file_name", "class", "fold"])
def test_a_missing_column_is_named_with_those_found_and_the_flags(column: str) -> None:
    message = refusal(HEADER.replace(column, "renamed"), GOOD)
    assert f"no column {column!r}" in message
    assert "renamed" in message
    assert "--file_column, --label_column, --fold_column" in message


@pytest.mark.parametrize("column", ["orig_file_name", "fsID", "classID", "augmentation"])
def test_other_columns_may_be_missing(column: str) -> None:
    keep = [i for i, name in enumerate(COLUMNS) if name != column]
    lines = [",".join(line.split(",")[i] for i in keep) for line in (HEADER, GOOD, OTHER)]
    assert parse(*lines).label.tolist() == [0, 1]


def test_semicolons_are_shown_as_what_they_make_of_the_header() -> None:
    message = refusal(HEADER.replace(",", ";"), GOOD.replace(",", ";"))
    assert "no column 'spec_file_name'; it has: spec_file_name;orig_file_name;" in message


@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
def test_an_empty_csv(content: str) -> None:
    assert "the CSV is empty; it needs a header and one row per image" in refusal(content)


def test_a_header_without_rows() -> None:
    assert "has a header but no rows" in refusal(HEADER)


def test_a_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere\.csv: cannot read the CSV \(No such file or directory\); check --csv_file"
    ):
        read_metadata(tmp_path / "nowhere.csv")


def test_a_csv_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the CSV \(Is a directory\)"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("rows_before", [0, 40_000])
def test_a_csv_that_is_not_utf8_is_refused_with_the_place(rows_before: int) -> None:
    raw = "\n".join([HEADER, *[GOOD] * rows_before, with_value("class", "d\u00f6g")]).encode("latin-1")
    with pytest.raises(DataError, match=rf"not UTF-8 text at byte {raw.index(0xF6)}; save the CSV as UTF-8"):
        parse_metadata(raw, Path("data.csv"), Columns())


def test_a_csv_in_utf16_is_refused() -> None:
    with pytest.raises(DataError, match="not UTF-8 text at byte 0; save the CSV as UTF-8"):
        parse_metadata(f"{HEADER}\n{GOOD}\n".encode("utf-16"), Path("data.csv"), Columns())


@pytest.mark.parametrize(
    "fold", ["0", "-1", "1.5", "1.0", "a", "1e1", "+1", "0x1", "00", "1_0", "10000", "99999999999999999999", "١"]
)
def test_a_fold_that_is_not_a_positive_integer(fold: str) -> None:
    message = refusal(HEADER, GOOD, OTHER, with_value("fold", fold))
    assert f"row 3: column 'fold' is {fold!r}, not a whole number from 1 to 9999" in message


@pytest.mark.parametrize(("text", "fold"), [("3", 3), (" 3", 3), ("3 ", 3), ("03", 3), ("9999", 9999)])
def test_ways_to_write_a_fold(text: str, fold: int) -> None:
    metadata = parse(HEADER, with_value("fold", text))
    assert metadata.fold.tolist() == [fold]
    assert metadata.relative_path(0) == f"fold{fold}/1-3-orig.png"


@pytest.mark.parametrize("value", ["", " ", "NaN", "nan", '""', "\t"])
@pytest.mark.parametrize("column", ["spec_file_name", "class", "fold"])
def test_a_missing_value_is_named_with_its_row(column: str, value: str) -> None:
    message = refusal(HEADER, GOOD, with_value(column, value), with_value(column, value))
    shown = value.strip('"')
    assert (
        f"row 2: column {column!r} is {shown!r}, a missing value (2 such row(s)); fill in or delete the row" in message
    )


def test_gaps_elsewhere_are_fine() -> None:
    assert parse(HEADER, with_value("fsID", ""), with_value("augmentation", "nan")).label.tolist() == [0, 0]


def test_a_row_with_too_few_values() -> None:
    assert "row 2: column 'class' is" in refusal(HEADER, GOOD, "2-3-orig.png,2.wav,2,2")


def test_a_row_with_too_many_values() -> None:
    assert "Expected 7 fields in line 3, saw 8" in refusal(HEADER, GOOD, OTHER + ",surplus")


def test_a_comma_at_the_end_of_every_row_does_not_move_values_into_other_columns() -> None:
    message = refusal("x,spec_file_name,class,fold,y", "1,a.png,dog,1,2,", "3,b.png,cat,1,2,")
    assert "row 1 has more values than the header has columns" in message


def test_a_quote_that_never_ends() -> None:
    assert "not a CSV" in refusal(HEADER, '"' + GOOD, OTHER)


@pytest.mark.parametrize(
    "file",
    [
        "../a.png",
        "x/../../a.png",
        "..",
        "/etc/passwd.png",
        "//host/a.png",
        "C:\\a.png",
        "C:a.png",
        "c:/a.png",
        "\\a.png",
        "\\\\host\\share\\a.png",
        "..\\a.png",
        "x\\..\\..\\a.png",
        "a\0.png",
    ],
)
def test_a_path_that_leaves_the_folder(file: str) -> None:
    message = refusal(HEADER, GOOD, with_value("spec_file_name", file))
    assert (
        f"row 2: the image {file!r} is absolute or climbs out with '..'; paths must stay below --spectrograms_dir"
        in message
    )


@pytest.mark.parametrize("file", ["a..b.png", "...png", "x/y/a.png", "-a.png", "ä ö.png", "a.b.png"])
def test_odd_names_that_stay_inside(file: str) -> None:
    assert parse(HEADER, with_value("spec_file_name", file)).file == [file]


def test_labels_follow_the_sorted_class_names_not_the_file_name_or_class_id() -> None:
    rows = ["9-0-orig.png,,,1,0,zebra,", "9-1-orig.png,,,1,1,ant,", "9-2-orig.png,,,1,2,Moth,"]
    metadata = parse(HEADER, *rows)
    assert metadata.classes == ("Moth", "ant", "zebra")  # as Python sorts text
    assert metadata.label.tolist() == [2, 1, 0]
    assert metadata.audit().class_id_conflicts == 2


def test_labels_of_the_real_thirteen_classes_are_their_class_ids(png_tree: PngTree) -> None:
    metadata = read_metadata(png_tree.csv_file)
    assert metadata.classes == CLASSES
    assert metadata.label.tolist() == [int(row["classID"]) for row in png_tree.rows]
    named = [int(row["spec_file_name"].split("-")[1]) for row in png_tree.rows]
    assert metadata.label.tolist() != named
    assert metadata.audit().class_id_conflicts == 0


def test_audit_of_a_clean_tree(png_tree: PngTree) -> None:
    metadata = read_metadata(png_tree.csv_file)
    audit = metadata.audit()
    for label, name in enumerate(CLASSES):
        for position, fold in enumerate(FOLDS):
            expected = sum(row["class"] == name and row["fold"] == str(fold) for row in png_tree.rows)
            assert audit.counts[label, position] == expected
    assert metadata.fold_numbers == FOLDS
    assert audit.rows_sharing_a_file == 20  # pairs, one in each of ten folds
    assert audit.conflicting_files == ()
    assert audit.recordings_across_folds == ()


def test_rows_share_a_file_only_inside_one_fold(tmp_path: Path) -> None:
    rows = [make_row("police", 1, recording=5) for _ in range(3)] + [
        make_row("police", fold, recording=5) for fold in (2, 3)
    ]
    audit = read_metadata(write_csv(tmp_path / "data.csv", rows)).audit()
    assert audit.rows_sharing_a_file == 3


def test_a_file_of_two_classes_is_reported(tmp_path: Path) -> None:
    rows = [make_row("police", 4), make_row("police", 4) | {"class": "traffic"}, make_row("traffic", 4)]
    audit = read_metadata(write_csv(tmp_path / "data.csv", rows)).audit()
    assert audit.conflicting_files == (f"fold4/{rows[0]['spec_file_name']}",)


def test_recordings_in_two_folds_are_reported(tmp_path: Path) -> None:
    rows = [
        make_row("police", fold, recording=recording)
        for fold, recording in ((1, 7), (2, 7), (2, 8), (2, 8), (3, 9), (1, 9))
    ]
    audit = read_metadata(write_csv(tmp_path / "data.csv", rows)).audit()
    assert audit.recordings_across_folds == ("7", "9")


@pytest.mark.parametrize("nothing", ["", " ", "nan", "NA", "None"])
def test_rows_without_a_recording_or_a_class_id_are_not_warned_of(nothing: str) -> None:
    rows = [f"{fold}.png,a.wav,{nothing},{fold},{nothing},dog,original" for fold in (1, 2, 3)]
    audit = parse("spec_file_name,orig_file_name,fsID,fold,classID,class,augmentation", *rows).audit()
    assert audit.recordings_across_folds == ()
    assert audit.class_id_conflicts == 0
    assert not [line for line in data_warnings(audit) if line.startswith("warning")]


def test_a_row_that_ends_before_its_recording_has_none() -> None:
    audit = parse(
        "spec_file_name,class,fold,fsID", "a.png,dog,1", "b.png,dog,2", "c.png,dog,3,7", "d.png,dog,1,7"
    ).audit()
    assert audit.recordings_across_folds == ("7",)


def test_a_csv_with_few_folds_is_fine() -> None:
    metadata = parse(HEADER, with_value("fold", "4"), with_value("fold", "2"))
    assert metadata.fold_numbers == (2, 4)
    assert metadata.audit().counts.tolist() == [[1, 1]]


def test_originals_are_told_from_augmented_rows() -> None:
    metadata = parse(HEADER, GOOD, OTHER, with_value("augmentation", "Original"))
    assert metadata.is_original is not None
    assert metadata.is_original.tolist() == [True, False, False]


def test_originals_are_unknown_without_the_column() -> None:
    assert parse("spec_file_name,fold,class", "a.png,1,dog").is_original is None


def test_images_lie_in_their_folds_folder_or_flat(tmp_path: Path) -> None:
    metadata = parse(HEADER, GOOD)
    (tmp_path / "fold1").mkdir()
    in_fold, flat = tmp_path / "fold1" / "1-3-orig.png", tmp_path / "1-3-orig.png"
    assert metadata.path(0, tmp_path) == in_fold  # where it ought to be, for the message
    flat.touch()
    assert metadata.path(0, tmp_path) == flat
    in_fold.touch()
    assert metadata.path(0, tmp_path) == in_fold


def test_a_name_too_long_for_the_file_system_is_a_missing_image(tmp_path: Path) -> None:
    metadata = parse(HEADER, with_value("spec_file_name", "a" * 300))
    assert metadata.path(0, tmp_path) == tmp_path / "fold1" / ("a" * 300)
