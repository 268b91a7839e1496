"""Conditions: what keeps the noise Gaussian given a label, a prompt or any other condition of the data.

Coupling data with noise regardless of the class makes the noise of each class lean towards that class, while
sampling starts from noise that does not. Coupling within a class leaves the noise given the class exactly as it was;
for continuous conditions, a price on moving noise between different conditions approximates that (C2OT, arXiv
2503.10636).
"""

from __future__ import annotations

import torch
from torch import Tensor

from couplings._names import unknown
from couplings.distances import cost_matrix
from couplings.quantization import Operand

CONDITION_METRICS = ("sqeuclidean", "cosine")


def check_condition_weight(weight: object) -> None:
    """Check ``condition_weight=``.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is negative or not finite.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        msg = f"condition_weight= takes a number, got {type(weight).__name__}."
        raise TypeError(msg)
    if not 0.0 <= weight < float("inf"):
        msg = f"condition_weight= must be finite and not negative, got {weight}."
        raise ValueError(msg)


def canonical_condition_metric(metric: object) -> str:
    """Lower-case the name in ``condition_metric=`` and check that it exists."""
    key = metric.strip().lower() if isinstance(metric, str) else metric
    if key not in CONDITION_METRICS:
        raise ValueError(unknown("condition_metric", metric, CONDITION_METRICS))
    return str(key)


def class_rows(labels: Tensor) -> list[Tensor]:
    """Rows of each class.

    Parameters
    ----------
    labels : (n,) integer Tensor

    Returns
    -------
    list of Tensor
        For each class its rows in increasing order.
    """
    order = labels.argsort(stable=True)
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    return list(torch.split(order, counts.tolist()))


def condition_cost(data: Tensor, noise: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """Distance between the conditions of data rows and the conditions that noise rows are tagged with.

    Parameters
    ----------
    data, noise : (n, c), (m, c) floating Tensor
    metric : {"sqeuclidean", "cosine"}
    dtype : torch.dtype
        float32 or float64.

    Returns
    -------
    (n, m) Tensor
    """
    # Centred: conditions may lie far from the origin, where the expanded square cancels badly.
    centre = noise.to(dtype).mean(0) if metric == "sqeuclidean" else 0.0
    return cost_matrix(
        Operand(data.to(dtype) - centre), Operand(noise.to(dtype) - centre), metric, shift_invariant=False
    )
