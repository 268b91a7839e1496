"""Numba kernels: the assignment solver, Sinkhorn, L1 distances, distances of pairs, greedy and stable matching.

Importing this package does not import Numba; its modules do, and so does the first use of `solve`, `solve_blocks` or
`linear_sum_assignment`, which are found here as well.
"""

from __future__ import annotations

import logging
import time
from typing import Any

__all__ = ["linear_sum_assignment", "solve", "solve_blocks", "warmup"]

log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    if name in ("linear_sum_assignment", "solve", "solve_blocks"):
        from . import assignment

        return getattr(assignment, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def warmup() -> float:
    """Compile every kernel for every size and dtype, or load it from the disk cache, so that timings exclude it.

    Returns
    -------
    float
        Seconds it took: about half a minute the first time on a machine, under one when cached. Also logged, at INFO.
    """
    import numpy as np

    start = time.perf_counter()
    from .assignment import solve, solve_blocks
    from .greedy import stable
    from .l1 import cdist_l1
    from .pairs import pair_distances
    from .sinkhorn import balance, draw

    i: Any = np.arange(300)
    j = i[:, None]
    tied = (j // 20 * (i // 20) * 3 + j // 20 * 7 + i // 20 * 11) % 10
    for dtype in (np.float32, np.float64):
        # Large enough for the auction: tied in blocks, which needs forests, without ties, with columns that differ, and
        # without a sketch; then what is solved at once.
        scattered = ((j * 37 + i * j * 11) % 1013).astype(dtype)
        for cost in (tied, scattered, scattered[:250], scattered + i * 100, scattered * (i < 3)):
            solve(cost.astype(dtype))
        small = scattered[:12, :12]
        solve(small)
        solve_blocks(small.ravel(), np.array([12]))
        stable(scattered, scattered)
        cdist_l1(scattered, scattered)
        for kind in ("squared", "absolute", "angular"):
            pair_distances(scattered, scattered, i, kind)
    plan, ones = np.exp(-tied[:12, :12].astype(np.float32)), np.ones(12, np.float32)
    balance(plan, 1e-5, 10)
    draw(plan, ones, ones, plan, ones, i[:12], np.full(12, 0.5), False)
    seconds = time.perf_counter() - start
    log.info("kernels ready in %.2f s", seconds)
    return seconds
