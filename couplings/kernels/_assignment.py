"""The hot loops of the assignment solver.

Everything here works in *levels*: ``level(c_ij) = rint((c_ij - r_i) * scale)``, an integer up to ``2**48`` kept in
a float64, where ``r_i`` is the row's smallest cost and ``scale`` a power of two. Prices are integers of the same
kind, so every sum and difference below is exact and no result depends on the order of evaluation. The matrix of
levels is never stored: a cost is turned into a level where it is read.

Prices only rise (the forward auction and the shortest paths both raise them). A short list of a row's cheapest
columns therefore stays complete below the threshold at which it was cut, however many bids later, and a row is read
in full only when its list has nothing below that threshold left. Even then an int16 *sketch* of the row, rounded
down, tells which few columns can matter; the floats are read in full where the sketch is too coarse to tell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._jit import jit

__all__ = ["CAP", "COARSE", "LIST", "SMALL", "Costs", "Lists", "Prices"]

BLUNT = 64  # fives of failures of the sketch, less successes, at which it is passed over
CAP = 2.0**48
COARSE = 16383  # largest sketched cost and price: their sum fits an int16
LIST = 48  # columns that a row's list can hold
WANT = 20  # groups of columns that a list is cut from
FULL = 36  # the same where the sketch was too coarse, and a list is dear
GROUPS = 256  # no more groups than this
MISSES = 16  # searches over lists that fail, times four, less those that succeed, until they are passed over
OPENINGS = 64  # rows that a search over lists may open
SMALL = 64  # matrices this narrow keep whole rows in their lists
TOP = np.int16(32767)  # above the sum of any sketched cost and price

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.int16]
Words = npt.NDArray[np.uint64]

short = np.int16


class Costs(NamedTuple):
    """The matrix as the kernels read it."""

    C: npt.NDArray[Any]  # (n, m) float
    low: Floats  # (n,) smallest cost of each row
    scale: float  # levels per unit of cost
    sketch: Shorts  # (n, m) floor of the level over `step`, at most COARSE; (n, 0) if there is none
    step: float  # levels


class Prices(NamedTuple):
    """Column prices, in levels, and their sketch: ``floor((exact - base) / step)``, at most COARSE."""

    exact: Floats
    coarse: Shorts
    base: float


class Lists(NamedTuple):
    """Cheapest columns of each row; a column outside costs at least `beyond`, price included."""

    columns: npt.NDArray[np.uint32]  # (n, LIST)
    levels: Floats  # (n, LIST)
    lengths: Integers  # (n,)
    beyond: Floats  # (n,)


class Work(NamedTuple):
    """Scratch space of one thread."""

    mins: Floats
    narrow: Shorts
    hits: Integers


@jit
def lowest(bits: Any, found: Any) -> None:
    """Write the bits of the smallest of a row of floats, given as integers, to ``found[0]``.

    LLVM compares floats one after another, but integers in vector registers; those of negative floats are in
    descending order, and are turned round.
    """
    kind = bits.dtype.type
    sign = kind(8 * bits.itemsize - 1)
    rest = kind(~(1 << sign))
    x = rest
    for j in range(bits.size):
        k = kind(bits[j] ^ ((bits[j] >> sign) & rest))
        x = k if k < x else x
    found[0] = x ^ ((x >> sign) & rest)


@jit
def smallest(C: Any, bits: Any, low: Floats, start: int, stop: int) -> None:
    """Smallest cost of every row."""
    found = np.empty(1, bits.dtype)
    for i in range(start, stop):
        lowest(bits[i], found)
        low[i] = found.view(C.dtype)[0]


@jit
def survey(C: Any, bits: Any, low: Floats, sketch: Shorts, steps: Any, start: int, stop: int) -> None:
    """Smallest cost of every row and, while the row is in the cache, its sketch with `steps` per unit of cost.

    All in the precision of the matrix, whose rounding `steps`, of that type, must make up for.
    """
    most = C.dtype.type(COARSE)
    found = np.empty(1, bits.dtype)
    for i in range(start, stop):
        lowest(bits[i], found)
        r = found.view(C.dtype)[0]
        low[i] = r
        for j in range(C.shape[1]):
            x = (C[i, j] - r) * steps
            sketch[i, j] = short(x if x < most else most)


@jit
def stagger(C: Any, low: Floats) -> tuple[float, int]:
    """Total above the row minima of the best of four cyclic assignments, and its first column."""
    n, m = C.shape
    best = np.inf
    first = 0
    for k in range(4):
        total = 0.0
        for i in range(n):
            total += np.float64(C[i, (i + m * k // 4) % m]) - low[i]
        if total < best:
            best = total
            first = m * k // 4
    return best, first


@jit
def level(c: Any, r: float, scale: float) -> Any:
    """Return a cost as a whole number of levels above its row's smallest."""
    x = (np.float64(c) - r) * scale
    return np.rint(x if x < CAP else CAP)


@jit
def cheapest(costs: Costs, i: int, p: Floats) -> float:
    """Least ``level + price`` of a row, over all columns one by one."""
    best = np.inf
    for j in range(p.size):
        best = min(best, level(costs.C[i, j], costs.low[i], costs.scale) + p[j])
    return best


@jit
def coarsen(p: float, base: float, step: float) -> Any:
    """Sketch of a price."""
    x = (p - base) / step
    return short(x if x < COARSE else COARSE)


@jit
def lift(costs: Costs, prices: Prices, j: int, by: float) -> None:
    """Raise a price, and its sketch with it."""
    prices.exact[j] += by
    prices.coarse[j] = coarsen(prices.exact[j], prices.base, costs.step)


@jit
def scan(C: Any, i: int, r: float, scale: float, p: Floats, mins: Floats) -> None:
    """Smallest ``level + price`` of each group of columns ``b, b + g, b + 2g, ...``: four loads a step, no branch."""
    g = mins.size
    for j in range(g):
        x0 = level(C[i, j], r, scale) + p[j]
        x1 = level(C[i, j + g], r, scale) + p[j + g]
        x2 = level(C[i, j + 2 * g], r, scale) + p[j + 2 * g]
        x3 = level(C[i, j + 3 * g], r, scale) + p[j + 3 * g]
        x0 = x0 if x0 < x1 else x1
        x2 = x2 if x2 < x3 else x3
        mins[j] = x0 if x0 < x2 else x2
    for j in range(4 * g, p.size):
        x0 = level(C[i, j], r, scale) + p[j]
        mins[j - 4 * g] = min(x0, mins[j - 4 * g])


@jit
def skim(sketch: Shorts, i: int, p: Shorts, mins: Shorts) -> None:
    """Do what `scan` does on the sketch, sixteen columns to a vector."""
    g = mins.size
    for j in range(g):
        x0 = short(sketch[i, j] + p[j])
        x1 = short(sketch[i, j + g] + p[j + g])
        x2 = short(sketch[i, j + 2 * g] + p[j + 2 * g])
        x3 = short(sketch[i, j + 3 * g] + p[j + 3 * g])
        x0 = x0 if x0 < x1 else x1
        x2 = x2 if x2 < x3 else x3
        mins[j] = x0 if x0 < x2 else x2
    for j in range(4 * g, p.size):
        x0 = short(sketch[i, j] + p[j])
        mins[j - 4 * g] = min(x0, mins[j - 4 * g])


@jit
def groups(m: int) -> int:
    """Count the groups that `scan` and `skim` leave, a multiple of the number that `fold` brings them to."""
    g = m // 4
    parts = max(1, g // GROUPS)
    return g - g % parts


@jit
def room(m: int) -> Work:
    """Scratch space for rows of `m` columns."""
    g = groups(m)
    return Work(np.empty(g), np.empty(g, np.int16), np.empty(g + 1, np.int64))


@jit
def fold(mins: Any) -> Any:
    """Merge groups until at most GROUPS remain at the front of `mins`: longer ones, but fewer to compare."""
    g = mins.size
    parts = max(1, g // GROUPS)
    h = g // parts
    for k in range(1, parts):
        for b in range(h):
            x = mins[k * h + b]
            mins[b] = x if x < mins[b] else mins[b]
    return h


@jit
def cut(mins: Any, want: int) -> tuple[Any, Any]:
    """Return the least minimum and a whole threshold with about `want` minima up to it, by bisection."""
    low = mins[0]
    high = mins[0]
    for b in range(mins.size):
        low = mins[b] if mins[b] < low else low
        high = mins[b] if mins[b] > high else high
    a = low
    z = high
    t = low  # first, lest there be ties
    for _ in range(52):
        count = short(0)
        for b in range(mins.size):
            count = short(count + (short(1) if mins[b] <= t else short(0)))
        if t == low and 4 * count >= 3 * want:
            break
        if count > want:
            z = t
        elif 4 * count < 3 * want:
            a = t
        else:
            break
        if a >= z:
            break
        t = type(low)(np.floor(0.5 * (np.float64(a) + np.float64(z))))
    return low, t


@jit
def fill(costs: Costs, i: int, prices: Prices, lists: Lists, work: Work, rough: bool) -> None:
    """Write the row's list: from the sketch if `rough` and it tells columns apart, else from the floats."""
    C, low, scale, sketch, step = costs
    mins, narrow, hits = work
    p = prices.exact
    m = p.size
    columns = lists.columns[i]
    levels = lists.levels[i]
    if m <= columns.size:
        for j in range(m):
            columns[j] = j
            levels[j] = level(C[i, j], low[i], scale)
        lists.lengths[i] = m
        lists.beyond[i] = np.inf
        return
    if rough and sketch.shape[1] > 0:
        skim(sketch, i, prices.coarse, narrow)
        h = fold(narrow)
        narrow = narrow[:h]
        least, t = cut(narrow, WANT)
        n = gather(sketch, i, prices.coarse, narrow, t, hits, columns)
        if n < 0 and t > least:
            t = short(least + (t - least) // 4)
            n = gather(sketch, i, prices.coarse, narrow, t, hits, columns)
        if n >= 0:
            for k in range(n):
                levels[k] = level(C[i, columns[k]], low[i], scale)
            lists.lengths[i] = n
            lists.beyond[i] = (np.float64(t) + 1.0) * step + prices.base
            return
    scan(C, i, low[i], scale, p, mins)
    h = fold(mins)
    mins = mins[:h]
    best, bar = cut(mins, FULL)
    n = sift(costs, i, p, mins, bar, columns, levels)
    for shrinking in (0.5, 0.25, 0.0):
        if n >= 0 or bar == best:
            break
        bar = best + np.floor(shrinking * (bar - best))
        n = sift(costs, i, p, mins, bar, columns, levels)
    # More ties for the best than fit: those listed will do, and nothing outside is certain to be dearer.
    lists.lengths[i] = columns.size if n < 0 else n
    lists.beyond[i] = best if n < 0 else bar + 1.0


@jit
def gather(sketch: Shorts, i: int, p: Shorts, mins: Shorts, t: Any, hits: Integers, columns: Any) -> int:
    """List the columns whose sketched level + price is at most `t`; return how many, or -1 if they do not fit.

    Written without branches on the data: mispredicted, they would cost more than everything else here.
    """
    g = mins.size
    count = 0
    for b in range(g):
        hits[count] = b
        count += 1 if mins[b] <= t else 0
    n = 0
    last = columns.size - 1
    for k in range(count):
        j = hits[k]
        while j < p.size:  # a range with a step would divide
            columns[min(n, last)] = j
            n += 1 if short(sketch[i, j] + p[j]) <= t else 0
            j += g
        if n > last:
            return -1
    return n


@jit
def sift(costs: Costs, i: int, p: Floats, mins: Floats, t: float, columns: Any, levels: Floats) -> int:
    """Do what `gather` does on the floats; equal rows start at different groups, so that ties list other columns."""
    g = mins.size
    n = 0
    for k in range(g):
        b = (k + i) % g
        if mins[b] <= t:
            for j in range(b, p.size, g):
                x = level(costs.C[i, j], costs.low[i], costs.scale)
                if x + p[j] <= t:
                    if n == columns.size:
                        return -1
                    columns[n] = j
                    levels[n] = x
                    n += 1
    return n


@jit
def fill_all(costs: Costs, prices: Prices, lists: Lists, start: int, stop: int) -> None:
    """Write the lists of a slice of the rows."""
    work = room(prices.exact.size)
    for i in range(start, stop):
        fill(costs, i, prices, lists, work, True)


@jit
def bid(
    costs: Costs,
    prices: Prices,
    lists: Lists,
    owner: Integers,
    mate: Integers,
    free: Integers,
    count: int,
    eps: float,
    limit: int,
    most: int,
) -> tuple[int, int, int]:
    """Forward auction over a stack of free rows (Bertsekas 1988), each bidding up its cheapest column.

    A row raises its best column to the second best plus `eps` and takes it from whoever held it. With ``eps = 0``
    it stays tight (Jonker and Volgenant's augmenting row reduction, 1987), and a row that could only swap places
    without raising anything is set aside. Stops after `limit` bids, or when `most` rows have been read whole. Returns
    the number of free rows left, of bids made, and of rows read whole.
    """
    p = prices.exact
    columns, levels, lengths, beyond = lists
    work = room(p.size)
    aside = np.empty(count if eps == 0.0 else 0, np.int64)
    waiting = 0
    bids = 0
    reads = 0
    blunt = 0
    while count > 0 and bids < limit and reads < most:
        count -= 1
        i = free[count]
        fills = 0
        while True:
            best = np.inf
            second = np.inf
            j = -1
            for k in range(lengths[i]):
                v = levels[i, k] + p[columns[i, k]]
                second = min(second, max(best, v))
                j = columns[i, k] if v < best else j
                best = min(best, v)
            if fills == 2 or (second if fills == 0 else best) <= beyond[i]:
                break
            # Where the sketch has told little of late, do without it, but try again now and then.
            if fills == 1:
                blunt += 5
            elif blunt > 0:
                fills = 1 if blunt >= BLUNT else 0
                blunt -= 1
            fill(costs, i, prices, lists, work, fills == 0)
            fills += 1
            reads += fills == 2
        bids += 1
        if second == best and owner[j] >= 0:
            for k in range(lengths[i]):
                if levels[i, k] + p[columns[i, k]] == best and owner[columns[i, k]] < 0:
                    j = columns[i, k]
        # What lies outside the list is no cheaper than `beyond`: bidding up to it is safe, if modest.
        second = max(best, min(second, beyond[i], best + CAP))
        previous = owner[j]
        if eps == 0.0 and second == best and previous >= 0:
            aside[waiting] = i
            waiting += 1
            continue
        lift(costs, prices, j, second - best + eps)
        owner[j] = i
        mate[i] = j
        if previous >= 0:
            mate[previous] = -1
            free[count] = previous
            count += 1
    for k in range(waiting):
        free[count] = aside[k]
        count += 1
    return count, bids, reads


@jit
def least(x: Shorts) -> Any:
    """Smallest of a few shorts."""
    best = x[0]
    for b in range(x.size):
        best = x[b] if x[b] < best else best
    return best


@jit
def haggle(
    sketch: Shorts, p: Shorts, owner: Integers, mate: Integers, free: Integers, count: int, eps: int, limit: int
) -> tuple[int, int]:
    """Do what `bid` does on the sketch alone, all columns at a time: while epsilon is coarse, prices may be as well.

    Stops at a price that a sketch cannot hold. Returns the number of free rows left, and of bids made.
    """
    narrow = np.empty(groups(p.size), np.int16)
    bids = 0
    while count > 0 and bids < limit:
        i = free[count - 1]
        skim(sketch, i, p, narrow)
        h = fold(narrow)
        mins = narrow[:h]
        best = least(mins)
        # The first group with the best column, without a branch; then that column and the best of all others.
        b = short(h)
        for k in range(h):
            x = short(k) if mins[k] == best else short(h)
            b = x if x < b else b
        mins[b] = TOP
        second = least(mins)
        j = np.int64(-1)
        column = np.int64(b)
        while column < p.size:
            x = short(sketch[i, column] + p[column])
            if x == best and j < 0:
                j = column
            else:
                second = x if x < second else second
            column += h
        price = p[j] + (second - best) + eps
        if price > COARSE:
            break
        bids += 1
        count -= 1
        p[j] = price
        previous = owner[j]
        owner[j] = i
        mate[i] = j
        if previous >= 0:
            mate[previous] = -1
            free[count] = previous
            count += 1
    return count, bids


@jit
def dual(costs: Costs, i: int, prices: Prices, lists: Lists, work: Work, known: float) -> float:
    """Least ``level + price`` of a row, of which one column is `known`."""
    p = prices.exact
    best = known
    for fills in range(3):
        for k in range(lists.lengths[i]):
            best = min(best, lists.levels[i, k] + p[lists.columns[i, k]])
        if best <= lists.beyond[i]:
            break
        if fills < 2:
            fill(costs, i, prices, lists, work, fills == 0)
    return best


@jit
def loosen(costs: Costs, prices: Prices, lists: Lists, owner: Integers, mate: Integers, free: Integers) -> int:
    """Free the rows that another column would suit better than their own; return how many are free."""
    work = room(prices.exact.size)
    count = 0
    for i in range(mate.size):
        j = mate[i]
        if j >= 0:
            own = level(costs.C[i, j], costs.low[i], costs.scale) + prices.exact[j]
            if own <= dual(costs, i, prices, lists, work, own):
                continue
            owner[j] = -1
            mate[i] = -1
        free[count] = i
        count += 1
    return count


@jit
def variety(sketch: Shorts, taken: Shorts) -> int:
    """Count the rows that find a column within a step of their least cost which no earlier row has found."""
    n, m = sketch.shape
    count = 0
    for i in range(n):
        for start in range(0, m, 128):
            stop = min(start + 128, m)
            found = short(1)
            for j in range(start, stop):
                x = short(sketch[i, j] | taken[j])
                found = x if x < found else found
            if found == 0:
                j = start
                while sketch[i, j] | taken[j]:
                    j += 1
                taken[j] = 1
                count += 1
                break
    return count


@jit
def openings(lists: Lists, taken: Any) -> int:
    """Count the rows that find a column of their least cost which no earlier row has found."""
    count = 0
    for i in range(lists.lengths.size):
        for k in range(lists.lengths[i]):
            j = lists.columns[i, k]
            if lists.levels[i, k] == 0.0 and not taken[j]:
                taken[j] = True
                count += 1
                break
    return count


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
def relax(costs: Costs, i: int, p: Floats, base: float, dist: Floats, key: Floats, back: Integers) -> None:
    """Shorten the distances of all columns by way of a row, and the keys of those not settled; without branches.

    Never that of a settled column: nothing found later is nearer.
    """
    r = costs.low[i]
    for j in range(p.size):
        d = base + (level(costs.C[i, j], r, costs.scale) + p[j])
        shorter = d < dist[j]
        dist[j] = d if shorter else dist[j]
        key[j] = d if shorter else key[j]
        back[j] = i if shorter else back[j]


@jit
def search(
    costs: Costs, p: Floats, owner: Integers, source: int, dist: Floats, back: Integers, closed: Floats, key: Floats
) -> tuple[int, float]:
    """Dijkstra's search from a free row over whole rows; return the free column it meets and its distance.

    Settled columns are marked by an infinity in `closed`.
    """
    dist[:] = np.inf
    key[:] = np.inf
    closed[:] = 0.0
    found = np.empty(1, np.int64)
    row = source
    base = 0.0
    while True:
        relax(costs, row, p, base, dist, key, back)
        lowest(key.view(np.int64), found)
        d = found.view(np.float64)[0]
        nearest = -1
        for j in range(p.size):
            if key[j] == d:
                nearest = j
                if owner[j] < 0:
                    return j, d
        closed[nearest] = np.inf
        key[nearest] = np.inf
        row = owner[nearest]
        base = d - (level(costs.C[row, nearest], costs.low[row], costs.scale) + p[nearest])


@jit
def grow(
    costs: Costs, prices: Prices, owner: Integers, mate: Integers, free: Integers, count: int, want: int
) -> tuple[int, int]:
    """Search from all free rows at once, until `want` have met a free column of their own, and match those.

    One forest for what would be many searches of the same ground. The price of every column settled is raised by
    what the last was farther, so that all paths of the forest are tight: of free columns as well, which is right
    only where all columns will be taken (m = n). Every matched row must be tight, and stays so. Returns how many
    rows are free, and how many free columns were settled.
    """
    p = prices.exact
    m = p.size
    dist = np.full(m, np.inf)
    key = np.full(m, np.inf)
    back = np.empty(m, np.int64)
    root = np.empty(costs.low.size, np.int64)  # the tree that a row is in
    ends = np.full(costs.low.size, -1, np.int64)  # the first free column of each tree
    found = np.empty(1, np.int64)
    for k in range(count):
        i = free[k]
        root[i] = i
        relax(costs, i, p, -cheapest(costs, i, p), dist, key, back)
    met = 0
    vacant = 0
    farthest = 0.0
    while met < want and vacant < count:
        lowest(key.view(np.int64), found)
        farthest = found.view(np.float64)[0]
        for j in range(m):
            if key[j] == farthest:
                key[j] = np.inf
                tree = root[back[j]]
                row = owner[j]
                if row >= 0:
                    root[row] = tree
                    base = farthest - (level(costs.C[row, j], costs.low[row], costs.scale) + p[j])
                    relax(costs, row, p, base, dist, key, back)
                else:
                    vacant += 1
                    if ends[tree] < 0:
                        ends[tree] = j
                        met += 1
    for j in range(m):
        if dist[j] < farthest:
            lift(costs, prices, j, farthest - dist[j])
    left = 0
    for k in range(count):
        source = free[k]
        end = ends[source]
        if end < 0:
            free[left] = source
            left += 1
        else:
            flip(back, owner, mate, source, end)
    return left, vacant


@jit
def flip(back: Integers, owner: Integers, mate: Integers, source: int, end: int) -> None:
    """Match the rows along the path from a free row to a free column to the columns after them."""
    while True:
        row = back[end]
        owner[end] = row
        end, mate[row] = mate[row], end
        if row == source:
            break


@jit
def suit(costs: Costs, p: Floats, mate: Integers, suits: Words) -> None:
    """Mark, a bit each, the columns that suit a row best, as for a matched row its own does."""
    m = p.size
    for i in range(mate.size):
        r = costs.low[i]
        k = mate[i]
        best = level(costs.C[i, k], r, costs.scale) + p[k] if k >= 0 else cheapest(costs, i, p)
        for w in range(suits.shape[1]):
            word = np.uint64(0)
            for j in range(64 * w, min(64 * w + 64, m)):
                same = level(costs.C[i, j], r, costs.scale) + p[j] == best
                word |= np.uint64(same) << np.uint64(j - 64 * w)
            suits[i, w] = word


@jit
def match(suits: Words, owner: Integers, mate: Integers, free: Integers, count: int) -> int:
    """Match as many free rows as the marked pairs allow (Pothen and Fan 1990); return how many are left.

    Searches in depth. A column that one search has tried, no other tries in the same round; rounds go on until one
    matches nothing.
    """
    n, words = suits.shape
    rows = np.empty(n, np.int64)  # the path: its rows, and the column that each takes
    columns = np.empty(n, np.int64)
    fresh = np.empty(words, np.uint64)
    before = count + 1
    while 0 < count < before:
        before = count
        count = 0
        fresh[:] = ~np.uint64(0)
        for k in range(before):
            rows[0] = free[k]
            depth = 0
            while depth >= 0:
                i = rows[depth]
                w = 0
                while w < words and not suits[i, w] & fresh[w]:
                    w += 1
                if w == words:
                    depth -= 1
                    continue
                word = suits[i, w] & fresh[w]
                j = 64 * w
                while not word & np.uint64(1):
                    word >>= np.uint64(1)
                    j += 1
                fresh[w] &= ~(np.uint64(1) << np.uint64(j - 64 * w))
                columns[depth] = j
                if owner[j] < 0:
                    break
                depth += 1
                rows[depth] = owner[j]
            if depth < 0:
                free[count] = free[k]
                count += 1
            for d in range(depth + 1):
                mate[rows[d]] = columns[d]
                owner[columns[d]] = rows[d]
    return count


@jit
def search_lists(
    costs: Costs,
    prices: Prices,
    lists: Lists,
    owner: Integers,
    source: int,
    dist: Floats,
    back: Integers,
    closed: Floats,
    touched: Integers,
    reach: Floats,
    heap: tuple[Floats, Integers],
    work: Work,
) -> tuple[int, float, int]:
    """Do what `search` does over the lists; return -1 for the column if that opens too many rows.

    What a row hides outside its list waits in the heap at the list's threshold, as ``-1 - row``, and is read only
    if the search gets that far. Also returns how many columns it has `touched`.
    """
    C, low, scale, _, _ = costs
    p = prices.exact
    columns, levels, lengths, beyond = lists
    keys, codes = heap
    touches = 0
    size = 0
    opened = 0
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
                back[j] = row
                if owner[j] < 0:
                    bound = d
                    end = j
                size = push(keys, codes, size, d, j)
        if base + beyond[row] < bound:
            size = push(keys, codes, size, base + beyond[row], -1 - row)
        # Settle the nearest column, or open the row whose hidden columns could be nearer.
        while True:
            if size == 0 or keys[0] >= bound:
                return end, bound, touches
            key = keys[0]
            code = codes[0]
            size = pop(keys, codes, size)
            if code < 0 or (closed[code] == 0.0 and key == dist[code]):
                break
        if code >= 0:
            closed[code] = np.inf
            row = owner[code]
            # Tight: the row's dual is the level plus price of its own column.
            reach[row] = key - (level(C[row, code], low[row], scale) + p[code])
        else:
            row = -1 - code
            opened += 1
            before = beyond[row]
            fill(costs, row, prices, lists, work, True)
            if beyond[row] <= before:
                fill(costs, row, prices, lists, work, False)
            if beyond[row] <= before or opened > OPENINGS:
                break
    return -1, 0.0, touches


@jit
def augment(
    costs: Costs,
    prices: Prices,
    lists: Lists,
    owner: Integers,
    mate: Integers,
    free: Integers,
    count: int,
    stop: int,
    patience: int,
) -> int:
    """Match free rows one by one along shortest augmenting paths (Jonker and Volgenant 1987) until `stop` are left.

    Every matched row must be tight. A search starts on the lists, unless lists have failed lately; more than
    `patience` rows are left alone once they have.
    """
    p = prices.exact
    m = p.size
    work = room(m)
    dist = np.full(m, np.inf)
    back = np.empty(m, np.int64)  # row from which a column was reached
    closed = np.zeros(m)
    key = np.empty(m)
    touched = np.empty(m, np.int64)
    reach = np.empty(costs.low.size)  # distance at which a row was reached, less its dual
    heap = (np.empty(8 * m + 256), np.empty(8 * m + 256, np.int64))
    misses = 0
    while count > stop:
        count -= 1
        source = free[count]
        end = -1
        bound = 0.0
        touches = 0
        if misses < MISSES:
            end, bound, touches = search_lists(
                costs, prices, lists, owner, source, dist, back, closed, touched, reach, heap, work
            )
            misses = max(0, misses - 1) if end >= 0 else misses + 4
        elif count > patience:
            return count + 1
        else:
            misses -= 1
        if end < 0:
            end, bound = search(costs, p, owner, source, dist, back, closed, key)
            touches = m
            touched[:] = np.arange(m)
        for k in range(touches):
            j = touched[k]
            if closed[j] > 0.0:
                lift(costs, prices, j, bound - dist[j])
                closed[j] = 0.0
            dist[j] = np.inf
        flip(back, owner, mate, source, end)
    return count


@jit
def slacks(costs: Costs, prices: Prices, mate: Integers, slack: Floats, dual: Floats, start: int, stop: int) -> None:
    """Row duals (least ``level + price``) and how far each row's own column is above it; looks at every column.

    A column that the sketch puts above the row's own, rounded down as it is, cannot be the least.
    """
    C, low, scale, sketch, step = costs
    p = prices.exact
    mins, narrow, hits = room(p.size)
    columns = np.empty(LIST, np.int64)
    for i in range(start, stop):
        j = mate[i]
        own = level(C[i, j], low[i], scale) + p[j] if j >= 0 else np.inf
        u = own
        n = -1
        if sketch.shape[1] > 0 and own < prices.base + COARSE * step:
            skim(sketch, i, prices.coarse, narrow)
            n = gather(sketch, i, prices.coarse, narrow, short((own - prices.base) / step), hits, columns)
            for k in range(n):
                u = min(u, level(C[i, columns[k]], low[i], scale) + p[columns[k]])
        if n < 0:
            if p.size > SMALL:
                scan(C, i, low[i], scale, p, mins)
                for b in range(mins.size):
                    u = mins[b] if mins[b] < u else u
            else:
                u = cheapest(costs, i, p)
        dual[i] = u
        slack[i] = own - u


@jit
def lossless(C: Any, low: Floats, scale: float) -> bool:
    """Whether every cost that can matter is a whole number of levels, so that the fixed point is the float matrix."""
    near = C.dtype.type(scale)
    for i in range(C.shape[0]):
        doubts = np.int32(0)
        for j in range(C.shape[1]):
            # The scale is a power of two: a product is rounded only if it vanishes or overflows (inf - inf is not 0).
            x = C[i, j] * near
            doubts = np.int32(doubts | np.int32((x - np.rint(x) != 0) | ((x == 0) != (C[i, j] == 0))))
        if doubts != 0:
            for j in range(C.shape[1]):
                y = np.float64(C[i, j]) * scale
                if y != np.rint(y) and (np.float64(C[i, j]) - low[i]) * scale < CAP:
                    return False
    return True
