"""Limits of the machine, measured in the same race as the loaders and trainings that they apply to.

- writing: every byte of a batch written once into reused memory, by the fastest method on all cores
- copying: ready pixels copied into such batches, one image of 150 KB after the other in shuffled order
- inflate: isal, or zlib without it, over the images' compressed data on all cores; decoding, if the rest cost nothing
- arithmetic: a model's multiply-adds, forward and backward, at the speed of a large matrix product
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

from harness.contender import Contender, Pass
from quaclrs.imaging.png_check import inflating, read_stream
from quaclrs.loaders.base import BatchMemory
from quaclrs.training.architectures import input_size
from quaclrs.training.models import build_model, forward_logits

Work = Callable[[int], object]
"""Does its work on the i-th of several buffers."""

_TRIAL_S = 0.1
_BUFFERS = 2
"""As many as a loader on the CPU needs: one is filled while the other is in use."""
_BANDWIDTH_BYTES = 128 * 2**20
"""Size of each buffer; larger than any cache."""
_COPIED_BYTES = 2 * 2**30
"""At most so many bytes of images are copied from, whatever the size of the data: more than a cache holds, little
enough for any machine's memory.
"""
_MOST_INFLATED = 520
"""Compressed images held in memory; a larger dataset is subsampled evenly."""
_MATMUL_S = 0.3
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product counts as a large one, by device type."""


# --- memory ---


def make_writing_limit(
    batch_size: int, batches: int, image_size: int, dtype: torch.dtype, device: torch.device
) -> Contender:
    """Return the limit that only writes: ``batches`` batches of ``batch_size`` images."""
    buffers = _batch_buffers(batch_size, image_size, dtype, device)
    way, write = _pick_fastest(_list_writing_ways(buffers), device)

    def run() -> Pass:
        with DeviceClock(device) as clock:
            for i in range(batches):
                write(i % _BUFFERS)
        return Pass(images=batch_size * batches, device_s=clock.seconds())

    name = f"writing {_dtype_name(dtype)} batches"
    return Contender(name=name, run=run, is_limit=True, work="memory writes", facts={"way": way})


def make_copying_limit(pixels: np.ndarray, batches: Sequence[np.ndarray], device: torch.device) -> Contender:
    """Return the limit that only copies ``pixels`` (N, S, S, 3) uint8 into ``batches`` of sample numbers."""
    kept = pixels[: max(1, _COPIED_BYTES // pixels[0].nbytes)]
    # in memory, as in a resident loader
    source = torch.from_numpy(np.array(kept).reshape(len(kept), -1)).to(device)
    buffers = _batch_buffers(max(map(len, batches)), pixels.shape[1], torch.uint8, device)
    numbers = [torch.from_numpy(batch % len(kept)).to(device) for batch in batches]
    way, copy = _pick_fastest(_list_copying_ways(source, buffers, numbers), device)

    def run() -> Pass:
        with DeviceClock(device) as clock:
            for i in range(len(numbers)):
                copy(i)
        return Pass(images=sum(map(len, batches)), device_s=clock.seconds())

    return Contender(name="copying ready pixels", run=run, is_limit=True, work="memory copies", facts={"way": way})


def measure_memory_bandwidth(device: torch.device) -> dict[str, float]:
    """Return GB/s of writing, and of copying, where both the bytes read and the bytes written count."""
    buffers = [torch.ones(_BANDWIDTH_BYTES // 4, device=device) for _ in range(_BUFFERS)]
    _, write = _pick_fastest(_list_writing_ways(buffers), device)

    def copy(i: int) -> None:
        buffers[i].copy_(buffers[1 - i])

    written, copied = (_calls_per_s(work, _BUFFERS, device) * _BANDWIDTH_BYTES for work in (write, copy))
    return {"memory_write_gb_per_s": written / 1e9, "memory_copy_gb_per_s": 2 * copied / 1e9}


def _batch_buffers(images: int, image_size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return flat buffers in the memory that our own loaders use for batches; every page has been touched."""
    if device.type == "cuda":
        return [torch.zeros(images * 3 * image_size**2, dtype=dtype, device=device) for _ in range(_BUFFERS)]
    memory = BatchMemory(image_size, dtype)
    batches = [memory.take(images) for _ in range(_BUFFERS)]
    return [batch.permute(0, 2, 3, 1).reshape(-1).zero_() for batch in batches]


def _list_writing_ways(buffers: Sequence[torch.Tensor]) -> dict[str, Work]:
    ways: dict[str, Work] = {"torch.fill_": lambda i: buffers[i].fill_(1)}
    if buffers[0].device.type == "cpu":
        raw = [buffer.view(torch.uint8).numpy() for buffer in buffers]

        def fill(part: np.ndarray) -> None:
            ctypes.memset(part.ctypes.data, 1, part.nbytes)

        def numpy_fill(part: np.ndarray) -> None:
            part.view(np.uint64).fill(2**64 - 1)

        threads = _Threads()
        ways["memset on threads"] = lambda i: threads.run_on_parts(fill, raw[i], 8)
        ways["numpy.fill on threads"] = lambda i: threads.run_on_parts(numpy_fill, raw[i][: len(raw[i]) // 8 * 8], 8)
    return ways


def _list_copying_ways(
    source: torch.Tensor, buffers: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor]
) -> dict[str, Work]:
    """Return the ways of copying; each copies batch ``i % len(numbers)``."""
    rows = [buffer.view(-1, source.shape[1]) for buffer in buffers]

    def select(i: int) -> None:
        chosen = numbers[i % len(numbers)]
        torch.index_select(source, 0, chosen, out=rows[i % _BUFFERS][: len(chosen)])

    ways: dict[str, Work] = {"torch.index_select": select}
    if source.device.type == "cpu":
        images, targets, threads = source.numpy(), [row.numpy() for row in rows], _Threads()

        def copy(i: int) -> None:
            chosen, target = numbers[i % len(numbers)].numpy(), targets[i % _BUFFERS]

            def copy_part(places: np.ndarray) -> None:
                for place in places.tolist():
                    target[place] = images[chosen[place]]

            threads.run_on_parts(copy_part, np.arange(len(chosen)), 1)

        ways["numpy rows on threads"] = copy
    return ways


class _Threads:
    """As many threads as torch uses."""

    def __init__(self) -> None:
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="limit")

    def run_on_parts(self, work: Callable[[np.ndarray], None], items: np.ndarray, unit: int) -> None:
        """Do ``work`` on equal parts of ``items``, one per thread, each a multiple of ``unit`` long; wait for all."""
        bounds = [len(items) // unit * part // self._count * unit for part in range(self._count)] + [len(items)]
        list(self._pool.map(work, [items[start:stop] for start, stop in itertools.pairwise(bounds)]))


# --- inflating ---


def make_inflate_limit(files: Sequence[Path], num_threads: int) -> Contender:
    """Return the limit that only inflates the data of the PNG ``files``, of at most ``_MOST_INFLATED`` of them."""
    streams = [_zlib_stream(path.read_bytes()) for path in files[:: -(-len(files) // _MOST_INFLATED)]]
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="inflate")

    def run() -> Pass:
        # without bufsize the output buffer is doubled and copied repeatedly, which takes twice as long
        for _ in threads.map(lambda stream: len(inflating.decompress(stream[0], bufsize=stream[1])), streams):
            pass
        return Pass(images=len(streams))

    return Contender(name="inflate alone", run=run, is_limit=True, work="inflate", facts={"by": inflating.__name__})


def _zlib_stream(png: bytes) -> tuple[bytes, int]:
    """Return the zlib stream of a valid PNG, and a buffer size for its content and for zlib to see its end."""
    stream = read_stream(png)
    if stream is None:
        raise ValueError("not a good PNG")  # packing, or the check of the tree, has refused it with its name before
    return stream.zlib_stream, stream.unpacked_bytes + 64


# --- arithmetic ---


def make_arithmetic_limit(model_name: str, dtype: torch.dtype, device: torch.device) -> Contender:
    """Return the limit of ``model_name``, as if every operation ran at the speed of a large matrix product."""
    per_image = count_flops_per_image(model_name)
    product, flops, used = _make_matrix_product(dtype, device)

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
        is_limit=True,
        work="arithmetic",
        facts={"gflop_per_image": per_image / 1e9, "dtype": _dtype_name(used)},
    )


def count_flops_per_image(model_name: str) -> float:
    """Return the floating-point operations of a forward and a backward pass, as torch counts them: two per
    multiply-add.
    """
    from torch.utils.flop_counter import FlopCounterMode

    batch, size = 2, input_size(model_name)
    with torch.device("meta"):  # shapes are enough to count; nothing is computed
        model = build_model(model_name, 13)
        images = torch.empty(batch, 3, size, size)
        own_formula = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
        with FlopCounterMode(display=False, custom_mapping=own_formula) as counter:
            logits, aux_logits = forward_logits(model, images)
            total = logits.sum() if aux_logits is None else logits.sum() + aux_logits.sum()
            torch.autograd.backward(total)
    return float(counter.get_total_flops()) / batch


def _convolution_backward_flops(
    grad: Sequence[int], images: Sequence[int], weight: Sequence[int], *rest: Any, **ignored: Any
) -> int:
    """Count each requested gradient like the forward pass.

    torch's own formula ignores the groups of depthwise convolutions, and counts seven times too much for MobileNetV2.
    """
    gradients = int(sum(rest[-1][:2]))  # output_mask: gradient of the input, gradient of the weights
    return gradients * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)


def measure_matmul_speed(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return GFLOP/s of a large matrix product in ``dtype``, or on a CPU in float32 if that is faster."""
    product, flops, used = _make_matrix_product(dtype, device)
    return {f"matmul_{_dtype_name(used)}_gflop_per_s": _calls_per_s(product, 1, device) * flops / 1e9}


def _make_matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Work, float, torch.dtype]:
    """Return the product as work, its floating-point operations, and the dtype it is computed in."""
    if device.type == "cuda":
        return *_make_square_product(_MATMUL_SIZE["cuda"], dtype, device), dtype
    # a CPU without units for a 16-bit type is a thousand times slower in it; nobody would use it there
    small = {
        candidate: _calls_per_s(_make_square_product(256, candidate, device)[0], 1, device)
        for candidate in {dtype, torch.float32}
    }
    fastest = max(small, key=lambda candidate: small[candidate])
    return *_make_square_product(_MATMUL_SIZE["cpu"], fastest, device), fastest


def _make_square_product(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Work, float]:
    left, right, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda i: torch.mm(left, right, out=out), 2.0 * n**3


# --- timing ---


def _pick_fastest(ways: Mapping[str, Work], device: torch.device) -> tuple[str, Work]:
    """Return the name and the work of the fastest of ``ways``."""
    rates = {name: _calls_per_s(work, _BUFFERS, device) for name, work in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    return best, ways[best]


def _calls_per_s(work: Work, buffers: int, device: torch.device) -> float:
    """Return calls per second in the best of three trials."""
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
