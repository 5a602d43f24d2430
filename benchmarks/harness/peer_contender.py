"""From an entry of the registry to a contender: its environment, the best number of workers, a process
that is ready.
"""

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

from harness.measure import Contender
from harness.peer_process import HERE, Pass, Peer, PeerError, make_environment, read_requirements
from harness.processes import peak_bytes, process_tree, reset_peaks

_EACH_COUNT_UP_TO = 4
_TUNING_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all peers of a group are given alike."""

    pixels: Path
    """(N, S, S, 3) uint8 .npy, all images as Pillow resizes them: what is served ready, and what all are checked
    against.
    """
    images: Path
    """CSV: number and PNG file of each sample."""
    shards: Path
    """Our png shards of the same samples."""
    work_dir: Path
    """Where peers keep what they write, from run to run."""
    batch_size: int
    dtype: str
    device: str
    cores: int
    environments: Path | None
    """The folder of the peers' environments; None measures only peers that need none."""

    def arguments(self, entry: Entry, num_workers: int) -> list[object]:
        """The command line of ``entry``'s script."""
        flags = ("pixels", "images", "shards", "work_dir", "batch_size", "dtype", "device")
        given = [part for flag in flags for part in (f"--{flag}", getattr(self, flag))]
        return [*given, "--num_workers", num_workers, *entry.arguments]


def open_peer(
    entry: Entry, setting: Setting, stack: contextlib.ExitStack, log: Callable[[str], None] = print
) -> Contender:
    """A contender whose process is ready and lives as long as ``stack``; one that says why it is left out where that
    fails.
    """

    def start(num_workers: int) -> Peer:
        return Peer(
            entry.name, python, HERE / entry.script, setting.arguments(entry, num_workers), variables=_variables(entry)
        )

    try:
        python = _python_of(entry, setting.environments)
        best, rates, peer = tune(start, worker_counts(entry.least_workers, setting.cores), stack)
        reset_peaks(process_tree(peer.pid))  # what it took to write its store and to check its pixels does not count
        log(
            f"{entry.name}: {best} workers, of {', '.join(f'{count} ({rate:,.0f}/s)' for count, rate in rates.items())}"
        )
    except PeerError as error:
        log(f"left out: {error}")
        return Contender(name=entry.name, run=_not_started, left_out=error.reason)
    facts: dict[str, Any] = {"num_workers": best, "images_per_s_by_workers": rates} | _variables(entry)
    facts |= peer.check | peer.versions | peer.stored

    def processes() -> list[int]:
        return process_tree(peer.pid)

    return Contender(
        name=entry.name, run=peer.run, facts=facts, processes=processes, peak_bytes=lambda: peak_bytes(processes())
    )


def worker_counts(least: int, cores: int) -> list[int]:
    """The numbers of workers to try: all from ``least`` to ``cores``, and on larger machines powers of two in place of
    the middle.
    """
    powers = [1 << power for power in range(_EACH_COUNT_UP_TO.bit_length(), cores.bit_length())]
    counts = {*range(min(cores, _EACH_COUNT_UP_TO) + 1), *powers, cores}
    return sorted(count for count in counts if count >= least)


def tune(
    start: Callable[[int], Peer], counts: Sequence[int], stack: contextlib.ExitStack
) -> tuple[int, dict[int, float], Peer]:
    """The best of ``counts`` by epochs of half a second in all, after the one that checks the peer; the images/s of
    each that worked; and the best one's process, which lives as long as ``stack``.

    Raises the last :class:`PeerError` where none works.
    """
    rates: dict[int, float] = {}
    best: tuple[float, int, Peer] | None = None
    failure: PeerError | None = None
    for count in counts:
        peer: Peer | None = None
        try:
            peer = stack.enter_context(start(count))
            rates[count] = _images_per_s(peer)
        except PeerError as error:
            failure = error
            if peer is not None:  # its workers would take the cores from those that are timed
                peer.close()
            continue
        if best is None or rates[count] > best[0]:
            best, beaten = (rates[count], count, peer), best[2] if best else None
        else:
            beaten = peer
        if beaten is not None:  # at once, so that it takes no memory, nor time from those that are tried next
            beaten.close()
    if best is None:
        raise failure or ValueError("no number of workers to try")
    return best[1], rates, best[2]


def _images_per_s(peer: Peer) -> float:
    images, started = 0.0, time.perf_counter()
    while images == 0 or time.perf_counter() - started < _TUNING_S:
        images += peer.run().images
    return images / (time.perf_counter() - started)


def _python_of(entry: Entry, environments: Path | None) -> Path:
    if entry.environment is None:
        return Path(sys.executable)
    if environments is None:
        raise PeerError(entry.name, "needs an environment of its own; name a folder with --peers")
    requirements = read_requirements(HERE / f"requirements-{entry.environment}.txt")
    return make_environment(entry.environment, requirements, environments.resolve(), over_ours=entry.over_ours)


def _variables(entry: Entry) -> dict[str, str]:
    """Environment variables, which those that are set already override."""
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")} if entry.waits_passively else {}


def _not_started() -> Pass:
    raise RuntimeError("this peer is not in the race")
