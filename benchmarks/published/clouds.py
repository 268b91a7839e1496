"""The points that the published experiments draw."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["checkerboard", "eight_gaussians", "half_ring", "moons", "noisy_moons", "normal"]


def normal(n: int, generator: torch.Generator) -> Tensor:
    """Draw from the standard normal law of the plane: (n, 2)."""
    return torch.randn(n, 2, generator=generator)


def eight_gaussians(
    n: int, generator: torch.Generator, *, radius: float, deviation: float, equal: bool = False
) -> Tensor:
    """Draw from eight normal laws of equal weight, evenly spaced on a circle: (n, 2).

    Parameters
    ----------
    n : int
    generator : torch.Generator
    radius, deviation : float
        Of the circle, and of each law.
    equal : bool
        Give each law as many of the points, in random order, instead of a random number.
    """
    which = torch.randperm(n, generator=generator) if equal else torch.randint(0, 8, (n,), generator=generator)
    angle = which % 8 * (math.pi / 4)
    centres = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + deviation * normal(n, generator)


def moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Place points along two moons as torchdyn does at noise 0.2, then times 3, less 1.

    Each point is moved by an equal amount along both axes, uniform in [0, 0.2]; the first half is the outer moon, from
    end to end.

    Returns
    -------
    (n, 2) Tensor
    (n,) int64 Tensor
        Which moon.
    """
    outer, inner = torch.linspace(0, math.pi, n // 2), torch.linspace(0, math.pi, n - n // 2)
    x = torch.cat([outer.cos(), 1 - inner.cos()])
    y = torch.cat([outer.sin(), 0.5 - inner.sin()])
    points = torch.stack([x, y], dim=1) + 0.2 * torch.rand(n, 1, generator=generator)
    return 3 * points - 1, (torch.arange(n) >= n // 2).long()


def noisy_moons(n: int, noise: float, random_state: int) -> Tensor:
    """Draw scikit-learn's moons: (n, 2)."""
    from sklearn.datasets import make_moons

    return torch.from_numpy(make_moons(n, noise=noise, random_state=random_state)[0].astype(np.float32))


def checkerboard(n: int, generator: torch.Generator, side: float) -> Tensor:
    """Draw uniformly from the eight dark squares of a board of 4 x 4 around the origin: (n, 2).

    Parameters
    ----------
    side : float
        Of a square.
    """
    cell = torch.randint(0, 8, (n,), generator=generator)
    column = cell // 2
    row = 2 * (cell % 2) + column % 2
    return side * (torch.stack([column, row], dim=1) - 2 + torch.rand(n, 2, generator=generator))


def half_ring(n: int, generator: torch.Generator) -> Tensor:
    """Draw from the right half of a ring: directions uniform, radii uniform in [3, 5]: (n, 2)."""
    points = normal(n, generator)
    points *= (3 + 2 * torch.rand(n, 1, generator=generator)) / points.norm(dim=1, keepdim=True)
    points[:, 0].abs_()
    return points
