"""Standard output and error that cannot end a command: a closed pipe, a full log disk, a terminal without a letter.

The results of a training or a packing are files. What it prints is lost if nobody takes it, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from quaclrs.errors import SIGNAL_EXIT_CODE


class TolerantStream:
    """A text stream of which ``write`` and ``flush`` do not raise; else as ``stream``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        """The first error of a write."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As ``TextIO.write``."""
        with self._noting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As ``TextIO.flush``."""
        with self._noting():
            self._stream.flush()

    def discard_unwritten(self) -> None:
        """Flush. What cannot be written is dropped, so that the interpreter does not try again when it ends."""
        try:
            self._stream.flush()
        except OSError as error:
            self.failure = self.failure or error
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error


@contextlib.contextmanager
def tolerant_output(program: str) -> Iterator[TolerantStream]:
    """Make ``sys.stdout`` and ``sys.stderr`` tolerant for the block; yields the former.

    Characters that a stream's encoding lacks are written as ``\\u4f60``. Lines reach a file as they are printed. At the
    end a line on stderr says that output was lost, if a full or broken disk was the reason. A closed pipe was the
    reader's wish.
    """
    out, err = (_tolerant(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
        try:
            yield out
        finally:
            out.discard_unwritten()
            if out.failure is not None and not is_closed_pipe(out.failure):
                print(f"{program}: some of the output was lost ({out.failure.strerror})", file=sys.stderr)
            err.discard_unwritten()


def is_closed_pipe(error: OSError) -> bool:
    """Whether ``error`` says that the reader of a pipe has closed it."""
    return error.errno == errno.EPIPE


def exit_code_of_output(out: TolerantStream) -> int:
    """For commands whose output is their result: 0 if all of it was written, 141 for a closed pipe, as other programs.

    2 for a disk that is full or broken.
    """
    out.discard_unwritten()
    if out.failure is None:
        return 0
    return SIGNAL_EXIT_CODE + signal.SIGPIPE if is_closed_pipe(out.failure) else 2


def _tolerant(stream: TextIO | None) -> TolerantStream:
    if stream is None:  # closed by the parent process
        stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    return TolerantStream(stream)
