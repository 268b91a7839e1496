"""Slow, obvious versions of what the library computes, in float64 and without any of its code."""

from collections import Counter
from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

# Modules that the extras bring.
MODULES = {"lapjv": "lapjv", "pot": "ot"}


def skip_without(info):
    """Skip the test where a package that the method needs is not installed."""
    for extra in info.requires:
        pytest.importorskip(MODULES[extra])


def flat(x):
    return torch.as_tensor(x).detach().reshape(len(x), -1).double()


def distances(x, y, metric):
    """True distances of all pairs, `dot` being minus the inner product."""
    x, y = flat(x)[:, None], flat(y)[None]
    if metric == "dot":
        return -(x * y).sum(2)
    if metric == "cosine":
        norms = x.norm(dim=2) * y.norm(dim=2)
        return 1 - torch.where(norms > 0, (x * y).sum(2) / torch.where(norms > 0, norms, 1.0), 0.0)
    difference = x - y
    if metric == "l1":
        return difference.abs().sum(2)
    squared = difference.square().sum(2)
    return {"sqeuclidean": squared, "l2": squared.sqrt()}[metric]


def paired(x, y, metric):
    """Mean reported distance of the rows as they stand: `dot` reports the squared Euclidean distance."""
    metric = "sqeuclidean" if metric == "dot" else metric
    rows = zip(flat(x).split(1), flat(y).split(1), strict=False)  # the first rows of a larger pool
    return torch.cat([distances(a, b, metric).flatten() for a, b in rows]).mean().item()


def optimum(cost):
    """Least sum of an assignment of every row, over the number of rows."""
    rows, columns = linear_sum_assignment(cost.numpy())
    return cost[rows, columns].mean().item()


def brute_force(cost):
    """Least mean over all permutations."""
    n = len(cost)
    every = torch.tensor(list(permutations(range(n))))
    return cost[torch.arange(n), every].mean(1).min().item()


def rows_of(x):
    """Rows as bytes: equal only bit for bit."""
    x = torch.as_tensor(x).detach().contiguous()
    if x.ndim == 0 or x.numel() == 0:
        return [x.numpy().tobytes()]
    return [row.tobytes() for row in x.reshape(len(x), -1).view(torch.uint8).numpy()]


def multiset(x):
    return Counter(rows_of(x))


def same_bits(x, y):
    return x.shape == y.shape and x.dtype == y.dtype and rows_of(x) == rows_of(y)
