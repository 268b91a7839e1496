"""The exact assignment solver: a fixed-point auction finished by shortest augmenting paths, with a certificate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from couplings.stages import stage

from . import _assignment as kernels
from ._threads import over_rows

__all__ = ["Solution", "solve"]

START = 0.1  # first epsilon, in standard deviations of the cost
FINAL = 1e-4  # last epsilon
SHRINK = 7.0  # from one phase to the next
WAR = 30  # bids a row in one phase: more than all phases take together where prices do not run away
DULL = 2  # readings of a whole row, each, in one phase: more where lists are of no use
FEW = 16  # rows that are matched one at a time even where lists are of no use
SHARE = 0.2  # of the free rows, to be matched by one forest
CROWD = 4  # free columns met for each of them, from which on trees stand in each other's way
NEVER = 1 << 62  # bids
RANGE = 8.0  # standard deviations of the cost that a sketch resolves
FINE = 3.0  # steps of the sketch down to which epsilon is settled on it
NORMAL = 1e-30  # least number of a sketch's steps per unit of cost, and one over the greatest: safe in float32
FAINT, FAR = 2.0**-900, 600  # totals that are too small to be measured in levels, and the power of two that mends it
SERIAL = 2_000_000  # matrices with fewer entries are read by one thread


@dataclass(frozen=True)
class Solution:
    """An assignment of every row to a column of its own, with its dual certificate.

    Attributes
    ----------
    index : (n,) int64
        Column of each row; all different.
    prices : (m,) float64
        Column duals ``v`` in the units of the cost: with ``u_i = min_j(c_ij - v_j)``, no reduced cost
        ``c_ij - u_i - v_j`` is negative. Zero at most, and zero where a column is unassigned (m > n, exact).
    total : float
        Sum of the chosen entries, correctly rounded.
    lower_bound : float
        No assignment of the matrix costs less: the dual objective, less all rounding.
    bids : int
        Bids made by the auction.
    exact : bool
        Whether the assignment is an optimum of the fixed-point matrix, or certified within 1e-6 of the optimum.
    """

    index: npt.NDArray[np.int64]
    prices: npt.NDArray[np.float64]
    total: float
    lower_bound: float
    bids: int
    exact: bool

    @property
    def gap(self) -> float:
        """Certified ``(total - optimum) / |total|`` at most; 0 if both are 0, inf if only the total is."""
        return _gap(self.total, self.lower_bound)


def _gap(total: float, bound: float) -> float:
    if total <= bound:
        return 0.0
    return (total - bound) / abs(total) if total else math.inf


def solve(
    cost: npt.NDArray[Any],
    *,
    tolerance: float = 0.0,
    max_bids: int | None = None,
    max_seconds: float | None = None,
    warm_start: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> Solution:
    """Assign every row of a cost matrix to a column of its own, at least total cost.

    Parameters
    ----------
    cost : (n, m) float32 or float64 array, m >= n >= 1
        Finite, any strides; never modified.
    tolerance : float
        Relative gap, certified, at which to stop early.
    max_bids : int, optional
        Bids after which to stop with the best permutation at hand.
    max_seconds : float, optional
        Wall-clock time after which to do so. The only argument by which the answer can differ between runs.
    warm_start : (m,) array, optional
        ``Solution.prices`` of a similar problem with the same columns: the closer it is, the more bids they save.
        They change no optimum, and are not used where columns outnumber rows.
    threads : int, optional
        Threads that read the matrix (default 1). The answer does not depend on it.

    Returns
    -------
    Solution

    Raises
    ------
    TypeError
        If `cost` is not a float32 or float64 array.
    ValueError
        If `cost` is not (n, m) with m >= n >= 1, or an option is out of range.

    Notes
    -----
    Costs become whole numbers of levels above their row's smallest: 2^48 of them up to the total (above the row
    minima) of a feasible assignment, beyond which no entry can be part of an optimum. For float32 costs of
    ordinary range that loses nothing. An epsilon-scaled Gauss-Seidel auction [1]_ prices the columns, rows that
    are not tight are freed, and shortest augmenting paths [2]_ finish them, found from all free rows at once where
    there are many: at most n Dijkstra searches, so there is no price war that could hang. Memory beyond the matrix:
    O(n + m), 48 list entries a row, a sketch of 2 bytes an entry and, where many costs are tied, a bit an entry.

    References
    ----------
    .. [1] Bertsekas, "The auction algorithm", Annals of Operations Research 14 (1988), doi:10.1007/BF02186476.
    .. [2] Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment
       problems", Computing 38 (1987), doi:10.1007/BF02278710.

    Examples
    --------
    >>> import numpy as np
    >>> solve(np.array([[1.0, 2.0], [0.0, 5.0]])).index
    array([1, 0])
    """
    _check(cost, tolerance, max_bids, max_seconds, warm_start)
    deadline = math.inf if max_seconds is None else time.perf_counter() + max_seconds
    C = np.ascontiguousarray(cost).view()
    C.flags.writeable = False  # one kernel signature for all callers, and a promise kept by Numba
    warm = None if warm_start is None else np.asarray(warm_start, np.float64)
    with stage("conversion"):
        search = _Search(C, 1 if threads is None or C.size < SERIAL else threads, deadline)
    if 0.0 < search.ceiling < FAINT:
        # Costs that differ by next to nothing in float64: so many levels to the unit that their number overflows.
        with np.errstate(over="ignore"):
            nearer = np.clip(C * 2.0**FAR, -sys.float_info.max, sys.float_info.max)
        found = solve(
            nearer,
            tolerance=tolerance,
            max_bids=max_bids,
            max_seconds=max_seconds,
            warm_start=None if warm is None else warm * 2.0**FAR,
            threads=threads,
        )
        small = {name: getattr(found, name) * 2.0**-FAR for name in ("prices", "total", "lower_bound")}
        return replace(found, **small)
    return search.run(tolerance, math.inf if max_bids is None else max_bids, warm)


def _check(
    cost: npt.NDArray[Any],
    tolerance: float,
    max_bids: int | None,
    max_seconds: float | None,
    warm_start: npt.NDArray[np.float64] | None,
) -> None:
    if not isinstance(cost, np.ndarray) or cost.dtype not in (np.float32, np.float64):
        got = f"{cost.dtype} array" if isinstance(cost, np.ndarray) else type(cost).__name__
        msg = f"cost must be a float32 or float64 NumPy array, got {got}; convert it with cost.astype('float32')"
        raise TypeError(msg)
    if cost.ndim != 2 or not 1 <= cost.shape[0] <= cost.shape[1]:
        msg = f"cost must be (n, m) with m >= n >= 1, got shape {cost.shape}; transpose it if rows outnumber columns"
        raise ValueError(msg)
    for name, value in (("tolerance", tolerance), ("max_bids", max_bids), ("max_seconds", max_seconds)):
        if value is None:
            continue
        if not isinstance(value, Real):
            msg = f"{name} must be a number, got {value!r}"
            raise TypeError(msg)
        if not value >= 0:
            msg = f"{name} must be at least 0, got {value}"
            raise ValueError(msg)
    if max_bids not in (None, math.inf) and max_bids != int(max_bids):
        msg = f"max_bids must be a whole number, got {max_bids}"
        raise ValueError(msg)
    if warm_start is not None and (np.shape(warm_start) != cost.shape[1:] or not np.isfinite(warm_start).all()):
        msg = f"warm_start must hold a finite price for each of {cost.shape[1]} columns, got {np.shape(warm_start)}"
        raise ValueError(msg)


class _Search:
    """State of one solve: prices, the partial matching, and the rows' lists."""

    def __init__(self, C: npt.NDArray[Any], threads: int, deadline: float) -> None:
        n, m = C.shape
        self.C, self.n, self.m, self.threads, self.deadline = C, n, m, threads, deadline
        self.bids = 0
        self.reads = 0
        self.low = np.empty(n)
        self.spread = self._spread()
        # Sketching pays where rows are long. Its steps are a power of two, for one to be a whole number of levels.
        fine = kernels.COARSE / (RANGE * self.spread) if self.spread > 0.0 and m > kernels.SMALL else 0.0
        self.steps = math.ldexp(1.0, math.floor(math.log2(fine))) if NORMAL < fine < 1.0 / NORMAL else 0.0
        self.sketch = np.empty((n, m if self.steps else 0), np.int16)
        bits = C.view(f"i{C.itemsize}")
        if self.steps:
            # A cost less its row's minimum is rounded, maybe up; the sketch must not be.
            steps = C.dtype.type(self.steps * (1.0 - 4.0 * float(np.finfo(C.dtype).eps)))
            self._over_rows(kernels.survey, C, bits, self.low, self.sketch, steps)
        else:
            self._over_rows(kernels.smallest, C, bits, self.low)
        self.ceiling, first = kernels.stagger(C, self.low)
        self.mate = (np.arange(n) + first) % m  # the first matching

    def _over_rows(self, kernel: Callable[..., object], *arguments: object) -> None:
        over_rows(lambda start, stop: kernel(*arguments, start, stop), self.n, self.threads)

    def _spread(self) -> float:
        """Return a standard deviation of the costs, less rows and columns, that a few huge entries cannot move."""
        sample = self.C[:: self.n // 32 + 1, :: self.m // 64 + 1].astype(np.float64)
        rows, columns = sample.shape
        # Partitions, not np.median: that takes longer than all other steps of a small solve.
        sample -= np.partition(sample, columns // 2, axis=1)[:, columns // 2, None]
        sample -= np.partition(sample, rows // 2, axis=0)[rows // 2]
        return 1.5 * float(np.partition(np.abs(sample), sample.size // 2, axis=None)[sample.size // 2])

    def run(self, tolerance: float, max_bids: float, warm: npt.NDArray[np.float64] | None) -> Solution:
        """Solve, and again with finer levels where the first feasible assignment made them too coarse."""
        while self.ceiling > 0.0:
            ceiling = self.ceiling
            best = self._attempt(tolerance, max_bids, warm)
            self.ceiling = float((self._chosen() - self.low).sum())
            if best.gap <= max(tolerance, 1e-7) or self.ceiling > ceiling / 4 or self._spent(max_bids):
                return best
        # Every row has its minimum: the bound is the total itself.
        total = math.fsum(self.low)
        return Solution(self.mate, np.zeros(self.m), total, total, self.bids, exact=True)

    def _spent(self, max_bids: float) -> bool:
        return self.bids >= max_bids or time.perf_counter() >= self.deadline

    def _attempt(self, tolerance: float, max_bids: float, warm: npt.NDArray[np.float64] | None) -> Solution:
        """Solve the matrix whose levels reach beyond the present ceiling."""
        n, m = self.n, self.m
        # Half the range, so that what is cut off at CAP is dearer than the whole feasible assignment.
        scale = math.ldexp(1.0, math.floor(math.log2(kernels.CAP / self.ceiling)) - 1)
        step = scale / self.steps if self.steps else 0.0
        sketch = self.sketch if step >= 1.0 else self.sketch[:, :0].copy()
        self.costs = kernels.Costs(self.C, self.low, scale, sketch, step)
        free = np.empty(n, np.int64)
        self._release(free)
        if m == n:
            best = self._scale(free, tolerance, max_bids, warm)
            if best is not None:
                return best
        else:
            self._open(np.zeros(m))
        left = kernels.loosen(self.costs, self.prices, self.lists, self.owner, self.mate, free)
        left = self._bid(free, left, 0.0, min(max_bids, self.bids + 20 * n))
        patience = FEW if m == n else n
        while left and not self._spent(max_bids):
            stop = 0 if self.deadline == math.inf else max(0, left - FEW)
            left = kernels.augment(
                self.costs, self.prices, self.lists, self.owner, self.mate, free, left, stop, patience
            )
            if left > patience:
                left, patience = self._grow(free, left, max_bids), n
        self._complete(free[:left])
        return self._solution()

    def _scale(
        self, free: npt.NDArray[np.int64], tolerance: float, max_bids: float, warm: npt.NDArray[np.float64] | None
    ) -> Solution | None:
        """Epsilon scaling: a matching of all rows, nearly tight, or none of them; a solution if that is good enough."""
        n = self.n
        spread = min(self.spread or self.ceiling / n, self.ceiling) * self.costs.scale
        eps, start = START * spread, np.zeros(n)
        if warm is not None:
            # With the first epsilon all the same: a smaller one would take long to correct a price that is too high.
            start = np.rint(np.minimum((warm.max() - warm) * self.costs.scale, kernels.CAP))
        calm = False
        if not self.costs.sketch.size:
            self._open(start)
            calm = kernels.openings(self.lists, np.zeros(n, np.bool_)) > n // 2
        elif warm is None and kernels.variety(self.costs.sketch, np.zeros(n, np.int16)) > n // 2:
            self._open(start)
            calm = True
        else:
            eps, best = self._haggle(free, start, eps, tolerance, max_bids)
            if best is not None:
                return best
        if calm:
            # Little competition: bids without epsilon may settle most rows, or all but the rows that are tied. Any
            # epsilon would only blur ties.
            most = self.bids + 4 * n
            if self._bid(free, n, 0.0, min(max_bids, most)) <= n // 8 or self.bids < most:
                return None
            self._release(free)
        reduced = False
        dull = DULL * n if calm else NEVER
        while True:
            if self._bid(free, n, max(1.0, np.rint(eps)), min(max_bids, self.bids + WAR * n), dull):
                if self.reads >= dull:
                    # So many columns are within epsilon that lists are of no use: leave all to the shortest paths.
                    self._restart(free, np.zeros(n))
                    return None
                if reduced or self._spent(max_bids):
                    return None
                # A price war: some columns are far from every row, and bids close that distance in small steps.
                reduced = True
                self._restart(free, self._reduced_columns())
                continue
            if tolerance > 0.0:
                best = self._solution()
                if best.gap <= tolerance:
                    return best
            if eps <= FINAL * spread:
                return None
            eps = max(eps / SHRINK, FINAL * spread)
            self._release(free)
            self._price(self.prices.exact)

    def _haggle(
        self, free: npt.NDArray[np.int64], start: npt.NDArray[np.float64], eps: float, tolerance: float, max_bids: float
    ) -> tuple[float, Solution | None]:
        """Do the first phases on the sketch; return the next epsilon, and a solution if one is good enough."""
        first, step = eps, self.costs.step
        p = np.minimum(start / step, kernels.COARSE).astype(np.int16)
        while eps >= FINE * step:
            left, end = self.n, min(max_bids, self.bids + WAR * self.n)
            while left and not self._spent(end):
                limit = int(min(end - self.bids, self._patience()))
                left, bids = kernels.haggle(
                    self.costs.sketch, p, self.owner, self.mate, free, left, round(eps / step), limit
                )
                self.bids += bids
                if bids < limit:
                    break
            if left and not self._spent(max_bids):
                # A price war, or a price too high to sketch: begin anew, on the lists.
                self._restart(free, np.zeros(self.n))
                return first, None
            if left:
                break
            if tolerance > 0.0:
                self._price(p.astype(np.float64) * step)
                best = self._solution()
                if best.gap <= tolerance:
                    return eps, best
            eps /= SHRINK
            self._release(free)
        self._open(p.astype(np.float64) * step)
        return eps, None

    def _open(self, prices: npt.NDArray[np.float64]) -> None:
        """Start at these prices, with lists to match: old lists hold only while prices rise."""
        n, m = self.n, self.m
        self._price(prices)
        width = m if m <= kernels.SMALL else kernels.LIST
        self.lists = kernels.Lists(
            np.empty((n, width), np.uint32), np.empty((n, width)), np.zeros(n, np.int64), np.full(n, -np.inf)
        )
        self._over_rows(kernels.fill_all, self.costs, self.prices, self.lists)

    def _price(self, exact: npt.NDArray[np.float64]) -> None:
        """Start from these prices, which are sketched above their smallest."""
        base = float(exact.min())
        step = self.costs.step or 1.0
        coarse = np.minimum((exact - base) / step, kernels.COARSE).astype(np.int16)
        self.prices = kernels.Prices(exact, coarse, base)

    def _reduced_columns(self) -> npt.NDArray[np.float64]:
        """Prices that make up for what all rows pay for a column (column reduction, Jonker and Volgenant 1987)."""
        least = np.full(self.m, np.inf)
        for start in range(0, self.n, 64):
            rows = slice(start, start + 64)
            np.minimum(least, (self.C[rows] - self.low[rows, None]).min(0), out=least)
        prices: npt.NDArray[np.float64] = np.rint(np.minimum((least.max() - least) * self.costs.scale, kernels.CAP))
        return prices

    def _release(self, free: npt.NDArray[np.int64]) -> None:
        """Free every row."""
        self.owner = np.full(self.m, -1)
        self.mate = np.full(self.n, -1)
        free[:] = np.arange(self.n - 1, -1, -1)

    def _restart(self, free: npt.NDArray[np.int64], prices: npt.NDArray[np.float64]) -> None:
        """Free every row, and begin anew at these prices."""
        self._release(free)
        self._open(prices)

    def _patience(self) -> int:
        """Bids between two looks at the clock."""
        return NEVER if self.deadline == math.inf else max(256, 20_000_000 // self.m)

    def _bid(self, free: npt.NDArray[np.int64], left: int, eps: float, max_bids: float, max_reads: int = NEVER) -> int:
        """Run the auction on the first `left` of the stack `free`; return how many rows it leaves there."""
        self.reads = 0
        while left and self.reads < max_reads and not self._spent(max_bids):
            limit = int(min(max_bids - self.bids, self._patience()))
            left, bids, reads = kernels.bid(
                self.costs,
                self.prices,
                self.lists,
                self.owner,
                self.mate,
                free,
                left,
                eps,
                limit,
                max_reads - self.reads,
            )
            self.bids += bids
            self.reads += reads
            if bids < limit:
                break
        return int(left)

    def _grow(self, free: npt.NDArray[np.int64], left: int, max_bids: float) -> int:
        """Match many rows at a time, while there are many; return how many are left."""
        matched = self.n
        while left > FEW and 8 * matched >= left and not self._spent(max_bids):
            before, want = left, math.ceil(SHARE * left)
            left, met = kernels.grow(self.costs, self.prices, self.owner, self.mate, free, left, want)
            if met >= CROWD * (before - left):
                suits = np.empty((self.n, (self.m + 63) // 64), np.uint64)
                kernels.suit(self.costs, self.prices.exact, self.mate, suits)
                left = kernels.match(suits, self.owner, self.mate, free, left)
            matched = before - left
        return left

    def _complete(self, free: npt.NDArray[np.int64]) -> None:
        """Give each free row the cheapest column still free: the end of a run that was cut short."""
        for i in free:
            vacant = np.flatnonzero(self.owner < 0)
            j = vacant[np.argmin(self.C[i, vacant])]
            self.owner[j], self.mate[i] = i, j

    def _chosen(self) -> npt.NDArray[np.float64]:
        chosen: npt.NDArray[np.float64] = self.C[np.arange(self.n), self.mate].astype(np.float64)
        return chosen

    def _solution(self) -> Solution:
        """Read the whole matrix once more for what the prices prove about this matching."""
        dual, slack = np.empty(self.n), np.empty(self.n)
        self._over_rows(kernels.slacks, self.costs, self.prices, self.mate, slack, dual)
        p, scale = self.prices.exact, self.costs.scale
        total = math.fsum(self._chosen().tolist())
        # Any prices give a bound: n columns pay at most the n largest.
        paid = p if self.m == self.n else np.sort(p)[self.m - self.n :]
        bound = math.fsum(self.low.tolist() + ((dual - paid) / scale).tolist())
        if not kernels.lossless(self.C, self.low, scale):
            bound = math.nextafter(bound - self.n / scale, -math.inf)
        bound = min(bound, total)
        optimal = not slack.any() and (self.m == self.n or bool((p[self.owner < 0] == p.min()).all()))
        prices = (p.min() - p) / scale
        exact = optimal or _gap(total, bound) <= 1e-6
        return Solution(self.mate.copy(), prices, total, bound, self.bids, exact)
