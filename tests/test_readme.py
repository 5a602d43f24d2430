"""Contract of the documents: their tables are the parsers', their code runs, and what they point to exists."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packing import pack_tree
from png_trees import PngTree

from quaclrs.cli import inspect, pack, synthesize, train
from quaclrs.config import DEFAULT_CSV_FILE, DEFAULT_SPECTROGRAMS_DIR
from quaclrs.training.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
CLI_README = "quaclrs/cli/README.md"
LINES_OF_README = 150
LINES_OF_LOOP = 15
OUTSIDE_THE_PARSER = {"csv_file": str(DEFAULT_CSV_FILE), "spectrograms_dir": str(DEFAULT_SPECTROGRAMS_DIR)}
"""``quaclrs-train`` fills these in when neither they nor ``--shards`` are given."""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


# --- flags and models ---


def flags_of(parser: argparse.ArgumentParser, program: str) -> dict[str, str]:
    """Flag to its default as a table shows it."""
    shown = {}
    for action in parser._actions:
        if action.dest in ("help", "version"):
            continue
        if action.dest == "num_workers" and program != train.PROGRAM:
            default = "processors"  # a number that depends on the machine
        elif action.default is None:
            default = (
                f"`{OUTSIDE_THE_PARSER[action.dest]}`"
                if program == train.PROGRAM and (action.dest in OUTSIDE_THE_PARSER)
                else ""
            )
        else:
            default = "off" if action.default is False else f"`{action.default}`"
        shown[f"--{action.dest}"] = default
    return shown


def flag_tables(document: str) -> list[dict[str, str]]:
    """Each table of flags in ``document``, one row a flag: flag to default."""
    tables = []
    for table in re.findall(r"^\| flag \| default \| \|\n\|[-|]+\|\n((?:\|.*\n)+)", text_of(document), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        tables.append({flag.strip("`"): default for flag, default, _ in rows})
    return tables


def test_flag_tables_are_the_parsers() -> None:
    packing, training, synthesis = flag_tables(CLI_README)
    assert training == flags_of(train._parser(), train.PROGRAM)
    assert packing == flags_of(pack.build_parser(), pack.PROGRAM)
    assert synthesis == flags_of(synthesize.build_parser(), synthesize.PROGRAM)
    actions = inspect.build_parser()._subparsers
    assert actions is not None
    (choices,) = (action.choices for action in actions._group_actions)
    assert choices is not None
    assert set(re.findall(r"quaclrs-inspect (\w+) SHARDS", text_of(CLI_README))) == set(choices)


@pytest.mark.parametrize(
    ("document", "line"),
    [("README.md", r"^Models, all from torchvision: (.+)\.$"), (CLI_README, r"^\| `--model_name` \| `\w+` \| (.+);")],
)
def test_model_lists_are_the_table_of_architectures(document: str, line: str) -> None:
    (listed,) = re.findall(line, text_of(document), re.MULTILINE)
    assert re.findall(r"`(\w+)`", listed) == list(ARCHITECTURES)


def test_flags_that_prose_names_exist() -> None:
    """In all documents: a flag of one of our commands, of a script here, or of a tool that is called by name."""
    commands = (
        flags_of(train._parser(), train.PROGRAM)
        | flags_of(pack.build_parser(), pack.PROGRAM)
        | flags_of(synthesize.build_parser(), synthesize.PROGRAM)
    )
    scripts = {
        flag
        for name in tracked("benchmarks")
        if name.endswith(".py")
        for flag in re.findall(r'"(--\w+)"', text_of(name))
    }
    others = {"--version", "--help", "--batch-size", "--check"}
    torchrun = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"}
    others |= torchrun | {"--array", "--requeue", "--signal", "--no-install-recommends", "--follow"}
    for document in documents():
        unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:[-_]\w+)*", text_of(document)))
        unknown -= {*commands, *scripts, *others}
        assert not unknown, document


def test_what_a_run_leaves_is_called_as_the_code_calls_it() -> None:
    from quaclrs.experiment.original_outputs import ORIGINAL_METRICS_FILE, ORIGINAL_SUMMARY_FILE
    from quaclrs.experiment.results import METRICS_FILE, SUMMARY_FILE
    from quaclrs.experiment.run import RUN_FILE
    from quaclrs.experiment.run_status import RUN_STATUS_FILE
    from quaclrs.training.checkpoint import BEST_MODEL_FILE
    from quaclrs.training.profiler import BOTTLENECK_FILE, TRACE_FILE

    section = text_of(CLI_README).partition("### What a run leaves")[2].partition("\n## ")[0]
    results = (SUMMARY_FILE, METRICS_FILE, ORIGINAL_SUMMARY_FILE, ORIGINAL_METRICS_FILE, RUN_FILE, RUN_STATUS_FILE)
    for name in (*results, BEST_MODEL_FILE, BOTTLENECK_FILE, TRACE_FILE):
        assert f"{name}`" in section, name


# --- the README ---


def test_the_readme_states_dalis_tolerance_as_the_code_does() -> None:
    from quaclrs.loaders.dali import BORDER_DIFFERENCE, INNER_DIFFERENCE

    text = " ".join(text_of("README.md").split())
    assert f"by up to {255 * INNER_DIFFERENCE:g} level (of 255), and in the outermost row or column" in text
    assert f"of pixels on each side by up to {255 * BORDER_DIFFERENCE:g}, as where" in text


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) < LINES_OF_README


def training_loop() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    assert len(code.splitlines()) <= LINES_OF_LOOP
    return str(code)


def on_tiny_data(code: str, shards: Path, loader: str) -> str:
    """The README's loop with other data and sizes; every replacement must find its place."""
    for old, new in (
        ('"shards"', repr(str(shards))),
        ("image_size=224, batch_size=64", f'image_size=32, batch_size=64, loader="{loader}", device="cpu"'),
        ("range(1, 11)", "range(1, 3)"),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def indexed_shards(png_tree: PngTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    pack_tree(png_tree, folder, encoding="indexed")
    return folder


@pytest.mark.parametrize(
    ("encoding", "loader"),
    [
        ("png", "dali"),
        ("png", "files"),
        ("png", "resident"),
        ("rgb", "mapped"),
        ("rgb", "resident"),
        ("indexed", "files"),
        ("indexed", "mapped"),
        ("indexed", "resident"),
    ],
)
def test_the_training_loop_of_the_readme(
    encoding: str, loader: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    shards: Path = request.getfixturevalue(f"{encoding}_shards")
    names: dict[str, object] = {}
    exec(on_tiny_data(training_loop(), shards, loader), names)
    names["loader"].close()  # type: ignore[attr-defined]
    names["data"].close()  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    assert re.fullmatch(r"(epoch [12]: validation accuracy \d+\.\d%\n){2}", printed)


def test_the_training_loop_as_a_script(indexed_shards: Path, tmp_path: Path) -> None:
    """Which closes nothing, and ends all the same without a word on stderr."""
    script = tmp_path / "loop.py"
    script.write_text(on_tiny_data(training_loop(), indexed_shards, "auto"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 2


# --- what documents and docstrings point to ---


@cache
def tracked(folder: str = ".") -> tuple[str, ...]:
    """The files below ``folder`` that git tracks; in a checkout without git, those that are there."""
    listed = subprocess.run(["git", "ls-files", folder], capture_output=True, text=True, check=False, cwd=ROOT)
    names = listed.stdout.splitlines() if listed.returncode == 0 else list(_files_below(folder))
    return tuple(name for name in names if (ROOT / name).is_file())


def _files_below(folder: str) -> Iterator[str]:
    """Paths from ROOT, without environments, caches and what a build leaves."""
    for place, folders, files in os.walk(ROOT / folder):
        folders[:] = [
            name
            for name in folders
            if name in (".ci", ".github")
            or (
                not (name[0] in "._" or name in ("build", "dist") or name.endswith(".egg-info"))
                and not Path(place, name, "pyvenv.cfg").exists()
            )
        ]
        yield from (Path(place, name).relative_to(ROOT).as_posix() for name in files)


def documents() -> list[str]:
    return [name for name in tracked() if name.endswith(".md")]


@cache
def folders() -> frozenset[str]:
    return frozenset(parent.as_posix() for name in tracked() for parent in Path(name).parents)


def exists(name: str, beside: str) -> bool:
    """Whether ``name`` is a file or folder of the repository: from its top, from ``beside``, or the end of a path."""
    name = name.rstrip("/")
    here = (Path(beside).parent / name).as_posix()
    if "../" in name:
        return (ROOT / here).exists()
    if "*" in name:
        return any(Path(found).match(name) for found in tracked())
    return any(found in (name, here) or found.endswith(f"/{name}") for found in (*tracked(), *folders()))


_TOP = ("quaclrs", "tests", "tools", "benchmarks", ".ci", ".github")
_PATH = re.compile(
    r"(?<![\w./~$}-])(?:"
    rf"(?:{'|'.join(map(re.escape, _TOP))})/[\w./*-]*[\w/*]"  # a path from the top
    r"|(?:\.\./)*(?:[\w*-]+/)*[\w*-]+\.(?:py|md|cfg|toml|ya?ml)"  # or anything that is source, wherever
    r")(?![\w{(])"
)
_MODULE = re.compile(r"(?<![\w.])quaclrs(?:\.[A-Za-z_]\w*)+")
_LINK = re.compile(r"\]\(([^)#\s]+)")
_NOT_OURS = {"setup.py"}
"""Names of files that are spoken of because they are not here."""


def paths_in(text: str) -> Iterator[str]:
    text = re.sub(r"\w+://\S+", " ", text)
    yield from (found for found in _PATH.findall(text) if found not in _NOT_OURS)


def comments_and_docstrings(source: str) -> str:
    """What a Python file says to its readers: strings that stand alone, and comments."""
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return "\n".join([*strings, *re.findall(r"(?:^|\s)#\s(.*)", source)])


def is_a_name_of_the_package(dotted: str) -> bool:
    """Whether ``dotted`` is a module of the package, or something that a module defines or imports at its top."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        module = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if module.is_file():
            defined = re.findall(
                r"^(?:class|def|async def)\s+(\w+)|^(\w+)\s*[:=]|^    \"(\w+)\",$|import .*\b(\w+)$",
                module.read_text(encoding="utf-8"),
                re.MULTILINE,
            )
            return end == len(parts) or parts[end] in {name for names in defined for name in names}
    return False


def spoken_texts() -> Iterator[tuple[str, str]]:
    for name in tracked():
        if name.endswith(".md"):
            yield name, text_of(name)
        elif name.endswith(".py"):
            yield name, comments_and_docstrings(text_of(name))
        elif name in ("setup.cfg", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml") or name.endswith(".yml"):
            yield name, "\n".join(re.findall(r"#\s(.*)", text_of(name)))


def test_no_sentence_points_to_a_file_that_is_not_there() -> None:
    missing = [
        f"{name}: {found}" for name, text in spoken_texts() for found in paths_in(text) if not exists(found, name)
    ]
    assert not missing, "\n".join(missing)


def test_no_link_leads_nowhere() -> None:
    for document in documents():
        for target in _LINK.findall(text_of(document)):
            assert "://" in target or (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_no_sentence_names_a_module_that_is_not_there() -> None:
    missing = [
        f"{name}: {found}"
        for name, text in spoken_texts()
        for found in _MODULE.findall(text)
        if not is_a_name_of_the_package(found)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `quaclrs/nowhere.py`, `nowhere.md`", ["quaclrs/nowhere.py", "nowhere.md"]),
        ("in benchmarks/results/ and tests/golden/losses.json.", ["benchmarks/results/", "tests/golden/losses.json"]),
        ("`/path/to/quaclrs/x.py` ~/.cache/quaclrs/demo https://a.b/quaclrs/c.py quaclrs_shards/a.tar", []),
        ("`fold_{k}/metrics.json` {output_dir}/x.md 1.py", ["1.py"]),
    ],
)
def test_what_counts_as_a_path(text: str, found: list[str]) -> None:
    assert list(paths_in(text)) == found
