"""Dual prices: a certificate for an assignment, and a cost on which the solvers of other packages are right.

For every price vector ``p``, ``sum_i min_j (cost[i, j] - p[j]) + sum_j p[j]`` is at most the optimum of the square
problem (weak duality); good prices make the bound tight.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from couplings.assigners.method import Assignment
from couplings.kernels.feasibility import check_feasible

Vector = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]
Solver = Callable[[Matrix], tuple[Vector, Vector | None]]

_GAP = 1e-6  # an answer further from the optimum, as a share of its cost, is an error
_CLOSE = 1e-9  # is not refined further
_COARSE = 1e-3  # an answer that leaves less of the slack came from costs with huge entries
_ROUNDING = 2.0**-48  # of sums in float64, as a share of what is summed


def solve(cost: Tensor, solver: Solver, bits: int, method: str) -> Assignment:
    """Solve an assignment problem with a solver that is right on costs of moderate size.

    Packages answer wrongly, or never, where huge entries lie next to small ones or rows are nearly equal. The solver is
    therefore given reduced costs, which are never negative. A pair that costs more than all that an assignment can
    still gain (its slack) is in no optimum: such entries are cut off at twice the slack, which a power of two brings
    near ``2 ** bits``. The answer and its prices reduce the slack; while it is large, they are refined the same way.

    Parameters
    ----------
    cost : (n, m) Tensor
        With ``m >= n``. ``+inf`` forbids a pair.
    solver : callable
        ``solver(reduced) -> (columns, prices)``, for an (m, m) float64 array from 0 to ``2 ** (bits + 1)``. A solver
        without dual prices returns None for them.
    bits : int
        Up to 50 minus the bits of m, for sums of whole numbers to be exact.
    method : str
        Its name, for the message.

    Returns
    -------
    Assignment
        Its slack is certified if the solver has prices.

    Raises
    ------
    ValueError
        If some rows cannot be matched by finite entries.
    RuntimeError
        If the solver's prices do not prove that its answer is within 1e-6 of the optimum.
    """
    n, m = cost.shape
    matrix = np.zeros((m, m))  # m - n rows of zeros take the columns that are left
    matrix[:n] = cost.numpy(force=True)
    index = _any_assignment(matrix, n)
    exponent = max(0, _exponent(np.abs(matrix[np.isfinite(matrix)]).max()) - 960)
    matrix = np.ldexp(matrix, -exponent)  # no sum or difference overflows
    rows, prices = np.arange(m), (matrix - matrix.min(1, keepdims=True)).min(0)
    reduced, slack = _reduced(matrix, index, prices)
    certified = True
    while slack > _allowed(_CLOSE, matrix, index, prices):
        power = bits - _exponent(slack)
        columns, steps = solver(np.ldexp(np.minimum(reduced, 2.0 * slack), power))
        certified = steps is not None
        before, left = slack, float(reduced[rows, columns].sum())
        if left < _COARSE * before:
            # Next to huge entries all others looked the same, and the prices are as coarse: solve again without them.
            index, slack = columns, left
            continue
        if steps is not None:
            steps = prices + np.ldexp(steps, -power)
            finer, left = _reduced(matrix, columns, steps)
        if left <= before:
            index, slack = columns, left
            if steps is not None:
                prices, reduced = steps, finer
        if steps is None or left > before / 2:
            break
    if certified and slack > _allowed(_GAP, matrix, index, prices):
        msg = (
            f"the package behind the method {method} may have missed the optimum by more than {_GAP:g} of the cost: "
            "its dual prices do not prove the answer. Use method='auction'."
        )
        raise RuntimeError(msg)
    with np.errstate(over="ignore"):
        slack = float(np.ldexp(slack, exponent))
    return Assignment(torch.from_numpy(index[:n].astype(np.int64)), slack)


def _any_assignment(matrix: Matrix, n: int) -> Vector:
    """Find an assignment of finite entries: the identity where all are finite."""
    found = check_feasible(matrix[:n])
    if found is None:
        return np.arange(len(matrix))
    return np.concatenate([found, np.setdiff1d(np.arange(len(matrix)), found)])


def _reduced(matrix: Matrix, index: Vector, prices: Vector) -> tuple[Matrix, float]:
    """Reduced costs at these prices, and how much more than the dual bound the assignment costs, rounding included."""
    reduced = matrix - prices
    reduced -= reduced.min(1, keepdims=True)
    rounding = _ROUNDING / 8 * _sizes(matrix, index, prices)
    return reduced, float(reduced[np.arange(len(index)), index].sum()) + rounding


def _allowed(share: float, matrix: Matrix, index: Vector, prices: Vector) -> float:
    """Return this share of the total cost, or what may be the rounding of its sum."""
    total = abs(float(matrix[np.arange(len(index)), index].sum()))
    return max(share * total, _ROUNDING * _sizes(matrix, index, prices))


def _sizes(matrix: Matrix, index: Vector, prices: Vector) -> float:
    return float(np.abs(matrix[np.arange(len(index)), index]).sum() + np.abs(prices).sum())


def _exponent(value: float) -> int:
    return int(np.frexp(value)[1])
