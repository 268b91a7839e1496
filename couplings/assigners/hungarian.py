"""Exact assignment by SciPy: modified Jonker-Volgenant, O(n^3).

Crouse (2016), On implementing 2D rectangular assignment algorithms, doi:10.1109/TAES.2016.140952.
"""

import torch
from torch import Tensor


def assign(cost: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Assign each row a distinct column at the least total cost."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost.numpy(force=True))
    return torch.from_numpy(columns)
