"""Work on a batch shared out over Python threads that end with it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import torch


def parallel_for(work: Callable[[int, int], None], items: int) -> None:
    """Run ``work(start, stop)`` over equal parts of ``items``, one here and each other on a thread that ends with this
    call.
    """
    parts = max(1, min(torch.get_num_threads(), items))
    bounds = [items * part // parts for part in range(parts + 1)]
    failures: list[BaseException] = []

    def guarded(start: int, stop: int) -> None:
        try:
            work(start, stop)
        except BaseException as error:  # raised again below, in the caller's thread
            failures.append(error)

    helpers = [threading.Thread(target=guarded, args=part) for part in itertools.pairwise(bounds[1:])]
    for helper in helpers:
        helper.start()
    guarded(0, bounds[1])
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
