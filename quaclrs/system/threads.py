"""Runs work on a batch in Python threads that end with the batch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import torch


def parallel_for(work: Callable[[int, int], None], items: int) -> None:
    """Call ``work(start, stop)`` for equal parts of ``range(items)``, on ``torch.get_num_threads()`` threads.

    The calling thread takes the first part. The other threads end before the function returns. The first exception of
    any part is raised here.
    """
    parts = max(1, min(torch.get_num_threads(), items))
    bounds = [items * part // parts for part in range(parts + 1)]
    failures: list[BaseException] = []

    def guarded(start: int, stop: int) -> None:
        try:
            work(start, stop)
        except BaseException as error:  # raised below, in the caller's thread
            failures.append(error)

    helpers = [threading.Thread(target=guarded, args=part) for part in itertools.pairwise(bounds[1:])]
    for helper in helpers:
        helper.start()
    guarded(0, bounds[1])
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
