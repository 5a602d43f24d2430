"""Contract of the package's structure: imports point one way, heavy libraries are loaded only where needed, one fact
has one home.
"""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "quaclrs"

LAYERS = (
    "cli",
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
    "errors",
    "__init__",
)
"""The folders and files of ``quaclrs/`` from the top down: a layer imports itself and those below it, never one above.
"""


SHARED_BY_LOADERS = ("loaders.base", "loaders.dataset", "loaders.rendering")


# --- who imports whom, read from the sources ---


def sources() -> dict[str, str]:
    """Module (``loaders.files``; ``loaders.__init__`` for a folder itself) to source."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths
    }


def imported_names(source: str, module: str = "") -> Iterator[str]:
    """Full dotted names of everything imported anywhere in ``source``, those of functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["quaclrs", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(module: str, source: str, modules: set[str]) -> set[str]:
    """The package's modules that ``source`` imports; a folder counts as its ``__init__``."""
    found = set()
    for name in imported_names(source, module):
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
    """Each import of a layer above the importing module's own, and each import of a loader by another loader."""
    found = []
    for module, source in all_sources.items():
        for imported in sorted(imported_modules(module, source, set(all_sources))):
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
    ],
)
def test_an_import_the_other_way_is_found(module: str, line: str) -> None:
    all_sources = sources()
    all_sources[module] += f"\n{line}\n"
    assert [found.partition(" ")[0] for found in upward_imports(all_sources)] == [module]


def test_no_import_goes_round_in_a_circle() -> None:
    all_sources = sources()
    waiting = {module: imported_modules(module, source, set(all_sources)) for module, source in all_sources.items()}
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
    assert {layer(module) for module in importers("matplotlib") - {"report.plots"}} <= {"synthesize"}
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


def modules_loaded_by(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``code``, by their full names."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded_by(code: str) -> set[str]:
    """Packages that ``code`` loads, without the standard library and what ``site`` loads at start (an editable
    installation).
    """
    found, at_start = ({name.partition(".")[0] for name in modules_loaded_by(source)} for source in (code, ""))
    return found - set(sys.stdlib_module_names) - at_start - {"__mp_main__"}


def test_importing_the_package_loads_no_library() -> None:
    assert loaded_by("import quaclrs") == {"quaclrs"}


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--batch_size", "many"]])
def test_the_command_line_reads_its_flags_without_libraries(flags: list[str]) -> None:
    code = f"from quaclrs.cli.train import main\ntry:\n    main({flags})\nexcept SystemExit:\n    pass"
    assert loaded_by(code) == {"quaclrs"}


@pytest.mark.parametrize("module", ["shards.packing.work_queue", "system.processes"])
def test_packing_workers_start_light(module: str) -> None:
    """Every spawned worker imports these anew."""
    loaded = loaded_by(f"import quaclrs.{module}")
    assert "quaclrs" in loaded
    assert loaded <= {"quaclrs", "numpy", "PIL", "isal", "tqdm"}


def test_drawing_workers_start_light() -> None:
    loaded = modules_loaded_by("import quaclrs.synthesize.write")
    assert "numpy" in loaded
    assert not loaded & {"torch", "pandas", "sklearn", "matplotlib.pyplot"}


@pytest.mark.parametrize(
    "module", ["shards.packing.pack", "shards.reader", "shards.verify", "shards.packing.summary", "data.metadata"]
)
def test_packing_and_inspecting_need_no_torch(module: str) -> None:
    loaded = loaded_by(f"import quaclrs.{module}")
    assert "pandas" in loaded
    assert not loaded & {"torch", "torchvision", "nvidia", "matplotlib", "sklearn", "captum"}


# --- one fact, one home ---


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


def in_use() -> set[str]:
    """The modules that a command of ours can come to import."""
    all_sources = sources()
    commands = {f"tools.{path.stem}": path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py")}
    found: set[str] = set()
    new = {"cli.train"}.union(*(imported_modules(name, source, set(all_sources)) for name, source in commands.items()))
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


def test_licence_and_command() -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="quaclrs-train")
    assert command.value == "quaclrs.cli.train:main"
