"""Costs as whole numbers: fixed-point levels, and an int16 sketch of them.

``level(c_ij) = rint((c_ij - row_min_i) * scale)`` is a whole number up to ``CAP`` in a float64, with `scale` a power
of two. Prices are whole numbers of levels too, so every sum and difference of the two is exact and no result depends
on the order of evaluation. The matrix of levels is never stored: a cost is turned into a level where it is read.

The sketch holds the levels in steps of a power of two of them, rounded down: a lower bound of a quarter of the size,
that sixteen columns at a time are compared in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._jit import jit

__all__ = ["CAP", "LARGEST_TOTAL", "MAX_PRICE", "SKETCH_MAX", "SMALLEST_TOTAL", "Costs", "Prices"]

CAP = 2.0**48  # largest level: dearer than a whole feasible assignment
MAX_PRICE = 2.0**51  # sums of a few prices and levels are exact in float64
SMALLEST_TOTAL, LARGEST_TOTAL = 2.0**-900, 2.0**1000  # beyond, the number of levels in a unit may overflow or vanish
SKETCH_MAX = 16383  # largest sketched level and price: their sum fits an int16

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.int16]

int16 = np.int16


class Costs(NamedTuple):
    """The cost matrix as the kernels read it."""

    C: npt.NDArray[Any]  # (n, m) float
    row_min: Floats  # (n,) smallest cost of each row, column offsets taken off
    scale: float  # levels per unit of cost
    offset: Floats  # (m,) levels that all rows pay for a column
    sketch: Shorts  # (n, m) (level - offset) // step, at most SKETCH_MAX; (n, 0) if there is none
    step: float  # levels


class Prices(NamedTuple):
    """Column prices in levels, and their sketch."""

    exact: Floats  # (m,)
    sketch: Shorts  # (m,) (exact + offset - base) // step, at most SKETCH_MAX
    base: float  # least of exact + offset


@jit
def minimum(bits: Any, out: Any) -> None:
    """Write the bits of the smallest of some floats, which are given as integers, to ``out[0]``.

    LLVM compares floats one after another, but integers in vector registers; those of negative floats are in
    descending order, and are turned round.
    """
    integer = bits.dtype.type
    sign = integer(8 * bits.itemsize - 1)
    rest = integer(~(1 << sign))
    x = rest
    for j in range(bits.size):
        k = integer(bits[j] ^ ((bits[j] >> sign) & rest))
        x = k if k < x else x
    out[0] = x ^ ((x >> sign) & rest)


@jit
def is_finite(bits: Any, infinity: Any) -> bool:
    """Return whether no float, given as an integer, is infinite or NaN: both have all bits of an infinity set."""
    integer = bits.dtype.type
    most = integer(0)
    for j in range(bits.size):
        k = integer(bits[j] & infinity)
        most = k if k > most else most
    return bool(most < infinity)


@jit
def row_minima(C: Any, bits: Any, infinity: Any, row_min: Floats, finite: Any, start: int, stop: int) -> None:
    """Find the smallest cost of each row, and whether all are finite."""
    out = np.empty(1, bits.dtype)
    for i in range(start, stop):
        minimum(bits[i], out)
        row_min[i] = out.view(C.dtype)[0]
        finite[i] = is_finite(bits[i], infinity)


@jit
def row_minima_and_sketch(
    C: Any,
    bits: Any,
    infinity: Any,
    row_min: Floats,
    finite: Any,
    sketch: Shorts,
    steps: Any,
    start: int,
    stop: int,
) -> None:
    """Do what `row_minima` does and, while the row is in the cache, sketch it, in `steps` per unit of cost.

    In the precision of the matrix, whose rounding `steps`, of that type, must make up for.
    """
    most = C.dtype.type(SKETCH_MAX)
    out = np.empty(1, bits.dtype)
    for i in range(start, stop):
        minimum(bits[i], out)
        r = out.view(C.dtype)[0]
        row_min[i] = r
        finite[i] = is_finite(bits[i], infinity)
        for j in range(C.shape[1]):
            x = (C[i, j] - r) * steps
            sketch[i, j] = int16(x if x < most else most)


@jit
def median_of_three(a: Any, b: Any, c: Any) -> Any:
    """Return the middle one of three numbers, without branches."""
    low = a if a < b else b
    high = b if a < b else a
    high = high if high < c else c
    return low if low > high else high


@jit
def column_offsets(C: Any, rows: Integers, centre: Floats, offset: Floats) -> None:
    """Find what all rows pay for a column: about the median of some rows less their centres.

    It is the median of three medians of three medians of three: nearly as good, and a few vector instructions.
    """
    thirds = np.empty((9, offset.size))
    for g in range(9):
        k0, k1, k2 = 3 * g * rows.size // 27, (3 * g + 1) * rows.size // 27, (3 * g + 2) * rows.size // 27
        i0, i1, i2 = rows[k0], rows[k1], rows[k2]
        for j in range(offset.size):
            thirds[g, j] = median_of_three(C[i0, j] - centre[k0], C[i1, j] - centre[k1], C[i2, j] - centre[k2])
    for g in range(3):
        for j in range(offset.size):
            thirds[g, j] = median_of_three(thirds[3 * g, j], thirds[3 * g + 1, j], thirds[3 * g + 2, j])
    for j in range(offset.size):
        offset[j] = median_of_three(thirds[0, j], thirds[1, j], thirds[2, j])


@jit
def row_minima_and_sketch_less_offsets(
    C: Any,
    bits: Any,
    infinity: Any,
    row_min: Floats,
    finite: Any,
    sketch: Shorts,
    steps: Any,
    offset: Any,
    eps: Any,
    start: int,
    stop: int,
) -> None:
    """Do what `row_minima_and_sketch` does on costs less an offset of each column.

    The offsets and the row minima are whole numbers of steps. What is rounded is the difference of cost and offset,
    by `eps` at most, relatively; near its minimum that is `eps` times the minimum.
    """
    m = offset.size
    zero = C.dtype.type(0)
    most = C.dtype.type(SKETCH_MAX)
    out = np.empty(1, bits.dtype)
    rest = np.empty(m, C.dtype)
    for i in range(start, stop):
        for j in range(m):
            rest[j] = C[i, j] - offset[j]
        finite[i] = is_finite(bits[i], infinity)
        minimum(rest.view(bits.dtype), out)
        r = out.view(C.dtype)[0]
        error = eps * abs(r)
        r = np.floor((r - error) * steps) / steps
        row_min[i] = r
        error = error * steps
        fewer = steps - eps * 4 * steps
        for j in range(m):
            x = (rest[j] - r) * fewer - error
            x = x if x > zero else zero
            sketch[i, j] = int16(x if x < most else most)


@jit
def cyclic_assignment(C: Any, row_min: Floats) -> tuple[float, int]:
    """Return the least total above the row minima of four cyclic assignments, and the column of its first row."""
    n, m = C.shape
    least = np.inf
    first = 0
    for k in range(4):
        total = 0.0
        for i in range(n):
            total += np.float64(C[i, (i + m * k // 4) % m]) - row_min[i]
        if total < least:
            least = total
            first = m * k // 4
    return least, first


@jit
def level(c: Any, row_min: float, scale: float) -> Any:
    """Return a cost as a whole number of levels above its row's smallest."""
    x = (np.float64(c) - row_min) * scale
    return np.rint(x if x < CAP else CAP)


@jit
def row_minimum(costs: Costs, i: int, p: Floats) -> float:
    """Return the least ``level + price`` of a row, reading all its columns."""
    least = np.inf
    for j in range(p.size):
        least = min(least, level(costs.C[i, j], costs.row_min[i], costs.scale) + p[j])
    return least


@jit
def raise_price(costs: Costs, prices: Prices, j: int, by: float) -> None:
    """Raise a price, and its sketch with it."""
    prices.exact[j] += by
    x = (prices.exact[j] + costs.offset[j] - prices.base) / costs.step
    prices.sketch[j] = int16(x if x < SKETCH_MAX else SKETCH_MAX)


@jit
def is_lossless(C: Any, row_min: Floats, scale: float) -> bool:
    """Return whether each cost that can matter is a whole number of levels: fixed point is then the matrix itself."""
    near = C.dtype.type(scale)
    for i in range(C.shape[0]):
        doubts = np.int32(0)
        for j in range(C.shape[1]):
            # The scale is a power of two: a product is rounded only if it vanishes or overflows (inf - inf is not 0).
            x = C[i, j] * near
            doubts = np.int32(doubts | np.int32((x - np.rint(x) != 0) | ((x == 0) != (C[i, j] == 0))))
        if doubts != 0:
            for j in range(C.shape[1]):
                y = np.float64(C[i, j]) * scale
                if y != np.rint(y) and (np.float64(C[i, j]) - row_min[i]) * scale < CAP:
                    return False
    return True
