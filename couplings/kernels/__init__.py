"""Numba kernels: the assignment solver, L1 distances, distances of pairs, greedy and stable matching.

Importing this package does not import Numba; its modules (`assignment`, `greedy`, `l1`, `pairs`) do.
"""

from __future__ import annotations

import logging
import time

__all__ = ["warmup"]

log = logging.getLogger(__name__)


def warmup() -> float:
    """Compile every kernel, or load it from the disk cache, so that later timings exclude it.

    Returns
    -------
    float
        Seconds it took: some twenty the first time on a machine, under one when cached. Also logged, at INFO.
    """
    import numpy as np

    start = time.perf_counter()
    from .assignment import solve
    from .greedy import stable
    from .l1 import cdist_l1
    from .pairs import pair_distances

    for dtype in (np.float32, np.float64):
        # Wide enough for the list code; a tie-free and two tied costs, one in blocks, reach every branch.
        i = np.arange(200)
        solve(np.abs(i[:, None] // 50 - i // 80).astype(dtype))
        i = i[:96]
        cost = ((i[:, None] * 37 + i[None] * i[:, None] * 11) % 101).astype(dtype)
        solve(cost)
        solve(cost[:40])
        solve(cost[:12, :12])  # too narrow for a sketch
        stable(cost, cost)
        cdist_l1(cost, cost)
        for kind in ("squared", "absolute", "angular"):
            pair_distances(cost, cost, i, kind)
    seconds = time.perf_counter() - start
    log.info("kernels ready in %.2f s", seconds)
    return seconds
