"""Exact optimal transport by POT's network simplex.

Bonneel et al. (2011), Displacement interpolation using Lagrangian mass transport, doi:10.1145/2070781.2024192.
"""

import random
import sys
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from couplings.assigners.duality import Matrix, Vector, solve
from couplings.assigners.extras import missing_extra
from couplings.assigners.method import Assignment

_OPTIMAL = 1  # POT's result code


def assign(cost: Tensor, *, generator: torch.Generator | None = None, max_iterations: int = 100_000_000) -> Assignment:
    """Solve the transport problem between uniform weights; its vertex solutions are permutations.

    Parameters
    ----------
    cost : (n, n) Tensor
        ``+inf`` forbids a pair.
    generator : torch.Generator, optional
        Not used: the method is deterministic.
    max_iterations : int
        Limit of the network simplex. POT's own default of 100,000 is too low for n above about 500, and what it returns
        then is no permutation.

    Raises
    ------
    ValueError
        If some rows cannot be matched by finite entries.
    RuntimeError
        If the limit was reached, or the answer is not within 1e-6 of the optimum.
    """
    if max_iterations < 1:
        msg = f"max_iterations= must be at least 1, got {max_iterations}."
        raise ValueError(msg)
    ot = _pot()
    mass = np.ones(cost.shape[1])  # unit masses, not 1/n: the flows of a vertex are then exactly 0 or 1

    def solver(reduced: Matrix) -> tuple[Vector, Vector]:
        flow, log = ot.emd(mass, mass, np.rint(reduced), numItermax=max_iterations, log=True, center_dual=False)
        if log["result_code"] != _OPTIMAL:
            msg = f"POT's network simplex did not finish: {log['warning']} Raise max_iterations={max_iterations}."
            raise RuntimeError(msg)
        return flow.argmax(1), log["v"]

    return solve(cost, solver, 50 - len(mass).bit_length(), "emd")


def _pot() -> ModuleType:
    """Import POT, which by what it imports draws from the global random state, once."""
    state = None if "ot" in sys.modules else random.getstate()
    try:
        import ot
    except ImportError as error:
        raise missing_extra(__name__, package="POT", extra="pot") from error
    finally:
        if state is not None:
            random.setstate(state)
    return ot  # type: ignore[no-any-return]
