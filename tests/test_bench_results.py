"""Contract of result files: the targets, the READMEs' tables and the figures follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmarking
import plot
import pytest
import readme_tables
import targets
from harness import records

from quaclrs.errors import DataError

CPU = {"cpu": "a processor", "cpus_usable": 2, "python": "3.11", "packages": {"torch": "2.14"}, "commit": "1"}


def write(folder: Path, what: str, rows: list[dict[str, Any]], date: str = "2026-01-02", **more: Any) -> None:
    environment = CPU | ({"gpu": {"name": more.pop("gpu")}} if "gpu" in more else {})
    document = {"what": what, "date": date, "command": "", "setting": more, "rows": rows, "environment": environment}
    (folder / f"{what}_{len(list(folder.iterdir()))}.json").write_text(json.dumps(document))


def row(
    name: str, group: str = "a group", rate: float = 100.0, ratio: float | None = 1.0, **more: Any
) -> dict[str, Any]:
    baseline = more.pop("baseline", "FFCV, raw")
    bounded = {"bounded_by": more.pop("bounded_by")} if "bounded_by" in more else {}
    return {
        "group": group,
        "name": name,
        "median_images_per_s": rate,
        "ratio_to_baseline": ratio,
        "baseline": baseline,
        "images_per_s": [0.9 * rate, rate, 1.1 * rate],
        "facts": more,
    } | bounded


def line_of(table: str, what: str) -> list[str]:
    found = [line for line in table.splitlines() if line.startswith(f"| {what}")]
    assert len(found) == 1, what
    return [cell.strip() for cell in found[0].strip("|").split("|")]


# ---------------------------------------------------------------------- targets


def test_nothing_measured(tmp_path: Path) -> None:
    table = targets.targets_table(tmp_path)
    assert line_of(table, "synthetic images") == ["synthetic images, images/s", "≥ 50", "", "", "not measured"]
    gpu = [line for line in table.splitlines() if line.startswith("| H200")]
    assert len(gpu) == 2
    assert all(line.endswith("| not measured: no GPU was at hand |") for line in gpu)


def test_targets_met_and_missed(tmp_path: Path) -> None:
    group = "nothing to decode, float32"
    missed = row(
        "mapped, indexed shards", group, 300, 0.5, bounded_by="writing", share_of_limit=0.75, bound_by="memory writes"
    )
    write(
        tmp_path,
        "load",
        [missed, row("resident, indexed shards", group, ratio=2.6), row("writing", group, 400, limit=True)],
    )
    write(tmp_path, "pack", [row("synthesis", rate=70), row("pack png", ratio=0.8, baseline="something else")])
    table = targets.targets_table(tmp_path)
    assert line_of(table, "`mapped`, `indexed`")[1:] == [
        *("≥ 2.50", "0.50", "0.20"),
        "bound by memory writes, at 0.75 of the limit (writing: 400 images/s)",
    ]
    assert line_of(table, "`resident`, `indexed`")[1:] == ["≥ 2.50", "2.60", "1.04", "met"]
    assert line_of(table, "synthetic")[1:] == ["≥ 50", "70", "1.40", "met"]
    assert line_of(table, "packing `png`")[-1] == "not measured"  # against something else


def test_the_worst_model_counts_and_none_may_be_missing(tmp_path: Path) -> None:
    rows = [
        row(
            "train, mapped, indexed",
            f"{name}, batch 16",
            ratio=0.96 + i / 100,
            model_name=name,
            data_wait=i / 100,
            bound_by="host",
        )
        for i, name in enumerate(targets.TRAINED_MODELS)
    ]
    write(tmp_path, "train", rows[1:])
    assert line_of(targets.targets_table(tmp_path), "trained")[-1] == "not measured"
    write(tmp_path, "train", rows, date="2026-01-03")
    first, *_, last = targets.TRAINED_MODELS
    table = targets.targets_table(tmp_path)
    assert line_of(table, "trained")[2:] == [f"0.96 ({first})", "1.01", "met"]
    assert line_of(table, "waiting")[1:] == ["≤ 2.0%", f"6.0% ({last})", "3.00", "bound by host"]


def test_upper_bounds_take_the_largest(tmp_path: Path) -> None:
    rows = [
        {
            "samples": samples,
            "first_batch_s": first,
            "resident_mb_added_at_most": 150 + first,
            "images_per_s": 9.0,
            "open_s": 0.1,
        }
        for samples, first in ((1000, 9.0), (57_918, 0.5), (57_918, 1.2))
    ]
    write(tmp_path, "scaling", rows)
    table = targets.targets_table(tmp_path)
    assert line_of(table, "`mapped`, first batch")[1:] == ["≤ 1.00", "1.20", "1.20", "missed"]
    assert line_of(table, "`mapped`, memory added")[1:] == ["≤ 200", "151", "0.76", "met"]


def test_only_the_gpu_that_is_meant(tmp_path: Path) -> None:
    rows = [row("resident, indexed shards", "nothing to decode, float16", 1_200_000, share_of_limit=0.7)]
    write(tmp_path, "load", rows, gpu="NVIDIA GeForce RTX 2080 Ti")
    assert line_of(targets.targets_table(tmp_path), "H200: render")[-1] == "not measured: no GPU was at hand"
    write(tmp_path, "load", rows, date="2026-01-03", gpu="NVIDIA H200")
    table = targets.targets_table(tmp_path)
    assert line_of(table, "H200: `resident`")[1:] == ["≥ 1,000,000", "1,200,000", "1.20", "met"]
    assert line_of(table, "H200: render")[1:] == ["≥ 0.60", "0.70", "1.17", "met"]


def test_the_newest_result_of_one_process_counts(tmp_path: Path) -> None:
    for date, rate, world_size in (
        ("2026-01-02", 1, 1),
        ("2026-01-04", 2, 1),
        ("2026-01-03", 3, 1),
        ("2026-01-05", 4, 2),
    ):
        write(tmp_path, "load", [row("ours", rate=rate)], date, world_size=world_size)
    found = records.find_row(records.newest_record("load", folder=tmp_path), "ours")
    assert found is not None
    assert found["median_images_per_s"] == 2
    assert records.newest_record("load", gpu=True, folder=tmp_path) is None
    assert records.find_row({"rows": [{"name": "ours", "group": "", "left_out": "broken"}]}, "ours") is None


# ---------------------------------------------------------------------- READMEs


@pytest.mark.parametrize("document", readme_tables.DOCUMENTS, ids=lambda path: path.parent.name)
def test_readmes_hold_what_the_results_make_of_them(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert readme_tables.fill_blocks(text) == text, "run benchmarks/readme_tables.py"


def test_the_targets_are_shown() -> None:
    text = (benchmarking.BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert f"<!-- table: targets -->\n{targets.targets_table()}\n<!-- /table -->" in text


def test_blocks_are_made_anew(tmp_path: Path) -> None:
    group = "nothing to decode, uint8"
    facts = {
        "share_of_limit": 0.5,
        "bound_by": "render",
        "first_batch_s": 0.0123,
        "host_peak_mb": 812.6,
        "num_workers": 2,
    }
    rows = [
        row("FFCV, raw", group, 1234.4),
        row("mapped, indexed shards", group, 2000, 1.62, **facts),
        row("copying", group, 4000, 3.24, limit=True),
        {"group": group, "name": "LitData", "left_out": "no such version"},
    ]
    write(tmp_path, "load", rows)
    text = "before\n<!-- table: load_uint8 -->\nold\n<!-- /table -->\nafter <!-- table: decode -->\n<!-- /table -->\n"
    made = readme_tables.fill_blocks(text, tmp_path)
    assert "old" not in made
    assert made.startswith("before\n<!-- table: load_uint8 -->\n| ")
    assert "Not measured yet." in made
    assert line_of(made, "mapped, indexed shards")[1:-1] == [
        *("2,000", "1,800 – 2,200", "1.62", "0.50", "render", "2", "0.012", "813"),
    ]
    assert line_of(made, "copying")[3:6] == ["", "", "the limit itself"]
    assert line_of(made, "LitData")[1] == "left out: no such version"
    assert readme_tables.fill_blocks(made, tmp_path) == made
    assert line_of(readme_tables.make_block("load_short", tmp_path), "mapped")[1:] == ["", "", "2,000", "1.62"]


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(
        DataError, match=r"<!-- table: lood -->: no such table; choose among targets, figure_KIND, load_short, "
    ):
        readme_tables.make_block("lood")


def test_check_changes_nothing_and_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    document.write_text("<!-- table: targets -->\nold\n<!-- /table -->\n")
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(readme_tables, "DOCUMENTS", (document,))
    assert readme_tables.main(["--check"]) == 2
    assert capsys.readouterr().err == (
        "readme_tables.py: error: README.md: its tables are not those of benchmarks/results; run "
        "benchmarks/readme_tables.py\n"
    )
    assert "old" in document.read_text()
    assert readme_tables.main([]) == 0
    assert capsys.readouterr().out == "README.md: tables rewritten\n"
    assert "old" not in document.read_text()
    assert readme_tables.main(["--check"]) == 0


# ---------------------------------------------------------------------- figures


def test_figures_of_races_and_of_sizes(tmp_path: Path) -> None:
    rows = [
        row("FFCV, raw"),
        row("ours"),
        row("writing", limit=True),
        {"group": "a group", "name": "none", "left_out": "why"},
    ]
    write(tmp_path, "load", rows)
    sizes = [
        {"samples": 10**k, "first_batch_s": 1, "resident_mb_added_at_most": 2, "images_per_s": 3} for k in range(3)
    ]
    write(tmp_path, "scaling", sizes)
    assert readme_tables.make_block("figure_load", tmp_path) == "Not measured yet.\n"
    assert plot.main([*map(str, tmp_path.glob("*.json")), "--output_dir", str(tmp_path)]) == 0
    for kind, image in (("load", "load_0.png"), ("scaling", "scaling_1.png")):
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
        assert readme_tables.make_block(f"figure_{kind}", tmp_path) == f"![{kind}](results/{image})\n"
    assert [plot._bar_colour(a_row) for a_row in rows[:3]] == ["tab:gray", "tab:blue", "tab:orange"]


def test_other_files_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    assert plot.main([str(other), "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"plot.py: error: {other}: not a result of benchmarks/ (KeyError: 'environment'); name files it wrote\n"
    )


def test_committed_figures_are_small() -> None:
    for image in records.RESULTS.glob("*.png"):
        assert image.stat().st_size < 150_000, image.name


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/a/b", "b"),
        ("--work_dir=/a/b", "--work_dir=b"),
        ("load", "load"),
        ("data/x.csv", "data/x.csv"),
        ("--shards=x", "--shards=x"),
    ],
)
def test_a_command_line_names_no_folder_of_the_machine(argument: str, kept: str) -> None:
    assert records._strip_folder(argument) == kept
