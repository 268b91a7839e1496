"""Sinkhorn's iteration on the CPU, and draws from the rows of its plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import jit

__all__ = ["balance", "draw"]

MEMORY = 5  # previous steps that the acceleration combines
RANGE = 30.0  # largest logarithm of a scaling: products of two of them and a kernel entry are float32 numbers
REORDER = {"reassoc", "contract", "nsz"}  # sums may be vectorised; infinity and NaN stay what they are
FAINT = 1e-6  # share of a row beyond which columns of the kernel that vanished may matter


@jit(fastmath=REORDER)
def half_steps(kernel: Any, v: Any, u: Any, sums: Any, part: Any) -> None:
    """Compute ``u = 1 / (kernel @ v)`` and ``sums = kernel.T @ u``, reading the kernel once, four rows at a time."""
    n = len(kernel)
    sums[:] = 0.0
    part[:] = 0.0  # of the sums, in float32, over up to 64 rows
    for i in range(0, n, 4):
        # Past the end the last row stands in, with weight 0.
        i1, i2, i3 = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)
        a = b = c = d = np.float32(0.0)
        for j in range(n):
            a += kernel[i, j] * v[j]
            b += kernel[i1, j] * v[j]
            c += kernel[i2, j] * v[j]
            d += kernel[i3, j] * v[j]
        one, zero = np.float32(1.0), np.float32(0.0)
        u[i], u[i1], u[i2], u[i3] = one / a, one / b, one / c, one / d
        a = u[i]
        b = u[i1] if i1 == i + 1 else zero
        c = u[i2] if i2 == i + 2 else zero
        d = u[i3] if i3 == i + 3 else zero
        for j in range(n):
            part[j] += a * kernel[i, j] + b * kernel[i1, j] + c * kernel[i2, j] + d * kernel[i3, j]
        if i % 64 == 60 or i + 4 >= n:
            sums += part
            part[:] = 0.0


@jit(fastmath=REORDER)
def balance(kernel: Any, tolerance: float, max_iterations: int) -> Any:
    """Find ``u`` and ``v`` such that rows and columns of ``u[:, None] * kernel * v`` sum to 1.

    Parameters
    ----------
    kernel : (n, n) float32 array
        Nonnegative; every row and column has an entry near its sum.
    tolerance : float
        Largest mean error of the column sums; rows are exact.
    max_iterations : int

    Returns
    -------
    log_u, log_v : (n,) float64 arrays
    error : float
        Mean error of the column sums.
    iterations : int
        Fewer than `max_iterations` without convergence if a scaling left the range of float32: put the scalings into
        the kernel, and call again.

    Notes
    -----
    Sinkhorn's map from ``log(v)`` to the next is accelerated by Anderson's method: the residual is projected on the
    differences of earlier residuals, kept orthonormal, and the same combination is taken off the step. A step that
    doubles the error is taken back, and the plain iteration goes on from there.

    References
    ----------
    Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011, doi:10.1137/10078356X.
    """
    n = len(kernel)
    u, v, part = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    log_v, sums = np.zeros(n), np.empty(n)
    plain, residual = np.zeros(n), np.zeros(n)
    residuals, steps = np.zeros((MEMORY, n)), np.zeros((MEMORY, n))
    known = 0  # pairs in `residuals` and `steps`
    slot = 0  # the next to be overwritten
    started = False
    least = np.inf
    error = np.inf
    for iteration in range(1, max_iterations + 1):
        v[:] = np.exp(log_v)
        half_steps(kernel, v, u, sums, part)
        error = np.abs(v * sums - 1.0).mean()
        if error <= tolerance or iteration == max_iterations:
            break
        if known > 0 and not error <= 2.0 * least:
            log_v = plain.copy()
            known = slot = 0
            started = False
            continue
        least = min(least, error) if started else error
        new = -np.log(sums)
        if np.abs(new).max() > RANGE:
            log_v = new
            break
        difference, step = new - log_v - residual, new - plain
        residual, plain = new - log_v, new
        if started:
            size = (difference * difference).sum()
            for k in range(known):
                along = (difference * residuals[k]).sum()
                difference -= along * residuals[k]
                step -= along * steps[k]
            left = (difference * difference).sum()
            if left > 1e-12 * size:
                residuals[slot] = difference / np.sqrt(left)
                steps[slot] = step / np.sqrt(left)
                slot = (slot + 1) % MEMORY
                known = min(known + 1, MEMORY)
        started = True
        log_v = new.copy()
        for k in range(known):
            log_v -= (residual * residuals[k]).sum() * steps[k]
        log_v = np.minimum(np.maximum(log_v, -2 * RANGE), 2 * RANGE)
    return np.log(u), log_v, error, iteration


@jit
def draw(kernel: Any, u: Any, v: Any, scaled: Any, log_v: Any, order: Any, uniforms: Any, replace: bool) -> Any:
    """Draw a column for each row of the plan ``u[:, None] * kernel * v``.

    Parameters
    ----------
    kernel : (n, n) float32 array
    u, v : (n,) float32 arrays
    scaled : (n, n) float32 array
        The cost that the kernel is made of, in units of the entropy.
    log_v : (n,) float32 array
        Row ``i`` of the plan is ``exp(log_v - scaled[i])`` up to a factor, which does not vanish where the kernel does.
    order : (n,) int64 array
        Which row draws when.
    uniforms : (n,) float64 array
        In [0, 1), one a row.
    replace : bool
        Whether a column can be drawn again. If not, a row draws among the columns that are left.

    Returns
    -------
    (n,) int64 array
        The column of each row.
    """
    n = len(kernel)
    columns, index, weights = np.arange(n), np.empty(n, np.int64), np.empty(n)
    left = n  # columns[:left] can be drawn
    for i in order:
        total = 0.0
        for k in range(left):
            total += kernel[i, columns[k]] * v[columns[k]]
            weights[k] = total
        if not total * u[i] > FAINT:
            largest = -np.inf
            for k in range(left):
                largest = max(largest, log_v[columns[k]] - scaled[i, columns[k]])
            total = 0.0
            for k in range(left):
                total += np.exp(log_v[columns[k]] - scaled[i, columns[k]] - largest)
                weights[k] = total
        k = min(np.searchsorted(weights[:left], uniforms[i] * total, side="right"), left - 1)
        index[i] = columns[k]
        if not replace:
            left -= 1
            columns[k] = columns[left]
    return index
