"""Requests to save or stop a training before its end: signals, and the clock of ``--checkpoint_minutes``.

The signals are SIGTERM, SIGINT, SIGHUP and SIGUSR1.

A signal handler only records the signal. After each step the training loop calls
:meth:`SignalHandler.requested_action`, so that it always stops between two steps.
"""

from __future__ import annotations

import signal
import threading
import time
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

from quaclrs.errors import Interrupted

_ENDING = (signal.SIGTERM, signal.SIGINT)
_OF_SCHEDULERS = (signal.SIGHUP, signal.SIGUSR1)
"""Sent before the time of a job is over, and when a terminal closes. ``nohup`` lets a process ignore SIGHUP."""
_SAME_S = 2.0
"""Seconds within which a second signal counts as the same one.

A launcher may forward a Ctrl-C that the terminal has already sent to every process.
"""


class StopRequest(IntEnum):
    """What a rank requests after a step. The highest request of all ranks wins."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2


class SignalHandler:
    """Within the block, the four signals do not end the process; :meth:`requested_action` reports them.

    A second signal, two seconds or more after the first, has its usual effect. With ``checkpoint_minutes``, the handler
    also requests a checkpoint each time that many minutes have passed.
    """

    def __init__(self, checkpoint_minutes: float | None = None) -> None:
        self._every_s = None if checkpoint_minutes is None else 60 * checkpoint_minutes
        self._saved = time.monotonic()
        self._before: dict[int, Any] = {}
        self._noted = 0.0
        self.signal: signal.Signals | None = None
        """The signal received; None before that."""

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            heeded = [number for number in _OF_SCHEDULERS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in (*_ENDING, *heeded)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def requested_action(self) -> StopRequest:
        """The request after the step just finished."""
        if self.signal is not None:
            return StopRequest.STOP
        if self._every_s is not None and time.monotonic() - self._saved >= self._every_s:
            return StopRequest.SAVE
        return StopRequest.CONTINUE

    def saved(self) -> None:
        """Restart the clock of ``checkpoint_minutes``; call it after writing a checkpoint."""
        self._saved = time.monotonic()

    def interrupted(self, where: str) -> Interrupted:
        """The exception to raise after the work has been saved."""
        by = self.signal.name if self.signal else "a signal"  # another rank received it
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
