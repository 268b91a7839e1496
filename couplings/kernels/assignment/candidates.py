"""Candidate lists: a few cheapest columns of each row, and what any other column costs at least.

Prices only rise, in the auction as along shortest paths. A list cut at a threshold therefore stays complete below that
threshold however many bids later, and its row is read again only when nothing below it is left. Even then the sketch
tells which few columns can matter; the floats are read in full only where it is too coarse.

Rows are read in *groups* of columns ``b, b + g, b + 2g, ...``: the minimum of each group is vectorised, a threshold is
chosen among the few minima, and only groups below it are looked into.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._jit import jit
from .costs import Costs, Floats, Integers, Prices, Shorts, int16, level
from .tuning import TUNING

__all__ = ["Lists", "Work"]

# Numba folds plain numbers into its code, but no attributes.
GROUPS = TUNING.groups
SKETCH_CANDIDATES = TUNING.sketch_candidates
FULL_CANDIDATES = TUNING.full_candidates


class Lists(NamedTuple):
    """Cheapest columns of each row; a column outside costs at least `beyond`, price included."""

    columns: npt.NDArray[np.uint32]  # (n, list_size)
    levels: Floats  # (n, list_size)
    lengths: Integers  # (n,)
    beyond: Floats  # (n,)


class Work(NamedTuple):
    """Scratch space of one thread."""

    minima: Floats
    sketch_minima: Shorts
    hits: Integers


@jit
def group_minima(C: Any, i: int, row_min: float, scale: float, p: Floats, minima: Floats) -> None:
    """Find the least ``level + price`` of each group of columns: four loads a step, no branch."""
    g = minima.size
    for j in range(g):
        x0 = level(C[i, j], row_min, scale) + p[j]
        x1 = level(C[i, j + g], row_min, scale) + p[j + g]
        x2 = level(C[i, j + 2 * g], row_min, scale) + p[j + 2 * g]
        x3 = level(C[i, j + 3 * g], row_min, scale) + p[j + 3 * g]
        x0 = x0 if x0 < x1 else x1
        x2 = x2 if x2 < x3 else x3
        minima[j] = x0 if x0 < x2 else x2
    for j in range(4 * g, p.size):
        x0 = level(C[i, j], row_min, scale) + p[j]
        minima[j - 4 * g] = min(x0, minima[j - 4 * g])


@jit
def group_minima_of_sketch(sketch: Shorts, i: int, p: Shorts, minima: Shorts) -> None:
    """Do what `group_minima` does on the sketch, sixteen columns to a vector register."""
    g = minima.size
    for j in range(g):
        x0 = int16(sketch[i, j] + p[j])
        x1 = int16(sketch[i, j + g] + p[j + g])
        x2 = int16(sketch[i, j + 2 * g] + p[j + 2 * g])
        x3 = int16(sketch[i, j + 3 * g] + p[j + 3 * g])
        x0 = x0 if x0 < x1 else x1
        x2 = x2 if x2 < x3 else x3
        minima[j] = x0 if x0 < x2 else x2
    for j in range(4 * g, p.size):
        x0 = int16(sketch[i, j] + p[j])
        minima[j - 4 * g] = min(x0, minima[j - 4 * g])


@jit
def group_count(m: int) -> int:
    """Return the number of groups of m columns, a multiple of the number that `merge_groups` leaves."""
    g = m // 4
    parts = max(1, g // GROUPS)
    return g - g % parts


@jit
def work_space(m: int) -> Work:
    """Return scratch space for rows of m columns."""
    g = group_count(m)
    return Work(np.empty(g), np.empty(g, np.int16), np.empty(g + 1, np.int64))


@jit
def merge_groups(minima: Any) -> Any:
    """Merge groups until few are left at the front of `minima`; return how many."""
    g = minima.size
    parts = max(1, g // GROUPS)
    h = g // parts
    for k in range(1, parts):
        for b in range(h):
            x = minima[k * h + b]
            minima[b] = x if x < minima[b] else minima[b]
    return h


@jit
def threshold(minima: Any, want: int) -> tuple[Any, Any]:
    """Return the least minimum, and a whole number that about `want` of the minima do not exceed, by bisection."""
    least = minima[0]
    most = minima[0]
    for b in range(minima.size):
        least = minima[b] if minima[b] < least else least
        most = minima[b] if minima[b] > most else most
    low = least
    high = most
    t = least  # first, lest there be ties
    for _ in range(52):
        count = int16(0)
        for b in range(minima.size):
            count = int16(count + (int16(1) if minima[b] <= t else int16(0)))
        if t == least and 4 * count >= 3 * want:
            break
        if count > want:
            high = t
        elif 4 * count < 3 * want:
            low = t
        else:
            break
        if low >= high:
            break
        t = type(least)(np.floor(0.5 * (np.float64(low) + np.float64(high))))
    return least, t


@jit
def collect_from_sketch(sketch: Shorts, i: int, p: Shorts, minima: Shorts, t: Any, hits: Integers, columns: Any) -> int:
    """List the columns whose sketched ``level + price`` is at most `t`; return how many, or -1 if they do not fit.

    Written without branches on the data: mispredicted, they would cost more than everything else here.
    """
    g = minima.size
    count = 0
    for b in range(g):
        hits[count] = b
        count += 1 if minima[b] <= t else 0
    n = 0
    last = columns.size - 1
    for k in range(count):
        j = hits[k]
        while j < p.size:  # a range with a step would divide
            columns[min(n, last)] = j
            n += 1 if int16(sketch[i, j] + p[j]) <= t else 0
            j += g
        if n > last:
            return -1
    return n


@jit
def collect(costs: Costs, i: int, p: Floats, minima: Floats, t: float, columns: Any, levels: Floats) -> int:
    """Do what `collect_from_sketch` does on the floats.

    Equal rows start at different groups, so that rows with many ties list different columns.
    """
    g = minima.size
    n = 0
    for k in range(g):
        b = (k + i) % g
        if minima[b] <= t:
            for j in range(b, p.size, g):
                x = level(costs.C[i, j], costs.row_min[i], costs.scale)
                if x + p[j] <= t:
                    if n == columns.size:
                        return -1
                    columns[n] = j
                    levels[n] = x
                    n += 1
    return n


@jit
def fill_list(costs: Costs, i: int, prices: Prices, lists: Lists, work: Work, try_sketch: bool) -> None:
    """Make the list of a row anew: from the sketch, if wanted and fine enough, else from the floats."""
    C, row_min, scale, _, sketch, step = costs
    minima, sketch_minima, hits = work
    p = prices.exact
    columns = lists.columns[i]
    levels = lists.levels[i]
    if try_sketch and sketch.shape[1] > 0:
        group_minima_of_sketch(sketch, i, prices.sketch, sketch_minima)
        h = merge_groups(sketch_minima)
        sketch_minima = sketch_minima[:h]
        least, t = threshold(sketch_minima, SKETCH_CANDIDATES)
        n = collect_from_sketch(sketch, i, prices.sketch, sketch_minima, t, hits, columns)
        if n < 0 and t > least:
            t = int16(least + (t - least) // 4)
            n = collect_from_sketch(sketch, i, prices.sketch, sketch_minima, t, hits, columns)
        if n >= 0:
            for k in range(n):
                levels[k] = level(C[i, columns[k]], row_min[i], scale)
            lists.lengths[i] = n
            lists.beyond[i] = (np.float64(t) + 1.0) * step + prices.base
            return
    group_minima(C, i, row_min[i], scale, p, minima)
    h = merge_groups(minima)
    minima = minima[:h]
    best, limit = threshold(minima, FULL_CANDIDATES)
    n = collect(costs, i, p, minima, limit, columns, levels)
    for shrinking in (0.5, 0.25, 0.0):
        if n >= 0 or limit == best:
            break
        limit = best + np.floor(shrinking * (limit - best))
        n = collect(costs, i, p, minima, limit, columns, levels)
    # More ties for the best than fit: those listed will do, and nothing outside is certain to be dearer.
    lists.lengths[i] = columns.size if n < 0 else n
    lists.beyond[i] = best if n < 0 else limit + 1.0


@jit
def fill_lists(costs: Costs, prices: Prices, lists: Lists, start: int, stop: int) -> None:
    """Make the lists of a slice of the rows."""
    work = work_space(prices.exact.size)
    for i in range(start, stop):
        fill_list(costs, i, prices, lists, work, True)


@jit
def row_dual(costs: Costs, i: int, prices: Prices, lists: Lists, work: Work, known: float) -> float:
    """Return the least ``level + price`` of a row, that of one column being `known`."""
    p = prices.exact
    least = known
    for fills in range(3):
        for k in range(lists.lengths[i]):
            least = min(least, lists.levels[i, k] + p[lists.columns[i, k]])
        if least <= lists.beyond[i]:
            break
        if fills < 2:
            fill_list(costs, i, prices, lists, work, fills == 0)
    return least
