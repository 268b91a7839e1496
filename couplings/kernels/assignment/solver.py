"""Exact linear assignment: an auction in fixed point, finished by shortest augmenting paths, with a certificate.

`solve` gives every row of a cost matrix a column of its own at least total cost, in four steps:

1. **Normalise** (`problem`). One pass finds the row minima, and a feasible assignment whose total above them is U.
   Costs become whole numbers of levels above their row's minimum, at least 2^46 of them up to U: an entry dearer than
   U, or forbidden (+inf), is in no optimum, and is cut off. For float32 costs of ordinary range that loses nothing,
   and all that follows is exact integer arithmetic in float64 (`costs`). The same pass makes the *sketch*, an int16
   lower bound of the levels. What all rows pay for a column, where that varies much, becomes its first price.
2. **Auction** (`bidding`), after Bertsekas [1]_. Rows bid for columns, each raising the price of its cheapest column by
   the distance to the second cheapest plus epsilon. One *phase* is the auction of all rows at one epsilon; prices are
   kept from phase to phase while epsilon is divided. Coarse epsilons are settled on the sketch alone; fine ones on a
   list of each row's cheapest columns (`candidates`). Bids are bounded, so no price war can hang.
3. **Shortest augmenting paths** (`paths`), after Jonker and Volgenant [2]_ and Crouse [3]_. Rows are freed whose column
   is not exactly their cheapest, and matched again along paths that Dijkstra's search finds from the auction's prices,
   from all free rows at once where there are many; ties are resolved by a maximum matching of the tight pairs [4]_.
4. **Certificate** (`certificate`). The prices prove a lower bound of the total, checked against every cost.

Problems of up to 256 rows mostly skip the auction: their levels stay in the cache, and shortest augmenting paths over
all columns take one compiled call (`dense`). Where most rows compete for few columns, those of more than 128 rows go on
to the auction after all. `blocks` solves many small problems in one call.

`search` holds the state that steps 2 and 3 share; `tuning` the constants, each with what it trades.

References
----------
.. [1] Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem", Annals of
   Operations Research 14 (1988), doi:10.1007/BF02186476.
.. [2] Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
   Computing 38 (1987), doi:10.1007/BF02278710.
.. [3] Crouse, "On implementing 2D rectangular assignment algorithms", IEEE Transactions on Aerospace and Electronic
   Systems 52 (2016), doi:10.1109/TAES.2016.140952.
.. [4] Pothen and Fan, "Computing the block triangular form of a sparse matrix", ACM Transactions on Mathematical
   Software 16 (1990), doi:10.1145/98267.98287.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from .._interrupts import interruptible
from .._threads import worthwhile
from ..feasibility import check_feasible
from . import certificate
from .dense import CROWDED, NOT_FINITE, OUT_OF_RANGE, solve_dense
from .problem import normalise, power_in_range, scaled
from .search import Budget, Search
from .tuning import TUNING

__all__ = ["Solution", "solve"]


@dataclass(frozen=True)
class Solution:
    """An assignment of every row to a column of its own, with its dual certificate.

    Attributes
    ----------
    index : (n,) int64 array
        Column of each row; all different.
    prices : (m,) float64 array
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
        return certificate.relative_gap(self.total, self.lower_bound)


@interruptible
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
        Any strides; never modified. An entry of +inf is a forbidden pair.
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
        Most threads that read the matrix (default 1). The answer does not depend on it.

    Returns
    -------
    Solution

    Raises
    ------
    TypeError
        If `cost` is not a float32 or float64 array.
    ValueError
        If `cost` is not (n, m) with m >= n >= 1, holds NaN or -inf, or has no assignment without forbidden pairs, or if
        an option is out of range.

    Notes
    -----
    At most n Dijkstra searches: O(n^2 m) operations, far fewer in practice. Memory beyond the matrix: O(n + m), 48
    list entries a row, a sketch of 2 bytes an entry and, where many costs are tied, a bit an entry. Problems that
    are solved without an auction are solved exactly, whatever `tolerance` and limits say, and need no warm start.

    Examples
    --------
    >>> import numpy as np
    >>> solve(np.array([[1.0, 2.0], [0.0, 5.0]])).index
    array([1, 0])
    """
    _check_arguments(cost, tolerance, max_bids, max_seconds, warm_start)
    if cost.size <= TUNING.dense_entries:
        small = _solve_small(cost, tolerance)
        if small is not None:
            return small
    budget = Budget(max_bids, max_seconds)
    threads = worthwhile(threads, cost.size)

    problem = normalise(cost, threads)
    index, ceiling = problem.assignment, problem.ceiling
    while ceiling > 0.0:
        if power_in_range(ceiling):
            problem = normalise(cost, threads, problem.power + power_in_range(ceiling))
            ceiling = problem.above_row_minima(index)
        duals = None if warm_start is None else np.ldexp(np.asarray(warm_start, np.float64), problem.power)
        search = Search(problem, ceiling, budget, threads)
        good = False
        if problem.square:
            good = search.auction(duals, tolerance)
        else:  # scaling epsilon would leave prices on columns that end up without a row
            search.make_lists(search.initial_prices())
        if not good:
            search.shortest_augmenting_paths()
            search.complete()
        found = _certified(cost, search)
        # Again with finer levels where the first assignment was so far from the best that they were too coarse.
        before, index, ceiling = ceiling, found.index, problem.above_row_minima(found.index)
        if ceiling > before / 4 or found.gap <= max(tolerance, 1e-7) or budget.spent():
            return found
    # Every row has its minimum: the total is its own bound.
    total = _total(cost, index)
    return Solution(index, np.zeros(cost.shape[1]), total, total, budget.bids, exact=True)


def _solve_small(cost: npt.NDArray[Any], tolerance: float) -> Solution | None:
    """Solve by dense shortest augmenting paths; the matching proves itself, row by row, as it is made.

    None where an auction is faster.
    """
    n, m = cost.shape
    C = np.ascontiguousarray(cost).view()
    C.flags.writeable = False
    levels, row_min, p, index = np.empty((n, m)), np.empty(n), np.empty(m), np.empty(n, np.int64)
    power, ceiling = 0, 0.0
    status, above, scale, lossless = solve_dense(C, ceiling, tolerance, levels, row_min, p, index)
    if status == NOT_FINITE:
        feasible = check_feasible(C)
        assert feasible is not None  # for an entry is not finite
        index[:] = feasible
        ceiling = float((C[np.arange(n), index].astype(np.float64) - row_min).sum())
        if ceiling > 0.0:
            status, above, scale, lossless = solve_dense(C, ceiling, tolerance, levels, row_min, p, index)
    while status == OUT_OF_RANGE:  # again where a better assignment left the range at its other end
        power += power_in_range(above)
        C = scaled(cost, power)
        ceiling = float((C[np.arange(n), index] - C.min(1)).sum())
        status, above, scale, lossless = solve_dense(C, ceiling, tolerance, levels, row_min, p, index)
    if status == CROWDED:
        return None
    total = _total(cost, index)
    if scale == 0.0:
        return Solution(index, p, total, total, 0, exact=True)
    bound = math.fsum([*row_min.tolist(), above / scale])
    if not lossless:
        bound = math.nextafter(bound - n / scale, -math.inf)
    return _solution(index, p, total, bound, power, 0, optimal=True)


def _certified(cost: npt.NDArray[Any], search: Search) -> Solution:
    """Return the search's matching, and what its prices prove, in the units of the cost."""
    p, problem = search.prices.exact, search.problem
    bound, tight = certificate.lower_bound(search.costs, search.prices, search.col4row, search.threads)
    optimal = tight and (search.m == search.n or bool((p[search.row4col < 0] == p.min()).all()))
    prices = (p.min() - p) / search.costs.scale
    total = _total(cost, search.col4row)
    return _solution(search.col4row, prices, total, bound, problem.power, search.budget.bids, optimal=optimal)


def _solution(
    index: npt.NDArray[np.int64],
    prices: npt.NDArray[np.float64],
    total: float,
    bound: float,
    power: int,
    bids: int,
    *,
    optimal: bool,
) -> Solution:
    """Return a solution in the units of the cost, from prices and a bound ``2**power`` times too large."""
    if power:
        with np.errstate(over="ignore"):
            bound = math.nextafter(float(np.ldexp(bound, -power)), -math.inf)
            prices = np.ldexp(prices, -power)
    bound = min(bound, total)
    exact = optimal or certificate.relative_gap(total, bound) <= 1e-6
    return Solution(index, prices, total, bound, bids, exact)


def _total(cost: npt.NDArray[Any], index: npt.NDArray[np.int64]) -> float:
    chosen = cost[np.arange(len(index)), index].astype(np.float64)
    try:
        return math.fsum(chosen.tolist())
    except OverflowError:  # of the total, or on the way to it
        with np.errstate(over="ignore"):
            return float(np.ldexp(math.fsum(np.ldexp(chosen, -64).tolist()), 64))


def _check_arguments(
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
