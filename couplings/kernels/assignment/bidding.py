"""The forward auction of Bertsekas (1988), on the sketch and on candidate lists.

A free row bids for the column with the least ``level + price``: it raises the price by the distance to the second
least plus epsilon, and takes the column from the row that had it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._jit import jit
from .candidates import Lists, fill_list, group_count, group_minima_of_sketch, merge_groups, row_dual, work_space
from .costs import MAX_PRICE, SKETCH_MAX, Costs, Integers, Prices, Shorts, int16, level, raise_price
from .tuning import TUNING

__all__ = ["bid", "bid_on_sketch", "free_loose_rows", "match_row_minima"]

SKETCH_FAILURES = TUNING.sketch_failures

TOP = np.int16(32767)  # above the sum of any sketched level and price


@jit
def bid(
    costs: Costs,
    prices: Prices,
    lists: Lists,
    row4col: Integers,
    col4row: Integers,
    free: Integers,
    count: int,
    epsilon: float,
    max_bids: int,
    max_reads: int,
) -> tuple[int, int, int]:
    """Let the first `count` rows of the stack `free` bid until all have a column.

    With ``epsilon = 0`` the auction is Jonker and Volgenant's augmenting row reduction (1987): every matched row stays
    tight, and a row that could only take its column at the same price is set aside. Stops after `max_bids` bids or
    `max_reads` readings of whole rows. Returns the number of rows still free, of bids, and of such readings.
    """
    p = prices.exact
    columns, levels, lengths, beyond = lists
    work = work_space(p.size)
    aside = np.empty(count if epsilon == 0.0 else 0, np.int64)
    waiting = 0
    bids = 0
    reads = 0
    most = MAX_PRICE / levels.shape[0]
    failures = 0  # five for each row that the sketch was too coarse for, less one for each other
    while count > 0 and bids < max_bids and reads < max_reads:
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
            if fills == 1:
                failures += 5
            elif failures > 0:
                fills = 1 if failures >= SKETCH_FAILURES else 0  # without the sketch, for now
                failures -= 1
            fill_list(costs, i, prices, lists, work, fills == 0)
            fills += 1
            reads += fills == 2
        bids += 1
        if second == best and row4col[j] >= 0:
            for k in range(lengths[i]):
                if levels[i, k] + p[columns[i, k]] == best and row4col[columns[i, k]] < 0:
                    j = columns[i, k]
        # What lies outside the list is no cheaper than `beyond`: bidding up to it is safe, if modest. So is a bid that
        # does not run up the price of a row's only allowed column.
        second = max(best, min(second, beyond[i], best + most))
        previous = row4col[j]
        if epsilon == 0.0 and second == best and previous >= 0:
            aside[waiting] = i
            waiting += 1
            continue
        raise_price(costs, prices, j, second - best + epsilon)
        row4col[j] = i
        col4row[i] = j
        if previous >= 0:
            col4row[previous] = -1
            free[count] = previous
            count += 1
    for k in range(waiting):
        free[count] = aside[k]
        count += 1
    return count, bids, reads


@jit
def smallest(x: Shorts) -> Any:
    """Return the smallest of a few numbers."""
    least = x[0]
    for b in range(x.size):
        least = x[b] if x[b] < least else least
    return least


@jit
def bid_on_sketch(
    sketch: Shorts,
    p: Shorts,
    row4col: Integers,
    col4row: Integers,
    free: Integers,
    count: int,
    epsilon: int,
    max_bids: int,
) -> tuple[int, int]:
    """Do what `bid` does on the sketch alone, reading whole rows of it: while epsilon is coarse, prices may be as well.

    Also stops at a price that the sketch cannot hold. Returns the number of rows still free, and of bids.
    """
    minima = np.empty(group_count(p.size), np.int16)
    bids = 0
    while count > 0 and bids < max_bids:
        i = free[count - 1]
        group_minima_of_sketch(sketch, i, p, minima)
        h = merge_groups(minima)
        few = minima[:h]
        best = smallest(few)
        # The first group with the best column, without a branch; then that column and the best of all others.
        b = int16(h)
        for k in range(h):
            x = int16(k) if few[k] == best else int16(h)
            b = x if x < b else b
        few[b] = TOP
        second = smallest(few)
        j = np.int64(-1)
        column = np.int64(b)
        while column < p.size:
            x = int16(sketch[i, column] + p[column])
            if x == best and j < 0:
                j = column
            else:
                second = x if x < second else second
            column += h
        price = p[j] + (second - best) + epsilon
        if price > SKETCH_MAX:
            break
        bids += 1
        count -= 1
        p[j] = price
        previous = row4col[j]
        row4col[j] = i
        col4row[i] = j
        if previous >= 0:
            col4row[previous] = -1
            free[count] = previous
            count += 1
    return count, bids


@jit
def free_loose_rows(
    costs: Costs, prices: Prices, lists: Lists, row4col: Integers, col4row: Integers, free: Integers
) -> int:
    """Free the rows that are not tight: another column costs less than theirs. Return how many rows are free."""
    work = work_space(prices.exact.size)
    count = 0
    for i in range(col4row.size):
        j = col4row[i]
        if j >= 0:
            own = level(costs.C[i, j], costs.row_min[i], costs.scale) + prices.exact[j]
            if own <= prices.base or own <= row_dual(costs, i, prices, lists, work, own):
                continue
            row4col[j] = -1
            col4row[i] = -1
        free[count] = i
        count += 1
    return count


@jit
def match_row_minima(costs: Costs, row4col: Integers, col4row: Integers) -> int:
    """Match the rows that find a column of their least cost, offsets taken off, which no row before has taken.

    Returns how many it matched; gives up where half of the first quarter found none, as later rows find fewer still.
    At the initial prices all matched rows are tight.
    """
    C, row_min, scale, offset, sketch, _ = costs
    n, m = C.shape
    taken = np.zeros(m, np.int16)
    count = 0
    for i in range(n):
        if 4 * i >= n and 2 * count <= i:
            break
        for start in range(0, m, 128):
            stop = min(start + 128, m)
            if sketch.shape[1] > 0:
                found = int16(1)
                for j in range(start, stop):
                    x = int16(sketch[i, j] | taken[j])
                    found = x if x < found else found
                if found != 0:
                    continue
            for j in range(start, stop):
                if taken[j] == 0 and level(C[i, j], row_min[i], scale) == offset[j]:
                    taken[j] = 1
                    row4col[j] = i
                    col4row[i] = j
                    count += 1
                    break
            if col4row[i] >= 0:
                break
    return count
