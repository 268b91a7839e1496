"""From two flat batches to an index: build the cost, let the method assign, hold it to its promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from couplings._types import Marginal
from couplings.assigners.registry import Assignment, Method, check_index
from couplings.conditions import class_rows, condition_cost
from couplings.distances import Metric, cost_matrix, pair_costs
from couplings.phases import phase
from couplings.quantization import Operand, quantized


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the batch arrives.

    Attributes
    ----------
    method : Method
    named : bool
        Whether the method came by name, and so declared its marginal.
    metric : str or callable
    quantize : str or None
    options : dict
        The method's own options.
    condition_weight : float
    condition_metric : str
    """

    method: Method
    named: bool
    metric: Metric
    quantize: str | None
    options: dict[str, Any]
    condition_weight: float
    condition_metric: str


@dataclass(frozen=True)
class Batch:
    """Flat operands in the precision of the cost.

    Attributes
    ----------
    data : (n, d) Tensor
    noise : (m, d) Tensor
    data_peak, noise_peak : float
        Largest magnitude in each: in the whole batch, where these are only some of its rows.
    condition : Tensor or None
        ``(n,)`` integer or ``(n, c)`` floating.
    """

    data: Tensor
    noise: Tensor
    data_peak: float
    noise_peak: float
    condition: Tensor | None

    @property
    def peak(self) -> float:
        """Largest magnitude in either."""
        return max(self.data_peak, self.noise_peak)


@dataclass(frozen=True)
class Pairing:
    """Which rows were paired, at what cost.

    Attributes
    ----------
    index : (n,) int64 Tensor
    marginal : str
    cost, cost_before : 0-d Tensor
        Mean reported distance of the pairs, and of the identity pairing.
    gap : float or None
        Certified relative distance from the optimum.
    """

    index: Tensor
    marginal: Marginal
    cost: Tensor
    cost_before: Tensor
    gap: float | None


def pair(batch: Batch, plan: Plan, generator: torch.Generator) -> Pairing:
    """Couple one batch held by one process.

    Parameters
    ----------
    batch : Batch
    plan : Plan
    generator : torch.Generator

    Returns
    -------
    Pairing
    """
    with phase("cost"):
        x = quantized(batch.data, plan.quantize, peak=batch.data_peak)
        y = quantized(batch.noise, plan.quantize, peak=batch.noise_peak)
    condition = None if plan.method.ignores_condition else batch.condition
    matrix: Tensor | None = None
    if condition is not None and not condition.is_floating_point():
        classes = class_rows(condition)
        assignment = assign_classes(
            len(condition), classes, lambda rows: _assign(x[rows], y[rows], None, batch.peak, plan, generator)[0]
        )
    else:
        assignment, matrix = _assign(x, y, condition, batch.peak, plan, generator)
    with phase("report"):
        if callable(plan.metric):
            if matrix is None or condition is not None:
                matrix = cost_matrix(x, y, plan.metric, shift_invariant=False)
            pairs, before = matrix.gather(1, assignment.index[:, None]).squeeze(1), matrix.diagonal()
        else:
            pairs = pair_costs(batch.data, batch.noise, plan.metric, assignment.index)
            before = pair_costs(batch.data, batch.noise, plan.metric)
        cost = pairs.mean(dtype=torch.float64)
        dtype = batch.data.dtype
        reported, reported_before = cost.to(dtype), before.mean(dtype=torch.float64).to(dtype)
        # Methods without a matrix have had no entry of it looked at.
        if callable(plan.metric) or not _far_from_overflow(batch.peak, batch.data.shape[1], dtype):
            _check_finite(torch.stack([reported, reported_before]), plan.metric)
    gap = None
    if assignment.slack is not None:
        between = 0.0
        if condition is not None and condition.is_floating_point():
            between = pair_conditions(condition, condition, assignment.index, plan).mean().item()
        gap = relative_gap(assignment.slack, len(batch.data), float(cost), between, plan)
    marginal = reached_marginal(assignment, plan, len(batch.data), len(batch.noise))
    return Pairing(assignment.index, marginal, reported, reported_before, gap)


def build_cost(x: Operand, y: Operand, condition: Tensor | None, peak: float, plan: Plan) -> Tensor:
    """Cost matrix that the method solves, condition included.

    Raises
    ------
    ValueError
        If a cost is not finite: from a callable metric, or because the inputs are too large for float32.
    """
    return finished_cost(
        cost_matrix(x, y, plan.metric, shift_invariant=may_shift(plan, len(x.values), len(y.values))),
        condition,
        condition,
        peak,
        x.values.shape[1],
        plan,
    )


def may_shift(plan: Plan, n: int, m: int) -> bool:
    """Tell whether constants in rows and columns of the cost leave the answer alone.

    Where there are more columns than rows they do not, whatever the method: the choice of columns depends on them.
    """
    return plan.method.info.shift_invariant and n == m


def finished_cost(
    cost: Tensor, of_data: Tensor | None, of_noise: Tensor | None, peak: float, depth: int, plan: Plan
) -> Tensor:
    """Add the distance between conditions and check that every cost is finite."""
    if of_data is not None and of_noise is not None and plan.condition_weight > 0:
        between = condition_cost(of_data, of_noise, plan.condition_metric, cost.dtype)
        cost = cost + between.mul_(plan.condition_weight)
        peak = float("inf")  # the bound below does not know the conditions
    if callable(plan.metric) or not _far_from_overflow(peak, depth, cost.dtype):
        _check_finite(cost, plan.metric)
    return cost


def _far_from_overflow(peak: float, depth: int, dtype: torch.dtype) -> bool:
    """Bound every cost by ``d * (2 * peak)**2``: only inputs near the limit of the type need a look at every entry."""
    most = max(1.0, peak)
    return 4.0 * depth * most * most < torch.finfo(dtype).max  # a power would raise where the product is infinite


def _check_finite(cost: Tensor, metric: Metric) -> None:
    if not bool(torch.isfinite(cost).all()):
        what = getattr(metric, "__name__", metric)
        msg = (
            f"the cost {what} is not finite everywhere (it is computed in {cost.dtype}). "
            "Scale the inputs, pass float64, or mend the metric."
        )
        raise ValueError(msg)


def assign_cost(
    cost: Tensor, plan: Plan, generator: torch.Generator, points: tuple[Tensor, Tensor] | None
) -> Assignment:
    """Let a method on the cost assign, and check its answer."""
    extra = {"points": points} if "points" in plan.method.wants else {}
    if callable(plan.metric) and not plan.method.leaves_operands:
        cost = cost.clone()  # what is reported is read from it, and it may be a tensor that the metric keeps
    return _checked(plan.method.fn, (cost,), extra, plan, generator, *cost.shape)


def _assign(
    x: Operand, y: Operand, condition: Tensor | None, peak: float, plan: Plan, generator: torch.Generator
) -> tuple[Assignment, Tensor | None]:
    if plan.method.info.needs == "cost":
        with phase("cost"):
            cost = build_cost(x, y, condition, peak, plan)
        return assign_cost(cost, plan, generator, (x.values, y.values)), cost
    return assign_points(x, y, condition, plan, generator), None


def assign_points(
    x: Operand, y: Operand, condition: Tensor | None, plan: Plan, generator: torch.Generator
) -> Assignment:
    """Let a method on the points assign, and check its answer.

    Raises
    ------
    ValueError
        For a continuous condition, which is a price in a cost matrix.
    """
    if condition is not None:
        msg = (
            f"the method {plan.method.info.name} builds no cost matrix to add a continuous condition= to. "
            "Use a method on the cost, such as 'auction', or integer classes."
        )
        raise ValueError(msg)
    extra = {"metric": plan.metric} if "metric" in plan.method.wants else {}
    points = (x.values, y.values)
    if not plan.method.leaves_operands:
        points = (x.values.clone(), y.values.clone())  # they may be the caller's own tensors
    return _checked(plan.method.fn, points, extra, plan, generator, len(x.values), len(y.values))


def _checked(
    fn: Any,
    operands: tuple[Tensor, ...],
    extra: dict[str, Any],
    plan: Plan,
    generator: torch.Generator,
    n: int,
    m: int,
) -> Assignment:
    info = plan.method.info
    if "generator" in plan.method.wants:
        extra = {**extra, "generator": generator}
    with phase("solve"):
        answer = fn(*operands, **extra, **plan.options)
        assignment = answer if isinstance(answer, Assignment) else Assignment(answer)
        promised = assignment.marginal or info.marginal
        index = check_index(assignment.index, n, m, promised, info.name, named=plan.named)
    return replace(assignment, index=index.to(operands[0].device))


def assign_classes(n: int, classes: list[Tensor], assign: Callable[[Tensor], Assignment]) -> Assignment:
    """Couple each class by itself: noise row j belongs to the class of data row j, and stays in it.

    Parameters
    ----------
    n : int
        Rows in all classes.
    classes : list of Tensor
        The rows of each class, from `class_rows`.
    assign : callable
        Assigns the rows that it is given among themselves.

    Returns
    -------
    Assignment
    """
    index = torch.arange(n, device=classes[0].device)
    slack: float | None = 0.0
    marginal: Marginal | None = None
    for rows in classes:
        if len(rows) == 1:  # paired with its own noise, whatever the method: large label sets have many of these
            continue
        part = assign(rows)
        index[rows] = rows[part.index]
        slack = None if slack is None or part.slack is None else slack + part.slack
        marginal = part.marginal
    return Assignment(index, slack, marginal)


def reached_marginal(assignment: Assignment, plan: Plan, n: int, m: int) -> Marginal:
    """Say what an assignment of n of m noise rows did to the distribution of the noise."""
    marginal = assignment.marginal or plan.method.info.marginal
    return "selected" if m > n and marginal == "permutation" else marginal


def pair_conditions(of_data: Tensor, of_noise: Tensor, index: Tensor, plan: Plan) -> Tensor:
    """Distances between the continuous conditions of the pairs, float64."""
    return condition_cost(of_data, of_noise, plan.condition_metric, torch.float64).gather(1, index[:, None]).squeeze(1)


def relative_gap(slack: float, n: int, cost: float, between: float, plan: Plan) -> float:
    """Slack of the solved matrix as a fraction of the reported cost, conditions included.

    Parameters
    ----------
    slack : float
        Certified bound on the total cost of the assignment minus the optimum.
    n : int
        Pairs in it.
    cost : float
        Mean reported distance of the pairs.
    between : float
        Mean distance between their continuous conditions.
    plan : Plan

    Returns
    -------
    float
    """
    # `dot` solves minus the inner product, and reports the squared distance, which changes twice as fast.
    unit = 2.0 if plan.metric == "dot" else 1.0
    excess = unit * slack / n
    cost += unit * plan.condition_weight * between
    if plan.quantize is None and isinstance(plan.metric, str):
        excess = min(excess, cost)  # no distance is negative, so neither is the optimum
    if excess == 0.0:
        return 0.0
    return excess / abs(cost) if cost != 0.0 else float("inf")
