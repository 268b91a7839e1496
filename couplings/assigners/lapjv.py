"""Exact assignment by the lapjv package.

Jonker and Volgenant (1987), A shortest augmenting path algorithm for dense and sparse linear assignment problems,
doi:10.1007/BF02278710.
"""

import numpy as np
import torch
from torch import Tensor

from couplings.assigners.duality import Matrix, Vector, solve
from couplings.assigners.extras import missing_extra
from couplings.assigners.method import Assignment

_BITS = 20


def assign(cost: Tensor, *, generator: torch.Generator | None = None) -> Assignment:
    """Assign each row a distinct column at the least total cost; the package's dual prices are the certificate.

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
    RuntimeError
        If the answer is not within 1e-6 of the optimum.

    Notes
    -----
    The package is given whole numbers, since it may run forever where rounding decides, and few of them, since rows
    that are nearly equal bid against each other in steps of their difference.
    """
    try:
        from lapjv import lapjv
    except ImportError as error:
        raise missing_extra(__name__, package="lapjv", extra="lapjv") from error

    def solver(reduced: Matrix) -> tuple[Vector, Vector]:
        columns, _, (_, _, prices) = lapjv(np.rint(reduced), force_doubles=True)
        return columns, prices

    return solve(cost, solver, _BITS, "lapjv")
