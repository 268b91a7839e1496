"""Distances between data and noise: the matrix that is solved, and the cost of the pairs that is reported.

A metric has two faces. Methods whose answer does not change when a constant is added to a row or a column of the
cost solve the cheapest such matrix: ``-2 <x, n>`` for ``sqeuclidean``, one matrix product without the norms, which
also makes it better conditioned. All others get the true distances. What is reported is always the true distance, of
the n pairs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from couplings._names import unknown
from couplings.quantization import Operand, inner_products, largest

Metric = str | Callable[[Tensor, Tensor], Tensor]

_METRICS = ("sqeuclidean", "l2", "l1", "cosine", "dot")

# Bytes of the temporaries of `pair_costs` away from the CPU: few launches, and no copy of the whole batch.
_CHUNK_BYTES = 1 << 26

# Magnitudes, and one over them, of which products and squares are far from the ends of float32.
_MODERATE = 2.0**30


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


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32, not in TF32 or bfloat16, whatever the process has chosen.

    The setting is global to the process; it is touched only where it differs from full precision, and put back when
    the last of the threads that asked for it leaves.
    """
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    with _precision_lock:
        users, saved = _precision_users.get(device.type, (0, None))
        if users == 0:
            chosen = backend.fp32_precision
            inherited = chosen == "none" and backends.fp32_precision in ("none", "ieee")
            if chosen != "ieee" and not inherited:
                saved = chosen
                backend.fp32_precision = "ieee"
        _precision_users[device.type] = (users + 1, saved)
    try:
        yield
    finally:
        with _precision_lock:
            users, saved = _precision_users.pop(device.type)
            if users > 1:
                _precision_users[device.type] = (users - 1, saved)
            elif saved is not None:
                backend.fp32_precision = saved


# By type of device: how many threads are inside, and what to put back (None: nothing).
_precision_users: dict[str, tuple[int, str | None]] = {}
_precision_lock = threading.Lock()


def cost_matrix(x: Operand, y: Operand, metric: Metric, *, shift_invariant: bool) -> Tensor:
    """Cost of every pair.

    Parameters
    ----------
    x, y : Operand
        ``(n, d)`` data and ``(m, d)`` noise.
    metric : str or callable
        One of `metrics()`, or ``metric(data, noise) -> (n, m)``.
    shift_invariant : bool
        Whether the caller's answer stays the same when constants are added to rows and columns: then the cheapest such
        matrix is returned, in the same units.

    Returns
    -------
    (n, m) Tensor
        float32, or float64 for float64 operands.

    Raises
    ------
    ValueError
        If a callable returns another shape, or values that are not finite.

    Notes
    -----
    One matrix product, O(n m) memory. ``l1`` takes O(n m d) operations: tiled and threaded on the CPU, `torch.cdist`
    elsewhere.
    """
    if callable(metric):
        # Copies: the values may be the caller's own tensors, and the metric may compute in place.
        return _checked(metric(x.values.clone(), y.values.clone()), x, y, metric)
    if metric == "l1":
        return _l1_matrix(x.values, y.values)
    if metric == "dot":
        return inner_products(x, y, factor=-1.0)
    if metric == "cosine":
        x, y = _moderate(x), _moderate(y)
        cost = inner_products(x, y, factor=-1.0)
        cost.mul_(_inverse_norms(x.values)[:, None]).mul_(_inverse_norms(y.values))
        return cost if shift_invariant else cost.add_(1.0).clamp_(0.0, 2.0)
    cost = inner_products(x, y, factor=-2.0)
    if metric == "sqeuclidean" and shift_invariant:
        return cost
    cost.add_(_squared_norms(x.values)[:, None]).add_(_squared_norms(y.values)).clamp_min_(0.0)
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
    (n,) float64 Tensor
        ``dot`` gives the squared Euclidean distance.
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
    if kind == "angular":
        cosine = torch.linalg.vecdot(x, y) * _inverse_norms(x) * _inverse_norms(y)
        apart: Tensor = (1.0 - cosine).double()
        return apart
    difference = x - y
    terms = difference.abs_() if kind == "absolute" else difference.square_()
    total: Tensor = terms.sum(1, dtype=torch.float64)
    return total


def _squared_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vecdot(x, x)
    return norms


def _inverse_norms(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=1)
    faint = (norms < 1.0 / _MODERATE).nonzero().squeeze(1)  # whose squares may have vanished
    norms[faint] = torch.linalg.vector_norm(x[faint], dim=1, dtype=torch.float64).to(x.dtype)
    inverse: Tensor = norms.reciprocal().masked_fill_(norms == 0, 0.0)
    return inverse


def _moderate(x: Operand) -> Operand:
    """Bring lengths near 1, all by the same power of two, if products of them could vanish or overflow."""
    peak = largest(x.values) if x.peak is None else x.peak
    if peak == 0.0 or 1.0 / _MODERATE < peak < _MODERATE:
        return x
    factor = 2.0 ** -max(-120, min(120, round(math.log2(peak))))
    return Operand(x.values * factor, x.codes, None if x.scale is None else x.scale * factor, peak * factor)


def _l1_matrix(x: Tensor, y: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return torch.cdist(x, y, p=1.0)
    from couplings.kernels.l1 import cdist_l1

    cost = cdist_l1(x.numpy(), y.numpy(), threads=torch.get_num_threads())
    return torch.from_numpy(cost)


def _checked(cost: object, x: Operand, y: Operand, metric: object) -> Tensor:
    name = getattr(metric, "__name__", repr(metric))
    expected = (x.values.shape[0], y.values.shape[0])
    if not isinstance(cost, Tensor):
        msg = f"the metric {name} must return a torch tensor of shape {expected}, got {type(cost).__name__}."
        raise TypeError(msg)
    if tuple(cost.shape) != expected:
        msg = f"the metric {name} must return shape {expected} (data rows, noise rows), got {tuple(cost.shape)}."
        raise ValueError(msg)
    if not cost.is_floating_point():
        msg = f"the metric {name} must return a floating tensor, got {cost.dtype}."
        raise TypeError(msg)
    return cost.to(device=x.values.device, dtype=x.values.dtype)
