"""Exact optimal transport by POT's network simplex.

Bonneel et al. (2011), Displacement interpolation using Lagrangian mass transport, doi:10.1145/2070781.2024192.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from couplings.assigners.duality import slack
from couplings.assigners.extras import missing_extra
from couplings.assigners.method import Assignment
from couplings.stages import stage

_OPTIMAL = 1  # POT's result code


def assign(cost: Tensor, *, generator: torch.Generator | None = None, max_iterations: int = 100_000_000) -> Assignment:
    """Solve the transport problem between uniform weights; its vertex solutions are permutations.

    Parameters
    ----------
    cost : (n, n) Tensor
    generator : torch.Generator, optional
        Not used: the method is deterministic.
    max_iterations : int
        Limit of the network simplex. POT's own default of 100,000 is too low for n above about 500, and what it returns
        then is no permutation.

    Raises
    ------
    RuntimeError
        If the limit was reached.
    """
    if max_iterations < 1:
        msg = f"max_iterations= must be at least 1, got {max_iterations}."
        raise ValueError(msg)
    try:
        import ot
    except ImportError as error:
        raise missing_extra(__name__, package="POT", extra="pot") from error
    with stage("conversion"):
        matrix = cost.cpu().double()
        # POT calls some problems with negative costs infeasible; a constant changes no pair.
        matrix = matrix - matrix.min()
    # Unit masses, not 1/n: the flows of a vertex are then exactly 0 or 1.
    mass = np.ones(len(matrix))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what POT would warn of is raised below
        flow, log = ot.emd(mass, mass, matrix.numpy(), numItermax=max_iterations, log=True, center_dual=False)
    if log["result_code"] != _OPTIMAL:
        msg = f"POT's network simplex did not finish: {log['warning']} Raise max_iterations={max_iterations}."
        raise RuntimeError(msg)
    index = torch.from_numpy(flow.argmax(axis=1))
    return Assignment(index, slack(matrix, index, torch.from_numpy(log["v"])))
