"""Turning the dual prices of an exact solver into a certificate."""

from torch import Tensor

_ROWS_AT_ONCE = 256


def slack(cost: Tensor, index: Tensor, prices: Tensor) -> float:
    """Bound how far an assignment is from the optimum, from any prices of the columns.

    For every price vector ``p``, ``sum_i min_j (cost[i, j] - p[j]) + sum_j p[j]`` is at most the optimum of the square
    problem (weak duality); good prices make the bound tight.

    Parameters
    ----------
    cost : (n, n) Tensor
        On the CPU.
    index : (n,) Tensor
    prices : (n,) Tensor

    Returns
    -------
    float
        Upper bound on ``cost[i, index[i]].sum() - optimum``, in float64, at least 0.
    """
    if len(cost) == 1:  # nothing to choose; some packages leave the price of a single column unset
        return 0.0
    prices = prices.double()
    total, bound = 0.0, prices.sum().item()
    for start in range(0, len(cost), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part, chosen = cost[rows], index[rows]
        reduced = part.double() - prices
        bound += reduced.amin(1).sum().item()
        total += part.gather(1, chosen[:, None]).double().sum().item()
    return max(0.0, total - bound)
