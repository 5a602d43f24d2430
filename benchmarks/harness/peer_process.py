"""A peer's process, as seen from the benchmark: started, checked, idle until its next epoch is timed.

peers/serving.py is the other end of the pipe and describes the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.contender import Pass, PeerError
from harness.peer_environment import find_reason

PEERS_FOLDER = Path(__file__).parents[1] / "peers"


class Peer:
    """One peer's process: ready once the context is entered, idle until :meth:`run`, ended when the context is left.

    Raises :class:`PeerError` with the last line the process wrote if it ends early or does not answer within
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
        """Versions of Python and of the packages the peer uses, known once it is ready."""
        self.check: dict[str, float] = {}
        """How far its pixels are from Pillow's, known once it is ready."""
        self.stored: dict[str, float] = {}
        """``bytes_per_image`` on disk, known once it is ready."""
        self._variables = dict(variables or {})
        self._command = [str(python), str(script), *map(str, arguments)]
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in close()

    def __enter__(self) -> Peer:
        # PYTHONPATH is for `from peers...` alone: the peer sees nothing else of ours
        environment = self._variables | os.environ | {"PYTHONPATH": str(PEERS_FOLDER.parent)}
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=environment,
            )
        except OSError as error:
            self.close()
            raise PeerError(self.name, f"cannot be started: {error}") from None
        threading.Thread(target=self._listen, args=[self._process], name=f"peer-{self.name}", daemon=True).start()
        try:
            ready = self._wait_for_answer()
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
        """Process id, while the process runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_open(self) -> bool:
        """Whether :meth:`close` has not ended the process yet."""
        return self._process is not None

    def run(self) -> Pass:
        """Run one shuffled epoch."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; waiting for the answer says why
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        return Pass(**self._wait_for_answer())

    def close(self) -> None:
        """End the process: close its input, and kill it if it is still there after 10 s."""
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
        self._stderr.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _wait_for_answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self.deadline_s)
        except queue.Empty:
            raise PeerError(self.name, f"no answer within {self.deadline_s:g} s") from None
        if line is None:
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._stderr.seek(0)
            reason = find_reason(self._stderr.read())
            raise PeerError(self.name, f"ended early with exit code {self._process.returncode}: {reason}")
        answer: dict[str, Any] = json.loads(line)
        return answer
