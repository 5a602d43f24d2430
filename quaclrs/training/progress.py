"""What a person sees while a model trains: one bar per epoch on a terminal, and a plain line after each epoch
everywhere.
"""

from __future__ import annotations

import sys
import time

import torch
from tqdm import tqdm

from quaclrs.loaders.base import Batch
from quaclrs.training.loop import Hooks
from quaclrs.training.state import RunningMetrics

_REFRESH_S = 0.5


def console_hooks(epochs: int) -> Hooks:
    """Hooks for :func:`quaclrs.training.loop.fit` that show progress on stderr (bars) and stdout (lines)."""
    return Hooks(
        step_meter=lambda phase, epoch, samples: (
            StepMeter(phase, epoch, epochs, samples) if sys.stderr.isatty() else _no_bar
        ),
        epoch_done=lambda entry: tqdm.write(epoch_line(entry, epochs)),
    )


def epoch_line(entry: dict[str, float | int], epochs: int) -> str:
    """One epoch's figures in words."""
    return (
        f"epoch {entry['epoch']}/{epochs}: train loss {entry['train_loss']:.4f}, accuracy "
        f"{entry['train_accuracy']:.2%}; validation loss "
        f"{entry['val_loss']:.4f}, accuracy {entry['val_accuracy']:.2%}; {entry['train_images_per_s']:.0f} images/s, "
        "waiting for data "
        f"{entry['train_data_wait']:.1%}; learning rate {entry['learning_rate']:.2g}"
    )


def _no_bar(batch: Batch, totals: RunningMetrics, waited_s: float) -> None:
    pass


class StepMeter:
    """A progress bar over one epoch's samples. It shows sums that have already reached the host and never waits for
    one.
    """

    def __init__(self, phase: str, epoch: int, epochs: int, samples: int) -> None:
        self._bar = tqdm(total=samples, desc=f"{phase} {epoch}/{epochs}", unit="image", leave=False)
        self._started = self._shown = time.perf_counter()
        self._samples = samples
        self._sums: torch.Tensor | None = None
        self._sums_samples = 0
        self._copied: torch.cuda.Event | None = None

    def __call__(self, batch: Batch, totals: RunningMetrics, waited_s: float) -> None:
        """As :data:`~quaclrs.training.loop.OnStep`."""
        now = time.perf_counter()
        self._bar.update(len(batch))
        if now - self._shown >= _REFRESH_S:
            self._show(waited_s / max(now - self._started, 1e-9))
            self._sums, self._sums_samples, self._copied = totals.snapshot(), totals.samples, _event(batch)
            self._shown = now
        if self._bar.n >= self._samples:
            self._bar.close()

    def _show(self, wait: float) -> None:
        if self._sums is not None and (self._copied is None or self._copied.query()):
            loss, weight, correct = self._sums.tolist()
            accuracy = correct / self._sums_samples
            self._bar.set_postfix_str(
                f"loss {loss / weight:.3f}, accuracy {accuracy:.1%}, data wait {wait:.1%}", refresh=False
            )


def _event(batch: Batch) -> torch.cuda.Event | None:
    if batch.images.device.type != "cuda":
        return None
    return torch.cuda.current_stream(batch.images.device).record_event()
