"""Virtual environments for peers whose dependencies cannot be installed beside ours."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from harness.contender import PeerError

_INSTALLED = "requirements.txt"
"""In an environment: what was installed there. Written last, so that its presence means a complete environment."""


def make_environment(name: str, requirements: Sequence[str], folder: Path, *, over_ours: bool = False) -> Path:
    """Return the Python of the virtual environment ``folder/name``; makes it unless it has ``requirements`` already.

    ``over_ours``: packages that it lacks come from our environment, so that torch is the same and not stored twice.
    Raises :class:`PeerError` with the installer's reason. Delete the folder to have it made again.
    """
    root = folder / name
    python = root / "bin" / "python"
    installed = root / _INSTALLED
    ours = sysconfig.get_path("purelib")
    wanted = "".join(f"{line}\n" for line in [*requirements, *([f"# over {ours}"] if over_ours else [])])
    if installed.is_file() and installed.read_text() == wanted:
        return python
    _install(name, [sys.executable, "-m", "venv", "--clear", str(root)])
    if over_ours:
        # pip sees our packages too, and installs only those whose version must differ
        (_packages_folder(python) / "ours.pth").write_text(f"{ours}\n")
    _install(name, [str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements])
    installed.write_text(wanted)
    return python


def read_requirements(path: Path) -> list[str]:
    """Return the lines of a requirements file without comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def find_reason(output: str) -> str:
    """Return the line of ``output`` that says most about a failure: Python's or the compiler's error before pip's
    summary."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"\w+Error: |.*\b(fatal )?error: (?!subprocess)", r"ERROR: "):
        for line in reversed(lines):
            if re.match(pattern, line):
                return line
    return lines[-1] if lines else "it said nothing"


def _packages_folder(python: Path) -> Path:
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def _install(name: str, command: list[str]) -> None:
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if finished.returncode != 0:
        raise PeerError(name, f"not installed: {find_reason(finished.stdout)}")
