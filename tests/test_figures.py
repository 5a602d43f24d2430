"""Contract of the READMEs: every figure about speed, memory or size is in a result file of the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
DOCUMENTS = {"README.md": ("Speed",), "benchmarks/README.md": ("Measured",)}
"""File to the headings under which every figure must have been measured."""

_NUMBER = re.compile(r"(?<![\w.,/×-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w/×])")
_NAMES = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|\bsm_\d+|\b\d+×\d+\b")
"""Code, links, and sizes: not figures."""


def sections(text: str, headings: tuple[str, ...]) -> Iterator[str]:
    """What stands under each of ``headings``, without code blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        if heading.strip() in headings:
            yield body


def numbers(text: str) -> list[str]:
    return _NUMBER.findall(_NAMES.sub(" ", text))


def leaves(value: Any) -> Iterator[float]:
    """All numbers in a JSON value, those in its texts included (versions, names of processors)."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", value))
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    else:
        for part in value:
            yield from leaves(part)


def measured(figure: str, among: list[float]) -> bool:
    """Whether ``figure`` is one of ``among``, or 100 times one (percent), rounded as it is printed."""
    decimals = len(figure.partition(".")[2])
    value = float(figure.replace(",", ""))
    return any(abs(round(found, decimals) - value) < 1e-9 for leaf in among for found in (leaf, 100 * leaf))


def results() -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in RESULTS]


def rows_named(name: str) -> list[dict[str, Any]]:
    """The rows of all results that a table's first cell stands for: by their own name, or that of their group."""
    return [
        row
        for result in results()
        for row in result["rows"]
        if name in (row.get("name"), row.get("group"), str(row.get("samples")))
    ]


def table_rows(body: str) -> Iterator[list[str]]:
    """The cells of each row of each table, without head and rule."""
    lines = body.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|") and i > 1 and lines[i - 1].startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_say_what_was_measured(document: str) -> None:
    checked = 0
    for body in sections((ROOT / document).read_text(encoding="utf-8"), DOCUMENTS[document]):
        for name, *cells in table_rows(body):
            found = rows_named(name.replace(",", "") if name.replace(",", "").isdecimal() else name)
            assert found, f"{document}: no result file has a row {name!r}"
            among = [leaf for row in found for leaf in leaves(row)]
            for figure in numbers(" | ".join(cells)):
                assert measured(figure, among), f"{document}: {figure} of {name!r} is in no result file"
                checked += 1
    assert checked > 10


@pytest.mark.parametrize("document", DOCUMENTS)
def test_prose_says_what_was_measured(document: str) -> None:
    among = [leaf for result in results() for leaf in leaves(result)]
    for body in sections((ROOT / document).read_text(encoding="utf-8"), DOCUMENTS[document]):
        prose = "\n".join(line for line in body.splitlines() if not line.startswith("|"))
        missing = [figure for figure in numbers(prose) if not measured(figure, among)]
        assert missing == [], f"{document}: figures that are in no result file"


def test_results_name_their_circumstances() -> None:
    assert RESULTS
    for path, result in zip(RESULTS, results(), strict=True):
        environment = result["environment"]
        assert {"what", "date", "command", "setting", "rows"} <= set(result), path.name
        assert {"cpu", "cpus_usable", "python", "packages", "commit"} <= set(environment), path.name
        assert path.name.startswith(f"{result['what']}_"), path.name
        assert result["date"] in path.name
        assert "/" not in result["command"].replace("benchmarks/", ""), f"{path.name}: a folder of one machine"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234 images/s at 224×224 with `--batch 7`", ["1,234"]),
        ("0.95 of [FFCV 2](http://x/9), 3 %", ["0.95", "3"]),
        ("ResNet18, sm_90, in 12, or 1,040 cases", ["12", "1,040"]),
    ],
)
def test_what_counts_as_a_figure(text: str, expected: list[str]) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [
        ("0.93", 0.9256, True),
        ("0.92", 0.9256, False),
        ("93", 0.93, True),
        ("1,234", 1233.6, True),
        ("1,234", 1234.6, False),
    ],
)
def test_rounding(figure: str, value: float, expected: bool) -> None:
    assert measured(figure, [value]) is expected
