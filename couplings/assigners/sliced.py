"""Sort data and noise along a direction and pair them in order; of several directions, keep the best.

On a line, pairing in order is optimal for every convex cost; along one direction of many it is a heuristic that
needs no cost matrix: O(n d) per direction and O(n log n) for the sort. Bonneel et al. (2015), Sliced and Radon
Wasserstein barycenters, doi:10.1007/s10851-014-0506-3.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from couplings._transfer import to_device
from couplings.distances import Metric, pair_costs

_PRIVATE_SEED = 0x5EED
_POWER_STEPS = 2
_QR_STEPS = 10
_ROWS = 1024  # of the data tell its principal axes
_COORDINATES = 1024  # taken to float64 at a time
_FLAT = 1e-9  # an axis is none where the data extends less than this share of its extent along the first


def assign(
    data: Tensor,
    noise: Tensor,
    *,
    generator: torch.Generator | None = None,
    metric: Metric = "sqeuclidean",
    directions: int = 16,
    axes: Literal["principal", "random"] = "principal",
) -> Tensor:
    """Pair in order along the direction that gives the least mean cost.

    Parameters
    ----------
    data, noise : (n, d) Tensor
    generator : torch.Generator, optional
        Decides the directions.
    metric : str
        What "best" means. A callable metric is not possible: it gives matrices, which this method exists to avoid.
    directions : int
        How many directions to try.
    axes : {"principal", "random"}
        Leading principal axes of the data (of some 1024 rows of it), which carry the most of what can be gained, or
        random directions.

    Raises
    ------
    ValueError
        For fewer than one direction or an unknown kind of axes.
    TypeError
        For a callable metric.

    Notes
    -----
    The identity is among the candidates, so that the result is never worse than independent pairing.
    """
    if directions < 1:
        msg = f"directions= must be at least 1, got {directions}."
        raise ValueError(msg)
    if axes not in ("principal", "random"):
        msg = f"axes= must be 'principal' or 'random', got {axes!r}."
        raise ValueError(msg)
    if not isinstance(metric, str):
        msg = "the method sliced builds no cost matrix and takes no callable metric: name one, or use another method."
        raise TypeError(msg)
    basis = _random_directions(noise, directions, generator)
    if axes == "principal":
        basis = _leading_axes(data[:: math.ceil(len(data) / _ROWS)], basis)
    order_data = _project(data, basis).argsort(dim=0, stable=True)
    order_noise = _project(noise, basis).argsort(dim=0, stable=True)
    best = torch.arange(len(data), device=data.device)
    least = pair_costs(data, noise, metric).mean()
    for from_data, from_noise in zip(order_data.T, order_noise.T, strict=True):
        candidate = torch.empty_like(best)
        candidate[from_data] = from_noise
        cost = pair_costs(data, noise, metric, candidate).mean()
        # Chosen by tensors, without a comparison on the host: nothing waits for the device.
        better = cost < least
        best, least = torch.where(better, candidate, best), torch.where(better, cost, least)
    return best


def _random_directions(noise: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``(d, count)`` normal float64 directions; without a generator, new ones for new noise.

    The signs of the first noise row turn a fixed draw into another one: seeding a generator would wait for the device.
    """
    source = generator or torch.Generator().manual_seed(_PRIVATE_SEED)
    draws = torch.randn(noise.shape[1], count, generator=source, device=source.device, dtype=torch.float32)
    basis = to_device(draws, noise.device).double()
    return basis if generator is not None else torch.where(noise[:1].T < 0, -basis, basis)


def _project(points: Tensor, basis: Tensor, origin: Tensor | None = None) -> Tensor:
    """``(points - origin) @ basis`` in float64, a slice of the coordinates at a time.

    How a product is split over threads, and how its operands lie in memory, decides how it is rounded: in float32 that
    would swap neighbours in the order, in float64 it does not.
    """
    out = basis.new_zeros(len(points), basis.shape[1])
    for start in range(0, len(basis), _COORDINATES):
        part = slice(start, start + _COORDINATES)
        out += _float64(points[:, part], None if origin is None else origin[part]) @ basis[part]
    return out


def _float64(points: Tensor, origin: Tensor | None) -> Tensor:
    wide = points.to(torch.float64, memory_format=torch.contiguous_format).contiguous()
    return wide if origin is None else wide - origin


def _leading_axes(data: Tensor, start: Tensor) -> Tensor:
    """Leading principal axes by subspace iteration (Halko et al. 2011, arXiv 0909.4061).

    `torch.pca_lowrank` would draw its start from the global random state. An axis along which the data does not extend
    is zero: which of them come out, and the order of the data along them, would be a matter of rounding.
    """
    slices = [slice(first, first + _COORDINATES) for first in range(0, data.shape[1], _COORDINATES)]
    mean = torch.cat([_float64(data[:, part], None).mean(0) for part in slices])
    basis = start
    for _ in range(_POWER_STEPS):
        basis, _ = torch.linalg.qr(basis)
        seen = _project(data, basis, mean)
        basis = torch.cat([_float64(data[:, part], mean[part]).T @ seen for part in slices])
    basis, _ = torch.linalg.qr(basis)
    # Rotated so that the columns are single axes and not just a basis of their span: the singular vectors of what they
    # see, by QR iteration, since `torch.linalg.svd` makes the host wait for the device.
    _, extents = torch.linalg.qr(_project(data, basis, mean))
    for _ in range(_QR_STEPS):
        rotation, transposed = torch.linalg.qr(extents.T)
        basis = basis @ rotation
        _, extents = torch.linalg.qr(transposed.T)
    extent = extents.diagonal().abs()
    axes: Tensor = basis * (extent > _FLAT * extent.max())
    return axes
