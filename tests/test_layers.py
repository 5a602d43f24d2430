"""Contract of the package's structure: imports point one way, heavy libraries load only where needed, and each fact is
stated once.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "quaclrs"

LAYERS = (
    "cli",
    "api",
    "experiment",
    "report",
    "training",
    "loaders",
    "shards",
    "synthesize",
    "imaging",
    "data",
    "system",
    "config",
    "settings",
    "errors",
    "__init__",
)
"""The folders and files of ``quaclrs/`` from the top down: a layer imports itself and those below it, never one above.
"""

SHARED_BY_LOADERS = ("loaders.base", "loaders.dataset", "loaders.rendering")


# --- which module imports which, read from the sources ---


@cache
def _sources() -> dict[str, str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths
    }


def sources() -> dict[str, str]:
    """Module (``loaders.files``; ``loaders.__init__`` for a folder itself) to source."""
    return dict(_sources())


class _WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out the blocks ``if TYPE_CHECKING:``, which are never executed."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


@cache
def imported_names(source: str, module: str = "", at_run_time: bool = False) -> tuple[str, ...]:
    """Full dotted names of everything imported anywhere in ``source``, inside functions too.

    ``at_run_time`` leaves out what only type checkers see.
    """
    tree: ast.AST = ast.parse(source)
    if at_run_time:
        tree = _WithoutTypeChecking().visit(tree)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["quaclrs", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += (f"{base}.{alias.name}" for alias in node.names)
    return tuple(names)


def imported_modules(module: str, source: str, modules: set[str], at_run_time: bool = False) -> set[str]:
    """The package's modules that ``source`` imports; a folder counts as its ``__init__``."""
    found = set()
    for name in imported_names(source, module, at_run_time):
        parts = name.split(".")
        if parts[0] != "quaclrs":
            continue
        for end in range(len(parts), 0, -1):  # the longest prefix that is a module; the rest are names in it
            candidate = ".".join(parts[1:end])
            folder = f"{candidate}.__init__".removeprefix(".")
            if candidate in modules or folder in modules:
                found.add(candidate if candidate in modules else folder)
                break
    return found - {module}


def layer(module: str) -> str:
    return module.split(".")[0]


def upward_imports(all_sources: dict[str, str]) -> list[str]:
    """Each import of a layer above the importing module's own, and each import of a loader by another loader.

    ``quaclrs/__init__.py`` may show type checkers the public API, which it loads when a name is first used.
    """
    found = []
    for module, source in all_sources.items():
        for imported in sorted(imported_modules(module, source, set(all_sources), at_run_time=module == "__init__")):
            upward = LAYERS.index(layer(imported)) < LAYERS.index(layer(module))
            siblings = (
                layer(module) == layer(imported) == "loaders"
                and imported not in SHARED_BY_LOADERS
                and module != "loaders.__init__"
            )
            if upward or siblings:
                found.append(f"{module} imports {imported}")
    return found


def test_every_module_has_a_layer() -> None:
    assert sorted({layer(module) for module in sources()}) == sorted(LAYERS)


def test_imports_point_one_way() -> None:
    assert upward_imports(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("shards.reader", "from quaclrs.training.loop import evaluate"),
        ("data.sampling", "import quaclrs.config, quaclrs.shards.reader"),
        ("training.loop", "from quaclrs import experiment"),
        ("data.metadata", "def late():\n    from quaclrs.loaders.base import Batch"),
        ("imaging.png", "from ..shards import reader"),
        ("loaders.dali", "from quaclrs.loaders.files import FilesLoader"),
        ("loaders.files", "from quaclrs.loaders import choose_loader"),
        ("experiment.fold", "from quaclrs.api import make_loader"),
        ("__init__", "from quaclrs import api"),
    ],
)
def test_an_import_the_other_way_is_found(module: str, line: str) -> None:
    all_sources = sources()
    all_sources[module] += f"\n{line}\n"
    assert [found.partition(" ")[0] for found in upward_imports(all_sources)] == [module]


def test_there_is_no_import_cycle() -> None:
    all_sources = sources()
    waiting = {
        module: imported_modules(module, source, set(all_sources), at_run_time=True)
        for module, source in all_sources.items()
    }
    while waiting:
        free = [module for module, imported in waiting.items() if not imported & set(waiting)]
        assert free, f"among these: {sorted(waiting)}"
        waiting = {module: imported for module, imported in waiting.items() if module not in free}


def test_reading_shards_needs_nothing_of_the_packer() -> None:
    all_sources = sources()
    read_side = [module for module in all_sources if module.startswith("shards.") and ".packing." not in module]
    assert {"shards.format", "shards.work_folder", "shards.reader", "shards.verify"} < set(read_side)
    for module in read_side:
        imported = imported_modules(module, all_sources[module], set(all_sources))
        assert not {name for name in imported if name.startswith("shards.packing.")}, module


def importers(library: str) -> set[str]:
    names = {module: set(imported_names(source)) for module, source in sources().items()}
    return {
        module
        for module, found in names.items()
        if any(name == library or name.startswith(f"{library}.") for name in found)
    }


def test_who_imports_the_heavy_libraries() -> None:
    assert importers("nvidia") == {"loaders.dali"}
    drawing = {"report.plots", "system.matplotlib_import"}
    assert {layer(module) for module in importers("matplotlib") - drawing} <= {"synthesize"}
    assert "report.plots" in importers("matplotlib")
    assert importers("sklearn") == {"report.metrics"}
    assert importers("captum") == {"report.gradcam"}
    assert "torch" in set(imported_names(sources()["training.loop"]))  # the scan sees what is there


def test_one_file_reads_the_environment_of_torchrun() -> None:
    def strings(source: str) -> set[str]:
        return {
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }

    readers = {module for module, source in sources().items() if strings(source) & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    assert readers == {"training.distributed"}


# --- what an import loads, seen from outside ---

_COMMAND = "from quaclrs.cli.{} import main\ntry:\n    main({})\nexcept SystemExit:\n    pass"
COMMANDS = ("train", "pack", "inspect", "synthesize")
"""The modules of ``quaclrs.cli`` that are commands: ``quaclrs-train`` and so on."""
WORKER_MODULES = ("shards.packing.write_shard", "system.processes")
"""What every worker process of a packing imports anew."""
PROBES = {
    "package": "import quaclrs",
    "workers": "".join(f"import quaclrs.{module}\n" for module in WORKER_MODULES),
    "drawing": "import quaclrs.synthesize.write",
    "packing": "import quaclrs.shards.packing.pack, quaclrs.shards.reader, quaclrs.shards.verify\n"
    "import quaclrs.shards.packing.summary, quaclrs.data.metadata",
    **{f"{name} {flag}": _COMMAND.format(name, [flag]) for name in COMMANDS for flag in ("--help", "--version")},
    **{f"{name} --unknown": _COMMAND.format(name, ["--unknown", "x"]) for name in COMMANDS},
}

_PROBE_RUNNER = """
import io, json, os, sys, traceback
for code in json.load(sys.stdin):
    reading, writing = os.pipe()
    if os.fork() == 0:
        before = set(sys.modules)
        sys.stdout = sys.stderr = io.StringIO()
        try:
            exec(code, {"__name__": "__probe__"})
            report = sorted(set(sys.modules) - before)
        except BaseException:
            report = traceback.format_exc()
        os.write(writing, json.dumps(report).encode() + b"\\n")
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        print(pipe.read(), end="")
    os.wait()
"""
"""Runs each snippet in a fork of one fresh interpreter, and prints what it loaded."""


@cache
def _probe_reports() -> dict[str, frozenset[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE_RUNNER],
        input=json.dumps(list(PROBES.values())),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    for report in reports:
        assert isinstance(report, list), report
    return {name: frozenset(report) for name, report in zip(PROBES, reports, strict=True)}


def modules_loaded_by(probe: str) -> frozenset[str]:
    """Full names of the modules that a fresh interpreter loads to run the snippet ``probe`` of :data:`PROBES`."""
    return _probe_reports()[probe]


def packages_loaded_by(probe: str) -> set[str]:
    """Top-level names of what ``probe`` loads, without the standard library."""
    return (
        {name.partition(".")[0] for name in modules_loaded_by(probe)} - set(sys.stdlib_module_names) - {"__mp_main__"}
    )


def test_importing_the_package_loads_no_library() -> None:
    """Which keeps it under 0.2 s: no third-party module, and of the standard library next to nothing."""
    assert packages_loaded_by("package") == {"quaclrs"}
    assert {name for name in modules_loaded_by("package") if name.startswith("quaclrs")} == {"quaclrs"}
    assert len(modules_loaded_by("package")) < 10


@pytest.mark.parametrize("flag", ["--help", "--version", "--unknown"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_its_flags_without_libraries(command: str, flag: str) -> None:
    assert packages_loaded_by(f"{command} {flag}") == {"quaclrs"}
    assert f"quaclrs.cli.{command}" in modules_loaded_by(f"{command} {flag}")


def test_packing_workers_start_light() -> None:
    loaded = packages_loaded_by("workers")
    assert "quaclrs" in loaded
    assert loaded <= {"quaclrs", "numpy", "PIL", "isal", "tqdm"}


def test_drawing_workers_start_light() -> None:
    loaded = modules_loaded_by("drawing")
    assert "numpy" in loaded
    assert not loaded & {"torch", "pandas", "sklearn", "matplotlib.pyplot"}


def test_packing_and_inspecting_need_no_torch() -> None:
    loaded = packages_loaded_by("packing")
    assert "pandas" in loaded
    assert not loaded & {"torch", "torchvision", "nvidia", "matplotlib", "sklearn", "captum"}


# --- each fact is stated once ---


def requirements() -> dict[str, list[str]]:
    """``install_requires`` and each extra of setup.cfg to its distributions' names."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = {"install_requires": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {
        name: [re.split(r"[^A-Za-z0-9._-]", line.strip())[0].lower() for line in text.splitlines() if line.strip()]
        for name, text in lists.items()
    }


def test_no_dependency_is_stated_twice() -> None:
    lists = requirements()
    assert {"torch", "nvidia-dali-cuda120", "pillow"} <= set(lists["install_requires"])
    for name, names in lists.items():
        assert len(set(names)) == len(names), name
        assert name == "install_requires" or not set(names) & set(lists["install_requires"]), name
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = re.findall(r"^\[+([^\]]+)\]+", pyproject, flags=re.MULTILINE)
    assert "build-system" in tables
    assert all(table == "build-system" or table.startswith("tool.") for table in tables)  # so no [project]
    assert re.findall(r"^(?:optional-)?(?:dependencies|requires)\b.*", pyproject, flags=re.MULTILINE) == [
        'requires = ["setuptools>=77"]'
    ]
    assert not [path.name for path in ROOT.glob("*requirements*")] + [path.name for path in ROOT.glob("setup.py")]


def test_all_checks_mean_the_same_pythons() -> None:
    """The oldest and the newest of setup.cfg's classifiers."""
    metadata = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)$", metadata, re.MULTILINE)
    oldest, newest = pythons[0], pythons[-1]
    assert f"python_requires = >={oldest}\n" in metadata
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'python_version = "{oldest}"' in settings
    assert f'target-version = "py{oldest.replace(".", "")}"' in settings
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f'python: ["{oldest}", "{newest}"]' in workflow
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        assert f"Python {oldest} to {newest}" in (ROOT / document).read_text(encoding="utf-8").replace("(", ""), (
            document
        )


def in_use() -> set[str]:
    """The modules that a command of ours, or a user of the Python API, can come to import."""
    all_sources = sources()
    found: set[str] = set()
    new = {"api", *(f"cli.{command}" for command in COMMANDS)}
    while new:
        found |= new
        new = set().union(*(imported_modules(module, all_sources[module], set(all_sources)) for module in new)) - found
    return found


def test_every_library_that_is_imported_is_a_dependency() -> None:
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn", "nvidia": "nvidia-dali-cuda120"}
    assert {"training.loop", "loaders.dali", "shards.verify", "report.gradcam"} <= in_use()
    imported = {name.partition(".")[0] for module in in_use() for name in imported_names(sources()[module])}
    third_party = imported - set(sys.stdlib_module_names) - {"quaclrs"}
    assert {"torch", "numpy"} <= third_party
    with_torch = {"triton"}  # torch brings the version that it was built for
    assert {distributions.get(name, name) for name in third_party - with_torch} <= set(
        requirements()["install_requires"]
    )


# --- commands ---


def declared_commands() -> dict[str, str]:
    """Console script to ``module:function``, as setup.cfg has them."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options.entry_points"]["console_scripts"].split("\n")
    return {name.strip(): target.strip() for name, _, target in (line.partition("=") for line in lines if line)}


def test_licence_and_commands() -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert declared_commands() == {f"quaclrs-{name}": f"quaclrs.cli.{name}:main" for name in COMMANDS}
    for name in COMMANDS:
        command = importlib.import_module(f"quaclrs.cli.{name}")
        assert callable(command.main)
        assert f"quaclrs-{name}" == command.PROGRAM
    (installed,) = importlib.metadata.entry_points(group="console_scripts", name="quaclrs-train")
    assert installed.value == declared_commands()["quaclrs-train"]


@pytest.mark.parametrize(
    ("tool", "command"),
    [("shard_dataset", "pack"), ("inspect_shards", "inspect"), ("synthesize_dataset", "synthesize")],
)
def test_a_tool_is_a_command_under_its_former_name(tool: str, command: str) -> None:
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main.func is importlib.import_module(f"quaclrs.cli.{command}").main
    assert module.main.keywords == {"program": f"{tool}.py"}


def test_no_message_names_a_path_that_is_not_installed() -> None:
    """Whoever did ``pip install`` has commands, and no folder ``tools``."""
    for module, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"\b(?:tools|benchmarks|tests)/\w+|\b(?:shard_dataset|inspect_shards)\b", node.value)
                assert not named, f"quaclrs.{module}, line {node.lineno}"
