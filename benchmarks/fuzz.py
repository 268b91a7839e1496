"""Solve 100,000 random small problems and compare every answer with SciPy: ``python -m benchmarks.fuzz``.

A problem is a hard family, or random numbers of a random kind, at a random size, shape, scale and precision. A wrong
optimum, a bound above the optimum, a repeated column or a solve of more than a second is a failure. Writes
``benchmarks/results/fuzz.json``; exits 1 if there is a failure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.optimize import linear_sum_assignment

import couplings
from benchmarks.instances import HARD
from benchmarks.record import environment
from couplings.kernels.auction import solve

RESULT = Path(__file__).parent / "results" / "fuzz.json"
SLOW = 1.0  # seconds

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
}


def problem(seed: int) -> tuple[str, np.ndarray[Any, Any]]:
    """Make problem number `seed`: its kind and its cost."""
    rng = np.random.default_rng(seed)
    kind = list(KINDS)[rng.integers(len(KINDS))]
    n = int(min(rng.integers(1, 12) ** rng.uniform(1, 1.8), 90))
    cost = np.array(KINDS[kind](n, rng), dtype=np.float64)
    if rng.random() < 0.3:
        cost = cost[: rng.integers(1, n + 1)]  # more columns than rows
    if rng.random() < 0.3 and kind not in ("huge-entry", "denormal"):
        cost = cost * 10.0 ** rng.integers(-9, 10)
    if rng.random() < 0.2:
        cost = -cost
    return kind, cost.astype(np.float32 if rng.random() < 0.6 else np.float64)


def failure(cost: np.ndarray[Any, Any]) -> str | None:
    """Solve a problem; say what is wrong with the answer, if anything."""
    started = time.perf_counter()
    solution = solve(cost)
    if time.perf_counter() - started > SLOW:
        return "slow"
    n = len(cost)
    if len(set(solution.index.tolist())) != n:
        return "repeated column"
    rows, columns = linear_sum_assignment(cost.astype(np.float64))
    least = math.fsum(cost[rows, columns].astype(np.float64).tolist())
    rounding = 1e-12 * n * float(np.abs(cost).max())
    if solution.total - least > 1e-6 * abs(least) + rounding:
        return "wrong optimum"
    if solution.lower_bound > least + rounding:
        return "false bound"
    if solution.total != math.fsum(cost[np.arange(n), solution.index].astype(np.float64).tolist()):
        return "false total"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the problems and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    couplings.warmup()
    started = time.perf_counter()
    kinds: Counter[str] = Counter()
    failures = []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.problems)
    for seed in track(seeds, "solving", console=Console(stderr=True)):
        kind, cost = problem(seed)
        kinds[kind] += 1
        if (what := failure(cost)) is not None:
            failures.append({"seed": seed, "kind": kind, "shape": cost.shape, "what": what})
    record = {
        "problems": arguments.problems,
        "first_seed": arguments.first_seed,
        "failures": failures,
        "kinds": dict(sorted(kinds.items())),
        "seconds": round(time.perf_counter() - started, 1),
        **environment(threads=1, extra_path=None),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{arguments.problems} problems, {len(failures)} failures: {arguments.output}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
