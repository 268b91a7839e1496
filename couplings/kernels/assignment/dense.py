"""Small problems: shortest augmenting paths over a dense matrix, in one compiled call.

Jonker and Volgenant (1987) with Crouse's rectangular search (2016), on the same levels as the large solver: column
reduction, augmenting row reduction, and a Dijkstra search for each row that is still free. Up to a hundred rows or so
the matrix of levels stays in the cache, and reading all of a row is cheaper than any list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._jit import jit
from .costs import (
    CAP,
    LARGEST_TOTAL,
    MAX_PRICE,
    SMALLEST_TOTAL,
    Floats,
    Integers,
    cyclic_assignment,
    level,
    minimum,
)
from .tuning import TUNING

__all__ = ["CROWDED", "NOT_FINITE", "OK", "OUT_OF_RANGE", "solve_dense", "solve_dense_blocks"]

OK, OUT_OF_RANGE, NOT_FINITE, CROWDED = 0, 1, 2, 3
DENSE_ALWAYS = TUNING.dense_always
DENSE_BIDS_PER_ROW = TUNING.dense_bids_per_row


@jit
def argmin(bits: Integers) -> int:
    """Return the place of the first smallest number of some that are not negative, given as their bits.

    Compared as integers, which LLVM does in vector registers.
    """
    smallest = bits[0]
    for j in range(bits.size):
        smallest = bits[j] if bits[j] < smallest else smallest
    j = 0
    while bits[j] != smallest:
        j += 1
    return j


@jit
def add(W: Floats, p: Floats, x: Floats) -> None:
    """Write ``level + price`` of a row to `x`."""
    for j in range(x.size):
        x[j] = W[j] + p[j]


@jit
def relax(W: Floats, p: Floats, base: float, i: int, key: Floats, pred: Integers, extra: Floats) -> None:
    """Shorten the distances by way of row i of the columns not settled; a settled one adds an infinity."""
    for j in range(key.size):
        d = base + (W[j] + p[j]) + extra[j]
        shorter = d < key[j]
        pred[j] = i if shorter else pred[j]
        key[j] = d if shorter else key[j]


@jit
def row_levels(C: Any, W: Floats, row_min: float, scale: float) -> None:
    """Turn a row of costs into levels."""
    for j in range(W.size):
        W[j] = level(C[j], row_min, scale)


@jit(fastmath={"reassoc"})
def not_finite(C: Any, W: Floats) -> float:
    """Copy a row of costs; return 0, but NaN where one of them is not finite."""
    check = 0.0
    for j in range(W.size):
        c = np.float64(C[j])
        W[j] = c
        check += c * 0.0
    return check


@jit(fastmath={"reassoc"})
def losses(C: Any, W: Floats, scale: float) -> float:
    """Count the costs of a row below `CAP` that are not whole numbers of levels, vanishing ones included."""
    count = 0.0
    for j in range(W.size):
        c = np.float64(C[j])
        y = c * scale
        lossy = (y != np.rint(y)) | ((y == 0.0) != (c == 0.0))
        count += 1.0 if lossy & (W[j] != CAP) else 0.0
    return count


@jit
def reduce_columns(W: Floats, p: Floats, col4row: Integers, row4col: Integers, x: Floats) -> None:
    """Set prices that make every column cost some row as much as the dearest column, and match what that can.

    Square problems only: prices of columns that no row takes would be wrong.
    """
    n, m = W.shape
    x[:] = W[0]
    for i in range(1, n):
        for j in range(m):
            x[j] = W[i, j] if W[i, j] < x[j] else x[j]
    most = x.max()
    for j in range(m):
        p[j] = most - x[j]
    bits = x.view(np.int64)
    for i in range(n):
        add(W[i], p, x)
        j = argmin(bits)
        if row4col[j] < 0:
            row4col[j] = i
            col4row[i] = j


@jit
def reduce_rows(
    W: Floats, p: Floats, col4row: Integers, row4col: Integers, free: Integers, count: int, x: Floats
) -> int:
    """Let free rows bid without epsilon (augmenting row reduction); return how many are still free."""
    waiting = 0
    bids = DENSE_BIDS_PER_ROW * W.shape[0]
    most = MAX_PRICE / W.shape[0]  # lest the price of a row's only allowed column run away
    aside = np.empty(count, np.int64)
    bits = x.view(np.int64)
    while count > 0 and bids > 0:
        bids -= 1
        count -= 1
        i = free[count]
        add(W[i], p, x)
        j = argmin(bits)
        best = x[j]
        x[j] = np.inf
        k = argmin(bits)
        second = x[k]
        if second == best and row4col[j] >= 0:
            while k < x.size and (x[k] != best or row4col[k] >= 0):
                k += 1
            if k == x.size:
                aside[waiting] = i
                waiting += 1
                continue
            j = k
        p[j] += min(second - best, most)
        previous = row4col[j]
        row4col[j] = i
        col4row[i] = j
        if previous >= 0:
            col4row[previous] = -1
            free[count] = previous
            count += 1
    for k in range(waiting):
        free[count] = aside[k]
        count += 1
    return count


@jit
def augment(
    W: Floats,
    p: Floats,
    col4row: Integers,
    row4col: Integers,
    source: int,
    key: Floats,
    pred: Integers,
    extra: Floats,
) -> None:
    """Match a free row along a shortest augmenting path, and raise the prices of the columns settled.

    Of columns at the same distance a free one comes first, for the path to end there: distances are whole numbers, and
    a column that has a row is half of one further.
    """
    key[:] = np.inf
    for j in range(extra.size):
        extra[j] = 0.5 if row4col[j] >= 0 else 0.0
    bits = key.view(np.int64)
    tree = np.empty(W.shape[0], np.int64)
    dist = np.empty(W.shape[0])
    count = 0
    row = source
    base = 0.0
    while True:
        relax(W[row], p, base, row, key, pred, extra)
        j = argmin(bits)
        d = key[j]
        if row4col[j] < 0:
            break
        d -= 0.5
        tree[count] = j
        dist[count] = d
        count += 1
        key[j] = np.inf
        extra[j] = np.inf
        row = row4col[j]
        base = d - (W[row, j] + p[j])
    for k in range(count):
        p[tree[k]] += d - dist[k]
    while True:
        row = pred[j]
        row4col[j] = row
        j, col4row[row] = col4row[row], j
        if row == source:
            break


@jit
def solve_levels(W: Floats, p: Floats, col4row: Integers) -> bool:
    """Find an optimal assignment of a matrix of levels, with prices that prove it.

    Returns False, and gives up, where the matrix is not among the smallest and reductions left most rows free: so many
    searches of the whole matrix take longer than an auction.
    """
    n, m = W.shape
    row4col = np.full(m, -1)
    col4row[:] = -1
    p[:] = 0.0
    x = np.empty(m)
    if n == m:
        reduce_columns(W, p, col4row, row4col, x)
    free = np.empty(n, np.int64)
    count = 0
    for i in range(n - 1, -1, -1):
        if col4row[i] < 0:
            free[count] = i
            count += 1
    count = reduce_rows(W, p, col4row, row4col, free, count, x)
    if 2 * count > n and W.size > DENSE_ALWAYS:  # crowded
        return False
    pred = np.empty(m, np.int64)
    extra = np.empty(m)
    while count > 0:
        count -= 1
        augment(W, p, col4row, row4col, free[count], x, pred, extra)
    return True


@jit
def greedy(W: Floats, col4row: Integers) -> None:
    """Give each row in turn its cheapest column still free."""
    n, m = W.shape
    taken = np.zeros(m)
    x = np.empty(m)
    bits = x.view(np.int64)
    for i in range(n):
        add(W[i], taken, x)
        j = argmin(bits)
        taken[j] = np.inf
        col4row[i] = j


@jit
def above_row_minima(C: Any, row_min: Floats, col4row: Integers) -> float:
    """Return the total of an assignment above the row minima."""
    total = 0.0
    for i in range(col4row.size):
        total += np.float64(C[i, col4row[i]]) - row_min[i]
    return total


@jit
def solve_dense(
    C: Any, ceiling: float, tolerance: float, W: Floats, row_min: Floats, p: Floats, col4row: Integers
) -> tuple[int, float, float, bool]:
    """Normalise and solve a small matrix.

    Parameters
    ----------
    C : (n, m) float array, m >= n
    ceiling : float
        Total of a feasible assignment above the row minima; found here where it is 0.
    tolerance : float
        Relative gap below which no finer levels are tried.
    W : (n, m) float64 array
        Space for the levels.
    row_min, p, col4row : (n,), (m,), (n,) arrays
        Row minima, column duals in units of the cost and the assignment; written.

    Returns
    -------
    status : int
        `OK`; `NOT_FINITE` where there is a NaN or an infinity and no `ceiling`; `OUT_OF_RANGE` where the total is too
        small or large for levels; `CROWDED` where an auction is faster.
    total : float
        Of the assignment, in levels; of a feasible one, in units of the cost, where the status is `OUT_OF_RANGE`.
    scale : float
        Levels per unit of cost; 0 where each row has its minimum.
    lossless : bool
        Whether levels are exact.
    """
    n = row_min.size
    check = 0.0
    out = np.empty(1, np.int64)
    for i in range(n):
        check += not_finite(C[i], W[i])
        minimum(W[i].view(np.int64), out)
        row_min[i] = out.view(np.float64)[0]
    if ceiling == 0.0:
        if check != 0.0:
            return NOT_FINITE, 0.0, 0.0, False
        ceiling, first = cyclic_assignment(C, row_min)
        for i in range(n):
            col4row[i] = (i + first) % p.size
    greedy_tried = False
    while True:
        if ceiling == 0.0:
            p[:] = 0.0
            return OK, 0.0, 0.0, True
        if not SMALLEST_TOTAL <= ceiling <= LARGEST_TOTAL:
            return OUT_OF_RANGE, ceiling, 0.0, False
        scale = 2.0 ** (np.floor(np.log2(CAP / ceiling)) - 1.0)
        lost = 0.0
        for i in range(n):
            row_levels(C[i], W[i], row_min[i], scale)
            lost += losses(C[i], W[i], scale)
        if lost > 0.0 and not greedy_tried:
            # A better assignment allows finer levels.
            greedy_tried = True
            greedy(W, col4row)
            above = above_row_minima(C, row_min, col4row)
            if above <= ceiling / 4:
                ceiling = above
                continue
        if not solve_levels(W, p, col4row):
            return CROWDED, ceiling, 0.0, False
        total = 0.0
        size = 0.0
        for i in range(n):
            total += W[i, col4row[i]]
            size += np.float64(C[i, col4row[i]])
        above = above_row_minima(C, row_min, col4row)
        if lost == 0.0 or n / scale <= max(tolerance, 1e-7) * abs(size) or above > ceiling / 4:
            least = p.min()
            for j in range(p.size):
                p[j] = (least - p[j]) / scale
            return OK, total, scale, lost == 0.0
        ceiling = above


@jit
def solve_dense_blocks(
    costs: Any,
    sizes: Integers,
    starts: Integers,
    rows: Integers,
    first: int,
    last: int,
    most: int,
    index: Integers,
    slack: Floats,
    status: Integers,
) -> None:
    """Solve the square blocks ``first:last`` that have at most `most` rows; see `solve_blocks`."""
    W = np.empty(most * most)
    row_min = np.empty(most)
    p = np.empty(most)
    for b in range(first, last):
        n = sizes[b]
        if n > most:
            continue
        if n == 0:
            status[b] = OK
            continue
        C = costs[starts[b] : starts[b] + n * n].reshape(n, n)
        code, _, scale, lossless = solve_dense(
            C, 0.0, 0.0, W[: n * n].reshape(n, n), row_min[:n], p[:n], index[rows[b] : rows[b] + n]
        )
        status[b] = code
        # Half a level of rounding for each entry chosen, and for each row of the bound.
        slack[b] = 0.0 if lossless else 1.1 * n / scale
