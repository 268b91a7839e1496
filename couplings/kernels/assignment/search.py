"""The state of a solve, and its phases as methods."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt

from .._threads import over_rows
from . import bidding, candidates, certificate, paths
from .costs import CAP, MAX_PRICE, SKETCH_MAX, Prices
from .problem import NormalisedCosts
from .tuning import TUNING

__all__ = ["Budget", "Search"]

UNLIMITED = 1 << 62
ENTRIES_PER_LOOK = 20_000_000  # costs read between two looks at the clock: some ten milliseconds

Floats = npt.NDArray[np.float64]


class Budget:
    """Bids and seconds that a solve may take."""

    def __init__(self, max_bids: int | None, max_seconds: float | None) -> None:
        self.max_bids = math.inf if max_bids is None else max_bids
        self.deadline = math.inf if max_seconds is None else time.perf_counter() + max_seconds
        self.bids = 0

    def spent(self, max_bids: float = math.inf) -> bool:
        """Return whether all bids are made, or `max_bids` of them, or the time is up."""
        return self.bids >= min(max_bids, self.max_bids) or time.perf_counter() >= self.deadline

    def until_look(self, max_bids: float, m: int) -> int:
        """Return how many bids to make, reading m costs each, before looking at the clock again."""
        share = UNLIMITED if self.deadline == math.inf else max(256, ENTRIES_PER_LOOK // m)
        return int(min(min(max_bids, self.max_bids) - self.bids, share))


class Search:
    """A partial matching, and prices.

    Attributes
    ----------
    costs : Costs
    prices : Prices
    lists : Lists
        Complete below a threshold as long as prices only rise.
    col4row : (n,) int64 array
        Column of each row, -1 where it is free.
    row4col : (m,) int64 array
    free : (n,) int64 array
        A stack: its first `left` are the free rows.
    """

    def __init__(self, problem: NormalisedCosts, ceiling: float, budget: Budget, threads: int) -> None:
        self.problem, self.budget, self.threads = problem, budget, threads
        self.n, self.m = problem.C.shape
        self.costs = problem.costs(ceiling)
        self.offset_max = float(self.costs.offset.max())
        # What epsilon is measured in: a deviation of the costs, or what a row pays above its minimum.
        self.spread = min(problem.spread or ceiling / self.n, ceiling) * self.costs.scale
        self.free = np.empty(self.n, np.int64)
        self.release()

    def release(self) -> None:
        """Free every row."""
        self.row4col = np.full(self.m, -1)
        self.col4row = np.full(self.n, -1)
        self.free[:] = np.arange(self.n - 1, -1, -1)
        self.left = self.n

    def set_prices(self, exact: Floats) -> None:
        """Set the prices, and their sketch above the least of them."""
        base = float((exact + self.costs.offset).min())
        self.prices = Prices(exact, self.sketched(exact, base), base)

    def sketched(self, exact: Floats, base: float) -> npt.NDArray[np.int16]:
        """Return prices less column offsets in steps of the sketch above `base`."""
        steps = np.minimum((exact + self.costs.offset - base) / (self.costs.step or 1.0), SKETCH_MAX)
        return steps.astype(np.int16)

    def make_lists(self, prices: Floats) -> None:
        """Set the prices and make all lists anew."""
        self.set_prices(prices)
        self.lists = self.empty_lists()
        over_rows(lambda a, b: candidates.fill_lists(self.costs, self.prices, self.lists, a, b), self.n, self.threads)

    def empty_lists(self) -> candidates.Lists:
        """Return lists that are made when they are read."""
        shape = (self.n, TUNING.list_size)
        return candidates.Lists(
            np.empty(shape, np.uint32), np.empty(shape), np.zeros(self.n, np.int64), np.full(self.n, -np.inf)
        )

    def initial_prices(self, duals: Floats | None = None) -> Floats:
        """Return prices in levels: what makes all columns cost the same, or those of another solve's column duals."""
        if duals is None:
            return self.offset_max - self.costs.offset
        prices: Floats = np.rint(np.minimum((duals.max() - duals) * self.costs.scale, CAP))
        return prices

    def auction(self, warm_start: Floats | None, tolerance: float) -> bool:
        """Scale epsilon down, one auction of all rows after another; return whether a matching was good enough.

        Leaves a matching that is nearly tight; a partial one, or none, where the auction was given up.
        """
        epsilon = TUNING.first_epsilon * self.spread
        max_reads = UNLIMITED
        if warm_start is None and self.match_row_minima():
            # Bids without epsilon may settle most rows, or all that are not tied. Any epsilon would only blur ties.
            end = self.budget.bids + TUNING.greedy_bids_per_row * self.n
            self.bid(0.0, end)
            if self.left <= self.n // 8 or self.budget.bids < end:
                return False
            max_reads = TUNING.reads_per_row * self.n
            self.release()
        elif self.costs.step:
            # From a warm start too with the first epsilon: a smaller one takes long to correct a price too high.
            epsilon, good = self.auction_on_sketch(self.initial_prices(warm_start), epsilon, tolerance)
            if good:
                return True
        else:
            self.make_lists(self.initial_prices(warm_start))
        return self.auction_on_lists(epsilon, tolerance, max_reads)

    def match_row_minima(self) -> bool:
        """Match rows to a cheapest column of their own; return whether most have one, else leave all free."""
        matched = bidding.match_row_minima(self.costs, self.row4col, self.col4row)
        if 2 * matched <= self.n:
            self.release()
            return False
        self.set_prices(self.initial_prices())
        self.lists = self.empty_lists()
        free = np.flatnonzero(self.col4row < 0)[::-1]
        self.left = len(free)
        self.free[: self.left] = free
        return True

    def auction_on_sketch(self, prices: Floats, epsilon: float, tolerance: float) -> tuple[float, bool]:
        """Run the phases whose epsilon the sketch resolves, and make lists.

        Returns the epsilon to go on with, and whether the matching is good enough as it is.
        """
        first, step = epsilon, self.costs.step
        base = float((prices + self.costs.offset).min())
        p = self.sketched(prices, base)
        while epsilon >= TUNING.sketch_epsilon * step:
            end = self.budget.bids + TUNING.bids_per_row * self.n
            while self.left and not self.budget.spent(end):
                share = self.budget.until_look(end, self.m)
                self.left, bids = bidding.bid_on_sketch(
                    self.costs.sketch, p, self.row4col, self.col4row, self.free, self.left, round(epsilon / step), share
                )
                self.budget.bids += bids
                if bids < share:
                    break
            if self.left and not self.budget.spent():
                # Prices run away, or one is too high to sketch: begin anew, on the lists.
                self.release()
                self.make_lists(self.initial_prices())
                return first, False
            if self.left:
                break
            if tolerance > 0.0:
                self.set_prices(p * step - self.costs.offset + base)
                if self.gap() <= tolerance:
                    return epsilon, True
            epsilon /= TUNING.epsilon_factor
            self.release()
        self.make_lists(p * step - self.costs.offset + base)
        return epsilon, False

    def auction_on_lists(self, epsilon: float, tolerance: float, max_reads: int) -> bool:
        """Run the remaining phases, down to the last epsilon; return whether the matching is good enough as it is."""
        last = TUNING.final_epsilon * self.spread
        columns_reduced = False
        while True:
            reads = self.bid(max(1.0, np.rint(epsilon)), self.budget.bids + TUNING.bids_per_row * self.n, max_reads)
            if reads >= max_reads and self.left:
                # So many columns are within epsilon that lists are of no use: the shortest paths do without.
                self.release()
                self.make_lists(self.initial_prices())
                return False
            if self.left and (columns_reduced or self.budget.spent()):
                return False
            if self.left:
                # Some columns are far from every row, and bids close that distance in small steps: reduce them first.
                columns_reduced = True
                self.release()
                self.make_lists(self.column_reduction())
                continue
            if tolerance > 0.0 and self.gap() <= tolerance:
                return True
            if epsilon <= last:
                return False
            epsilon = max(epsilon / TUNING.epsilon_factor, last)
            self.release()
            self.set_prices(self.prices.exact)

    def bid(self, epsilon: float, max_bids: float, max_reads: int = UNLIMITED) -> int:
        """Let free rows bid on the lists; return how many rows of the matrix were read whole."""
        reads = 0
        while self.left and reads < max_reads and not self.budget.spent(max_bids):
            share = self.budget.until_look(max_bids, self.m)
            self.left, bids, more = bidding.bid(
                self.costs,
                self.prices,
                self.lists,
                self.row4col,
                self.col4row,
                self.free,
                self.left,
                epsilon,
                share,
                max_reads - reads,
            )
            self.budget.bids += bids
            reads += more
            if bids < share:
                break
        return int(reads)

    def column_reduction(self) -> Floats:
        """Return prices that make up for what all rows pay for a column (Jonker and Volgenant 1987)."""
        C, row_min = self.costs.C, self.costs.row_min
        least = np.full(self.m, np.inf)
        for start in range(0, self.n, 64):
            rows = slice(start, start + 64)
            np.minimum(least, (C[rows] - row_min[rows, None]).min(0), out=least)
        return self.initial_prices(least)

    def shortest_augmenting_paths(self) -> None:
        """Match the rows that are not tight, and those still free, until the matching is optimal."""
        self.left = bidding.free_loose_rows(self.costs, self.prices, self.lists, self.row4col, self.col4row, self.free)
        self.bid(0.0, self.budget.bids + TUNING.reduction_bids_per_row * self.n)
        if self.prices.exact.max() > MAX_PRICE:
            # Rows with few allowed columns ran up their prices beyond what is exact.
            self.release()
            self.make_lists(self.initial_prices())
        # A forest raises prices of free columns, which rectangular problems forbid.
        max_dense = TUNING.few_rows if self.m == self.n else self.n
        while self.left and not self.budget.spent():
            stop = 0 if self.budget.deadline == math.inf else max(0, self.left - TUNING.few_rows)
            self.left = paths.augment(
                self.costs,
                self.prices,
                self.lists,
                self.row4col,
                self.col4row,
                self.free,
                self.left,
                stop,
                max_dense,
            )
            if self.left > max_dense:
                self.grow_forests()
                max_dense = self.n

    def grow_forests(self) -> None:
        """Match a share of the free rows at a time while there are many."""
        matched = self.n
        while self.left > TUNING.few_rows and 8 * matched >= self.left and not self.budget.spent():
            before = self.left
            want = math.ceil(TUNING.forest_share * before)
            self.left, met = paths.grow_forest(
                self.costs, self.prices, self.row4col, self.col4row, self.free, before, want
            )
            if met >= TUNING.forest_crowding * (before - self.left):
                # Many ties: trees stand in each other's way, and a maximum matching of the tight pairs does better.
                tight = np.empty((self.n, (self.m + 63) // 64), np.uint64)
                paths.mark_tight(self.costs, self.prices.exact, self.col4row, tight)
                self.left = paths.match_tight(tight, self.row4col, self.col4row, self.free, self.left)
            matched = before - self.left

    def complete(self) -> None:
        """Give each free row the cheapest column that is left: the end of a solve cut short."""
        for i in self.free[: self.left]:
            vacant = np.flatnonzero(self.row4col < 0)
            j = vacant[np.argmin(self.costs.C[i, vacant])]
            self.row4col[j], self.col4row[i] = i, j
        self.left = 0
        if self.problem.C[np.arange(self.n), self.col4row].max() == np.inf:  # a forbidden pair
            self.col4row = self.problem.assignment
            self.row4col[:] = -1
            self.row4col[self.col4row] = np.arange(self.n)

    def gap(self) -> float:
        """Return the certified relative gap of the present matching."""
        bound, _ = certificate.lower_bound(self.costs, self.prices, self.col4row, self.threads)
        return certificate.relative_gap(self.problem.total(self.col4row), bound)
