"""``--parallel folds``: one process per GPU, each training whole folds from one queue; nothing is exchanged between
them.

A fold that fails, or whose process dies, does not affect the other folds: they continue, a new process replaces the
dead one, and the end of the run names the missing folds. A process and its libraries print to the log of the fold being
trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from quaclrs.config import TrainConfig
from quaclrs.errors import Interrupted, QuaclrsError, TrainingError
from quaclrs.experiment.cross_validation import FoldRunner, tasks
from quaclrs.experiment.results import SUMMARY_FILE, Summary, read_document
from quaclrs.experiment.run import Log, model_folder
from quaclrs.experiment.run_status import note
from quaclrs.loaders import needs_shards
from quaclrs.loaders.dataset import open_dataset
from quaclrs.system.atomic_files import make_folder
from quaclrs.system.processes import exit_with_parent, interrupts_held
from quaclrs.system.signals import SignalHandler
from quaclrs.training.device import refuse_for_device, resolve_device
from quaclrs.training.distributed import World
from quaclrs.training.launcher import set_threads_per_process
from quaclrs.training.progress import epoch_line
from quaclrs.training.trainer import Hooks

_POLL_S = 0.5
Task = tuple[str, int]
"""Model and fold."""


def log_file(config: TrainConfig, fold: int) -> Path:
    """The log of one fold of ``config``'s one model."""
    return model_folder(config) / "logs" / f"fold_{fold}.log"


def run_in_parallel(config: TrainConfig, processes: int, log: Log = print) -> dict[str, Summary]:
    """Train the fold(s) of ``config``'s model(s) in ``processes`` processes; returns the summaries by model.

    Raises :class:`TrainingError` at the end when folds failed, naming each with its log; :class:`Interrupted` after a
    signal, once every process has saved its training; and what keeps every process from training anything.
    """
    config = dataclasses.replace(config, nproc=processes)
    to_do = tasks(config)
    refuse_for_device(config, resolve_device(config.device), World())
    _prepare_data(config, log)
    make_folder(config.output_dir)
    with SignalHandler() as watch:
        _Pool(config, to_do, log, watch).run()
    names = dict.fromkeys(name for name, _ in to_do)
    return {name: Summary.from_json(read_document(config.output_dir / name / SUMMARY_FILE)) for name in names}


def _prepare_data(config: TrainConfig, log: Log) -> None:
    """Pack the data if needed, and check that they open, before starting processes that would all do it."""
    open_dataset(config, want_shards=needs_shards(config), log=log).close()


# --- the process that hands out folds ---


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: Any
    connection: Connection
    device: str
    task: Task | None = None
    ready: bool = False
    problem: str | None = None
    """Why it cannot train anything."""


@dataclass
class _Pool:
    config: TrainConfig
    to_do: list[Task]
    log: Log
    watch: SignalHandler
    waiting: deque[Task] = field(default_factory=deque)
    workers: list[_Worker] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    told: bool = False
    """Whether :meth:`_pass_signals_on` has passed a signal to the processes."""
    problem: str | None = None
    """Of the last process that could not train anything."""
    untold: list[str] = field(default_factory=list)
    """Problems to log once some process is ready; until then, all processes may share them."""

    def run(self) -> None:
        self.waiting.extend(self.to_do)
        processes = min(self.config.nproc or 1, len(self.to_do))
        set_threads_per_process(processes)
        on_gpu = resolve_device(self.config.device).type == "cuda"
        try:
            for i in range(processes):
                self._start(f"cuda:{i}" if on_gpu else "cpu")
            while self.workers:
                self._pass_signals_on()
                for source in wait(
                    [source for worker in self.workers for source in (worker.connection, worker.process.sentinel)],
                    _POLL_S,
                ):
                    self._hear(source)
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()
        if self.watch.signal is not None:
            raise self.watch.interrupted("the folds that were running, each of which is saved")
        if self.waiting:
            raise QuaclrsError(self.problem or "no process is left to train on")
        if self.failures:
            raise TrainingError(
                f"{len(self.failures)} of {len(self.to_do)} fold(s) failed: {'; '.join(self.failures)}; "
                "the same command with --resume trains only what is missing"
            )

    def _start(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        config = dataclasses.replace(self.config, device=device)
        process = context.Process(target=_work, args=(theirs, config), name=f"quaclrs-{device}")
        with interrupts_held():
            process.start()
        theirs.close()  # so that its death closes the connection
        self.workers.append(_Worker(process=process, connection=ours, device=device))

    def _pass_signals_on(self) -> None:
        if self.watch.signal is None or self.told:
            return
        self.told = True
        for worker in self.workers:
            worker.process.terminate()

    def _hear(self, source: Any) -> None:
        worker = next(
            (worker for worker in self.workers if source in (worker.connection, worker.process.sentinel)), None
        )
        if worker is None:  # both of its sources were ready, and the first one ended it
            return
        try:
            if source == worker.process.sentinel and not worker.connection.poll():
                raise EOFError  # do not read: processes that it forked keep the connection open for a while
            kind, content = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._bury(worker)
            return
        if kind == "log":
            self.log(content)
        elif kind == "unusable":
            worker.problem = content
        elif kind == "broken":
            if worker.task is not None:
                self._failed(worker.task, content)
            worker.task = None
        else:
            self._finish(worker, content)

    def _finish(self, worker: _Worker, error: str | None) -> None:
        """Give a worker its next fold: it has become ready, or its fold has ended, with ``error`` or without."""
        if worker.task is not None and error is not None:
            self._failed(worker.task, error)
        worker.ready = True
        self._tell_problems()
        worker.task = self.waiting.popleft() if self.waiting and self.watch.signal is None else None
        with contextlib.suppress(OSError):  # it has died; its sentinel reports that
            worker.connection.send(worker.task)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        if self.watch.signal is not None:
            return
        code = worker.process.exitcode
        how = (
            f"its process was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with exit code {code}"
        )
        if not worker.ready:
            self.problem = (
                worker.problem or f"a process on {worker.device} could not start: {how}; its own messages are above"
            )
            self.untold.append(self.problem)
            self._tell_problems()
            return
        if worker.task is not None:
            name, fold = worker.task
            with contextlib.suppress(QuaclrsError):  # a full disk must not end the other folds
                note(self.config.output_dir / name, fold, state="failed", error=how)
            self._failed(worker.task, how)
        if self.waiting:
            self._start(worker.device)

    def _tell_problems(self) -> None:
        if any(worker.ready for worker in self.workers):  # else probably all have the problem, which is an error
            for problem in self.untold:
                self.log(f"{problem}; the other processes go on")
            self.untold.clear()

    def _failed(self, task: Task, reason: str) -> None:
        name, fold = task
        path = log_file(dataclasses.replace(self.config, model_name=name), fold)
        self.failures.append(f"{name} fold {fold}: {reason} (log: {path})")
        self.log(f"{name} fold {fold} failed: {reason}; the other folds go on")


# --- the process that trains folds ---


def _work(connection: Connection, config: TrainConfig) -> None:
    """Train the folds received through ``connection``, until it sends None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us by SIGTERM
    exit_with_parent()

    def say(kind: str, content: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has ended, and this process will end too
            connection.send((kind, content))

    task: list[Task] = []

    def log(text: str) -> None:
        if task:  # the parent has already logged messages about the data
            print(text, flush=True)
            say("log", f"{task[0][0]}: {text}")

    hooks = Hooks(epoch_done=lambda record: log(f"fold {task[0][1]}: {epoch_line(record, config.epochs)}"))
    try:
        with FoldRunner.opened(config, log, hooks) as place:
            say("ready", None)
            while (received := connection.recv()) is not None:
                task[:] = [received]
                say("done", _train(place, config, *received))
    except Interrupted as error:
        sys.exit(error.exit_code)
    except QuaclrsError as error:
        say("unusable", str(error))
    except Exception as error:  # the process may be unusable, as after a GPU error
        if not task:
            raise
        say("broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.exit(1)


def _train(place: FoldRunner, config: TrainConfig, name: str, fold: int) -> str | None:
    """Train one fold; returns the message of a :class:`QuaclrsError`, or None."""
    try:
        with _printing_to(log_file(dataclasses.replace(config, model_name=name), fold)):
            try:
                place.train(name, fold)
            except QuaclrsError as error:
                print(error)
                raise
            except Exception:
                traceback.print_exc()
                raise
    except Interrupted:
        raise
    except QuaclrsError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Append all output of this process to ``path``, including its libraries' and a crash of the interpreter."""
    make_folder(path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        faulthandler.enable(file=2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, number)
                os.close(copy)
