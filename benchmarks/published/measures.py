"""What the published tables measure, and how a value measured here is held against a published one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from couplings import couple

__all__ = ["Value", "adaptive", "chi2", "euler", "squared_w2", "velocity", "verdict"]

TIMES_DEVIATION = 2.0


@dataclass(frozen=True)
class Value:
    """A published value.

    Attributes
    ----------
    mean : float
    deviation : float or None
        Standard deviation over runs; None where one run was published, which is given the deviation of ours.
    """

    mean: float
    deviation: float | None = None


def verdict(ours: Sequence[float], published: Value) -> str:
    """Compare the mean over seeds with a published mean; lower values are better.

    Returns
    -------
    str
        "agrees" if the means are within two combined standard deviations, the root of the sum of both squares, of each
        other; else "better" or "worse"; "one seed" if nothing is known of the deviation.
    """
    if len(ours) < 2:
        return "one seed"
    own = statistics.stdev(ours)
    combined = (own**2 + (own if published.deviation is None else published.deviation) ** 2) ** 0.5
    apart = statistics.mean(ours) - published.mean
    if abs(apart) <= TIMES_DEVIATION * combined:
        return "agrees"
    return "better" if apart < 0 else "worse"


def squared_w2(x: Tensor, y: Tensor) -> float:
    """Squared 2-Wasserstein distance of two clouds of as many points, (n, d) each: exact."""
    return float(couple(x.detach().cpu(), y.detach().cpu()).cost)


def chi2(picks: Tensor, rows: int) -> float:
    """Estimate ``N sum_j (p_j - 1/N)^2`` without bias from B independent picks among N rows.

    Parameters
    ----------
    picks : (B,) int64 Tensor
    rows : int
        N.
    """
    counts = torch.bincount(picks, minlength=rows).double()
    return float((counts * (counts - 1.0)).sum()) * rows / (len(picks) * (len(picks) - 1.0)) - 1.0


Velocity = Callable[[Tensor, Tensor], Tensor]


def velocity(network: nn.Module, condition: Tensor | None = None) -> Velocity:
    """Make a velocity field ``v(t, x)`` of the networks of several seeds: t is a 0-d tensor, x (seeds, rows, 2)."""

    def at(t: Tensor, x: Tensor) -> Tensor:
        inputs = {"x": x, "t": t.expand(*x.shape[:2], 1)}
        return network(**(inputs if condition is None else inputs | {"condition": condition}))

    return at


@torch.no_grad()
def euler(field: Velocity, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Integrate a velocity field from time 0 to 1 in equal steps.

    Returns
    -------
    (seeds, rows, 2) Tensor
        Where the points end.
    (seeds,) Tensor
        Path energy: the mean over points of the integral of the squared speed.
    """
    energy = torch.zeros(len(x), device=x.device)
    for step in range(steps):
        v = field(torch.tensor(step / steps, device=x.device), x)
        energy += v.square().sum(2).mean(1) / steps
        x = x + v / steps
    return x, energy


@torch.no_grad()
def adaptive(field: Velocity, x: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Integrate a velocity field from time 0 to 1 by dopri5, and count its evaluations."""
    from torchdiffeq import odeint

    evaluations = 0

    def counted(t: Tensor, points: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return field(t, points)

    ends = torch.tensor([0.0, 1.0], device=x.device)
    return odeint(counted, x, ends, method="dopri5", rtol=tolerance, atol=tolerance)[-1], evaluations
