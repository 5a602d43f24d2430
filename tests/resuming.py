"""Runs ``quaclrs-train`` in a process that is disturbed at a chosen moment and records its steps.

The processes are forked from a server that has imported everything already, so that one costs a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import nn

PRELOADED = ["pytest", "resuming_process"]
TIMEOUT_S = 60
KILLED = -signal.SIGKILL


class TinyNetwork(nn.Module):
    """700 weights with all that makes resuming difficult: running statistics and dropout; ``plain`` has neither."""

    def __init__(self, weights: None = None, plain: bool = False) -> None:
        super().__init__()
        norm, dropout = (nn.Identity(), nn.Identity()) if plain else (nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, bias=False), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.classifier = nn.Sequential(dropout, nn.Linear(32, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.classifier(self.features(images))
        return scores


@dataclass(frozen=True)
class Moment:
    """After the ``step``-th step that this process does in this phase, counted over all epochs."""

    phase: str
    step: int = 1
    fold: int = 1

    def __str__(self) -> str:
        return f"{self.phase}, fold {self.fold}, step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What happens to the process; by default nothing."""

    signals: dict[Moment, list[tuple[float, int]]] = field(default_factory=dict)
    """At each moment, signals, each after a delay in seconds."""
    signal_at_event: tuple[str, int] | None = None
    """(prefix, signal): the signal is sent before the first event that begins with the prefix."""
    killed_at_a_new_event: Path | None = None
    """SIGKILL before the first event that is not in this file; the event is then added to the file."""
    one_in: int = 1
    """Consider only one in so many of those events, chosen by a checksum of their text."""
    killed_in_save: int | None = None
    """SIGKILL when the call of torch.save with this number, counted from 1, has written half of its file."""
    plots: bool = False
    """Draw real plots, which takes longer than the training."""


UNDISTURBED = Disturbance()


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a process recorded after a step."""

    rank: int
    fold: int
    phase: str
    epoch: int
    samples: int
    """Of this rank in this epoch so far."""
    index: tuple[int, ...]
    """The batch's sample numbers."""
    sums: tuple[str, ...]
    """The epoch's sums so far, to the last bit."""

    @property
    def where(self) -> tuple[int, int, str, int, int]:
        return self.rank, self.fold, self.phase, self.epoch, self.samples


@dataclass(frozen=True, kw_only=True)
class Result:
    code: int
    """Exit code; negative for a signal that ended it."""
    out: str
    err: str
    steps: list[Step]


# --- in the test ---


def start_server() -> None:
    """Start the fork server, which imports what the processes need and lives until the tests end."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # one that another test file started has not imported everything
    multiprocessing.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


class Job:
    """A training process."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[object],
        disturbance: Disturbance = UNDISTURBED,
        rank: tuple[int, int, int] | None = None,
    ) -> None:
        """Its output goes to files in ``folder``; ``rank``: (rank, world_size, port of the meeting point)."""
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"{name}.{rank[0] if rank else 0}" for name in ("out", "err", "steps")]
        for file in self._files:
            file.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(
            target=_work, args=([str(part) for part in arguments], self._files, disturbance, rank)
        )
        self.process.start()

    def has_begun(self) -> bool:
        """Whether it has written any output, or has ended."""
        return self._files[0].exists() or not self.process.is_alive()

    def kill_after(self, seconds: float) -> None:
        self.process.join(seconds)
        self.process.kill()

    def steps(self) -> list[Step]:
        """The steps recorded so far."""
        lines = self._files[2].read_text().splitlines() if self._files[2].exists() else []
        return [eval(line) for line in lines]  # our own repr

    def result(self) -> Result:
        """Wait for the process to end."""
        self.process.join(TIMEOUT_S)
        hangs = self.process.is_alive()
        if hangs:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        out, err = (file.read_text() if file.exists() else "" for file in self._files[:2])
        assert not hangs, f"still running after {TIMEOUT_S} s: {out}{err}"
        assert code is not None
        return Result(code=code, out=out, err=err, steps=self.steps())


def _work(*arguments: Any) -> None:
    from resuming_process import work

    work(*arguments)
