"""Stable matching: no data row and noise row would both rather have each other than what they got.

Gale and Shapley (1962), College admissions and the stability of marriage, doi:10.2307/2312726. Where both sides rank
by the same distance and there are no ties, the one stable matching is the greedy one.
"""

from typing import Literal

import torch
from torch import Tensor


def assign(
    cost: Tensor,
    *,
    generator: torch.Generator | None = None,
    points: tuple[Tensor, Tensor],
    noise_rank: Literal["cost", "dot"] = "cost",
) -> Tensor:
    """Let data rows propose in order of increasing cost, and noise rows keep the proposer that they rank best.

    Parameters
    ----------
    cost : (n, m) Tensor
        How data ranks noise.
    generator : torch.Generator, optional
        Not used: the method is deterministic.
    points : (n, d) Tensor, (m, d) Tensor
        Data and noise, for `noise_rank`.
    noise_rank : {"cost", "dot"}
        How noise ranks data: by the same cost, or by decreasing inner product.
    """
    from couplings.kernels.greedy import stable

    if noise_rank not in ("cost", "dot"):
        msg = f"noise_rank= must be 'cost' or 'dot', got {noise_rank!r}."
        raise ValueError(msg)
    data, noise = points
    score = cost if noise_rank == "cost" else -(data @ noise.T)
    return torch.from_numpy(stable(cost.numpy(force=True), score.numpy(force=True)))
