"""Costs that break naive solvers, by name: ``FAMILIES[name](n, rng)`` is an (n, n) float64 matrix."""

import numpy as np

from benchmarks.instances import HARD


def _crops(n, rng):
    data, noise = 0.5 * rng.standard_normal((2, n, 48))
    return -2 * data @ noise.T


def _far_column(n, rng):
    cost = rng.standard_normal((n, n))
    cost[:, rng.integers(n)] += 1e5
    return cost


def _column_offsets(n, rng):
    return rng.standard_normal((n, n)) + 10.0 ** rng.uniform(0, 6, n)


def _distances(n, rng):
    data, noise = rng.standard_normal((2, n, 48))
    noise *= rng.uniform(0.5, 1.5, (n, 1))
    return np.sqrt(((data[:, None] - noise) ** 2).sum(-1))


def _far_row(n, rng):
    return _far_column(n, rng).T


FAMILIES = {
    **HARD,
    "image-like": _crops,
    "distances": _distances,
    "far-column": _far_column,
    "far-row": _far_row,
    "column-offsets": _column_offsets,
    "offset": lambda n, rng: rng.random((n, n)) + 1e6,
    "negative": lambda n, rng: -rng.random((n, n)) - 1e3,
}
