"""Run a kernel over slices of the rows on a few threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

__all__ = ["over_rows", "worthwhile"]

# Entries that one thread reads in about a quarter of a millisecond. Starting a thread takes a fourth of that.
_CHUNK = 1 << 19


def worthwhile(threads: int | None, entries: int) -> int:
    """Return how many of the threads pay for their start when so many entries are read.

    They start one after another, so that t of them take about ``entries / t + t * start``: least at a square root.
    """
    return max(1, min(threads or 1, math.isqrt(entries // _CHUNK)))


def over_rows(kernel: Callable[[int, int], object], n: int, threads: int) -> None:
    """Call ``kernel(start, stop)`` over a partition of ``range(n)``, one slice per thread.

    The pool lives for this call only: starting it costs tens of microseconds, and a pool kept between calls would
    be dead weight in a forked DataLoader worker, where its threads no longer exist.
    """
    if threads <= 1 or n < 2 * threads:
        kernel(0, n)
        return
    cuts = [n * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        rest = []
        for first, last in pairwise(cuts[1:]):
            try:
                rest.append(pool.submit(kernel, first, last))
            except RuntimeError:  # the main thread has ended, or no thread can be started
                kernel(first, last)
        kernel(cuts[0], cuts[1])
        for future in rest:
            future.result()
