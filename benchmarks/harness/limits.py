"""What the machine itself allows, measured in the same race as the loaders and trainings that come up against it.

writing      every byte of a batch written once into memory that batches use again, by whatever is fastest here on all
cores copying      the same with ready pixels copied from where they lie, an image of 150 KB after the other in shuffled
order inflate      isal, or zlib where there is none, over the images' data, on all cores: decoding if all else cost
nothing arithmetic   a model's products and sums, forward and backward, at the speed of a large matrix product, the
fastest there is
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.serving import DeviceClock

from harness.measure import Contender
from harness.peer_process import Pass
from quaclrs.imaging.png_check import inflating, read_stream
from quaclrs.loaders.base import BatchMemory
from quaclrs.training.models import build_model, forward_logits, input_size

Work = Callable[[int], object]
"""Does something with the i-th of several buffers."""

_TRIAL_S = 0.1
_BUFFERS = 2
"""As many as a loader on the CPU needs: one is being filled while the other is in use."""
_BANDWIDTH_BYTES = 128 * 2**20
"""Of each buffer; more than caches hold."""
_COPIED_BYTES = 2 * 2**30
"""Of images that are copied from, whatever the size of the data: no cache holds them, any machine does."""
_MOST_INFLATED = 520
"""Images held in memory for inflating; of more, every so many."""
_MATMUL_S = 0.3


# --- memory ---


def writing_limit(
    batch_size: int, batches: int, image_size: int, dtype: torch.dtype, device: torch.device
) -> Contender:
    """So many ``batches`` of ``batch_size`` images written, and nothing else."""
    buffers = _batch_buffers(batch_size, image_size, dtype, device)
    way, write = _fastest(_writing_ways(buffers), device)

    def run() -> Pass:
        with DeviceClock(device) as clock:
            for i in range(batches):
                write(i % _BUFFERS)
        return Pass(images=batch_size * batches, device_s=clock.seconds())

    return Contender(
        name=f"writing {_name(dtype)} batches", run=run, limit=True, work="memory writes", facts={"way": way}
    )


def copying_limit(pixels: np.ndarray, batches: Sequence[np.ndarray], device: torch.device) -> Contender:
    """The images ``batches`` (numbers) of ``pixels`` (N, S, S, 3) uint8 copied into batches and nothing else."""
    kept = pixels[: max(1, _COPIED_BYTES // pixels[0].nbytes)]
    source = torch.from_numpy(np.array(kept).reshape(len(kept), -1)).to(
        device
    )  # in memory, as a resident loader has it
    buffers = _batch_buffers(max(map(len, batches)), pixels.shape[1], torch.uint8, device)
    numbers = [torch.from_numpy(batch % len(kept)).to(device) for batch in batches]
    way, copy = _fastest(_copying_ways(source, buffers, numbers), device)

    def run() -> Pass:
        with DeviceClock(device) as clock:
            for i in range(len(numbers)):
                copy(i)
        return Pass(images=sum(map(len, batches)), device_s=clock.seconds())

    return Contender(name="copying ready pixels", run=run, limit=True, work="memory copies", facts={"way": way})


def memory_bandwidth(device: torch.device) -> dict[str, float]:
    """GB/s of writing, and of copying with bytes read and bytes written both counted."""
    buffers = [torch.ones(_BANDWIDTH_BYTES // 4, device=device) for _ in range(_BUFFERS)]
    _, write = _fastest(_writing_ways(buffers), device)

    def copy(i: int) -> None:
        buffers[i].copy_(buffers[1 - i])

    written, copied = (_rate(work, _BUFFERS, device) * _BANDWIDTH_BYTES for work in (write, copy))
    return {"memory_write_gb_per_s": written / 1e9, "memory_copy_gb_per_s": 2 * copied / 1e9}


def _batch_buffers(images: int, image_size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Flat, of the memory that our own loaders use for batches; every page has been touched."""
    if device.type == "cuda":
        return [torch.zeros(images * 3 * image_size**2, dtype=dtype, device=device) for _ in range(_BUFFERS)]
    memory = BatchMemory(image_size, dtype)
    batches = [memory.take(images) for _ in range(_BUFFERS)]
    return [batch.permute(0, 2, 3, 1).reshape(-1).zero_() for batch in batches]


def _writing_ways(buffers: Sequence[torch.Tensor]) -> dict[str, Work]:
    ways: dict[str, Work] = {"torch.fill_": lambda i: buffers[i].fill_(1)}
    if buffers[0].device.type == "cpu":
        raw = [buffer.view(torch.uint8).numpy() for buffer in buffers]

        def fill(part: np.ndarray) -> None:
            ctypes.memset(part.ctypes.data, 1, part.nbytes)

        def numpy_fill(part: np.ndarray) -> None:
            part.view(np.uint64).fill(2**64 - 1)

        threads = _Threads()
        ways["memset on threads"] = lambda i: threads.share(fill, raw[i], 8)
        ways["numpy.fill on threads"] = lambda i: threads.share(numpy_fill, raw[i][: len(raw[i]) // 8 * 8], 8)
    return ways


def _copying_ways(
    source: torch.Tensor, buffers: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor]
) -> dict[str, Work]:
    """Each copies the i-th batch of ``numbers`` (i from 0, wrapping round)."""
    rows = [buffer.view(-1, source.shape[1]) for buffer in buffers]

    def select(i: int) -> None:
        asked = numbers[i % len(numbers)]
        torch.index_select(source, 0, asked, out=rows[i % _BUFFERS][: len(asked)])

    ways: dict[str, Work] = {"torch.index_select": select}
    if source.device.type == "cpu":
        images, targets, threads = source.numpy(), [row.numpy() for row in rows], _Threads()

        def copy(i: int) -> None:
            asked, target = numbers[i % len(numbers)].numpy(), targets[i % _BUFFERS]

            def copy_part(places: np.ndarray) -> None:
                for place in places.tolist():
                    target[place] = images[asked[place]]

            threads.share(copy_part, np.arange(len(asked)), 1)

        ways["numpy rows on threads"] = copy
    return ways


class _Threads:
    """As many threads as torch has, kept for as long as this object is."""

    def __init__(self) -> None:
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="limit")

    def share(self, work: Callable[[np.ndarray], None], items: np.ndarray, unit: int) -> None:
        """``work`` on equal parts of ``items``, each a multiple of ``unit`` long, and wait for all."""
        bounds = [len(items) // unit * part // self._count * unit for part in range(self._count)] + [len(items)]
        list(self._pool.map(work, [items[start:stop] for start, stop in itertools.pairwise(bounds)]))


# --- inflating ---


def inflate_limit(files: Sequence[Path], num_threads: int) -> Contender:
    """The compressed data of the PNG ``files``, at most ``_MOST_INFLATED`` of them, inflated in memory
    and thrown away.
    """
    streams = [_pixel_data(path.read_bytes()) for path in files[:: -(-len(files) // _MOST_INFLATED)]]
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="inflate")

    def run() -> Pass:
        # bufsize: without it the buffer doubles, and is copied, again and again; twice as long
        for _ in threads.map(lambda stream: len(inflating.decompress(stream[0], bufsize=stream[1])), streams):
            pass
        return Pass(images=len(streams))

    return Contender(name="inflate alone", run=run, limit=True, work="inflate", facts={"by": inflating.__name__})


def _pixel_data(png: bytes) -> tuple[bytes, int]:
    """The zlib stream of a good PNG, and room for what it holds and for zlib to see its end."""
    stream = read_stream(png)
    if stream is None:
        raise ValueError("not a good PNG")  # which packing, or the tree's own check, has said before
    return stream.zlib_stream, stream.unpacked_bytes + 64


# --- arithmetic ---


def arithmetic_limit(model_name: str, dtype: torch.dtype, device: torch.device) -> Contender:
    """Images/s of ``model_name`` if each of its operations ran at the speed of a large matrix product in ``dtype``."""
    per_image = flops_per_image(model_name)
    product, flops, used = _matrix_product(dtype, device)

    def run() -> Pass:
        done, started = 0, time.perf_counter()
        with DeviceClock(device) as clock:
            while done == 0 or time.perf_counter() - started < _MATMUL_S:
                product(0)
                _synchronise(device)
                done += 1
        return Pass(images=done * flops / per_image, device_s=clock.seconds())

    return Contender(
        name="arithmetic at the speed of matmul",
        run=run,
        limit=True,
        work="arithmetic",
        facts={"gflop_per_image": per_image / 1e9, "dtype": _name(used)},
    )


def flops_per_image(model_name: str) -> float:
    """Floating-point operations, a product and its sum counted as two, of a forward and a backward pass, as torch
    counts them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    batch, size = 2, input_size(model_name)
    with torch.device("meta"):  # shapes are enough to count; nothing is computed
        model = build_model(model_name, 13)
        images = torch.empty(batch, 3, size, size)
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
        ) as counter:
            logits, aux_logits = forward_logits(model, images)
            (logits.sum() + (0 if aux_logits is None else aux_logits.sum())).backward()
    return counter.get_total_flops() / batch


def _convolution_backward(
    grad: Sequence[int], images: Sequence[int], weight: Sequence[int], *rest: Any, **ignored: Any
) -> int:
    """Each gradient asked for costs what the forward pass does. torch's own formula forgets the groups of depthwise
    convolutions, and makes MobileNetV2 seven times as expensive as it is."""
    gradients = sum(rest[-1][:2])  # output_mask: of the input, of the weights
    return gradients * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)


def matmul_speed(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """GFLOP/s of a large matrix product in ``dtype``."""
    product, flops, used = _matrix_product(dtype, device)
    return {f"matmul_{_name(used)}_gflop_per_s": _rate(product, 1, device) * flops / 1e9}


def _matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Work, float, torch.dtype]:
    """The work, its floating-point operations, and the type it is done in."""
    if device.type == "cuda":
        return *_product_of(8192, dtype, device), dtype
    # a CPU without units for a 16-bit type takes a thousand times as long in it, and would not use it
    small = {
        candidate: _rate(_product_of(256, candidate, device)[0], 1, device) for candidate in {dtype, torch.float32}
    }
    fastest = max(small, key=lambda candidate: small[candidate])
    return *_product_of(2048, fastest, device), fastest


def _product_of(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Work, float]:
    left, right, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda i: torch.mm(left, right, out=out), 2.0 * n**3


# --- timing ---


def _fastest(ways: Mapping[str, Work], device: torch.device) -> tuple[str, Work]:
    """The name and the work of the fastest of ``ways``."""
    rates = {name: _rate(work, _BUFFERS, device) for name, work in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    return best, ways[best]


def _rate(work: Work, buffers: int, device: torch.device) -> float:
    """Calls per second of the best of three trials."""
    for i in range(buffers):
        work(i)
    best = 0.0
    for _ in range(3):
        _synchronise(device)
        calls, started = 0, time.perf_counter()
        while calls < buffers or time.perf_counter() - started < _TRIAL_S:
            work(calls % buffers)
            _synchronise(device)
            calls += 1
        best = max(best, calls / (time.perf_counter() - started))
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
