"""Globally smallest remaining entry of the cost first.

No bound on its distance from the optimum, but on images and Gaussian noise it comes close.
Ties go to the lowest row, then the lowest column. The loop is in `couplings.kernels.greedy`.
"""

import torch
from torch import Tensor


def assign(cost: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Take the smallest entry, cross out its row and column, repeat."""
    from couplings.kernels.greedy import greedy

    return torch.from_numpy(greedy(cost.numpy(force=True)))
