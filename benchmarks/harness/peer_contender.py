"""From a registry entry to a contender: the peer's environment, its best number of workers, a process that is ready."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.registry import Entry

from harness.contender import Contender, Pass, PeerError
from harness.peer_environment import make_environment, read_requirements
from harness.peer_process import PEERS_FOLDER, Peer
from harness.processes import list_tree_pids, read_peak_bytes, reset_peaks

_TRY_EACH_UP_TO = 4
"""Numbers of workers up to this are all tried."""
_TUNING_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all peers of a group get alike."""

    pixels: Path
    """(N, S, S, 3) uint8 .npy, all images as Pillow resizes them: served as ready pixels, and the reference that every
    peer is checked against.
    """
    images: Path
    """CSV: number and PNG file of each sample."""
    shards: Path
    """Our png shards of the same samples."""
    work_dir: Path
    """Where peers keep the files they write, between runs."""
    batch_size: int
    dtype: str
    device: str
    cores: int
    environments: Path | None
    """The folder of the peers' environments; with None only peers that need none are measured."""

    def arguments(self, entry: Entry, num_workers: int) -> list[object]:
        """Return the command line of ``entry``'s script."""
        flags = ("pixels", "images", "shards", "work_dir", "batch_size", "dtype", "device")
        given = [part for flag in flags for part in (f"--{flag}", getattr(self, flag))]
        return [*given, "--num_workers", num_workers, *entry.arguments]


def open_peer(
    entry: Entry, setting: Setting, stack: contextlib.ExitStack, log: Callable[[str], None] = print
) -> Contender:
    """Return a contender whose process is ready and lives until ``stack`` is closed.

    If that fails, the contender is left out and says why.
    """

    def start(num_workers: int) -> Peer:
        script, arguments = PEERS_FOLDER / entry.script, setting.arguments(entry, num_workers)
        return Peer(entry.name, python, script, arguments, variables=_environment_variables(entry))

    try:
        python = _find_python(entry, setting.environments)
        best, rates, peer = tune_workers(start, list_worker_counts(entry.least_workers, setting.cores), stack)
        reset_peaks(list_tree_pids(peer.pid))  # the peak of writing its store and checking its pixels does not count
        tried = ", ".join(f"{count} ({rate:,.0f}/s)" for count, rate in rates.items())
        log(f"{entry.name}: {best} workers, of {tried}")
    except PeerError as error:
        log(f"left out: {error}")
        return Contender(name=entry.name, run=_refuse_to_run, left_out=error.reason)
    facts: dict[str, Any] = {"num_workers": best, "images_per_s_by_workers": rates} | _environment_variables(entry)
    facts |= peer.check | peer.versions | peer.stored

    def list_pids() -> list[int]:
        return list_tree_pids(peer.pid)

    return Contender(
        name=entry.name,
        run=peer.run,
        facts=facts,
        list_pids=list_pids,
        read_peak_bytes=lambda: read_peak_bytes(list_pids()),
    )


def list_worker_counts(least: int, cores: int) -> list[int]:
    """Return the numbers of workers to try: ``least`` to ``cores``, on larger machines only powers of two in the
    middle."""
    powers = [1 << power for power in range(_TRY_EACH_UP_TO.bit_length(), cores.bit_length())]
    counts = {*range(min(cores, _TRY_EACH_UP_TO) + 1), *powers, cores}
    return sorted(count for count in counts if count >= least)


def tune_workers(
    start: Callable[[int], Peer], counts: Sequence[int], stack: contextlib.ExitStack
) -> tuple[int, dict[int, float], Peer]:
    """Find the fastest of ``counts``, each timed for half a second after the epoch that checks the peer.

    Returns the best count, the images/s of each count that worked, and the best count's process, which lives until
    ``stack`` is closed. Raises the last :class:`PeerError` if no count works.
    """
    rates: dict[int, float] = {}
    best: tuple[float, int, Peer] | None = None
    failure: PeerError | None = None
    for count in counts:
        peer: Peer | None = None
        try:
            peer = stack.enter_context(start(count))
            rates[count] = _measure_rate(peer)
        except PeerError as error:
            failure = error
            if peer is not None:  # its workers would take the cores from the counts still to be timed
                peer.close()
            continue
        if best is None or rates[count] > best[0]:
            best, beaten = (rates[count], count, peer), best[2] if best else None
        else:
            beaten = peer
        if beaten is not None:  # closed at once, so that it takes no memory or time from the counts still to be tried
            beaten.close()
    if best is None:
        raise failure or ValueError("no number of workers to try")
    return best[1], rates, best[2]


def _measure_rate(peer: Peer) -> float:
    """Return images/s over at least one epoch and at least ``_TUNING_S``."""
    images, started = 0.0, time.perf_counter()
    while images == 0 or time.perf_counter() - started < _TUNING_S:
        images += peer.run().images
    return images / (time.perf_counter() - started)


def _find_python(entry: Entry, environments: Path | None) -> Path:
    if entry.environment is None:
        return Path(sys.executable)
    if environments is None:
        raise PeerError(entry.name, "needs an environment of its own; name a folder with --peers")
    requirements = read_requirements(PEERS_FOLDER / f"requirements-{entry.environment}.txt")
    return make_environment(entry.environment, requirements, environments.resolve(), over_ours=entry.over_ours)


def _environment_variables(entry: Entry) -> dict[str, str]:
    """Return the environment variables to start with; a variable that is set already wins."""
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")} if entry.waits_passively else {}


def _refuse_to_run() -> Pass:
    raise RuntimeError("this peer is not in the race")
