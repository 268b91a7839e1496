"""Slow, obvious versions of what the library computes, in float64 and without any of its code."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import torch
from torch import Tensor


def flat(x: Any) -> Tensor:
    """Rows in float64."""
    return torch.as_tensor(x).detach().reshape(len(x), -1).double()


def distances(x: Any, y: Any, metric: str) -> Tensor:
    """Return the ``(n, m)`` true distances of all pairs, `dot` being minus the inner product."""
    a, b = flat(x)[:, None], flat(y)[None]
    if metric == "dot":
        return -(a * b).sum(2)
    if metric == "cosine":
        norms = a.norm(dim=2) * b.norm(dim=2)
        return 1 - torch.where(norms > 0, (a * b).sum(2) / torch.where(norms > 0, norms, 1.0), 0.0)
    difference = a - b
    if metric == "l1":
        return difference.abs().sum(2)
    squared = difference.square().sum(2)
    return {"sqeuclidean": squared, "l2": squared.sqrt()}[metric]


def paired(x: Any, y: Any, metric: str) -> float:
    """Mean reported distance of the rows as they stand: `dot` reports the squared Euclidean distance."""
    metric = "sqeuclidean" if metric == "dot" else metric
    rows = zip(flat(x)[:, None], flat(y)[:, None], strict=False)  # the first rows of a larger pool
    return torch.cat([distances(a, b, metric).flatten() for a, b in rows]).mean().item()


def optimum(cost: Tensor) -> float:
    """Least sum of an assignment of every row, over the number of rows."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.numpy())
    return cost[rows, columns].mean().item()


def brute_force(cost: Tensor) -> float:
    """Least mean over all permutations."""
    n = len(cost)
    every = torch.tensor(list(permutations(range(n))))
    return cost[torch.arange(n), every].mean(1).min().item()


def rows_of(x: Any) -> list[bytes]:
    """Rows as bytes: equal only bit for bit."""
    # A clone: `contiguous` keeps odd strides of axes of one element, which no bytes can be seen through.
    x = torch.as_tensor(x).detach().clone(memory_format=torch.contiguous_format)
    x = x.reshape(1, -1) if x.ndim == 0 or x.numel() == 0 else x.reshape(len(x), -1)
    return [row.tobytes() for row in x.view(torch.uint8).numpy()]


def multiset(x: Any) -> Counter[bytes]:
    """Rows, and how often each is there."""
    return Counter(rows_of(x))


def same_bits(x: Any, y: Any) -> bool:
    """Whether two tensors are equal bit for bit, in shape and type too."""
    return bool(x.shape == y.shape and x.dtype == y.dtype and rows_of(x) == rows_of(y))
