"""``--compile cudagraph``: whole training steps, from the gather to the optimizer, captured once and replayed with one
launch each.

At small batches a step's hundreds of kernels take less time than Python needs to launch them. A CUDA graph launches
them all at once, but with the same addresses each time: so the sample numbers are copied to where the graph looks for
them, and everything else stays on the device. That takes a loader whose data are there already
(:class:`~quaclrs.loaders.base.DeviceLoader`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from quaclrs.loaders.base import Batch, DeviceLoader, to_device
from quaclrs.training.state import Training

_WARM_UP_STEPS = 3
"""Real steps before the capture: optimizer states, compiled kernels and cuDNN's choices must be there by then (torch's
own advice).
"""


class GraphedStep:
    """Optimizer steps on batches of ``size`` samples of ``loader``, each of them a replay of one graph but for the
    first few.

    On the CPU, which has no graphs, the same work is done step by step.
    """

    def __init__(self, training: Training, loader: DeviceLoader, size: int) -> None:
        self._size = size
        self._training, self._loader = training, loader
        self._index = torch.zeros(size, dtype=torch.int64, device=training.device)
        self._share = torch.zeros((), device=training.device)
        # a capture is not allowed on the default stream, so nor is its rehearsal
        self._stream = torch.cuda.Stream(training.device) if training.device.type == "cuda" else None
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._output: _Output | None = None

    def __call__(self, index: torch.Tensor, share: torch.Tensor) -> _Output:
        """One step on the samples ``index`` (B,) int64 on the device, with :meth:`Training.step`'s ``share``.

        What it returns is overwritten by the next step.
        """
        if len(index) != self._size:
            return self._step(index, share)
        self._index.copy_(index)
        self._share.copy_(share)
        if self._replay is None and self._steps >= _WARM_UP_STEPS:
            self._replay = self._captured()
        if self._replay is not None:
            self._replay()
        else:
            self._warm_up()
        self._steps += 1
        assert self._output is not None
        return self._output

    def _step(self, index: torch.Tensor, share: torch.Tensor) -> _Output:
        images, labels = self._loader.on_device(index)
        return images, labels, *self._training.step(images, labels, share)

    def _usual_step(self) -> None:
        self._output = self._step(self._index, self._share)

    def _warm_up(self) -> None:
        if self._stream is None:
            self._usual_step()
            return
        current = torch.cuda.current_stream(self._training.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._usual_step()
        current.wait_stream(self._stream)

    def _captured(self) -> Callable[[], None]:
        if self._stream is None:
            return self._usual_step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._usual_step()
        return graph.replay


_Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Images, labels, loss, right predictions."""


def graphed_steps(
    graphed: GraphedStep, batches: Sequence[np.ndarray], shares: torch.Tensor, seeds: np.ndarray
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """A step for each of ``batches``; yields each with its loss and right predictions, on the device.

    Batches of ``graphed``'s size are replayed, others (an epoch's last) done step by step.
    """
    if not batches:
        return
    sizes = [len(batch) for batch in batches]
    numbers = torch.from_numpy(np.concatenate(batches).astype(np.int64, copy=False))
    indices = to_device(numbers, shares.device).split(sizes)  # one copy for the whole epoch
    for index, on_host, share, seed in zip(indices, numbers.split(sizes), shares, seeds, strict=True):
        torch.manual_seed(int(seed))
        images, labels, loss, correct = graphed(index, share)
        yield Batch(images, labels, on_host), loss, correct
