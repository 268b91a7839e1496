"""What is solved: crops of photographs against Gaussian noise, and cost matrices that are hard for auctions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CROPS", "HARD", "Instance", "photo_crops"]

CROPS = "crops"
SIZE = 32

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Instance:
    """A problem; the same for the same family and size on every machine, up to the rounding of the matrix product.

    Attributes
    ----------
    family : str
        `CROPS` or a name from `HARD`.
    cost : (n, n) float32 array
    data, noise : (n, 3, 32, 32) Tensor or None
        What `CROPS` was computed from: ``cost = -2 <data, noise>``.
    made : dict
        Matrices that `distances` has made.
    """

    family: str
    cost: Matrix
    data: Any = None
    noise: Any = None
    made: dict[str, Matrix] = field(default_factory=dict)

    @classmethod
    def make(cls, family: str, n: int) -> Instance:
        """Build the instance of a family with n rows."""
        rng = np.random.default_rng(n)
        if family != CROPS:
            return cls(family, np.ascontiguousarray(HARD[family](n, rng), np.float32))
        import torch

        data = torch.from_numpy(photo_crops(n, rng))
        noise = torch.from_numpy(rng.standard_normal(data.shape, np.float32))
        return cls(family, (data.flatten(1) @ noise.flatten(1).T).mul_(-2).numpy(), data, noise)

    def distances(self, metric: str) -> Matrix:
        """Return the true matrix of a metric, ``-2 <x, n>`` for ``"dot"``, made once; only of `CROPS`."""
        import torch
        from torch.nn.functional import normalize

        from couplings.kernels.l1 import cdist_l1

        x, n = self.data.flatten(1), self.noise.flatten(1)
        make = {
            "dot": lambda: self.cost,
            "sqeuclidean": lambda: torch.cdist(x, n).square_().numpy(),
            "l2": lambda: torch.cdist(x, n).numpy(),
            "l1": lambda: cdist_l1(x.numpy(), n.numpy()),
            "cosine": lambda: (1 - normalize(x) @ normalize(n).T).numpy(),
        }
        if metric not in self.made:
            self.made[metric] = make[metric]()
        return self.made[metric]


@cache
def _photographs() -> list[npt.NDArray[np.uint8]]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]


def photo_crops(n: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Cut crops at random places out of the colour photographs that scikit-learn and scikit-image ship.

    Parameters
    ----------
    n : int
    rng : numpy.random.Generator

    Returns
    -------
    (n, 3, 32, 32) float32 array
        Pixels in [-1, 1].
    """
    photographs = _photographs()
    crops = np.empty((n, SIZE, SIZE, 3), np.float32)
    for crop, which in zip(crops, rng.integers(len(photographs), size=n), strict=True):
        photograph = photographs[which]
        top, left = rng.integers(0, np.array(photograph.shape[:2]) - SIZE + 1)
        crop[:] = photograph[top : top + SIZE, left : left + SIZE]
    return np.ascontiguousarray(crops.transpose(0, 3, 1, 2)) / np.float32(127.5) - np.float32(1)


def _rank_one(n: int, _: np.random.Generator) -> Any:
    i = np.arange(1, n + 1)
    return np.outer(i, i)


def _points(dimensions: int) -> Callable[[int, np.random.Generator], Any]:
    def build(n: int, rng: np.random.Generator) -> Any:
        x, y = rng.random((2, n, dimensions))
        return np.sqrt(sum((x[:, k, None] - y[:, k]) ** 2 for k in range(dimensions)))

    return build


def _repeated(n: int, rng: np.random.Generator) -> Any:
    return rng.standard_normal((max(1, n // 8), n))[np.arange(n) % max(1, n // 8)]


def _huge_entry(n: int, rng: np.random.Generator) -> Any:
    cost = 1 + rng.random((n, n))
    cost[0, 0] = 1e30
    return cost


def _blocks(n: int, rng: np.random.Generator) -> Any:
    block = np.arange(n) * 16 // n
    return rng.integers(0, 10, (16, 16))[np.ix_(block, block)]


HARD: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "rank-one": _rank_one,
    "rank-one-negative": lambda n, rng: -_rank_one(n, rng),
    "points-1d": _points(1),
    "points-2d": _points(2),
    "constant": lambda n, _: np.full((n, n), 3.0),
    "repeated-rows": _repeated,
    "repeated-columns": lambda n, rng: _repeated(n, rng).T,
    "integers": lambda n, rng: rng.integers(0, 10, (n, n)),
    "pareto": lambda n, rng: 1 + rng.pareto(0.5, (n, n)),
    "blocks": _blocks,
    "huge-entry": _huge_entry,
    "denormal": lambda n, rng: rng.random((n, n)) * 1e-40,
}
