"""Exact assignment by SciPy: modified Jonker-Volgenant, O(n^3).

Crouse (2016), On implementing 2D rectangular assignment algorithms, doi:10.1109/TAES.2016.140952.
"""

import torch
from torch import Tensor

from couplings.stages import stage


def assign(cost: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Assign each row a distinct column at the least total cost."""
    from scipy.optimize import linear_sum_assignment

    with stage("conversion"):
        matrix = cost.cpu().double().numpy()  # what scipy would do, unseen
    _, columns = linear_sum_assignment(matrix)
    return torch.from_numpy(columns)
