"""Exact assignment by SciPy: modified Jonker-Volgenant, O(n^3).

Crouse (2016), On implementing 2D rectangular assignment algorithms, doi:10.1109/TAES.2016.140952.
"""

import torch
from torch import Tensor

from couplings.assigners.duality import solve


def assign(cost: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Assign each row a distinct column at the least total cost.

    Parameters
    ----------
    cost : (n, m) Tensor
        With ``m >= n``; ``+inf`` forbids a pair.
    generator : torch.Generator, optional
        Not used: the method is deterministic.

    Raises
    ------
    ValueError
        If some rows cannot be matched by finite entries.
    """
    from scipy.optimize import linear_sum_assignment

    return solve(cost, lambda reduced: (linear_sum_assignment(reduced)[1], None), 0, "hungarian").index
