"""Distances between data and noise: the matrix that is solved, and the cost of the pairs that is reported.

A metric has two faces. Methods whose answer does not change when a constant is added to a row or a column of the
cost solve the cheapest such matrix: ``-2 <x, n>`` for ``sqeuclidean``, one matrix product without the norms, which
also makes it better conditioned. All others get the true distances. What is reported is always the true distance, of
the n pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from couplings._names import unknown
from couplings.quantization import Operand, inner_products, largest_magnitude

Metric = str | Callable[[Tensor, Tensor], Tensor]

_METRICS = ("sqeuclidean", "l2", "l1", "cosine", "dot")

# Bytes of the temporaries of `pair_costs` away from the CPU: few launches, and no copy of the whole batch.
_CHUNK_BYTES = 1 << 26

# Rows that tell where the noise lies: few enough for their statistics to take microseconds.
_SAMPLE_ROWS = 8


def metrics() -> list[str]:
    """Names that `metric=` accepts.

    Returns
    -------
    list of str
        ``sqeuclidean``: squared Euclidean distance, summed over elements. ``l2``: its square root. ``l1``: sum of
        absolute differences. ``cosine``: one minus the cosine of the angle (1 for a zero vector). ``dot``: minus the
        inner product; its reported cost is the squared Euclidean distance.
    """
    return list(_METRICS)


def canonical_metric(metric: Metric) -> Metric:
    """Lower-case a metric's name and check that it exists; callables pass."""
    if callable(metric):
        return metric
    if not isinstance(metric, str):
        msg = f"metric= takes a name or a callable, got {type(metric).__name__}. Known: {', '.join(_METRICS)}."
        raise TypeError(msg)
    key = metric.strip().lower()
    if key not in _METRICS:
        raise ValueError(unknown("metric", metric, _METRICS))
    return key


def wide_float(device: torch.device) -> torch.dtype:
    """Type in which sums are accumulated: float64, float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def common_centre(noise: Tensor) -> Tensor | None:
    """Find the point that data and noise should be measured from, if that is not the origin.

    ``<x, n>`` of points far from the origin cancels in floating point. Distances do not change when the same point is
    taken off both sides, and of ``-<x, n>`` only row and column constants do.

    Parameters
    ----------
    noise : (m, d) Tensor
        float32 or float64.

    Returns
    -------
    (d,) Tensor or None
        The mean of a few rows, to a multiple of about eight of their standard deviations: exactly zero for noise
        around the origin, and insensitive to the order of a sum. None where it is known to be zero, which only the
        CPU can tell without waiting.
    """
    if len(noise) < 2:
        return None
    sample = noise[:: -(-len(noise) // _SAMPLE_ROWS)]
    if noise.device.type == "cpu" and _surrounds_origin(sample.numpy()):
        return None
    mean = sample.mean(0)
    deviation = (sample - mean).square_().mean().sqrt_()
    # A power of two; of rows that are all equal the mean itself is the centre.
    grid = torch.exp2(torch.log2(deviation).round_().add_(3.0))
    centre = torch.where(grid > 0, (mean / grid).round_().mul_(grid), mean)
    centre = centre.nan_to_num_(0.0, 0.0, 0.0)  # of rows with NaN or infinity, which the checks report
    return centre if centre.device.type != "cpu" or bool(centre.any()) else None


def _surrounds_origin(sample: npt.NDArray[Any]) -> bool:
    """Whether the centre of these rows would certainly be rounded to zero: an early exit of a few microseconds."""
    with np.errstate(all="ignore"):  # of values that are not finite, or nearly
        mean = np.add.reduce(sample, 0) / len(sample)
        apart = sample - mean
        # Half the grid is at least 4 / sqrt(2) deviations.
        return bool(np.abs(mean).max() <= 2.8 * np.sqrt(np.vdot(apart, apart) / apart.size))


def cost_matrix(x: Operand, y: Operand, metric: str, *, shift_invariant: bool) -> Tensor:
    """Cost of every pair.

    Parameters
    ----------
    x, y : Operand
        ``(n, d)`` data and ``(m, d)`` noise, or batches ``(b, n, d)`` and ``(b, m, d)`` of such.
    metric : str
        One of `metrics()`.
    shift_invariant : bool
        Whether the caller's answer stays the same when constants are added to rows and columns: then the cheapest such
        matrix is returned, in the same units.

    Returns
    -------
    (..., n, m) Tensor
        float32, or float64 for float64 operands.

    Notes
    -----
    One matrix product, O(n m) memory. ``l1`` takes O(n m d) operations: tiled and threaded on the CPU, `torch.cdist`
    elsewhere.
    """
    if metric == "l1":
        return _l1_matrix(x.values, y.values)
    if metric == "dot":
        return inner_products(x, y, factor=-1.0)
    if metric == "cosine":
        x, y = _moderate(x), _moderate(y)
        cost = inner_products(x, y, factor=-1.0)
        cost.mul_(_inverse_norms(x.values)[..., :, None]).mul_(_inverse_norms(y.values)[..., None, :])
        return cost if shift_invariant else cost.add_(1.0).clamp_(0.0, 2.0)
    if metric not in ("sqeuclidean", "l2"):
        raise ValueError(unknown("metric", metric, _METRICS))
    cost = inner_products(x, y, factor=-2.0)
    if metric == "sqeuclidean" and shift_invariant:
        return cost
    cost.add_(_squared_norms(x.values)[..., :, None]).add_(_squared_norms(y.values)[..., None, :]).clamp_min_(0.0)
    return cost if metric == "sqeuclidean" else cost.sqrt_()


def pair_costs(x: Tensor, y: Tensor, metric: str, index: Tensor | None = None) -> Tensor:
    """Compute the reported distance of each pair ``(x[i], y[index[i]])``.

    Parameters
    ----------
    x : (n, d) Tensor
        float32 or float64.
    y : (m, d) Tensor
    metric : str
        One of `metrics()`.
    index : (n,) Tensor, optional
        Rows of `y`; the first n by default.

    Returns
    -------
    (n,) Tensor
        float64, float32 where the device has none. ``dot`` gives the squared Euclidean distance.
    """
    kind = _PAIR_KINDS[metric]
    if index is None:
        index = torch.arange(len(x), device=x.device)
    if x.device.type == "cpu":
        from couplings.kernels.pairs import pair_distances

        # One pass, no temporaries: the same in torch takes four passes over copies of the operands.
        threads = torch.get_num_threads()
        costs = torch.from_numpy(pair_distances(x.numpy(), y.numpy(), index.numpy(), kind, threads=threads))
    else:
        rows = max(1, _CHUNK_BYTES // (x.shape[1] * x.element_size()))
        starts = range(0, len(x), rows)
        costs = torch.cat([_distances(x[i : i + rows], y[index[i : i + rows]], kind) for i in starts])
    return costs.sqrt_() if metric == "l2" else costs


_PAIR_KINDS = {"sqeuclidean": "squared", "l2": "squared", "dot": "squared", "l1": "absolute", "cosine": "angular"}


def _distances(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Do what the kernel does, on any device: in float64, where no square of a float32 vanishes or overflows."""
    wide = wide_float(x.device)
    if kind == "angular":
        x, y = x.to(wide), y.to(wide)
        cosine = torch.linalg.vecdot(x, y) * _inverse_norms(x) * _inverse_norms(y)
        apart: Tensor = 1.0 - cosine
        return apart
    difference = (x - y).to(wide)
    terms = difference.abs_() if kind == "absolute" else difference.square_()
    total: Tensor = terms.sum(1)
    return total


def _squared_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vecdot(x, x)
    return norms


def _inverse_norms(x: Tensor) -> Tensor:
    """One over the length of each row, 0 for a zero row; in float64, where no square of a float32 vanishes."""
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=wide_float(x.device))
    inverse: Tensor = norms.reciprocal().masked_fill_(norms == 0, 0.0).to(x.dtype)
    return inverse


def _moderate(x: Operand) -> Operand:
    """Bring the largest value near 1 by a power of two, so that products of lengths neither vanish nor overflow."""
    largest = largest_magnitude(x.values)
    if largest.device.type == "cpu" and 2.0**-30 < largest.item() < 2.0**30:
        return x
    exponent = torch.log2(torch.where(largest > 0, largest, 1.0)).round().clamp(-120, 120)
    factor = torch.exp2(-exponent)
    if x.scale is None or x.rows.dtype is torch.bfloat16:  # whose codes have the range of the values
        return Operand(x.rows * factor, x.scale)
    return Operand(x.rows, x.scale * factor)


def _l1_matrix(x: Tensor, y: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return torch.cdist(x, y, p=1.0)
    from couplings.kernels.l1 import cdist_l1

    threads = torch.get_num_threads()
    if x.dim() == 2:
        return torch.from_numpy(cdist_l1(x.numpy(), y.numpy(), threads=threads))
    parts = zip(x, y, strict=True)
    return torch.stack([torch.from_numpy(cdist_l1(a.numpy(), b.numpy(), threads=threads)) for a, b in parts])
