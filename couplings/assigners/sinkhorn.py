"""Entropic optimal transport by POT's log-domain Sinkhorn, then a draw from the plan.

Cuturi (2013), Sinkhorn distances, arXiv 1306.0895; Feydy et al. (2019), arXiv 1810.08278, for the log domain.
"""

import logging
import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from couplings.assigners.extras import missing_extra
from couplings.assigners.method import Assignment
from couplings.assigners.randomness import gumbel, seeded_by
from couplings.stages import stage

logger = logging.getLogger(__name__)

# Above this column error, rows drawn from the plan would visibly favour some noise.
_COLUMN_ERROR_LIMIT = 1e-3


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
        On any device; the iterations run there.
    generator : torch.Generator, optional
        Decides the draw.
    reg : float
        Strength of the entropy, in units of the cost's standard deviation after row and column means are removed.
        (The raw mean and deviation are dominated by the norms of data and noise in high dimension, which do not
        matter to the plan.)
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
        If ``draw="rows"`` and the columns of the plan are off by more than 1e-3 in total: the noise would no longer be
        Gaussian.

    Notes
    -----
    The column error is ``sum_j |n * sum_i plan[i, j] - 1| / n``; rows are exact by construction.
    Non-convergence is logged.
    """
    _check(reg, draw, max_iterations)
    try:
        from ot.bregman import sinkhorn_log
    except ImportError as error:
        raise missing_extra(__name__, package="POT", extra="pot") from error
    n = len(cost)
    generator = generator or seeded_by(cost)
    with stage("conversion"):
        centred = cost - cost.mean(1, keepdim=True)
        centred -= centred.mean(0)
        centred /= _or_one(centred.abs().amax())  # squares of large or small costs would not be float32 numbers
        # Row by row: a sum over the whole matrix would be split, and rounded, as threads are available.
        deviation = centred.square().mean(1).mean().sqrt()
        centred /= _or_one(deviation)
    mass = cost.new_full((n,), 1.0 / n)
    tolerance = 1e-5 / n**0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # non-convergence is reported below, with its size
        plan, log = sinkhorn_log(
            mass, mass, centred, reg, numItermax=max_iterations, stopThr=tolerance, log=True, warn=False
        )
    error_of_columns = float((plan.sum(0) - mass).abs().sum())
    if error_of_columns > _COLUMN_ERROR_LIMIT:
        msg = (
            f"Sinkhorn did not converge in {max_iterations} iterations at reg={reg}: the plan's columns are off by "
            f"{error_of_columns:.1e}. Raise reg= or max_iterations=."
        )
        if draw == "rows":
            raise RuntimeError(msg)
        logger.warning(msg)
    # The logarithm of the plan: the plan itself underflows to rows of zeros for small reg.
    log_plan = log["log_u"][:, None] + log["log_v"] - centred / reg
    keys = log_plan + gumbel(log_plan.shape, generator).to(log_plan)
    if draw == "rows":
        return Assignment(keys.argmax(1), marginal="resampled")
    order = torch.randperm(n, generator=generator, device=generator.device)
    return Assignment(_without_replacement(keys.cpu(), order.cpu()))


def _or_one(scale: Tensor) -> Tensor:
    """Return what to divide by: 1 where there is nothing to scale."""
    return torch.where(scale > 0, scale, 1.0)


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


def _without_replacement(keys_NM: Tensor, order: Tensor) -> Tensor:
    """Let rows choose in turn, each its largest key among the columns that are left.

    With Gumbel noise added to logarithms of probabilities, the largest key over any set of columns is a draw from the
    probabilities restricted to that set (the Gumbel-max trick, arXiv 2110.01515).
    """
    keys = keys_NM.numpy()
    taken = np.zeros(keys.shape[1], dtype=keys.dtype)
    index = np.empty(len(keys), dtype=np.int64)
    for row in order.tolist():
        column = int(np.argmax(keys[row] + taken))
        index[row] = column
        taken[column] = -np.inf
    return torch.from_numpy(index)
