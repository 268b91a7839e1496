"""All pairwise L1 distances, tiled for the cache and threaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._jit import jit
from ._threads import over_rows, worthwhile

__all__ = ["cdist_l1"]

DEPTH = 512  # coordinates summed in the operands' precision before the float64 total: bounds the rounding
ROWS = 32  # rows of x and y per tile: one tile of each fits the second-level cache
COLUMNS = 64

# The sum over one tile's depth may be reordered, which lets it run in vector registers; nothing else may.
_reordered = jit(fastmath={"reassoc", "nsz", "contract"})


@_reordered
def patch(x: Any, y: Any, i: Any, j: Any, start: Any, stop: Any, zero: Any) -> Any:
    """Partial L1 distances of two rows of x and four of y: six loads serve eight sums, all kept in registers."""
    xa, xb = x[i, start:stop], x[i + 1, start:stop]
    ya, yb, yc, yd = y[j, start:stop], y[j + 1, start:stop], y[j + 2, start:stop], y[j + 3, start:stop]
    a = b = c = d = e = f = g = h = zero
    for k in range(xa.size):
        u, v = xa[k], xb[k]
        p, q, r, s = ya[k], yb[k], yc[k], yd[k]
        a += abs(u - p)
        b += abs(u - q)
        c += abs(u - r)
        d += abs(u - s)
        e += abs(v - p)
        f += abs(v - q)
        g += abs(v - r)
        h += abs(v - s)
    return a, b, c, d, e, f, g, h


@_reordered
def single(x: Any, y: Any, i: Any, j: Any, start: Any, stop: Any, zero: Any) -> Any:
    """Partial L1 distance of one pair."""
    a, b = x[i, start:stop], y[j, start:stop]
    total = zero
    for k in range(a.size):
        total += abs(a[k] - b[k])
    return total


@jit
def tiles(x: Any, y: Any, out: Any, zero: Any, first: Any, last: Any) -> Any:
    """Distances from rows ``first:last`` of x to all rows of y, a tile of both staying in the cache."""
    m, depth = y.shape
    total = np.empty((ROWS, COLUMNS))
    for i0 in range(first, last, ROWS):
        rows = min(ROWS, last - i0)
        for j0 in range(0, m, COLUMNS):
            columns = min(COLUMNS, m - j0)
            total[:] = 0.0
            even = rows - rows % 2
            fours = columns - columns % 4
            for k0 in range(0, depth, DEPTH):
                k1 = min(k0 + DEPTH, depth)
                for i in range(0, even, 2):
                    for j in range(0, fours, 4):
                        a, b, c, d, e, f, g, h = patch(x, y, i0 + i, j0 + j, k0, k1, zero)
                        total[i, j] += a
                        total[i, j + 1] += b
                        total[i, j + 2] += c
                        total[i, j + 3] += d
                        total[i + 1, j] += e
                        total[i + 1, j + 1] += f
                        total[i + 1, j + 2] += g
                        total[i + 1, j + 3] += h
                for i in range(rows):
                    for j in range(0 if i == even else fours, columns):
                        total[i, j] += single(x, y, i0 + i, j0 + j, k0, k1, zero)
            out[i0 : i0 + rows, j0 : j0 + columns] = total[:rows, :columns]


def cdist_l1(x: npt.NDArray[Any], y: npt.NDArray[Any], *, threads: int = 1) -> npt.NDArray[Any]:
    """Sum of absolute differences between every row of `x` and every row of `y`.

    Parameters
    ----------
    x, y : (n, d) and (m, d) arrays, both float32 or both float64
        Any strides; never modified.
    threads : int
        The distances do not depend on it.

    Returns
    -------
    (n, m) array of the same dtype
        Relative error about 1e-7 in float32 whatever d: sums of 512 terms are totalled in float64.

    Raises
    ------
    TypeError
        If the dtypes differ or are not float32 or float64.
    ValueError
        If the shapes are not (n, d) and (m, d).
    """
    if x.dtype != y.dtype or x.dtype not in (np.float32, np.float64):
        msg = f"x and y must both be float32 or both float64, got {x.dtype} and {y.dtype}"
        raise TypeError(msg)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        msg = f"x and y must be (n, d) and (m, d), got {x.shape} and {y.shape}"
        raise ValueError(msg)
    rows, columns = np.ascontiguousarray(x).view(), np.ascontiguousarray(y).view()
    rows.flags.writeable = columns.flags.writeable = False
    out = np.empty((len(x), len(y)), x.dtype)
    zero = x.dtype.type(0)  # keeps the sums in the operands' precision
    threads = worthwhile(threads, len(x) * columns.size)
    over_rows(lambda a, b: tiles(rows, columns, out, zero, a, b), len(x), threads)
    return out
