"""Entropic optimal transport by Sinkhorn's iteration, then a draw from the plan.

Cuturi (2013), Sinkhorn distances, arXiv 1306.0895; Schmitzer (2019), Stabilized sparse scaling algorithms for entropy
regularized transport problems, arXiv 1610.06519, for scalings that are put into the kernel; Walker and Ni (2011),
doi:10.1137/10078356X, for Anderson acceleration. The loops for the CPU are in `couplings.kernels.sinkhorn`.
"""

import logging
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from couplings._transfer import to_host
from couplings.assigners.method import Assignment
from couplings.assigners.randomness import seeded_by

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5
# Above this column error, rows drawn from the plan would visibly favour some noise.
_COLUMN_ERROR_LIMIT = 1e-3
_SAMPLE = 4096  # differences from which the deviation of a cost is estimated
_OUTLIER = 3.0  # standard deviations
# A Kronecker sequence, evenly spread in four dimensions: 2^31 over powers of the root of x^5 = x + 1.
_STEPS = [round(2**31 / 1.1673039782614187**power) for power in (1, 2, 3, 4)]
_CHECK = 10  # iterations between two looks of the host at the error, away from the CPU
_RANGE = 30.0  # a scaling with a larger logarithm is put into the kernel
_HUGE = 1e30  # stands in for entries that float32 does not reach

_logged: set[tuple[object, ...]] = set()


def assign(
    cost: Tensor,
    *,
    generator: torch.Generator | None = None,
    reg: float = 0.2,
    draw: Literal["permutation", "rows"] = "permutation",
    max_iterations: int = 2000,
) -> Assignment:
    """Draw an assignment from the entropic plan.

    Parameters
    ----------
    cost : (n, n) Tensor
        On any device; the iterations run there, in float32.
    generator : torch.Generator, optional
        Decides the draw; by default, one seeded by the plan.
    reg : float
        Strength of the entropy, in standard deviations of the cost beyond constants of rows and columns, outliers left
        out: see `deviation`.
    draw : {"permutation", "rows"}
        ``"permutation"``: rows in random order, without replacement. ``"rows"``: each row by itself from its
        conditional, so that noise rows may repeat; the marginal is then ``"resampled"``.
    max_iterations : int
        Limit of the Sinkhorn iterations.

    Raises
    ------
    ValueError
        For `reg` that is not positive and finite, or an unknown `draw`.
    RuntimeError
        If ``draw="rows"`` and the columns of the plan are off by more than 1e-3 on average: the noise would no longer
        be Gaussian.

    Notes
    -----
    The column error is ``sum_j |n * sum_i plan[i, j] - 1| / n``; rows are exact by construction. Iterations stop at
    1e-5. An error above 1e-3 is logged, once for the same options.
    """
    _check(reg, draw, max_iterations)
    plan = _solve(_scaled(cost, reg), max_iterations)
    if not plan.error <= _COLUMN_ERROR_LIMIT:
        msg = (
            f"Sinkhorn did not converge in {max_iterations} iterations at reg={reg}: the plan's columns are off by "
            f"{plan.error:.1e}. Raise reg= or max_iterations=."
        )
        if draw == "rows":
            raise RuntimeError(msg)
        if (reg, max_iterations) not in _logged:
            _logged.add((reg, max_iterations))
            logger.warning(msg)
    index = _draw(plan, generator, replace=draw == "rows")
    return Assignment(index, marginal="resampled" if draw == "rows" else None)


def entropic_plan(cost: Tensor, reg: float, *, max_iterations: int = 2000, warn: bool = True) -> Tensor:
    """Solve for the plan itself, with its entropy in units of the cost.

    Parameters
    ----------
    cost : (n, n) Tensor
    reg : float
        Strength of the entropy, in units of the cost.
    max_iterations : int
    warn : bool
        Log a warning, once for the same `reg`, if the columns of the plan are off by more than 1e-3 on average.

    Returns
    -------
    (n, n) float64 Tensor
        Its rows sum to 1.
    """
    _check(reg, "rows", max_iterations)
    scaled = cost - cost.amin(1, keepdim=True)
    scaled -= scaled.amin(0)
    plan = _solve((scaled / reg).clamp_(max=_HUGE).float(), max_iterations)
    if warn and not plan.error <= _COLUMN_ERROR_LIMIT and ("plan", reg) not in _logged:
        _logged.add(("plan", reg))
        logger.warning(
            "Sinkhorn did not converge in %d iterations at reg=%s: the plan's columns are off by %.1e.",
            *(max_iterations, reg, plan.error),
        )
    return torch.softmax(plan.log_v.double() - plan.scaled.double(), 1)


class Plan(NamedTuple):
    """An entropic plan: ``u[:, None] * kernel * v``, or ``exp(log_v - scaled)`` with its rows divided by their sums."""

    scaled: Tensor
    log_v: Tensor
    kernel: Tensor
    u: Tensor
    v: Tensor
    error: float
    iterations: int


def deviation(cost: Tensor) -> Tensor:
    """Estimate the standard deviation of a cost beyond constants of rows and columns, outliers left out.

    Differences ``cost[i, j] + cost[k, l] - cost[i, l] - cost[k, j]`` are free of such constants, and have twice the
    deviation of independent entries. A heavy condition, a far row or a few huge entries make some of them huge, and
    equal rows make some of them zero; the lower third of the others tells the deviation, and is taken again without
    those beyond 3 deviations until that settles.

    Parameters
    ----------
    cost : (n, n) Tensor

    Returns
    -------
    0-d Tensor
        1 for a cost that is nothing but constants of rows and columns.

    Notes
    -----
    Exact for normal entries; 0.8 of the standard deviation for crops of photographs, whose contrast differs.
    """
    n = len(cost)
    count = torch.arange(1, _SAMPLE + 1, device=cost.device)
    ranges = (n, n, max(1, n - 1), max(1, n - 1))
    i, j, down, right = (count * step % 2**31 * size >> 31 for step, size in zip(_STEPS, ranges, strict=True))
    k, l = (i + 1 + down) % n, (j + 1 + right) % n  # noqa: E741
    corners = torch.stack([cost[i, j], cost[k, l], -cost[i, l], -cost[k, j]])
    differences, sizes = corners.sum(0).abs(), corners.abs().sum(0)
    rounding = 4 * torch.finfo(torch.float32).eps * sizes
    differences = torch.where(differences > rounding, differences, 0.0).sort().values
    zeros = torch.searchsorted(differences, differences.new_zeros(()), right=True)
    end = torch.full_like(zeros, _SAMPLE)
    for _ in range(6):
        # A third of the absolute values of a normal law is within 0.43 deviations.
        spread = differences.take((zeros + (end - zeros) // 3).clamp_max(_SAMPLE - 1)) / 0.43
        end = torch.searchsorted(differences, _OUTLIER * spread, right=True)
    return torch.where(spread > 0, spread / 2, 1.0)


def _scaled(cost: Tensor, reg: float) -> Tensor:
    """Cost in units of the entropy, float32, its smallest entry in every row and column 0."""
    peak = cost.abs().amax()
    scaled = cost / torch.where(peak > 0, peak, 1.0)
    # Minima, not means: they lose nothing next to a huge entry.
    scaled -= scaled.amin(1, keepdim=True)
    scaled -= scaled.amin(0)
    scaled /= (reg * deviation(scaled)).clamp_min(1 / _HUGE)
    return scaled.clamp_(max=_HUGE).float()


def _solve(scaled: Tensor, max_iterations: int) -> Plan:
    """Iterate until the columns of the plan are right, or the iterations are used up."""
    balance = _balance_on_cpu if scaled.device.type == "cpu" else _balance
    log_u, log_v = scaled.new_zeros(2, len(scaled))
    kernel = torch.empty_like(scaled)
    used = 0
    while True:
        torch.sub(log_v, scaled, out=kernel).add_(log_u[:, None]).exp_()
        more_u, more_v, error, iterations = balance(kernel, max_iterations - used)
        log_u, log_v = log_u + more_u, log_v + more_v
        used += iterations
        if error <= _TOLERANCE or used == max_iterations:
            return Plan(scaled, log_v, kernel, more_u.exp(), more_v.exp(), error, used)


def _balance_on_cpu(kernel: Tensor, max_iterations: int) -> tuple[Tensor, Tensor, float, int]:
    from couplings.kernels.sinkhorn import balance

    log_u, log_v, error, iterations = balance(kernel.numpy(), _TOLERANCE, max_iterations)
    return torch.from_numpy(log_u).float(), torch.from_numpy(log_v).float(), error, iterations


def _balance(kernel: Tensor, max_iterations: int) -> tuple[Tensor, Tensor, float, int]:
    """Do what `couplings.kernels.sinkhorn.balance` does, on any device, with one earlier step for the acceleration."""
    log_v = plain = torch.zeros_like(kernel[0])
    before = torch.full_like(log_v, torch.inf)
    least = before[0]
    iteration = 0
    while True:
        iteration += 1
        u = (kernel @ log_v.exp()).reciprocal().clamp(max=_HUGE)
        new = (kernel.T @ u).log().neg().clamp(-2 * _RANGE, 2 * _RANGE)
        residual = new - log_v
        error = (residual.neg().exp() - 1).abs().mean()
        if iteration % _CHECK == 0 or iteration == max_iterations:
            now, reach = torch.stack([error, new.abs().amax()]).tolist()
            if now <= _TOLERANCE or iteration == max_iterations:
                return u.log(), log_v, now, iteration
            if reach > _RANGE:
                return u.log(), new, now, iteration
        worse = ~(error <= 2 * least)
        change = residual - before
        # NaN in the first step, and after one that was taken back: no acceleration then.
        share = ((residual @ change) / (change @ change)).nan_to_num()
        log_v = torch.where(worse, plain, new - share * (new - plain)).clamp(-2 * _RANGE, 2 * _RANGE)
        before = torch.where(worse, torch.inf, residual)
        least = torch.where(worse, torch.inf, torch.minimum(least, error))
        plain = torch.where(worse, plain, new)


def _draw(plan: Plan, generator: torch.Generator | None, *, replace: bool) -> Tensor:
    """Draw a column for each row, rows in random order, with or without replacement."""
    from couplings.kernels.sinkhorn import draw

    kernel, u, v, scaled, log_v = to_host(plan.kernel, plan.u, plan.v, plan.scaled, plan.log_v)
    generator = generator or seeded_by(log_v[None])
    order = torch.randperm(len(u), generator=generator, device=generator.device)
    uniforms = torch.rand(len(u), generator=generator, device=generator.device, dtype=torch.float64)
    arrays = (t.numpy() for t in (kernel, u, v, scaled, log_v, *to_host(order, uniforms)))
    return torch.from_numpy(draw(*arrays, replace))


def _check(reg: float, draw: str, max_iterations: int) -> None:
    if not 0.0 < reg < float("inf"):
        msg = f"reg= must be positive and finite (in standard deviations of the cost; 0.2 is the default), got {reg}."
        raise ValueError(msg)
    if draw not in ("permutation", "rows"):
        msg = f"draw= must be 'permutation' or 'rows', got {draw!r}."
        raise ValueError(msg)
    if max_iterations < 1:
        msg = f"max_iterations= must be at least 1, got {max_iterations}."
        raise ValueError(msg)
