"""The ranks of one training: rank and world size, collectives, joining and leaving the process group.

The only module that reads ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

There are two process groups. The default group carries tensors on their device (NCCL on GPUs, gloo on the CPU). A
second one, always gloo, carries host values. A rank that ends breaks its gloo connections, so every other rank notices
at its own next step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from quaclrs.errors import QuaclrsError, UsageError, run_command

Value = TypeVar("Value")

_COLLECTIVE_TIMEOUT = timedelta(hours=24)
"""Longest wait for a rank that is alive, which may be packing the dataset. A rank notices a dead one at once."""
SHUTDOWN_S = 25
"""Seconds from the first failure or signal to the end of the last rank: time to write a checkpoint."""
_REPORT_DELAY_S = 2
"""Seconds that a rank without a message of its own waits before it exits.

Launchers report the rank that exits first and kill the others, so the rank that has the message must exit first.
"""


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and world size of this process, and the collectives of its world.

    In a world of one process there is no process group, and every collective returns its own input.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_size: int = 1
    hosts: distributed.ProcessGroup | None = None
    """The gloo group of host values; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce ``tensor`` to its sum over all ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite ``tensors`` in place with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def gather(self, value: Value) -> list[Value]:
        """The ``value`` of every rank, in the order of ranks. Collective; ``value`` must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.hosts)
        return values

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's ``value`` on every rank. Collective; ``value`` must be picklable."""
        if self.size == 1:
            return value
        values: list[Value] = [value]
        distributed.broadcast_object_list(values, 0, group=self.hosts)
        return values[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on local rank 0 of every other machine, then on all other ranks.

        The other ranks then find what rank 0 has prepared (a packed dataset, a download). Collective.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for now in range(3):
            if now == turn:
                yield
            if self.size > 1:
                distributed.barrier(group=self.hosts)


class AsyncConsensus:
    """Agreement of all ranks on the highest of their requests, one step late, so that no host waits for another.

    A request is an int; 0 means "no request". After each step every rank calls :meth:`exchange`, which starts an
    asynchronous all-reduce (maximum) and returns the result of the one before. All ranks see the same value at the same
    step. In a world of one the request is returned at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, request: int) -> int:
        """Submit ``request``; returns the maximum of all ranks' requests of the call before. Collective."""
        if self._world.size == 1:
            return request
        agreed = self.settle()
        if agreed == 0:  # otherwise all ranks are about to act on it; a request that is still open comes again
            tensor = torch.tensor(request)
            work = distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._world.hosts, async_op=True)
            self._pending = tensor, work
        return agreed

    def settle(self) -> int:
        """The result of the last :meth:`exchange`, 0 if there is none. Call it when no further exchange follows."""
        if self._pending is None:
            return 0
        tensor, work = self._pending
        self._pending = None
        work.wait()
        return int(tensor)


# --- joining ---


def is_rank() -> bool:
    """Whether torchrun, or :mod:`quaclrs.training.launcher`, started this process as one of several ranks.

    Raises :class:`UsageError` where the environment sets ``WORLD_SIZE`` but not the rest.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise UsageError(
                f"the environment sets WORLD_SIZE={os.environ['WORLD_SIZE']} but {name}={value!r}; start with "
                "torchrun, or unset WORLD_SIZE"
            )
    return True


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """Join the process group for the block, if this process is a rank; yields its :class:`World`. Collective.

    ``device`` is ``--device``. If the block raises, this rank abandons the groups without waiting: the other ranks may
    never arrive. Raises :class:`UsageError` for more ranks than GPUs.
    """
    if not is_rank():
        yield World()
        return
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        found = torch.cuda.device_count()
        if local_rank >= found:
            if local_rank > found:  # the first rank without a GPU reports it
                time.sleep(_REPORT_DELAY_S)
            raise UsageError(
                f"{local_size} processes on this machine, and torch sees {found} GPU(s); start one per GPU, or "
                "--device cpu"
            )
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_COLLECTIVE_TIMEOUT)
    hosts = distributed.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
    assert isinstance(hosts, distributed.ProcessGroup)  # as it is for members of the group
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, hosts=hosts)
    except QuaclrsError as error:
        if error.everywhere and rank > 0:
            _wait_for_main_to_end(hosts)
        raise
    distributed.barrier(group=hosts)  # no rank leaves while another still uses the group
    distributed.destroy_process_group()


def _wait_for_main_to_end(hosts: distributed.ProcessGroup) -> None:
    """Wait until rank 0 has ended: it may still write the checkpoint, or report the error for all ranks."""
    with contextlib.suppress(RuntimeError):  # raised when rank 0 closes the connection
        distributed.barrier(group=hosts, async_op=True).wait(timedelta(seconds=SHUTDOWN_S))


def run_rank(command: Callable[[], None], program: str) -> int:
    """As :func:`quaclrs.errors.run_command`, for one rank: messages name it. Rank 0 alone prints errors of all ranks.

    After a failure the process exits here, without running exit handlers: threads of libraries may wait for other ranks
    forever.
    """
    rank = int(os.environ["RANK"])

    def run_naming_rank() -> int:
        try:
            command()
        except QuaclrsError as error:
            if error.everywhere and rank > 0:
                if not distributed.is_initialized():
                    time.sleep(_REPORT_DELAY_S)
                return error.exit_code
            if error.everywhere:
                raise
            raise type(error)(f"rank {rank}: {error}") from None
        except RuntimeError as error:
            if not _is_rank_lost(error):
                raise
            print(f"{program}: rank {rank}: another rank has ended; see what it says", file=sys.stderr, flush=True)
            time.sleep(_REPORT_DELAY_S)
            return 1
        return 0

    try:
        code = run_command(run_naming_rank, program)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_rank_lost(error: RuntimeError) -> bool:
    """Whether ``error`` means that another rank has ended. gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer")
    )
