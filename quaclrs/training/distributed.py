"""The ranks of one training: who this process is, what ranks tell each other, and starting them. The only reader of
RANK and WORLD_SIZE.

Two groups: the default one carries tensors on their device (NCCL on GPUs, gloo on the CPU), the other one, always gloo,
what the hosts have to agree on. A rank that ends, for whatever reason, breaks its gloo connections, and so all others
learn of it at their next step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
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

from quaclrs.config import default_num_workers
from quaclrs.errors import SIGNAL_EXIT_CODE, QuaclrsError, UsageError, run_command

Value = TypeVar("Value")

_PATIENCE = timedelta(hours=24)
"""How long a rank waits for another that is alive: it may be packing the dataset. Dead ones are noticed at once."""
_SHUTDOWN_S = 25
"""From the first failure, or signal, to the end of the last rank; time to write a checkpoint."""
_OTHERS_SPEAK_S = 2
"""Launchers blame the rank that they see end first, and end all others then: who has nothing to say waits so long with
its end.
"""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of one training, and which of them this is. One process needs no group, and no method does anything
    then.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    hosts: distributed.ProcessGroup | None = None
    """The gloo group; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def gather(self, value: Value) -> list[Value]:
        """The ``value`` of each rank, by rank; a meeting point. Anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.hosts)
        return values

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's ``value``, on every rank; a meeting point."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, 0, group=self.hosts)
        return values[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block first, then the first rank of every other machine, then the rest: what one prepares,
        others find.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for now in range(3):
            if now == turn:
                yield
            if self.size > 1:
                distributed.barrier(group=self.hosts)


class AsyncConsensus:
    """What any rank wishes, known to all ranks at the same step, one step late: no rank waits for the others' hosts.

    A wish is an int from 0, "nothing"; the highest one counts. In a world of one it is known at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: tuple[torch.Tensor, Any] | None = None

    def exchange(self, wish: int) -> int:
        """Tell the others ``wish``; returns what was agreed on. To be called equally often on every rank."""
        if self._world.size == 1:
            return wish
        agreed = self.settle()
        if (
            agreed == 0
        ):  # else all ranks are about to do something else, and whoever still has a wish will have it later
            tensor = torch.tensor(wish)
            work = distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._world.hosts, async_op=True)
            self._asked = tensor, work
        return agreed

    def settle(self) -> int:
        """What the last exchange comes to; for when no further one follows."""
        if self._asked is None:
            return 0
        tensor, work = self._asked
        self._asked = None
        work.wait()
        return int(tensor)


# --- joining ---


def is_rank() -> bool:
    """Whether torchrun, or our own launcher, started this process as one of several.

    Raises :class:`UsageError` where the environment says so but not which one.
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
    """The world of this process; ``device`` is ``--device``. Meets all other ranks before it returns.

    Errors of the block leave the groups behind at once: waiting for the others to agree on it could take for ever.
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
            if local_rank > found:  # the first of those without a GPU says so
                time.sleep(_OTHERS_SPEAK_S)
            raise UsageError(
                f"{local_size} processes on this machine, and torch sees {found} GPU(s); start one per GPU, or "
                "--device cpu"
            )
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    hosts = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(hosts, distributed.ProcessGroup)  # which it is for members
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, hosts=hosts)
    except QuaclrsError as error:
        if error.everywhere and rank > 0:
            _outlast_main(hosts)
        raise
    distributed.barrier(group=hosts)  # nobody hangs up on a rank that is still listening
    distributed.destroy_process_group()


def _outlast_main(hosts: distributed.ProcessGroup) -> None:
    """Wait for the end of rank 0, which may be writing the checkpoint, or has to say for all what is wrong."""
    with contextlib.suppress(RuntimeError):  # which is how one hears of its end
        distributed.barrier(group=hosts, async_op=True).wait(timedelta(seconds=_SHUTDOWN_S))


def run_rank(command: Callable[[], None], program: str) -> int:
    """As :func:`quaclrs.errors.run_command`, for one of several processes: says which, and not what another one says.

    A failure ends the process here, without leave from libraries whose threads wait for other ranks.
    """
    rank = int(os.environ["RANK"])

    def told() -> int:
        try:
            command()
        except QuaclrsError as error:
            if error.everywhere and rank > 0:
                if not distributed.is_initialized():
                    time.sleep(_OTHERS_SPEAK_S)
                return error.exit_code
            if error.everywhere:
                raise
            raise type(error)(f"rank {rank}: {error}") from None
        except RuntimeError as error:
            if not _is_rank_lost(error):
                raise
            print(f"{program}: rank {rank}: another rank has ended; see what it says", file=sys.stderr, flush=True)
            time.sleep(_OTHERS_SPEAK_S)
            return 1
        return 0

    try:
        code = run_command(told, program)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_rank_lost(error: RuntimeError) -> bool:
    """Whether this is torch's way of saying that another rank has ended; gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer")
    )


# --- starting ---


def processes_wanted(nproc: int | None, device: str, flag: str) -> int:
    """How many processes ``flag`` (--distributed or --parallel) is about: ``nproc``, or one per visible GPU.

    Raises :class:`UsageError` where there is no GPU and no number, or there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and gpus == 0:
        raise UsageError(f"--device {device}: torch sees no GPU here; use --device auto or cpu")
    if device.startswith("cuda:"):
        raise UsageError(
            f"{flag}: takes all GPUs, and --device {device} names one; set CUDA_VISIBLE_DEVICES to choose among them"
        )
    if nproc is None:
        if gpus == 0:
            raise UsageError(f"{flag}: no GPU to be used here; give --nproc N for N processes on the CPU")
        return gpus
    if gpus and nproc > gpus:
        raise UsageError(f"--nproc {nproc}: torch sees {gpus} GPU(s); give no more, or --device cpu")
    return nproc


def share_processors(processes: int) -> None:
    """Let each of ``processes`` children of this process compute on its share of the processors, unless the user has
    said otherwise.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, default_num_workers() // processes)))


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``quaclrs-train`` with ``arguments`` as ``nproc`` ranks on this machine by torch's own launcher; returns the
    exit code.

    The first rank to fail ends the others; signals are passed on, and each rank then writes what it has to. Raises
    :class:`QuaclrsError` for a rank that was killed, and so could say nothing itself.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # its own account of a failure is a page long; the rank has said in one line what is wrong
    logging.disable(logging.CRITICAL)
    share_processors(nproc)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_S))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on one machine: whatever its host name resolves to
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="quaclrs",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "quaclrs.cli", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        killed = QuaclrsError(
            f"rank {rank} was killed by {signal.Signals(-first.exitcode).name} (out of memory?); --resume goes on"
        )
        killed.exit_code = SIGNAL_EXIT_CODE - first.exitcode
        raise killed from None
    except SignalException as error:
        return SIGNAL_EXIT_CODE + int(error.sigval)
    return 0
