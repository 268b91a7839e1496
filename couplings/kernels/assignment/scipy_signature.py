"""The solver behind the signature of ``scipy.optimize.linear_sum_assignment``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..feasibility import Infeasible
from .solver import solve

__all__ = ["linear_sum_assignment"]


def linear_sum_assignment(
    cost_matrix: npt.ArrayLike, maximize: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Solve the linear sum assignment problem, as the function of that name in SciPy does.

    Parameters
    ----------
    cost_matrix : (n, m) array_like
        Anything that casts safely to float64; float32 is solved as it is. +inf (-inf to `maximize`) forbids a pair.
    maximize : bool
        Find the largest total.

    Returns
    -------
    row_ind, col_ind : (min(n, m),) int64 arrays
        Rows in ascending order, and the column of each.

    Raises
    ------
    TypeError
        If the entries do not cast safely.
    ValueError
        If the matrix is not two-dimensional, has NaN or an infinity of the wrong sign, or is infeasible.

    Examples
    --------
    >>> rows, columns = linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
    >>> columns
    array([1, 0, 2])
    """
    cost = np.asarray(cost_matrix)
    if cost.ndim != 2:
        msg = f"expected a matrix (2-D array), got a {cost.ndim} array"
        raise ValueError(msg)
    if cost.dtype != np.float32:
        cost = cost.astype(np.float64, casting="safe", copy=False)
    if cost.size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if maximize:
        cost = -cost
    if np.isnan(cost).any() or (cost == -np.inf).any():
        msg = "matrix contains invalid numeric entries"
        raise ValueError(msg)
    tall = cost.shape[0] > cost.shape[1]
    try:
        index = solve(cost.T if tall else cost).index
    except Infeasible as error:
        msg = f"cost matrix is infeasible: {error}"
        raise ValueError(msg) from None
    if not tall:
        return np.arange(len(index)), index
    order = np.argsort(index)
    return index[order], order
