"""Best of k: each data row takes the best of its own k candidates, independently of all other rows.

The KNN variant of Immiscible Diffusion (arXiv 2505.18521), with Euclidean scores as published. It is no assignment: the
chosen noise is biased. Under ``score="l2"`` it has smaller norms (by 1.2 standard deviations of the squared norm at
d = 3072, k = 8); ``"dot"`` keeps the norms but shifts the mean towards the data all the same. That is what the marginal
``"selected"`` says.
"""

from typing import Literal

import torch
from torch import Tensor


def assign(
    data: Tensor,
    noise: Tensor,
    *,
    generator: torch.Generator | None = None,
    score: Literal["l2", "dot"] = "l2",
    k: int | None = None,
) -> Tensor:
    """Choose among rows ``i * k`` to ``i * k + k - 1`` of the noise for row ``i`` of the data.

    Parameters
    ----------
    data : (n, d) Tensor
    noise : (k * n, d) Tensor
    generator : torch.Generator, optional
        Not used: the method is deterministic.
    score : {"l2", "dot"}
        Least distance, or largest inner product.
    k : int, optional
        Candidates per row, to be checked against the rows of noise; by default what their number says.

    Raises
    ------
    ValueError
        For an unknown score, a k that is no number of rows, or if the rows of noise are not k times the rows of data.
    """
    if score not in ("l2", "dot"):
        msg = f"score= must be 'l2' or 'dot', got {score!r}."
        raise ValueError(msg)
    if k is not None and not (isinstance(k, int) and k >= 1):
        msg = f"k= must be a whole number of at least 1, got {k!r}."
        raise ValueError(msg)
    n, d = data.shape
    if len(noise) % n or (k is not None and len(noise) != k * n):
        count = "k" if k is None else k
        msg = f"nearest takes {count} candidates per row: noise must have {count} * {n} rows, got {len(noise)}."
        raise ValueError(msg)
    candidates = noise.reshape(n, -1, d)
    inner = torch.bmm(candidates, data[:, :, None]).squeeze(2)
    cost = -inner if score == "dot" else torch.linalg.vecdot(candidates, candidates) - 2 * inner
    first = torch.arange(n, device=data.device) * candidates.shape[1]
    return first + cost.argmin(1)
