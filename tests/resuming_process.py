"""The training process of resuming.py. Importing this module does at once what would cost each process a second."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resuming import Disturbance, Moment, Step, TinyNetwork
from tqdm import tqdm

from quaclrs import loaders
from quaclrs.cli.train import main
from quaclrs.experiment import cross_validation, fold
from quaclrs.experiment.results import FoldResult
from quaclrs.experiment.run import Run
from quaclrs.imaging.kernels.normalise_cpu import normalise_cpu
from quaclrs.report import metrics
from quaclrs.system.atomic_files import write_bytes
from quaclrs.training import trainer
from quaclrs.training.architectures import ARCHITECTURES

metrics.compute_metrics(np.array([0, 1]), np.eye(2, dtype=np.float32), ("a", "b"))  # scikit-learn imports on first use
normalise_cpu(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1, 3, 1, 1))  # Numba loads what it has compiled


def work(arguments: list[str], files: list[Path], disturbance: Disturbance, rank: tuple[int, int, int] | None) -> None:
    for number, file in zip((1, 2), files[:2], strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if rank is not None:
        names = (
            "RANK",
            "WORLD_SIZE",
            "MASTER_PORT",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "GLOO_SOCKET_IFNAME",
        )
        os.environ.update(zip(names, [*map(str, rank), str(rank[0]), str(rank[1]), "127.0.0.1", "lo"], strict=True))
    warnings.simplefilter("error")
    warnings.filterwarnings(
        "ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning
    )  # from Python 3.12
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own lock is shared by processes, and causes a warning when this one is killed
    torch.set_num_threads(1)
    _Patched(disturbance, files[2], rank[0] if rank else 0).install()
    sys.exit(main(arguments))


class _Patched:
    def __init__(self, disturbance: Disturbance, journal: Path, rank: int) -> None:
        self._disturbance, self._rank = disturbance, rank
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fold = 0
        self._now = "start"
        self._moments: dict[tuple[str, int], int] = {}
        self._signalled = self._saves = 0

    def install(self) -> None:
        mobilenet = ARCHITECTURES["mobilenet"]
        tiny = replace(mobilenet, constructor=TinyNetwork, gradcam_layer="features.2")
        ARCHITECTURES.update({"tiny": tiny, "plain": replace(tiny, options={"plain": True})})
        patch = pytest.MonkeyPatch()
        patch.setattr(loaders, "dali_missing", lambda: "takes long to import")
        if not self._disturbance.plots:
            patch.setattr(fold, "write_plots", _write_something)
        hooks = trainer.Hooks(step_meter=self._step_meter)

        def noting_the_fold(run: Run, number: int) -> FoldResult | None:
            self._fold = number
            return fold.run_fold(replace(run, hooks=hooks), number)

        def loading(*arguments: Any) -> Any:
            self._event("load")
            return loaders.build_loader(*arguments)

        patch.setattr(cross_validation, "run_fold", noting_the_fold)
        patch.setattr(cross_validation, "build_loader", loading)
        patch.setattr(os, "fsync", self._eventful("flush", os.fsync))
        patch.setattr(Path, "replace", self._eventful("rename", Path.replace))
        patch.setattr(Path, "unlink", self._eventful("delete", Path.unlink))
        patch.setattr(torch, "save", self._saving(torch.save))

    def _step_meter(self, phase: str, epoch: int, samples: int) -> Callable[..., None]:
        def on_step(batch: Any, totals: Any, waited_s: float) -> None:
            sums = tuple(value.hex() for value in totals.sums.tolist())
            step = Step(
                rank=self._rank,
                fold=self._fold,
                phase=phase,
                epoch=epoch,
                samples=totals.samples,
                index=tuple(batch.index.tolist()),
                sums=sums,
            )
            os.write(self._journal, f"{step!r}\n".encode())
            self._now = f"{phase} {epoch}, {totals.samples}"  # without the fold: events of the next fold are not new
            done = self._moments[phase, self._fold] = self._moments.get((phase, self._fold), 0) + 1
            for after_s, number in self._disturbance.signals.get(Moment(phase, done, self._fold), []):
                time.sleep(after_s)
                signal.raise_signal(number)

        return on_step

    def _eventful(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(what: Any, *more: Any, **options: Any) -> Any:
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
            self._event(f"{kind} {'/'.join(path.parts[-2:])} at {self._now}".replace(f"fold_{self._fold}", "fold"))
            return original(what, *more, **options)

        return wrapped

    def _event(self, event: str) -> None:
        if (
            self._disturbance.signal_at_event
            and not self._signalled
            and event.startswith(self._disturbance.signal_at_event[0])
        ):
            self._signalled = 1
            signal.raise_signal(self._disturbance.signal_at_event[1])
        known = self._disturbance.killed_at_a_new_event
        chosen = zlib.crc32(event.encode()) % self._disturbance.one_in == 0
        if known is not None and chosen and event not in known.read_text().splitlines():
            with known.open("a") as file:
                file.write(f"{event}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def _saving(self, original: Callable[..., None]) -> Callable[..., None]:
        def save(content: Any, file: Any, **options: Any) -> None:
            self._saves += 1
            if self._saves != self._disturbance.killed_in_save:
                return original(content, file, **options)
            whole = io.BytesIO()
            original(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        return save


def _write_something(directory: Path, history: Any, metrics: Any) -> None:
    losses = [(record.train_loss, record.val_loss) for record in history]
    for name in ("loss_curves.png", "confusion_matrix.png"):
        write_bytes(directory / name, repr((losses, metrics["confusion_matrix"])).encode(), durable=False)
