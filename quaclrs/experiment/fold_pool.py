"""``--parallel folds``: one process per GPU, each training whole folds that the parent process hands out.

Workers do not communicate with each other. A fold that fails, or whose worker dies, does not affect the others: a new
worker replaces the dead one, and the error at the end names the folds that are missing. What a worker and its libraries
print goes to the log of the fold being trained.
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
from multiprocessing.context import SpawnProcess
from pathlib import Path

from quaclrs.config import TrainConfig
from quaclrs.errors import Interrupted, QuaclrsError, TrainingError
from quaclrs.experiment.cross_validation import FoldRunner, list_tasks
from quaclrs.experiment.results import SUMMARY_FILE, Summary, read_document
from quaclrs.experiment.run import Log, model_folder
from quaclrs.experiment.run_status import update_status
from quaclrs.loaders import needs_shards
from quaclrs.loaders.dataset import open_dataset
from quaclrs.system.atomic_files import make_folder, storage_error
from quaclrs.system.console import tolerant_output
from quaclrs.system.processes import exit_with_parent, interrupts_held
from quaclrs.system.signals import SignalHandler
from quaclrs.training.device import refuse_unsupported, resolve_device
from quaclrs.training.distributed import World
from quaclrs.training.launcher import set_threads_per_process
from quaclrs.training.progress import epoch_line
from quaclrs.training.records import EpochRecord
from quaclrs.training.trainer import Hooks

_POLL_S = 0.5
Task = tuple[str, int]
"""Model and fold."""


def log_file(config: TrainConfig, fold: int) -> Path:
    """Path of the file with the output of one fold of ``config``'s one model."""
    return model_folder(config) / "logs" / f"fold_{fold}.log"


def run_in_parallel(config: TrainConfig, processes: int, log: Log = print) -> dict[str, Summary]:
    """Train the fold(s) of ``config``'s model(s) in ``processes`` processes; returns the summaries by model.

    Raises :class:`TrainingError` after the last fold if some failed, naming each with its log; :class:`Interrupted`
    after a signal, once every worker has saved its training; and the error that keeps all workers from training.
    """
    config = dataclasses.replace(config, nproc=processes)
    to_do = list_tasks(config)
    refuse_unsupported(config, resolve_device(config.device), World())
    _prepare_data(config, log)
    make_folder(config.output_dir)
    with SignalHandler() as signals:
        _Pool(config, to_do, log, signals).run()
    names = dict.fromkeys(name for name, _ in to_do)
    return {name: Summary.from_json(read_document(config.output_dir / name / SUMMARY_FILE)) for name in names}


def _prepare_data(config: TrainConfig, log: Log) -> None:
    """Pack the data if necessary and check that they can be opened, once, before the workers all open them."""
    open_dataset(config, want_shards=needs_shards(config), log=log).close()


# --- the parent process ---


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection
    """On it the worker sends (kind, content) pairs, and receives tasks."""
    device: str
    task: Task | None = None
    """The fold it is training."""
    ready: bool = False
    """It has opened the data and can train."""
    problem: str | None = None
    """Why it cannot train."""


@dataclass
class _Pool:
    config: TrainConfig
    to_do: list[Task]
    log: Log
    signals: SignalHandler
    waiting: deque[Task] = field(default_factory=deque)
    """Folds that no worker has been given yet."""
    workers: list[_Worker] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """One line per failed fold."""
    signal_passed_on: bool = False
    problem: str | None = None
    """Why the last worker that could not train could not."""
    unlogged_problems: list[str] = field(default_factory=list)
    """Problems of workers at their start, held back until another worker is ready: if all of them have problems, the
    run ends with an error instead.
    """

    def run(self) -> None:
        """Train all tasks. Raises what :func:`run_in_parallel` raises."""
        self.waiting.extend(self.to_do)
        processes = min(self.config.nproc or 1, len(self.to_do))
        set_threads_per_process(processes)
        on_gpu = resolve_device(self.config.device).type == "cuda"
        try:
            for i in range(processes):
                self._start_worker(f"cuda:{i}" if on_gpu else "cpu")
            while self.workers:
                self._pass_signal_on()
                for source in wait([source for worker in self.workers for source in _sources(worker)], _POLL_S):
                    self._receive(source)
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()
        self._raise_for_incomplete()

    def _raise_for_incomplete(self) -> None:
        if self.signals.signal is not None:
            raise self.signals.interrupted("the folds that were running, each of which is saved")
        if self.waiting:
            raise QuaclrsError(self.problem or "no process is left to train on")
        if self.failures:
            raise TrainingError(
                f"{len(self.failures)} of {len(self.to_do)} fold(s) failed: {'; '.join(self.failures)}; "
                "the same command with --resume trains only what is missing"
            )

    def _start_worker(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        config = dataclasses.replace(self.config, device=device)
        process = context.Process(target=_run_worker, args=(theirs, config), name=f"quaclrs-{device}")
        try:
            with interrupts_held():
                process.start()
        except BrokenPipeError:  # it was killed before it had read what this process writes to it
            self._note_problem(f"a process on {device} was killed while it started (out of memory?)")
            return
        theirs.close()  # otherwise the worker's death would not end the connection
        self.workers.append(_Worker(process=process, connection=ours, device=device))

    def _pass_signal_on(self) -> None:
        if self.signals.signal is None or self.signal_passed_on:
            return
        self.signal_passed_on = True
        for worker in self.workers:
            worker.process.terminate()

    def _receive(self, source: object) -> None:
        """Handle a message, or the death, of the worker that has ``source``."""
        worker = next((worker for worker in self.workers if source in _sources(worker)), None)
        if worker is None:  # both of its sources were ready, and the first one removed it
            return
        try:
            if source == worker.process.sentinel and not worker.connection.poll():
                raise EOFError  # recv() could block: a process that the worker forked may keep the connection open
            kind, content = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._remove_dead(worker)
            return
        if kind == "log":
            self.log(content)
        elif kind == "unusable":
            worker.problem = content
        elif kind == "broken":
            if worker.task is not None:
                self._add_failure(worker.task, content)
            worker.task = None
        else:
            self._give_next_task(worker, content)

    def _give_next_task(self, worker: _Worker, error: str | None) -> None:
        """After ``worker`` has become ready, or finished its fold, with ``error`` if that failed."""
        if worker.task is not None and error is not None:
            self._add_failure(worker.task, error)
        worker.ready = True
        self._log_problems()
        worker.task = self.waiting.popleft() if self.waiting and self.signals.signal is None else None
        with contextlib.suppress(OSError):  # it has died in the meantime: its sentinel reports that
            worker.connection.send(worker.task)

    def _remove_dead(self, worker: _Worker) -> None:
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        if self.signals.signal is not None:
            return
        reason = _describe_end(worker.process.exitcode or 0)
        if not worker.ready:
            unstarted = f"a process on {worker.device} could not start: {reason}; its own messages are above"
            self._note_problem(worker.problem or unstarted)
            return
        if worker.task is not None:
            name, fold = worker.task
            with contextlib.suppress(QuaclrsError):  # a full disk must not stop the other folds
                update_status(self.config.output_dir / name, fold, state="failed", error=reason)
            self._add_failure(worker.task, reason)
        if self.waiting:
            self._start_worker(worker.device)

    def _note_problem(self, problem: str) -> None:
        self.problem = problem
        self.unlogged_problems.append(problem)
        self._log_problems()

    def _log_problems(self) -> None:
        if any(worker.ready for worker in self.workers):
            for problem in self.unlogged_problems:
                self.log(f"{problem}; the other processes go on")
            self.unlogged_problems.clear()

    def _add_failure(self, task: Task, reason: str) -> None:
        name, fold = task
        path = log_file(dataclasses.replace(self.config, model_name=name), fold)
        self.failures.append(f"{name} fold {fold}: {reason} (log: {path})")
        self.log(f"{name} fold {fold} failed: {reason}; the other folds go on")


def _sources(worker: _Worker) -> tuple[Connection, int]:
    """What becomes readable when ``worker`` sends a message or dies."""
    return worker.connection, worker.process.sentinel


def _describe_end(exit_code: int) -> str:
    if exit_code < 0:
        return f"its process was killed by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


# --- a worker process ---


def _run_worker(connection: Connection, config: TrainConfig) -> None:
    with tolerant_output("quaclrs-train"):
        _train_received(connection, config)


def _train_received(connection: Connection, config: TrainConfig) -> None:
    """Train the folds received on ``connection`` until None is received."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent passes it on as SIGTERM
    exit_with_parent()

    def send(kind: str, content: str | None) -> None:
        with contextlib.suppress(OSError):  # the parent has died, and exit_with_parent() is about to end this process
            connection.send((kind, content))

    task: Task | None = None

    def log(text: str) -> None:
        if task is not None:  # the parent has logged what concerns the data
            print(text, flush=True)
            send("log", f"{task[0]}: {text}")

    def log_epoch(record: EpochRecord) -> None:
        if task is not None:
            log(f"fold {task[1]}: {epoch_line(record, config.epochs)}")

    try:
        with FoldRunner.opened(config, log, Hooks(epoch_done=log_epoch)) as runner:
            send("ready", None)
            while (task := connection.recv()) is not None:
                send("done", _train_logged(runner, config, *task))
    except Interrupted as error:
        sys.exit(error.exit_code)
    except QuaclrsError as error:
        send("unusable", str(error))
    except Exception as error:  # the process may be unusable, as after a CUDA error: the parent starts a new one
        if task is None:
            raise
        send("broken", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.exit(1)


def _train_logged(runner: FoldRunner, config: TrainConfig, name: str, fold: int) -> str | None:
    """Train one fold, its output going to its log. Returns the message of an error in the data or the settings."""
    try:
        with _output_to(log_file(dataclasses.replace(config, model_name=name), fold)):
            try:
                runner.train(name, fold)
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
def _output_to(path: Path) -> Iterator[None]:
    """Append the output of this process to ``path``, that of C libraries and of a crashing interpreter included."""
    make_folder(path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        file = path.open("ab")
    except OSError as error:
        raise storage_error(path, error) from None
    with file:
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
