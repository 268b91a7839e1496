"""Random small problems for every exact method, and their answers compared.

A problem is a hard family, or random numbers of a random kind, at a random size, shape, scale and precision. A total
above the best of all answers and SciPy's, a bound above it, a repeated or forbidden column, an answer to a problem that
has none, or no answer in time is lost; an error that says that the problem cannot be solved is not.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..contenders import exact
from ..instances import HARD
from .trial import Outcome, Verdict, judged, sized

# The first two are the kernel itself, with its bound: as it is, and as it solves what is too large for dense paths.
METHODS = ("solver", "engine", "auction", "hungarian", "lapjv", "emd")
WIDE = 64  # columns from which on the engine of large problems works: more than its lists hold
PATIENCE = 120.0  # seconds for one problem, and for what it compiles
PROBLEMS = 100_000

Matrix = np.ndarray[Any, Any]
Answer = tuple[str, Any, float]  # "ok", the columns and a lower bound of the total; or "refused" or "failed" and why

KINDS: dict[str, Any] = {
    **HARD,
    "normal": lambda n, rng: rng.standard_normal((n, n)),
    "few-values": lambda n, rng: rng.choice(rng.standard_normal(3), (n, n)),
    "column-offsets": lambda n, rng: rng.standard_normal((n, n)) + 10.0 ** rng.uniform(-3, 6, n),
    "row-offsets": lambda n, rng: rng.standard_normal((n, n)) + 10.0 ** rng.uniform(-3, 6, (n, 1)),
    "far-column": lambda n, rng: rng.standard_normal((n, n)) + 1e5 * (np.arange(n) == rng.integers(n)),
    "low-rank": lambda n, rng: rng.standard_normal((n, 2)) @ rng.standard_normal((2, n)),
    "log-uniform": lambda n, rng: 10.0 ** rng.uniform(-6, 6, (n, n)),
    "sparse": lambda n, rng: rng.random((n, n)) * (rng.random((n, n)) < 0.1),
    "near-duplicates": lambda n, rng: (
        rng.standard_normal((-(-n // 4), n))[np.arange(n) // 4] + 1e-9 * rng.random((n, n))
    ),
    "wide": lambda n, rng: 10.0 ** rng.uniform(-300, 300, (n, n)),
    "far-blocks": lambda n, rng: rng.random((n, n)) + 1e18 * (np.arange(n)[:, None] % 3 != np.arange(n) % 3),
    "forbidden": lambda n, rng: np.where(rng.random((n, n)) < rng.uniform(0, 0.9), np.inf, rng.standard_normal((n, n))),
}
AS_THEY_ARE = ("huge-entry", "denormal", "wide", "far-blocks", "forbidden")  # neither scaled nor, if wide, rounded


def problem(seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> tuple[str, Matrix]:
    """Make problem number `seed`: its kind and its cost."""
    rng = np.random.default_rng(seed)
    kind = kinds[rng.integers(len(kinds))]
    n = int(rng.integers(WIDE, 2 * WIDE) if rng.random() < 0.25 else rng.integers(1, 12) ** rng.uniform(1, 1.6))
    cost = np.array(KINDS[kind](n, rng), dtype=np.float64)
    if rng.random() < 0.3:
        cost = cost[: rng.integers(1, n + 1)]  # more columns than rows
    if kind not in AS_THEY_ARE:
        if rng.random() < 0.3:
            cost = cost * 10.0 ** rng.integers(-9, 10)
        if rng.random() < 0.2:
            cost = -cost
    return kind, cost.astype(np.float32 if rng.random() < 0.6 and kind != "wide" else np.float64)


def answer(method: str, cost: Matrix) -> Answer:
    """Solve a problem by a method."""
    import torch

    from couplings import couple
    from couplings.kernels.assignment import solver

    try:
        if method in ("solver", "engine"):
            least = solver.TUNING._replace(dense_entries=0)
            with patch.object(solver, "TUNING", least) if method == "engine" else contextlib.nullcontext():
                solution = exact(cost)
            return "ok", solution.index.tolist(), float(solution.lower_bound)
        given = torch.from_numpy(cost)
        points = torch.zeros(len(cost), 1).to(given)
        return "ok", couple(points, points, method, metric=lambda *_: given).index.tolist(), -math.inf
    except (ValueError, RuntimeError) as error:
        return "refused", str(error), 0.0
    except Exception as error:  # whatever else is raised is a finding
        return "failed", f"{type(error).__name__}: {error}", 0.0


def failures(cost: Matrix, answers: dict[str, Answer]) -> dict[str, str]:
    """Return the methods whose answers are wrong, and how."""
    rows, wrong = np.arange(len(cost)), {}
    totals: dict[str, float] = {}
    for method, (status, columns, _) in answers.items():
        if status == "failed":
            wrong[method] = columns
        elif status == "ok":
            if len(set(columns)) < len(rows):
                wrong[method] = "repeated column"
            elif not np.isfinite(cost[rows, columns]).all():
                wrong[method] = "forbidden column"
            else:
                totals[method] = math.fsum(cost[rows, columns].astype(np.float64).tolist())
    known = [np.array(answers[method][1]) for method in totals]
    try:
        known.append(linear_sum_assignment(cost.astype(np.float64))[1])
    except ValueError:  # infeasible
        return wrong | dict.fromkeys(totals, "answered what has no answer")
    least, best = min((math.fsum(cost[rows, each].astype(np.float64).tolist()), i) for i, each in enumerate(known))
    rounding = 1e-12 * len(rows) * float(np.abs(cost[rows, known[best]].astype(np.float64)).max())
    for method, total in totals.items():
        if total > least + 1e-6 * abs(least) + rounding:
            wrong[method] = f"{total / least - 1 if least else math.inf:.0e} above the optimum"
        elif answers[method][2] > least + rounding:
            wrong[method] = "false bound"
    return wrong


def judge_seed(seed: int) -> Verdict:
    """Solve problem number `seed` with every method that takes it."""
    kind, cost = problem(seed)
    # Couplings are of as many rows as columns.
    square, wide = cost.shape[0] == cost.shape[1], cost.shape[1] >= WIDE
    methods = [name for name in METHODS if {"solver": True, "engine": wide}.get(name, square)]
    answers = {method: answer(method, cost) for method in methods}
    wrong = failures(cost, answers)
    if wrong:
        told = "; ".join(f"{method}: {what}" for method, what in wrong.items())
        return "lost", f"{kind} of shape {cost.shape}: {told}"
    return ("refused" if all(status == "refused" for status, *_ in answers.values()) else "right"), kind


def solve(share: float) -> Outcome:
    """Solve the first of 100,000 problems with every method; seed and number of a problem are the same."""
    return judged(judge_seed, range(sized(PROBLEMS, share)), PATIENCE)


PARTS = {"fuzz": solve}
