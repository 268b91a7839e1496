"""Random small problems for every exact method, and their answers compared.

A problem is a hard family, or random numbers of a random kind, at a random size, shape, scale and precision. A total
above the best of all answers and SciPy's, a bound above it, a repeated or forbidden column, an answer to a problem that
has none, or no answer in time is lost; an error that says that the problem cannot be solved is not.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..child import Child, Ended
from ..contenders import exact
from ..instances import HARD
from .trial import Outcome, sized

# The first two are the kernel itself, with its bound: as it is, and as it solves what is too large for dense paths.
METHODS = ("solver", "engine", "auction", "hungarian", "lapjv", "emd")
WIDE = 64  # columns from which on the engine of large problems works: more than its lists hold
PATIENCE = 10.0  # seconds for one answer
START = 300.0  # seconds for imports and compilation
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


def _serve(connection: Any) -> None:
    import torch

    import couplings

    torch.set_num_threads(1)
    couplings.warmup()
    connection.send(None)
    with contextlib.suppress(EOFError):  # the one who asked has ended
        while True:
            method, *which = connection.recv()
            connection.send(answer(method, problem(*which)[1]))


def ask(child: Child, method: str, seed: int, kinds: tuple[str, ...]) -> Answer:
    """Let the child solve a problem, or say why it did not."""
    try:
        if not child.running:
            child.start()
            child.receive(START)
        child.send((method, seed, kinds))
        return child.receive(PATIENCE)
    except Ended as error:
        return "failed", str(error), 0.0


def solve(share: float, methods: tuple[str, ...] = METHODS, kinds: tuple[str, ...] = tuple(KINDS)) -> Outcome:
    """Solve the first of 100,000 problems with every method; seed and number of a problem are the same."""
    problems, answered, lost = sized(PROBLEMS, share), 0, []
    refused, solved = Counter(), Counter()
    with Child(_serve) as child:
        for seed in range(problems):
            kind, cost = problem(seed, kinds)
            # Couplings are of as many rows as columns.
            square, wide = cost.shape[0] == cost.shape[1], cost.shape[1] >= WIDE
            asked = [name for name in methods if {"solver": True, "engine": wide}.get(name, square)]
            answers = {method: ask(child, method, seed, kinds) for method in asked}
            for method, what in failures(cost, answers).items():
                lost.append(f"seed {seed}, {kind} of shape {cost.shape}, {method}: {what}")
            refused.update(f"{method}, {kind}" for method, (status, *_) in answers.items() if status == "refused")
            solved[kind] += 1
            answered += len(answers)
    counts = {"refused": dict(sorted(refused.items())), "solved": dict(sorted(solved.items()))}
    return Outcome.of(answered, lost, problems=problems, methods=list(methods), **counts)


PARTS = {"fuzz": solve}
