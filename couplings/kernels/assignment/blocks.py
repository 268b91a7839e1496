"""Many square problems in one call."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from .._threads import over_rows, worthwhile
from . import solver
from .dense import OK, solve_dense_blocks
from .tuning import TUNING

__all__ = ["solve_blocks"]


def solve_blocks(
    costs: npt.NDArray[Any],
    sizes: npt.NDArray[np.int64],
    *,
    tolerance: float = 0.0,
    max_bids: int | None = None,
    max_seconds: float | None = None,
    threads: int | None = None,
) -> tuple[npt.NDArray[np.int64], float]:
    """Solve many square problems; small ones in one compiled loop.

    Parameters
    ----------
    costs : (sum of sizes**2,) float32 or float64 array
        The blocks one after the other, each row by row; never modified.
    sizes : (b,) int64 array
        Rows of each block, 0 or more.
    tolerance, max_bids, max_seconds
        Of each block that is too large for the loop; see `solve`.
    threads : int, optional
        Threads over the blocks (default 1). The answer does not depend on it.

    Returns
    -------
    index : (sum of sizes,) int64 array
        Column of each row within its block.
    slack : float
        The total of all blocks is above the optimum by no more than this.

    Raises
    ------
    TypeError, ValueError
        As `solve`, and if `costs` does not have as many entries as the blocks.
    """
    sizes = np.ascontiguousarray(sizes, np.int64)
    if costs.ndim != 1 or sizes.ndim != 1 or (sizes < 0).any() or costs.size != int((sizes * sizes).sum()):
        msg = (
            f"costs must be flat, with size**2 entries for each of the sizes, got {costs.shape} for {sizes.shape} sizes"
        )
        raise ValueError(msg)
    if costs.dtype not in (np.float32, np.float64):
        msg = f"costs must be float32 or float64, got {costs.dtype}"
        raise TypeError(msg)
    flat = np.ascontiguousarray(costs).view()
    flat.flags.writeable = False
    blocks = len(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes * sizes)])
    rows = np.concatenate([[0], np.cumsum(sizes)])
    index = np.empty(rows[-1], np.int64)
    slack = np.zeros(blocks)
    status = np.full(blocks, -1)
    small = math.isqrt(TUNING.dense_entries)
    most = int(min(small, sizes.max(initial=0)))
    workers = worthwhile(threads, flat.size)
    over_rows(
        lambda a, b: solve_dense_blocks(flat, sizes, starts, rows, a, b, most, index, slack, status), blocks, workers
    )

    def solve_one(b: int) -> None:
        n = sizes[b]
        block = flat[starts[b] : starts[b + 1]].reshape(n, n)
        try:
            found = solver.solve(block, tolerance=tolerance, max_bids=max_bids, max_seconds=max_seconds)
        except ValueError as error:
            msg = f"block {b}: {error}"
            raise ValueError(msg) from None
        index[rows[b] : rows[b + 1]] = found.index
        slack[b] = max(0.0, found.total - found.lower_bound)

    # What is too large for the loop, crowded, has forbidden pairs, or totals near the limits of float64.
    rest = np.flatnonzero(status != OK).tolist()
    if workers > 1 and len(rest) > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(solve_one, rest))
    else:
        for b in rest:
            solve_one(b)
    return index, math.fsum(slack.tolist())
