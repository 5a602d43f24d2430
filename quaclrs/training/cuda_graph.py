"""``--compile cudagraph``: a training step, from gathering the batch to the optimizer, replayed as one CUDA graph.

At small batches a step's hundreds of kernels take less time than Python needs to launch them. A CUDA graph launches all
of them with one call, but always with the same addresses. So the sample numbers are copied into the tensor that the
graph reads, and everything else stays on the device. This takes a loader whose data are on the device already
(:class:`~quaclrs.loaders.base.DeviceLoader`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from quaclrs.loaders.base import Batch, DeviceLoader, to_device
from quaclrs.training.state import TrainState

_WARM_UP_STEPS = 3
"""Training steps before the capture, as torch's documentation advises: they create the optimizer's state, compile
kernels and let cuDNN choose its algorithms.
"""

StepOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Images, labels, loss, correct predictions; on the device."""


class GraphedStep:
    """Optimizer steps on batches of ``size`` samples of ``loader``: the first few run eagerly, the others as replays.

    On the CPU, which has no graphs, every step runs eagerly.
    """

    def __init__(self, state: TrainState, loader: DeviceLoader, size: int) -> None:
        self._size = size
        self._state, self._loader = state, loader
        self._index = torch.zeros(size, dtype=torch.int64, device=state.device)
        self._loss_scale = torch.zeros((), device=state.device)
        # A capture is not allowed on the default stream, so the warm-up runs on the capture's stream too.
        self._stream = torch.cuda.Stream(state.device) if state.device.type == "cuda" else None
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._output: StepOutput | None = None

    def __call__(self, index: torch.Tensor, loss_scale: torch.Tensor) -> StepOutput:
        """One step on the samples ``index`` (B,) int64 on the device; ``loss_scale`` as in :meth:`TrainState.step`.

        The next step overwrites the tensors that are returned. A batch of another size runs eagerly.
        """
        if len(index) != self._size:
            return self._run(index, loss_scale)
        self._index.copy_(index)
        self._loss_scale.copy_(loss_scale)
        if self._replay is None and self._steps >= _WARM_UP_STEPS:
            self._replay = self._capture()
        if self._replay is not None:
            self._replay()
        else:
            self._warm_up()
        self._steps += 1
        assert self._output is not None
        return self._output

    def _run(self, index: torch.Tensor, loss_scale: torch.Tensor) -> StepOutput:
        images, labels = self._loader.on_device(index)
        return images, labels, *self._state.step(images, labels, loss_scale)

    def _run_on_own_tensors(self) -> None:
        self._output = self._run(self._index, self._loss_scale)

    def _warm_up(self) -> None:
        if self._stream is None:
            self._run_on_own_tensors()
            return
        current = torch.cuda.current_stream(self._state.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._run_on_own_tensors()
        current.wait_stream(self._stream)

    def _capture(self) -> Callable[[], None]:
        """Capture a step; returns the function that replays it."""
        if self._stream is None:
            return self._run_on_own_tensors
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._run_on_own_tensors()
        return graph.replay


def graphed_steps(
    graphed: GraphedStep, batches: Sequence[np.ndarray], loss_scales: torch.Tensor, seeds: np.ndarray
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Run one step per array of sample numbers in ``batches``; yields (batch, loss, correct), all on the device."""
    if not batches:
        return
    sizes = [len(batch) for batch in batches]
    numbers = torch.from_numpy(np.concatenate(batches).astype(np.int64, copy=False))
    indices = to_device(numbers, loss_scales.device).split(sizes)  # one copy for the whole epoch
    for index, index_on_host, loss_scale, seed in zip(indices, numbers.split(sizes), loss_scales, seeds, strict=True):
        torch.manual_seed(int(seed))
        images, labels, loss, correct = graphed(index, loss_scale)
        yield Batch(images, labels, index_on_host), loss, correct
