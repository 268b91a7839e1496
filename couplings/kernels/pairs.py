"""Distances of given pairs of rows, in one pass over each row and without a temporary."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._jit import jit
from ._threads import over_rows, worthwhile

__all__ = ["pair_distances"]

# Sums may be reordered, which lets them run in vector registers; they are float64, so it changes nothing that shows.
_reordered = jit(fastmath={"reassoc", "nsz", "contract"})


@_reordered
def squared(x: Any, y: Any, index: Any, out: Any, first: int, last: int) -> None:
    """Sum of squared differences of rows ``x[i]`` and ``y[index[i]]``."""
    for i in range(first, last):
        a, b = x[i], y[index[i]]
        total = 0.0
        for k in range(a.size):
            d = np.float64(a[k] - b[k])
            total += d * d
        out[i] = total


@_reordered
def absolute(x: Any, y: Any, index: Any, out: Any, first: int, last: int) -> None:
    """Sum of absolute differences."""
    for i in range(first, last):
        a, b = x[i], y[index[i]]
        total = 0.0
        for k in range(a.size):
            total += np.float64(abs(a[k] - b[k]))
        out[i] = total


@_reordered
def angular(x: Any, y: Any, index: Any, out: Any, first: int, last: int) -> None:
    """One minus the cosine of the angle; 1 where a row is zero."""
    for i in range(first, last):
        a, b = x[i], y[index[i]]
        ab = aa = bb = 0.0
        for k in range(a.size):
            u, v = np.float64(a[k]), np.float64(b[k])
            ab += u * v
            aa += u * u
            bb += v * v
        norms = np.sqrt(aa) * np.sqrt(bb)
        out[i] = 1.0 - ab / norms if norms > 0.0 else 1.0


_KERNELS = {"squared": squared, "absolute": absolute, "angular": angular}


def pair_distances(
    x: npt.NDArray[Any], y: npt.NDArray[Any], index: npt.NDArray[np.int64], kind: str, *, threads: int = 1
) -> npt.NDArray[np.float64]:
    """Distance between row ``i`` of `x` and row ``index[i]`` of `y`.

    Parameters
    ----------
    x, y : (n, d) and (m, d) arrays, both float32 or both float64
        Any strides; never modified.
    index : (n,) int64 array
        Rows of `y`.
    kind : {"squared", "absolute", "angular"}
        Sum of squared differences, sum of absolute differences, or one minus the cosine of the angle.
    threads : int
        The distances do not depend on it.

    Returns
    -------
    (n,) float64 array
    """
    out = np.empty(len(x))
    a, b = np.ascontiguousarray(x), np.ascontiguousarray(y)
    kernel = _KERNELS[kind]
    threads = worthwhile(threads, a.size // 2)  # a pass over both takes no longer than one over costs does
    over_rows(lambda first, last: kernel(a, b, index, out, first, last), len(x), threads)
    return out
