"""Greedy and stable matchings: deferred acceptance with lists of proposals that are made when needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._jit import jit
from .assignment.costs import is_finite
from .feasibility import Infeasible, check_feasible

__all__ = ["greedy", "stable"]

BATCH = 32  # proposals prepared for a row at a time


@jit
def prepare(cost: Any, score: Any, i: Any, held: Any, holder: Any, after: Any, proposals: Any, values: Any) -> Any:
    """Fill the row's next proposals in order of (cost, column), leaving out columns that hold a better row.

    A column's holder only ever improves, so what is left out now would refuse later too. Insertion into a short
    sorted list, read off in one pass over the row.
    """
    n = 0
    limit = proposals.size
    last = values[limit - 1] if after >= 0 else -np.inf
    for j in range(cost.shape[1]):
        v = cost[i, j]
        if v < last or (v == last and j <= after) or (n == limit and v >= values[n - 1]):
            continue
        s = score[i, j]
        if holder[j] >= 0 and (s > held[j] or (s == held[j] and i > holder[j])):
            continue
        k = n if n < limit else n - 1
        while k > 0 and values[k - 1] > v:
            values[k] = values[k - 1]
            proposals[k] = proposals[k - 1]
            k -= 1
        values[k] = v
        proposals[k] = j
        n = min(n + 1, limit)
    return n


@jit
def defer(cost: Any, score: Any, index: Any) -> Any:
    """Gale and Shapley (1962): rows propose to columns, a column keeps the row it scores lowest.

    The outcome does not depend on the order in which rows speak.
    """
    n, m = cost.shape
    held = np.empty(m)
    holder = np.full(m, -1, np.int64)
    proposals = np.empty((n, BATCH), np.int64)
    values = np.empty((n, BATCH))
    count = np.zeros(n, np.int64)
    spoken = np.zeros(n, np.int64)
    after = np.full(n, -1, np.int64)
    for first in range(n):
        i = first
        while i >= 0:
            if spoken[i] == count[i]:
                count[i] = prepare(cost, score, i, held, holder, after[i], proposals[i], values[i])
                spoken[i] = 0
                after[i] = proposals[i, count[i] - 1]
            j = proposals[i, spoken[i]]
            spoken[i] += 1
            s = score[i, j]
            other = holder[j]
            if other < 0 or s < held[j] or (s == held[j] and i < other):
                held[j] = s
                holder[j] = i
                index[i] = j
                i = other
    return index


def _matching(cost: npt.NDArray[Any], score: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    for name, value in (("cost", cost), ("noise_score", score)):
        if value.dtype not in (np.float32, np.float64):
            msg = f"{name} must be float32 or float64, got {value.dtype}"
            raise TypeError(msg)
    if cost.ndim != 2 or not 1 <= cost.shape[0] <= cost.shape[1] or score.shape != cost.shape:
        msg = f"cost and noise_score must both be (n, m) with m >= n >= 1, got {cost.shape} and {score.shape}"
        raise ValueError(msg)
    if score.dtype != cost.dtype:
        cost, score = cost.astype(np.float64), score.astype(np.float64)
    forbidden = not (_finite(cost) and (score is cost or _finite(score)))
    if forbidden:
        check_feasible(cost)
        if np.isnan(score).any():
            msg = f"noise_score must hold numbers, got {np.isnan(score).sum()} NaN"
            raise ValueError(msg)
    rows, scores = np.ascontiguousarray(cost).view(), np.ascontiguousarray(score).view()
    rows.flags.writeable = scores.flags.writeable = False
    index: npt.NDArray[np.int64] = defer(rows, scores, np.empty(len(rows), np.int64))
    if forbidden and (stuck := int(np.isinf(cost[np.arange(len(index)), index]).sum())):
        msg = (
            f"{stuck} of {len(index)} rows are left with forbidden pairs (+inf) only; an exact method matches them all"
        )
        raise Infeasible(msg)
    return index


def _finite(matrix: npt.NDArray[Any]) -> bool:
    flat = np.ascontiguousarray(matrix).ravel().view(f"i{matrix.itemsize}")
    return bool(is_finite(flat, np.array(np.inf, matrix.dtype).view(flat.dtype)[()]))


def greedy(cost: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Match the globally smallest remaining entry first; ties go to the lower row, then the lower column.

    Parameters
    ----------
    cost : (n, m) float32 or float64 array, m >= n
        Never modified. An entry of +inf is a forbidden pair.

    Returns
    -------
    (n,) int64
        Column of each row; all different.

    Raises
    ------
    ValueError
        If there is a NaN or -inf, or a row is left with forbidden pairs only: says how many are, or, where no
        assignment avoids that, how many must be.

    Notes
    -----
    Ordering entries by (cost, row, column) gives rows and columns preferences of which the greedy matching is the
    only stable one, so deferred acceptance finds it without sorting the matrix.
    """
    return _matching(cost, cost)


def stable(cost: npt.NDArray[Any], noise_score: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Stable matching in which the rows propose, in order of cost, and the columns choose by `noise_score`.

    Parameters
    ----------
    cost : (n, m) float32 or float64 array, m >= n
        Row i prefers column j where ``cost[i, j]`` is small; ties go to the lower column. An entry of +inf is a
        forbidden pair.
    noise_score : (n, m) array
        Column j prefers row i where ``noise_score[i, j]`` is small; ties go to the lower row.

    Returns
    -------
    (n,) int64
        Column of each row; all different. Best for every row among stable matchings.

    Raises
    ------
    ValueError
        As `greedy`.

    References
    ----------
    Gale and Shapley, "College admissions and the stability of marriage", 1962, doi:10.2307/2312726.
    """
    return _matching(cost, noise_score)
