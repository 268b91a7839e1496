"""The certificate: what the prices prove about an assignment, from one more look at every cost."""

from __future__ import annotations

import math

import numpy as np

from .._jit import jit
from .._threads import over_rows
from .candidates import collect_from_sketch, group_minima, group_minima_of_sketch, work_space
from .costs import SKETCH_MAX, Costs, Floats, Integers, Prices, int16, is_lossless, level
from .tuning import TUNING

__all__ = ["lower_bound", "relative_gap"]

LIST_SIZE = TUNING.list_size


def relative_gap(total: float, bound: float) -> float:
    """Return ``(total - bound) / |total|``; 0 if the bound is reached, inf if only the total is 0."""
    if total <= bound:
        return 0.0
    return (total - bound) / abs(total) if total else math.inf


def lower_bound(costs: Costs, prices: Prices, col4row: Integers, threads: int) -> tuple[float, bool]:
    """Return a total that no assignment is below, and whether every row is tight.

    Any prices prove a bound (weak duality): each row pays its least ``level + price``, and n columns pay back no more
    than the n highest prices. Where costs were rounded to levels, half a level a row is taken off, and twice that for
    the rounding of a sum.
    """
    n, m = costs.C.shape
    dual, slack = np.empty(n), np.empty(n)
    over_rows(lambda start, stop: row_slacks(costs, prices, col4row, slack, dual, start, stop), n, threads)
    p = prices.exact
    paid = p if m == n else np.sort(p)[m - n :]
    bound = math.fsum(costs.row_min.tolist() + ((dual - paid) / costs.scale).tolist())
    if not is_lossless(costs.C, costs.row_min, costs.scale):
        bound = math.nextafter(bound - n / costs.scale, -math.inf)
    return bound, not slack.any()


@jit
def row_slacks(
    costs: Costs, prices: Prices, col4row: Integers, slack: Floats, dual: Floats, start: int, stop: int
) -> None:
    """Find each row's dual, the least ``level + price`` of all columns, and how far its own column is above it.

    A column that the sketch, rounded down as it is, puts above the row's own cannot be the least.
    """
    C, row_min, scale, _, sketch, step = costs
    p = prices.exact
    minima, sketch_minima, hits = work_space(p.size)
    columns = np.empty(LIST_SIZE, np.int64)
    for i in range(start, stop):
        j = col4row[i]
        own = level(C[i, j], row_min[i], scale) + p[j] if j >= 0 else np.inf
        u = own
        n = -1
        if own <= prices.base:  # the least level and the least price
            n = 0
        elif sketch.shape[1] > 0 and own < prices.base + SKETCH_MAX * step:
            group_minima_of_sketch(sketch, i, prices.sketch, sketch_minima)
            t = int16((own - prices.base) / step)
            n = collect_from_sketch(sketch, i, prices.sketch, sketch_minima, t, hits, columns)
            for k in range(n):
                u = min(u, level(C[i, columns[k]], row_min[i], scale) + p[columns[k]])
        if n < 0:
            group_minima(C, i, row_min[i], scale, p, minima)
            for b in range(minima.size):
                u = minima[b] if minima[b] < u else u
        dual[i] = u
        slack[i] = own - u
