"""Problems that break solvers of other packages, solved by every exact method that is built on one.

``python tests/assigners/problems.py FIRST LAST`` solves the problems of these numbers and writes what went wrong.
"""

import faulthandler
import math
import sys
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from couplings.assigners import emd, hungarian, lapjv

SECONDS = 20  # for one problem, after which the process ends with a traceback
METHODS = {"hungarian": hungarian, "lapjv": lapjv, "emd": emd}


def _near_duplicates(n, m, rng):
    groups = rng.integers(1, 4)
    data = rng.standard_normal((groups, 2))[rng.integers(groups, size=n)]
    data = data + 10.0 ** rng.integers(-15, -2) * rng.standard_normal((n, 2))
    noise = rng.standard_normal((m, 2))
    squared = ((data[:, None] - noise) ** 2).sum(2)
    return [squared, np.sqrt(squared), -2 * data @ noise.T][rng.integers(3)]


def _blocks(n, m, rng):
    """Small entries where a row and a column are of one class, and one large entry or many elsewhere."""
    of_rows = rng.integers(0, 3, n)
    of_columns = rng.permutation(np.concatenate([of_rows, rng.integers(0, 3, m - n)]))
    cost = rng.random((n, m)) * 10.0 ** rng.integers(-300, 1)
    apart = of_rows[:, None] != of_columns
    cost[apart] = 10.0 ** rng.integers(1, 300) * rng.uniform(0.1, 1, apart.sum()) ** rng.integers(2)
    return cost


def _huge_entries(n, m, rng):
    return np.where(rng.random((n, m)) < 0.2, 10.0 ** rng.integers(0, 300), rng.random((n, m)))


def _bargains(n, m, rng):
    return rng.random((n, m)) - (rng.random((n, m)) < 0.2) * 10.0 ** rng.integers(0, 12)


def _offsets(n, m, rng):
    return rng.random((n, m)) + 10.0 ** rng.integers(0, 9, (n, 1)) + 10.0 ** rng.integers(0, 9, m)


FAMILIES = {
    "normal": lambda n, m, rng: rng.standard_normal((n, m)),
    "near-duplicates": _near_duplicates,
    "ties": lambda n, m, rng: rng.integers(0, 4, (n, m)).astype(float),
    "blocks": _blocks,
    "huge-entries": _huge_entries,
    "bargains": _bargains,
    "offsets": _offsets,
    "log-uniform": lambda n, m, rng: 10.0 ** rng.uniform(-300, 300, (n, m)),
    "denormal": lambda n, m, rng: rng.random((n, m)) * 1e-309,
    "largest": lambda n, m, rng: 1.7e308 * rng.uniform(-1, 1, (n, m)),
}


def problem(number):
    """Make problem number `number`: the name of its family, and an (n, m) cost."""
    rng = np.random.default_rng(number)
    n = int(rng.integers(1, 24))
    m = n + int(rng.integers(0, 8)) * int(rng.random() < 0.3)
    family = list(FAMILIES)[number % len(FAMILIES)]
    return family, FAMILIES[family](n, m, rng)


def total(cost, columns):
    return sum(Fraction(float(entry)) for entry in cost[np.arange(len(cost)), columns])


def mistakes(cost):
    """Solve a problem by every method; name those that miss the optimum by more than 1e-6 of it, or raise."""
    answers = {}
    for name, method in METHODS.items():
        if name == "emd" and len(cost) < cost.shape[1]:
            continue
        try:
            answer = method.assign(torch.from_numpy(cost.copy()))
        except RuntimeError as error:
            yield f"{name}: {error}"
            continue
        columns = (answer if name == "hungarian" else answer.index).numpy()
        if len(set(columns.tolist())) < len(cost):
            yield f"{name}: a column twice"
        answers[name] = total(cost, columns)
    # SciPy overflows at the ends of float64; any answer better than another shows that the other is wrong.
    with np.errstate(all="ignore"):
        columns = linear_sum_assignment(cost)[1]
    least = min(*answers.values(), total(cost, columns))
    rounding = Fraction(math.ulp(1.0)) * 100 * sum(abs(Fraction(float(c))) for c in cost[np.arange(len(cost)), columns])
    for name, reached in answers.items():
        if reached - least > abs(least) / 10**6 + rounding:
            yield f"{name}: above the optimum"


def main(first, last):
    """Write the mistakes in problems `first` to `last - 1`, and how many there are."""
    found = 0
    for number in range(first, last):
        family, cost = problem(number)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        for mistake in mistakes(cost):
            sys.stdout.write(f"problem {number}, {family}, {cost.shape}: {mistake}\n")
            found += 1
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.write(f"{last - first} problems, {found} mistakes\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
