"""Decides how many ranks ``--distributed`` starts on this machine, and starts them with torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import torch

from quaclrs.config import usable_processors
from quaclrs.errors import SIGNAL_EXIT_CODE, QuaclrsError, UsageError
from quaclrs.training.distributed import SHUTDOWN_S


def processes_wanted(nproc: int | None, device: str, flag: str) -> int:
    """Number of processes that ``flag`` (--distributed or --parallel) starts: ``nproc``, or one per visible GPU.

    Raises :class:`UsageError` where there are fewer GPUs than processes, or neither GPUs nor ``nproc``.
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


def set_threads_per_process(processes: int) -> None:
    """Set ``OMP_NUM_THREADS`` for ``processes`` child processes to their share of the processors, if it is not set."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_processors() // processes)))


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``quaclrs-train`` with ``arguments`` as ``nproc`` ranks on this machine; returns the exit code.

    When a rank fails, the launcher ends the others. It forwards signals to all ranks; rank 0 then writes a checkpoint.
    Raises :class:`QuaclrsError` for a rank that was killed, since it could not report anything itself.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch reports a failure on a page; the rank has reported it in one line
    logging.disable(logging.CRITICAL)
    set_threads_per_process(nproc)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, but the host name may resolve elsewhere
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

    def stop(number: int, frame: FrameType | None) -> None:
        raise SignalException("as torch does for other signals", sigval=signal.Signals(number))

    signal.signal(signal.SIGUSR1, stop)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup, which torch would overrule
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
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
