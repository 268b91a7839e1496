"""Exact methods that are built on other packages: right or an error, and never without end."""

import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from couplings.assigners import Assignment, duality, emd, hungarian, lapjv

pytest.importorskip("ot")
pytest.importorskip("lapjv")

METHODS = {"hungarian": hungarian, "lapjv": lapjv, "emd": emd}
SQUARE = pytest.mark.parametrize("name", METHODS)
RECTANGULAR = pytest.mark.parametrize("name", ["hungarian", "lapjv"])


def solve(name, cost):
    answer = METHODS[name].assign(torch.as_tensor(cost))
    return (answer.index if isinstance(answer, Assignment) else answer).numpy()


def total(cost, columns):
    return math.fsum(np.asarray(cost)[np.arange(len(cost)), columns].tolist())


def least(cost):
    return total(cost, linear_sum_assignment(cost)[1])


def test_hard_problems_are_solved_and_none_runs_for_ever():
    program = [sys.executable, Path(__file__).parent / "problems.py", "0", "300"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.splitlines() == ["300 problems, 0 mistakes"], done.stdout + done.stderr


@SQUARE
@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_two_blocks_apart_by_huge_entries(name, scale):
    generator = torch.Generator().manual_seed(0)
    cost = scale * torch.rand(12, 12, generator=generator, dtype=torch.float64)
    best = least(cost[:6, :6]) + least(cost[6:, 6:])
    cost[:6, 6:] = cost[6:, :6] = 1e18
    assert total(cost, solve(name, cost)) == pytest.approx(best, rel=1e-6)


@RECTANGULAR
def test_near_duplicate_rows_of_a_smaller_side(name):
    # Run with a time limit by the problems above; here with the known answer.
    generator = torch.Generator().manual_seed(0)
    data = 1 + 1e-9 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    cost = (data[:, None] - noise).square().sum(2)
    assert total(cost, solve(name, cost)) == pytest.approx(least(cost), rel=1e-9)


@SQUARE
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ordinary_costs_are_solved_to_rounding_and_certified(name, dtype):
    cost = np.random.default_rng(0).standard_normal((150, 150)).astype(dtype)
    assert total(cost, solve(name, cost)) == pytest.approx(least(cost.astype(np.float64)), rel=1e-9)
    answer = METHODS[name].assign(torch.from_numpy(cost))
    if isinstance(answer, Assignment):
        assert 0 <= answer.slack < 1e-9 * abs(least(cost))


@SQUARE
def test_a_forbidden_pair_is_never_chosen(name):
    rng = np.random.default_rng(1)
    for size in (2, 5, 20, 60):
        cost = rng.random((size, size))
        forbidden = rng.random((size, size)) < 0.6
        forbidden[np.arange(size), rng.permutation(size)] = False
        cost[forbidden] = np.inf
        columns = solve(name, cost)
        assert np.isfinite(cost[np.arange(size), columns]).all()
        assert total(cost, columns) == pytest.approx(least(cost), rel=1e-9)


@RECTANGULAR
def test_a_forbidden_pair_is_never_selected(name):
    cost = np.random.default_rng(2).random((5, 9))
    cost[:, ::2] = np.inf
    cost[4, 0] = 100.0
    columns = solve(name, cost)
    assert columns[4] == 0
    assert total(cost, columns) == pytest.approx(least(cost))


@SQUARE
def test_rows_that_cannot_be_matched_are_counted(name):
    cost = np.zeros((6, 6))
    cost[:4, 1:] = np.inf
    with pytest.raises(ValueError, match="3 of 6 rows"):
        solve(name, cost)


@SQUARE
@pytest.mark.parametrize("cost", [[[7.0]], [[0.0] * 3] * 3, [[-2.0] * 4] * 4, [[1e-320, 0.0], [0.0, 1e-320]]], ids=str)
def test_trivial_costs(name, cost):
    cost = np.array(cost)
    columns = solve(name, cost)
    assert sorted(columns) == list(range(len(cost)))
    assert total(cost, columns) == least(cost)


def test_a_wrong_answer_is_an_error_not_a_result():
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solver(reduced):
        return np.roll(np.arange(8), 3), np.zeros(8)

    with pytest.raises(RuntimeError, match=r"wrong.*1e-06.*auction"):
        duality.solve(cost, solver, 20, "wrong")


def test_the_limit_of_the_network_simplex_is_an_error():
    cost = torch.rand(60, 60, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="max_iterations=3"), pytest.warns(UserWarning, match="numItermax"):
        emd.assign(cost, max_iterations=3)


def test_importing_pot_leaves_the_global_random_state(tmp_path, monkeypatch):
    (tmp_path / "ot.py").write_text("import random\n\ndrawn = random.random()\n")  # as what POT imports does
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ot", raising=False)
    before = random.getstate()
    assert 0 <= emd._pot().drawn < 1
    assert random.getstate() == before
