"""Console output of a training: a progress bar per phase on a terminal, and a line after each epoch."""

from __future__ import annotations

import sys
import time

import torch
from tqdm import tqdm

from quaclrs.loaders.base import Batch
from quaclrs.training.loop import OnStep, ignore_step
from quaclrs.training.records import EpochRecord
from quaclrs.training.running_metrics import RunningMetrics
from quaclrs.training.trainer import Hooks

_REFRESH_S = 0.5


def console_hooks(epochs: int) -> Hooks:
    """Hooks of a :class:`~quaclrs.training.trainer.Trainer`: bars on stderr if it is a terminal, lines on stdout."""

    def step_meter(phase: str, epoch: int, samples: int) -> OnStep:
        return StepMeter(phase, epoch, epochs, samples) if sys.stderr.isatty() else ignore_step

    return Hooks(step_meter=step_meter, epoch_done=lambda record: tqdm.write(epoch_line(record, epochs)))


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One epoch's figures as one line of text."""
    return (
        f"epoch {record.epoch}/{epochs}: train loss {record.train_loss:.4f}, accuracy {record.train_accuracy:.2%}; "
        f"validation loss {record.val_loss:.4f}, accuracy {record.val_accuracy:.2%}; "
        f"{record.train_images_per_s:.0f} images/s, waiting for data {record.train_data_wait:.1%}; "
        f"learning rate {record.learning_rate:.2g}"
    )


class StepMeter:
    """A progress bar over one phase's samples. Shows only sums that have reached the host already."""

    def __init__(self, phase: str, epoch: int, epochs: int, samples: int) -> None:
        self._bar = tqdm(total=samples, desc=f"{phase} {epoch}/{epochs}", unit="image", leave=False)
        self._started = self._shown = time.perf_counter()
        self._samples = samples
        self._sums: torch.Tensor | None = None
        self._sums_samples = 0
        self._copied: torch.cuda.Event | None = None

    def __call__(self, batch: Batch, metrics: RunningMetrics, waited_s: float) -> None:
        """As :data:`~quaclrs.training.loop.OnStep`."""
        now = time.perf_counter()
        self._bar.update(len(batch))
        if now - self._shown >= _REFRESH_S:
            self._show(waited_s / max(now - self._started, 1e-9))
            self._sums, self._sums_samples = metrics.copy_to_host(), metrics.samples
            self._copied = _record_event(batch)
            self._shown = now
        if self._bar.n >= self._samples:
            self._bar.close()

    def _show(self, wait: float) -> None:
        """Show the sums copied at the previous refresh, if their copy is done; ``wait`` is a fraction."""
        if self._sums is not None and (self._copied is None or self._copied.query()):
            loss, denominator, correct = self._sums.tolist()
            accuracy = correct / self._sums_samples
            self._bar.set_postfix_str(
                f"loss {loss / denominator:.3f}, accuracy {accuracy:.1%}, data wait {wait:.1%}", refresh=False
            )


def _record_event(batch: Batch) -> torch.cuda.Event | None:
    """An event on the stream of ``batch``: done once the copy queued before it is done; None on the CPU."""
    if batch.images.device.type != "cuda":
        return None
    event: torch.cuda.Event = torch.cuda.current_stream(batch.images.device).record_event()
    return event
