"""Statistical tests of the returned noise against the noise that was passed in.

The data stays fixed and every batch brings fresh noise from N(0, I). For each batch the mean of a function over the
returned rows is compared with its mean over the rows that were passed in. If the coupling keeps the distribution,
the expected difference is 0, however the rows of a batch depend on one another, and batches are independent: a
t-test over batches decides. A permutation gives differences of exactly 0, and a change of a few rows stands out,
because all others cancel.

The functions are the coordinates (mean), their squares and the squared norm (variance), the norm, fourth powers
(kurtosis), products (correlation) and indicators of half-spaces (Kolmogorov-Smirnov), along random directions and
along those in which a coupling would bias the noise: the mean of the data, its principal axis and the differences of
its classes. Given classes, the rows of each class are tested by themselves too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RANDOM_DIRECTIONS = 8
_QUANTILES = 13
# Means of the same rows in another order differ by rounding.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Statistic:
    """One family of tests.

    Attributes
    ----------
    name : str
        What was tested, such as ``"variance"`` or ``"mean | class 1"``.
    value : float
        Departure of the family's worst member from what is expected under N(0, I), in its own unit (for ``"ks"`` the
        distance, for ``"use of rows"`` the uses per batch beyond the expected ones).
    z : float
        That member's test statistic, in standard deviations.
    p_value : float
        Of the family, corrected for the number of its members.
    threshold : float
        The family fails if its p-value is below this.
    """

    name: str
    value: float
    z: float
    p_value: float
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the p-value reaches the threshold."""
        return self.p_value >= self.threshold


def directions_to_test(data: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Choose ``(d, k)`` unit columns: random ones, and those in which ``(n, d)`` data could bias its noise."""
    d = data.shape[1]
    random = torch.randn(d, min(d, _RANDOM_DIRECTIONS), generator=generator, dtype=torch.float64)
    centre = data.mean(0)
    of_data = [centre, torch.linalg.svd(data - centre, full_matrices=False).Vh[0]]
    if labels is not None:
        of_data += [data[labels == c].mean(0) - centre for c in torch.unique(labels)[:_RANDOM_DIRECTIONS]]
    columns = [*torch.linalg.qr(random).Q.T, *(v for v in of_data if float(v.norm()) > 1e-9)]
    return torch.stack([v / v.norm() for v in columns], 1)


def mean_differences(out: Tensor, noise: Tensor, directions: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Mean of each tested function over the returned rows of a batch, minus that over the rows passed in.

    `out` and `noise` are ``(n, d)`` and ``(m, d)``, float64; with classes n = m. The ``(members,)`` differences have
    names such as ``"variance"`` or, over the rows of a class, ``"variance | class 1"``.
    """
    groups: dict[str, Tensor | slice] = {"": slice(None)}
    if labels is not None:
        groups |= {f" | class {int(c)}": labels == c for c in torch.unique(labels)}
    returned, passed = _functions(out, directions), _functions(noise, directions)
    differences = {}
    for name in returned:
        for group, rows in groups.items():
            difference = returned[name][rows].mean(0) - passed[name][rows].mean(0)
            differences[name + group] = torch.where(difference.abs() <= _ROUNDING, 0.0, difference)
    return differences


def _functions(rows: Tensor, directions: Tensor) -> dict[str, Tensor]:
    """Functions of single rows whose means are tested: ``(n, members)`` each."""
    z = rows @ directions
    squared_norm = rows.square().sum(1, keepdim=True)
    first, second = torch.triu_indices(z.shape[1], z.shape[1], offset=1)
    levels = torch.special.ndtri(torch.linspace(0.05, 0.95, _QUANTILES, dtype=z.dtype))
    return {
        "mean": z,
        "variance": torch.cat([z.square(), squared_norm / rows.shape[1]], 1),
        "norm": squared_norm.sqrt(),
        "kurtosis": z.pow(4),
        "correlation": z[:, first] * z[:, second],
        "ks": (z[:, :, None] <= levels).flatten(1).to(z.dtype),
    }


def zero_mean(name: str, differences: Tensor, threshold: float) -> Statistic:
    """Test that every column of ``(batches, members)`` differences has mean 0, and report the worst column."""
    from scipy.special import stdtr

    t = _t_statistics(differences)
    worst = int(t.abs().argmax())
    size, members = differences.shape
    p = 2.0 * float(stdtr(size - 1, -abs(float(t[worst])))) * members
    return Statistic(name, float(differences[:, worst].mean()), float(t[worst]), min(1.0, p), threshold)


def _t_statistics(differences: Tensor) -> Tensor:
    """Student's t per column, or its correction for skewness where that is smaller.

    Skewed differences give Student's t one heavy tail, which at these levels is off by orders of magnitude; the cubic
    transformation removes it (Hall 1992, J. R. Statist. Soc. B 54, 221-228). It inflates the other tail where few
    batches differ from 0 at all, so the smaller of the two counts.
    """
    size = len(differences)
    mean, deviation = differences.mean(0), differences.std(0, correction=0)
    # Equal numbers have a deviation of rounding; the floor leaves a statistic that is huge, or 0 for zeros.
    s = mean / deviation.clamp_min(1e-12).maximum(1e-9 * mean.abs())
    skewness = ((differences - mean) / deviation.clamp_min(1e-12)).pow(3).mean(0)
    hall = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * size)
    smaller = torch.where(hall * s > 0, torch.minimum(s.abs(), hall.abs()), 0.0)
    return smaller.copysign(s) * math.sqrt(size - 1)


def equal_use(counts: Tensor, batches: int, threshold: float) -> Statistic:
    """Test that each of the m rows of noise was used equally often: `counts` is ``(m,)``, over all batches.

    Uses of rows that are drawn independently are binomial; those of rows drawn without replacement vary less.
    """
    from scipy.special import bdtr, bdtrc, ndtri

    trials, share = int(counts.sum()), 1.0 / len(counts)
    fewer, more = bdtr(counts.numpy(), trials, share), bdtrc(counts.numpy() - 1, trials, share)
    p_values = torch.as_tensor(2.0 * fewer).minimum(torch.as_tensor(2.0 * more))
    p, worst = float(p_values.min()), int(p_values.argmin())
    excess = float(counts[worst]) - trials * share
    z = math.copysign(-float(ndtri(max(min(p / 2.0, 0.5), 1e-300))), excess) if excess else 0.0
    return Statistic("use of rows", excess / batches, z, min(1.0, p * len(counts)), threshold)
