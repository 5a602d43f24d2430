"""Peers that cannot live in our environment: making theirs, and running them as processes that wait to be timed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from quaclrs.errors import MissingDependencyError

HERE = Path(__file__).parents[1] / "peers"

INSTALLED = "requirements.txt"
"""In an environment: what was installed there, written when it was whole."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One run over everything, and what it tells about itself beside the time it takes."""

    images: float
    first_batch_s: float | None = None
    """From asking for the first batch to having it."""
    data_wait: float | None = None
    """Share of the time in which the consumer had no batch."""
    device_s: float | None = None
    """Between CUDA events around all of it; None on the CPU."""


class PeerError(MissingDependencyError):
    """A peer cannot be installed, or does not do its work. ``reason`` is the message without the peer's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


class Peer:
    """One peer's process: ready once the context is entered, idle until :meth:`run`, ended with the context.

    Raises :class:`PeerError` with the last line the process wrote when it ends early or lets us wait more than
    ``deadline_s``.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        script: Path,
        arguments: Sequence[object],
        *,
        deadline_s: float = 900,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.deadline_s = deadline_s
        self.versions: dict[str, str] = {}
        """What the peer runs on, known once it is ready."""
        self.check: dict[str, float] = {}
        """How far its pixels are from Pillow's, known once it is ready."""
        self.stored: dict[str, float] = {}
        """``bytes_per_image`` on disk, known once it is ready."""
        self._variables = dict(variables or {})
        self._command = [str(python), str(script), *map(str, arguments)]
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in close()

    def __enter__(self) -> Peer:
        environment = (
            self._variables | os.environ | {"PYTHONPATH": str(HERE.parent)}
        )  # for `from peers...`; nothing else of ours
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                text=True,
                env=environment,
            )
        except OSError as error:
            self.close()
            raise PeerError(self.name, f"cannot be started: {error}") from None
        threading.Thread(target=self._listen, args=[self._process], name=f"peer-{self.name}", daemon=True).start()
        try:
            ready = self._answer()
            self.versions, self.check, self.stored = ready["versions"], ready["check"], ready.get("stored", {})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process, while it runs."""
        assert self._process is not None
        return self._process.pid

    def run(self) -> Pass:
        """One shuffled epoch."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says so
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        return Pass(**self._answer())

    def close(self) -> None:
        """End the process: by the end of its input, and if it does not heed that, by force."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._complaints.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self.deadline_s)
        except queue.Empty:
            raise PeerError(self.name, f"no answer within {self.deadline_s:g} s") from None
        if line is None:
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._complaints.seek(0)
            reason = _reason(self._complaints.read())
            raise PeerError(self.name, f"ended early with exit code {self._process.returncode}: {reason}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def make_environment(name: str, requirements: Sequence[str], folder: Path, *, over_ours: bool = False) -> Path:
    """A virtual environment ``folder/name`` with ``requirements``, made unless it is there already; returns its Python.

    ``over_ours``: what it has not itself it takes from our environment, so that torch is the same and not there twice.
    Raises :class:`PeerError` with the installer's reason. Delete the folder to have it made anew.
    """
    root = folder / name
    python = root / "bin" / "python"
    installed = root / INSTALLED
    ours = sysconfig.get_path("purelib")
    wanted = "".join(f"{line}\n" for line in [*requirements, *([f"# over {ours}"] if over_ours else [])])
    if installed.is_file() and installed.read_text() == wanted:
        return python
    _install(name, [sys.executable, "-m", "venv", "--clear", str(root)])
    if over_ours:
        (_packages_of(python) / "ours.pth").write_text(
            f"{ours}\n"
        )  # pip sees it too, and installs beside it what must differ
    _install(name, [str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements])
    installed.write_text(wanted)
    return python


def _packages_of(python: Path) -> Path:
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def read_requirements(path: Path) -> list[str]:
    """The lines of a requirements file that are not comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def _install(name: str, command: list[str]) -> None:
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if finished.returncode != 0:
        raise PeerError(name, f"not installed: {_reason(finished.stdout)}")


def _reason(output: str) -> str:
    """The line of ``output`` that says most about why a program failed: Python's or the compiler's own before pip's
    summary.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"\w+Error: |.*\b(fatal )?error: (?!subprocess)", r"ERROR: "):
        for line in reversed(lines):
            if re.match(pattern, line):
                return line
    return lines[-1] if lines else "it said nothing"
