"""When a training is to be saved or stopped before its end: signals, and the clock of ``--checkpoint_minutes``."""

from __future__ import annotations

import signal
import threading
import time
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

from quaclrs.errors import Interrupted

_SAME_S = 2.0
"""A launcher may pass on a Ctrl-C that the terminal has sent to everyone already; only a later one is another."""


class StopRequest(IntEnum):
    """What a rank wishes after a step; of several, the highest counts."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class SignalHandler:
    """Between ``with`` and its end, SIGTERM and SIGINT are noted, to be asked for by :meth:`wish`, instead of ending
    the process.

    A second one, two seconds or more after the first, does what it did before. ``checkpoint_minutes`` wishes a
    checkpoint each time that long has passed.
    """

    def __init__(self, checkpoint_minutes: float | None = None) -> None:
        self._every_s = None if checkpoint_minutes is None else 60 * checkpoint_minutes
        self._saved = time.monotonic()
        self._before: dict[int, Any] = {}
        self._noted = 0.0
        self.signal: signal.Signals | None = None
        """The signal that came, None while there was none."""

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread have handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def wish(self) -> StopRequest:
        """What to do after the step just done."""
        if self.signal is not None:
            return StopRequest.STOP
        if self._every_s is not None and time.monotonic() - self._saved >= self._every_s:
            return StopRequest.SAVE
        return StopRequest.GO_ON

    def saved(self) -> None:
        """A checkpoint has been written; the clock starts again."""
        self._saved = time.monotonic()

    def interrupted(self, where: str) -> Interrupted:
        """What to raise once the work is saved."""
        by = self.signal.name if self.signal else "a signal"  # that another process of this training got
        message = f"stopped by {by} in {where}; the same command with --resume goes on from there"
        return Interrupted(message, self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted = signal.Signals(number), now
        elif now - self._noted >= _SAME_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
