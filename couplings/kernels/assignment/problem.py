"""Normalisation, once on entry: what all phases of a solve read."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._threads import over_rows
from ..feasibility import check_feasible
from .costs import (
    CAP,
    LARGEST_TOTAL,
    SKETCH_MAX,
    SMALLEST_TOTAL,
    Costs,
    column_offsets,
    cyclic_assignment,
    row_minima,
    row_minima_and_sketch,
    row_minima_and_sketch_less_offsets,
)
from .tuning import TUNING

__all__ = ["NormalisedCosts", "normalise"]

SAFE = 1e30  # steps of a sketch per unit of cost, or units per step, that float32 multiplies by without loss


@dataclass(frozen=True)
class NormalisedCosts:
    """A cost matrix with what one pass over it has found.

    Attributes
    ----------
    C : (n, m) float array, contiguous
        The costs, times ``2**power``.
    power : int
        0 but where totals are near the limits of float64.
    offset : (m,) float64 array
        What all rows pay for a column, in units of the cost, where that varies from column to column; else 0.
    row_min : (n,) float64 array
        Smallest cost of each row, offsets taken off.
    sketch : (n, m) or (n, 0) int16 array
    steps : float
        Steps of the sketch per unit of cost; 0 if there is none.
    spread : float
        Standard deviation of the costs less rows and columns.
    assignment : (n,) int64 array
        The best of a few obvious assignments, or one that has no forbidden pair.
    ceiling : float
        Its total above row minima and offsets, plus the largest offset.
    """

    C: npt.NDArray[Any]
    power: int
    offset: npt.NDArray[np.float64]
    row_min: npt.NDArray[np.float64]
    sketch: npt.NDArray[np.int16]
    steps: float
    spread: float
    assignment: npt.NDArray[np.int64]
    ceiling: float

    @property
    def square(self) -> bool:
        """Whether every column is taken."""
        return bool(self.C.shape[0] == self.C.shape[1])

    def above_row_minima(self, col4row: npt.NDArray[np.int64]) -> float:
        """Return what `ceiling` is for another assignment."""
        chosen = self.C[np.arange(len(col4row)), col4row].astype(np.float64)
        return float((chosen - self.row_min - self.offset[col4row]).sum() + self.offset.max())

    def total(self, col4row: npt.NDArray[np.int64]) -> float:
        """Return the sum of the entries chosen, correctly rounded."""
        return math.fsum(self.C[np.arange(len(col4row)), col4row].tolist())

    def costs(self, ceiling: float) -> Costs:
        """Return the costs in levels, of which `ceiling` has at least a quarter of `CAP`.

        Half of it at most, so that a cost cut off at `CAP` is dearer than the whole feasible assignment.
        """
        scale = math.ldexp(1.0, math.floor(math.log2(CAP / ceiling)) - 1)
        step = scale / self.steps if self.steps else 0.0
        if step < 1.0:  # a step must be a whole number of levels
            return Costs(self.C, self.row_min, scale, self.offset * 0.0, np.empty((len(self.C), 0), np.int16), 0.0)
        return Costs(self.C, self.row_min, scale, self.offset * scale, self.sketch, step)


def normalise(cost: npt.NDArray[Any], threads: int, power: int = 0) -> NormalisedCosts:
    """Read the costs, times ``2**power``, once: row minima, sketch, a first assignment.

    Raises ValueError for NaN, -inf, and forbidden pairs that no assignment avoids.
    """
    return _normalise(scaled(cost, power) if power else cost, power, threads)


def power_in_range(ceiling: float) -> int:
    """Return the power of two to scale costs by, for a total that is near the limits of float64; else 0."""
    if 0.0 < ceiling < SMALLEST_TOTAL:
        return 600
    return -100 if ceiling > LARGEST_TOTAL else 0


def scaled(cost: npt.NDArray[Any], power: int) -> npt.NDArray[np.float64]:
    """Return costs times a power of two; what overflows is as large as can be, but not forbidden."""
    with np.errstate(over="ignore"):
        near = np.clip(np.ldexp(cost.astype(np.float64), power), -sys.float_info.max, sys.float_info.max)
    near[np.isinf(cost)] = np.inf
    near.flags.writeable = False
    return near


def _normalise(cost: npt.NDArray[Any], power: int, threads: int) -> NormalisedCosts:
    C = np.ascontiguousarray(cost).view()
    C.flags.writeable = False  # one kernel signature for all callers, and a promise kept by Numba
    n, m = C.shape
    bits = C.view(f"i{C.itemsize}")
    row_min = np.empty(n)
    spread, offset_spread, sampled, centre = _sample(C)
    # The steps of the sketch are a power of two, for one to be a whole number of levels.
    finest = SKETCH_MAX / (TUNING.sketch_range * spread) if spread > 0.0 else 0.0
    steps = math.ldexp(1.0, math.floor(math.log2(finest))) if 1.0 / SAFE < finest < SAFE else 0.0
    sketch = np.empty((n, m if steps else 0), np.int16)
    offset = np.zeros(m)
    finite = np.empty(n, np.bool_)
    real, eps = C.dtype.type, float(np.finfo(C.dtype).eps)
    found = (C, bits, np.array(np.inf, C.dtype).view(bits.dtype)[()], row_min, finite)
    if steps and m == n and offset_spread > TUNING.offset_spread * spread:
        # In whole steps, so that the sketch stays a lower bound; above the least, so that no level is negative.
        column_offsets(C, sampled, centre, offset)
        if not np.isfinite(offset).all():
            offset[:] = 0.0
        near = (np.rint((offset - offset.min()) * steps) / steps).astype(C.dtype)
        offset = near.astype(np.float64)
        rounding = (real(steps), near, real(eps))
        over_rows(lambda a, b: row_minima_and_sketch_less_offsets(*found, sketch, *rounding, a, b), n, threads)
    elif steps:
        # A cost less its row's minimum is rounded, maybe up; the sketch must not be.
        fewer = real(steps * (1.0 - 4.0 * eps))
        over_rows(lambda a, b: row_minima_and_sketch(*found, sketch, fewer, a, b), n, threads)
    else:
        over_rows(lambda a, b: row_minima(*found, a, b), n, threads)
    assignment = None if finite.all() else check_feasible(C)
    if assignment is None:
        ceiling, first = cyclic_assignment(C, row_min)
        assignment = (np.arange(n) + first) % m
    else:
        ceiling = float((C[np.arange(n), assignment].astype(np.float64) - row_min).sum())
    if offset.any():
        ceiling = max(ceiling - float(offset.sum()), spread) + float(offset.max())
    return NormalisedCosts(C, power, offset, row_min, sketch, steps, spread, assignment, ceiling)


def _sample(C: npt.NDArray[Any]) -> tuple[float, float, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Read some costs, for medians that a few huge entries do not move.

    Returns a deviation of the costs less rows and columns, one of the columns, and rows with the median of each.
    """
    stride = len(C) // 32 + 1
    sample = C[::stride, :: C.shape[1] // 64 + 1].astype(np.float64)
    rows, columns = sample.shape
    if not np.isfinite(sample).all():  # a forbidden pair counts for none, as far as that goes
        usual = np.median(sample[np.isfinite(sample)]) if np.isfinite(sample).any() else 0.0
        sample[~np.isfinite(sample)] = usual
    with np.errstate(over="ignore", invalid="ignore"):
        # Partitions, not np.median: that takes longer than all other steps of a small solve.
        centre = np.partition(sample, columns // 2, axis=1)[:, columns // 2]
        sample -= centre[:, None]
        offset = np.partition(sample, rows // 2, axis=0)[rows // 2]
        sample -= offset
        spread = 1.5 * float(np.partition(np.abs(sample), sample.size // 2, axis=None)[sample.size // 2])
        offset_spread = 1.5 * float(np.partition(np.abs(offset), columns // 2)[columns // 2])
    return spread, offset_spread, np.arange(rows) * stride, centre
