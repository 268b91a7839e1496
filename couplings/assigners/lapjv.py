"""Exact assignment by the lapjv package.

Jonker and Volgenant (1987), A shortest augmenting path algorithm for dense and sparse linear assignment problems,
doi:10.1007/BF02278710.
"""

import torch
from torch import Tensor

from couplings.assigners.duality import slack
from couplings.assigners.extras import missing_extra
from couplings.assigners.method import Assignment
from couplings.stages import stage


def assign(cost: Tensor, *, generator: torch.Generator | None = None) -> Assignment:
    """Assign each row a distinct column at the least total cost; the package's dual prices are the certificate."""
    try:
        from lapjv import lapjv
    except ImportError as error:
        raise missing_extra(__name__, package="lapjv", extra="lapjv") from error
    n, m = cost.shape
    with stage("conversion"):
        square = cost.cpu()
        if m > n:
            # The package takes square matrices: m - n rows of a constant take the columns that are left.
            square = torch.cat([square, square.new_zeros(m - n, m)])
        doubles = square.double().numpy()
    columns, _, (_, _, prices) = lapjv(doubles, force_doubles=True)
    index = torch.from_numpy(columns).long()
    return Assignment(index[:n], slack(square, index, torch.from_numpy(prices)))
