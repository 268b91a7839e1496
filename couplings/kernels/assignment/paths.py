"""Shortest augmenting paths, from one free row or from all of them.

Every function here takes and leaves duals that are feasible and matched rows that are tight: each row's column has the
least ``level + price`` of the row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .._jit import jit
from .candidates import Lists, Work, fill_list, work_space
from .costs import Costs, Floats, Integers, Prices, level, minimum, raise_price, row_minimum
from .tuning import TUNING

__all__ = ["augment", "grow_forest", "mark_tight", "match_tight"]

SEARCH_FAILURES = TUNING.search_failures
SEARCH_FILLS = TUNING.search_fills

Words = npt.NDArray[np.uint64]


@jit
def relax(costs: Costs, i: int, p: Floats, base: float, dist: Floats, key: Floats, pred: Integers) -> None:
    """Shorten the distances of all columns by way of row i, and the keys of those not settled; without branches.

    Never that of a settled column: nothing found later is nearer.
    """
    row_min = costs.row_min[i]
    for j in range(p.size):
        d = base + (level(costs.C[i, j], row_min, costs.scale) + p[j])
        shorter = d < dist[j]
        dist[j] = d if shorter else dist[j]
        key[j] = d if shorter else key[j]
        pred[j] = i if shorter else pred[j]


@jit
def shortest_path(
    costs: Costs, p: Floats, row4col: Integers, source: int, dist: Floats, pred: Integers, settled: Floats, key: Floats
) -> tuple[int, float]:
    """Search from a free row for the nearest free column (Dijkstra); return it and its distance."""
    dist[:] = np.inf
    key[:] = np.inf
    settled[:] = 0.0
    out = np.empty(1, np.int64)
    row = source
    base = 0.0
    while True:
        relax(costs, row, p, base, dist, key, pred)
        minimum(key.view(np.int64), out)
        d = out.view(np.float64)[0]
        nearest = -1
        for j in range(p.size):
            if key[j] == d:
                nearest = j
                if row4col[j] < 0:
                    return j, d
        settled[nearest] = 1.0
        key[nearest] = np.inf
        row = row4col[nearest]
        base = d - (level(costs.C[row, nearest], costs.row_min[row], costs.scale) + p[nearest])


@jit
def push(keys: Floats, codes: Integers, size: int, key: float, code: int) -> int:
    """Add to a binary heap; the caller keeps room for one more."""
    k = size
    while k > 0:
        parent = (k - 1) >> 1
        if keys[parent] <= key:
            break
        keys[k] = keys[parent]
        codes[k] = codes[parent]
        k = parent
    keys[k] = key
    codes[k] = code
    return size + 1


@jit
def pop(keys: Floats, codes: Integers, size: int) -> int:
    """Remove the top of a binary heap, which the caller has read."""
    size -= 1
    key = keys[size]
    code = codes[size]
    k = 0
    while True:
        child = 2 * k + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[k] = keys[child]
        codes[k] = codes[child]
        k = child
    keys[k] = key
    codes[k] = code
    return size


@jit
def shortest_path_on_lists(
    costs: Costs,
    prices: Prices,
    lists: Lists,
    row4col: Integers,
    source: int,
    dist: Floats,
    pred: Integers,
    settled: Floats,
    touched: Integers,
    reach: Floats,
    heap: tuple[Floats, Integers],
    work: Work,
) -> tuple[int, float, int]:
    """Do what `shortest_path` does on candidate lists; return -1 for the column if too many must be filled anew.

    The columns outside a row's list wait in the heap at the list's threshold, as ``-1 - row``, and are read only if
    the search gets that far. Also returns how many columns have a distance: those in `touched`.
    """
    C, row_min, scale, _, _, _ = costs
    p = prices.exact
    columns, levels, lengths, beyond = lists
    keys, codes = heap
    touches = 0
    size = 0
    fills = 0
    bound = np.inf  # least distance of a free column so far
    end = -1
    row = source
    reach[source] = 0.0
    while size + lengths[row] < keys.size:
        base = reach[row]
        for k in range(lengths[row]):
            j = columns[row, k]
            d = base + levels[row, k] + p[j]
            if d < dist[j] and d < bound:
                if dist[j] == np.inf:
                    touched[touches] = j
                    touches += 1
                dist[j] = d
                pred[j] = row
                if row4col[j] < 0:
                    bound = d
                    end = j
                size = push(keys, codes, size, d, j)
        if base + beyond[row] < bound:
            size = push(keys, codes, size, base + beyond[row], -1 - row)
        # Settle the nearest column, or read on in the row whose other columns could be nearer.
        while True:
            if size == 0 or keys[0] >= bound:
                return end, bound, touches
            key = keys[0]
            code = codes[0]
            size = pop(keys, codes, size)
            if code < 0 or (settled[code] == 0.0 and key == dist[code]):
                break
        if code >= 0:
            settled[code] = 1.0
            row = row4col[code]
            # Tight: the row's dual is the level plus price of its own column.
            reach[row] = key - (level(C[row, code], row_min[row], scale) + p[code])
        else:
            row = -1 - code
            fills += 1
            before = beyond[row]
            fill_list(costs, row, prices, lists, work, True)
            if beyond[row] <= before:
                fill_list(costs, row, prices, lists, work, False)
            if beyond[row] <= before or fills > SEARCH_FILLS:
                break
    return -1, 0.0, touches


@jit
def flip(pred: Integers, row4col: Integers, col4row: Integers, source: int, end: int) -> None:
    """Match the rows along the path from a free row to a free column to the columns after them."""
    while True:
        row = pred[end]
        row4col[end] = row
        end, col4row[row] = col4row[row], end
        if row == source:
            break


@jit
def augment(
    costs: Costs,
    prices: Prices,
    lists: Lists,
    row4col: Integers,
    col4row: Integers,
    free: Integers,
    count: int,
    stop: int,
    max_dense: int,
) -> int:
    """Match free rows one by one along shortest augmenting paths (Jonker and Volgenant 1987) until `stop` are left.

    Where lists have failed of late, a search reads whole rows, unless more than `max_dense` rows are left: those are
    the caller's. Returns how many are left.
    """
    p = prices.exact
    m = p.size
    work = work_space(m)
    dist = np.full(m, np.inf)
    pred = np.empty(m, np.int64)  # row from which a column was reached
    settled = np.zeros(m)
    key = np.empty(m)
    touched = np.empty(m, np.int64)
    reach = np.empty(costs.row_min.size)  # distance at which a row was reached, less its dual
    heap = (np.empty(8 * m + 256), np.empty(8 * m + 256, np.int64))
    failures = 0  # four for each search that failed, less one for each other
    while count > stop:
        count -= 1
        source = free[count]
        end = -1
        bound = 0.0
        touches = 0
        if failures < SEARCH_FAILURES:
            end, bound, touches = shortest_path_on_lists(
                costs, prices, lists, row4col, source, dist, pred, settled, touched, reach, heap, work
            )
            failures = max(0, failures - 1) if end >= 0 else failures + 4
        elif count > max_dense:
            return count + 1
        else:
            failures -= 1
        if end < 0:
            end, bound = shortest_path(costs, p, row4col, source, dist, pred, settled, key)
            touches = m
            touched[:] = np.arange(m)
        for k in range(touches):
            j = touched[k]
            if settled[j] > 0.0:
                raise_price(costs, prices, j, bound - dist[j])
                settled[j] = 0.0
            dist[j] = np.inf
        flip(pred, row4col, col4row, source, end)
    return count


@jit
def grow_forest(
    costs: Costs, prices: Prices, row4col: Integers, col4row: Integers, free: Integers, count: int, want: int
) -> tuple[int, int]:
    """Search from all free rows at once until `want` of their trees have met a free column, and match those rows.

    One search in place of many over the same ground. The price of each settled column is raised by what the last was
    farther, so that all paths of the forest are tight: that raises prices of free columns, which is right only where
    all columns will be taken (m = n). Returns how many rows are free, and how many free columns were settled.
    """
    p = prices.exact
    m = p.size
    dist = np.full(m, np.inf)
    key = np.full(m, np.inf)
    pred = np.empty(m, np.int64)
    root = np.empty(costs.row_min.size, np.int64)  # the tree that a row is in
    ends = np.full(costs.row_min.size, -1, np.int64)  # the first free column of each tree
    out = np.empty(1, np.int64)
    for k in range(count):
        i = free[k]
        root[i] = i
        relax(costs, i, p, -row_minimum(costs, i, p), dist, key, pred)
    met = 0
    vacant = 0
    farthest = 0.0
    while met < want and vacant < count:
        minimum(key.view(np.int64), out)
        farthest = out.view(np.float64)[0]
        for j in range(m):
            if key[j] == farthest:
                key[j] = np.inf
                tree = root[pred[j]]
                row = row4col[j]
                if row >= 0:
                    root[row] = tree
                    base = farthest - (level(costs.C[row, j], costs.row_min[row], costs.scale) + p[j])
                    relax(costs, row, p, base, dist, key, pred)
                else:
                    vacant += 1
                    if ends[tree] < 0:
                        ends[tree] = j
                        met += 1
    for j in range(m):
        if dist[j] < farthest:
            raise_price(costs, prices, j, farthest - dist[j])
    left = 0
    for k in range(count):
        source = free[k]
        end = ends[source]
        if end < 0:
            free[left] = source
            left += 1
        else:
            flip(pred, row4col, col4row, source, end)
    return left, vacant


@jit
def mark_tight(costs: Costs, p: Floats, col4row: Integers, tight: Words) -> None:
    """Mark, a bit each, the columns of least ``level + price`` in each row."""
    m = p.size
    for i in range(col4row.size):
        row_min = costs.row_min[i]
        k = col4row[i]
        least = level(costs.C[i, k], row_min, costs.scale) + p[k] if k >= 0 else row_minimum(costs, i, p)
        for w in range(tight.shape[1]):
            word = np.uint64(0)
            for j in range(64 * w, min(64 * w + 64, m)):
                same = level(costs.C[i, j], row_min, costs.scale) + p[j] == least
                word |= np.uint64(same) << np.uint64(j - 64 * w)
            tight[i, w] = word


@jit
def match_tight(tight: Words, row4col: Integers, col4row: Integers, free: Integers, count: int) -> int:
    """Match as many free rows as the marked pairs allow (Pothen and Fan 1990); return how many are left.

    Searches in depth. A column that one search has tried, no other tries in the same round; rounds go on until one
    matches nothing.
    """
    n, words = tight.shape
    rows = np.empty(n, np.int64)  # the path: its rows, and the column that each takes
    columns = np.empty(n, np.int64)
    untried = np.empty(words, np.uint64)
    before = count + 1
    while 0 < count < before:
        before = count
        count = 0
        untried[:] = ~np.uint64(0)
        for k in range(before):
            rows[0] = free[k]
            depth = 0
            while depth >= 0:
                i = rows[depth]
                w = 0
                while w < words and not tight[i, w] & untried[w]:
                    w += 1
                if w == words:
                    depth -= 1
                    continue
                word = tight[i, w] & untried[w]
                j = 64 * w
                while not word & np.uint64(1):
                    word >>= np.uint64(1)
                    j += 1
                untried[w] &= ~(np.uint64(1) << np.uint64(j - 64 * w))
                columns[depth] = j
                if row4col[j] < 0:
                    break
                depth += 1
                rows[depth] = row4col[j]
            if depth < 0:
                free[count] = free[k]
                count += 1
            for d in range(depth + 1):
                col4row[rows[d]] = columns[d]
                row4col[columns[d]] = rows[d]
    return count
