"""The default: our fixed-point auction, finished by shortest augmenting paths, with a dual certificate.

Bertsekas (1988), The auction algorithm, doi:10.1007/BF02186476; Jonker and Volgenant (1987), doi:10.1007/BF02278710.
It is explained in `couplings.kernels.assignment.solver`. Small problems are mostly solved by the paths alone.
"""

import torch
from torch import Tensor

from couplings.assigners.method import Assignment


def assign(
    cost: Tensor,
    *,
    generator: torch.Generator | None = None,
    tolerance: float = 0.0,
    max_bids: int | None = None,
    max_seconds: float | None = None,
) -> Assignment:
    """Assign each row a distinct column at the least total cost.

    Parameters
    ----------
    cost : (n, m) Tensor
        With ``m >= n``. An entry of +inf is a forbidden pair.
    generator : torch.Generator, optional
        Not used: the method is deterministic.
    tolerance : float
        Relative gap at which to stop early, certified; 0 solves exactly.
    max_bids : int, optional
        Stop after this many bids with a valid permutation and an honest gap.
    max_seconds : float, optional
        Stop after this many seconds, likewise; the one option whose result depends on the machine's speed.
    """
    from couplings.kernels import solve

    solution = solve(
        cost.numpy(force=True),
        tolerance=tolerance,
        max_bids=max_bids,
        max_seconds=max_seconds,
        threads=torch.get_num_threads(),
    )
    return Assignment(torch.from_numpy(solution.index), max(0.0, solution.total - solution.lower_bound))


def assign_blocks(
    costs: Tensor,
    sizes: Tensor,
    *,
    generator: torch.Generator | None = None,
    tolerance: float = 0.0,
    max_bids: int | None = None,
    max_seconds: float | None = None,
) -> Assignment:
    """Solve many square problems in one call.

    Parameters
    ----------
    costs : (sum of sizes**2,) Tensor
        The problems one after the other, each row by row.
    sizes : (b,) int64 Tensor
        Rows of each.
    generator, tolerance, max_bids, max_seconds
        As for `assign`, for each problem.

    Returns
    -------
    Assignment
        Column of each row within its own problem, and how far all problems together may be from the optimum.
    """
    from couplings.kernels import solve_blocks

    index, slack = solve_blocks(
        costs.numpy(force=True),
        sizes.numpy(force=True),
        tolerance=tolerance,
        max_bids=max_bids,
        max_seconds=max_seconds,
        threads=torch.get_num_threads(),
    )
    return Assignment(torch.from_numpy(index), slack)
