"""The exact solver: optimal on every family, with a bound that is true, whatever ends it."""

import itertools
import math
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from couplings.kernels.assignment import bidding, paths, solve, solve_blocks
from couplings.kernels.assignment.problem import normalise
from couplings.kernels.assignment.search import Budget, Search
from tests.kernels.families import FAMILIES

SIZES = [100, 300, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 2, 3, 17, 64, 256, 257, 600))]


def family(name, n, m=None, dtype=np.float32, seed=None):
    """Return the first n rows of a problem of m columns."""
    m = m or n
    return np.ascontiguousarray(FAMILIES[name](m, np.random.default_rng(m if seed is None else seed))[:n], dtype)


def optimum(cost):
    rows, columns = linear_sum_assignment(cost.astype(np.float64))
    return math.fsum(cost[rows, columns].astype(np.float64))


def check(cost, solution, tolerance=1e-6):
    n, m = cost.shape
    assert len(set(solution.index.tolist())) == len(solution.index) == n
    assert 0 <= solution.index.min() <= solution.index.max() < m
    assert solution.total == math.fsum(cost[np.arange(n), solution.index].astype(np.float64))
    least = optimum(cost)
    # scipy adds in another order: the last bits of its total are its own.
    slack = 1e-12 * np.abs(cost).astype(np.float64).max() * n
    assert solution.lower_bound <= least + slack
    assert solution.total - least <= tolerance * abs(least) + slack


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_solved_exactly(name, n):
    for dtype in (np.float32, np.float64):
        cost = family(name, n, dtype=dtype)
        solution = solve(cost)
        check(cost, solution)
        assert solution.exact
        assert solution.gap <= 1e-6


@pytest.mark.parametrize("m", [40, 450, *(pytest.param(m, marks=pytest.mark.thorough) for m in (1, 5, 900))])
@pytest.mark.parametrize("name", FAMILIES)
def test_more_columns_than_rows(name, m):
    cost = family(name, max(1, m // 2), m)
    check(cost, solve(cost))


def test_small_problems_equal_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(1, 7))
        m = int(rng.integers(n, 8))
        cost = rng.integers(-4, 5, (n, m)).astype(np.float64)
        least = min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(m), n))
        assert solve(cost).total == least


def test_random_problems_have_no_wrong_optimum():
    rng = np.random.default_rng(0)
    for _ in range(400):
        name = list(FAMILIES)[rng.integers(len(FAMILIES))]
        n = int(rng.integers(1, 24))
        cost = np.array(FAMILIES[name](n, rng), dtype=np.float32)[: rng.integers(1, n + 1)]
        check(cost, solve(cost))


def test_the_certificate_is_tight_where_levels_lose_nothing_that_shows():
    for name in ("image-like", "points-2d", "pareto", "integers"):
        for n in (200, 300):
            solution = solve(family(name, n))
            assert solution.lower_bound <= solution.total <= solution.lower_bound + 1e-7 * abs(solution.total)


@pytest.mark.parametrize("n", [120, 300])
@pytest.mark.parametrize("name", ["image-like", "distances"])
def test_prices_prove_the_optimum(name, n):
    cost = family(name, n, dtype=np.float64)
    prices = solve(cost).prices
    bound = (cost - prices).min(1).sum() + prices.sum()
    assert bound == pytest.approx(optimum(cost), rel=1e-9)


@pytest.mark.parametrize("n", [70, 300])
@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("scale", [-1060, -1000, -880, 900])
def test_a_power_of_two_changes_no_pair(scale, huge, n):
    cost = np.random.default_rng(0).integers(0, 2**14, (n, n)) * 1.0
    plain = solve(cost)
    scaled = np.ldexp(cost, scale)
    if huge:
        scaled[0, :5] = scaled[:5, 0] = 1e308
        plain = solve(np.where(scaled == 1e308, 1e9, cost))
    solution = solve(scaled)
    assert (solution.index == plain.index).all()
    assert solution.total == math.ldexp(plain.total, scale)
    assert solution.gap <= 1e-6


@pytest.mark.parametrize("n", [70, 300])
def test_costs_near_the_largest_number_there_is(n):
    cost = (2 * np.random.default_rng(0).random((n, n)) - 1) * 1.7e308
    check(cost / 2**20, solve(cost / 2**20))
    assert np.array_equal(solve(cost).index, solve(cost / 2**20).index)


def unmatched(cost):
    """Return a search before its first bid."""
    problem = normalise(cost, 1)
    search = Search(problem, problem.ceiling or 1.0, Budget(None, None), 1)
    search.make_lists(np.zeros(problem.C.shape[1]))
    return search


@pytest.mark.parametrize("name", FAMILIES)
def test_forests_alone_reach_the_optimum(name):
    cost = family(name, 150)
    s = unmatched(cost)
    while s.left:
        before = s.left
        s.left, met = paths.grow_forest(s.costs, s.prices, s.row4col, s.col4row, s.free, before, math.ceil(before / 5))
        assert met >= before - s.left > 0
        assert sorted(np.flatnonzero(s.col4row < 0)) == sorted(s.free[: s.left])
        # Every matched row is tight, which makes the matching a least one of its rows.
        assert bidding.free_loose_rows(s.costs, s.prices, s.lists, s.row4col, s.col4row, s.free.copy()) == s.left
    least = optimum(cost)
    assert s.problem.total(s.col4row) == pytest.approx(least, rel=1e-9, abs=1e-12 * float(np.abs(cost).max()))


@pytest.mark.parametrize("density", [0.01, 0.03, 0.3])
def test_a_matching_of_tight_pairs_takes_as_many_rows_as_can_be(density):
    rng = np.random.default_rng(3)
    cost = (rng.random((130, 130)) > density).astype(np.float32)
    cost[:, 0] = 0.0  # every row has a tight pair
    s = unmatched(cost)
    tight = np.empty((130, 3), np.uint64)
    paths.mark_tight(s.costs, s.prices.exact, s.col4row, tight)
    left = paths.match_tight(tight, s.row4col, s.col4row, s.free, 130)
    assert 130 - left == (maximum_bipartite_matching(csr_array(cost == 0.0)) >= 0).sum()
    rows = np.flatnonzero(s.col4row >= 0)
    assert (cost[rows, s.col4row[rows]] == 0.0).all()
    assert (s.row4col[s.col4row[rows]] == rows).all()
    assert sorted(s.free[:left]) == np.flatnonzero(s.col4row < 0).tolist()


@pytest.mark.parametrize("limit", [{}, {"max_seconds": 1e3}])
def test_tied_rows_are_matched_by_forests(monkeypatch, limit):
    calls = []
    whole = paths.grow_forest
    monkeypatch.setattr(paths, "grow_forest", lambda *arguments: calls.append(1) or whole(*arguments))
    cost = family("blocks", 300)
    check(cost, solve(cost, **limit))
    assert calls


@pytest.mark.parametrize("limit", [{"max_bids": 0}, {"max_bids": 50}, {"max_seconds": 0.0}, {"tolerance": 0.05}])
@pytest.mark.parametrize("m", [300, 400])
def test_ending_early_leaves_distinct_columns_and_an_honest_gap(limit, m):
    cost = family("image-like", 300, m)
    solution = solve(cost, **limit)
    check(cost, solution, tolerance=math.inf)
    assert solution.gap >= (solution.total - optimum(cost)) / abs(solution.total) - 1e-9
    if "tolerance" in limit:
        assert solution.gap <= limit["tolerance"]


def test_a_tolerance_saves_bids():
    cost = family("rank-one-negative", 500)
    assert solve(cost, tolerance=0.02).bids < solve(cost).bids


@pytest.mark.parametrize("n", [80, 300])
def test_warm_start_changes_no_optimum(n):
    rng = np.random.default_rng(5)
    cost = rng.random((n, n)) + 10.0 * rng.random(n)
    first = solve(cost)
    again = solve(cost + 1e-3 * rng.random((n, n)), warm_start=first.prices)
    assert again.gap <= 1e-6
    assert solve(cost, warm_start=first.prices).total == pytest.approx(first.total, rel=1e-12)
    assert solve(cost, warm_start=1e9 * rng.standard_normal(n)).total == pytest.approx(first.total, rel=1e-6)


def test_warm_start_saves_bids_on_a_similar_problem():
    cost = family("image-like", 300)
    noise = np.random.default_rng(8).standard_normal(cost.shape)
    similar = cost + np.float32(0.05) * noise.astype(np.float32)
    warm = solve(similar, warm_start=solve(cost).prices)
    assert warm.total == pytest.approx(optimum(similar), rel=1e-9)
    assert warm.bids < 0.8 * solve(similar).bids


@pytest.mark.parametrize("name", ["image-like", "points-1d", "blocks"])
def test_threads_change_nothing(name, monkeypatch):
    monkeypatch.setattr("couplings.kernels._threads._CHUNK", 1)
    cost = family(name, 300)
    one, two = solve(cost, threads=1), solve(cost, threads=2)
    assert np.array_equal(one.index, two.index)
    assert np.array_equal(one.prices, two.prices)


def test_concurrent_solves_do_not_disturb_each_other():
    costs = [family("image-like", 300, seed=s) for s in range(6)]
    alone = [solve(cost).index for cost in costs]
    together = [None] * 6

    def run(k):
        together[k] = solve(costs[k]).index

    threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_interpreter_runs_on_during_a_solve():
    cost = family("rank-one", 900)
    solve(cost[:8, :8])
    worker = threading.Thread(target=solve, args=(cost,))
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    started = time.perf_counter()
    solve(cost)
    # With the GIL held, one pause would be as long as the kernels themselves.
    assert longest < 0.9 * (time.perf_counter() - started)


@pytest.mark.parametrize("n", [90, 300])
@pytest.mark.parametrize("view", [lambda c: c.T, lambda c: c[::-1, ::-1], lambda c: np.asfortranarray(c)])
def test_any_strides_and_the_input_stays_as_it_was(view, n):
    cost = np.random.default_rng(7).random((2, n, n)).astype(np.float32)[1]
    given = view(cost)
    before = given.copy()
    check(np.ascontiguousarray(given), solve(given))
    assert np.array_equal(given, before)


def forbid(cost, pattern):
    """Forbid pairs so that some assignment is left."""
    n, m = cost.shape
    rng = np.random.default_rng(1)
    i, j = np.arange(n)[:, None], np.arange(m)
    allowed = {
        "random": rng.random((n, m)) < 0.1,
        "band": abs(i - j) <= 1,
        "triangle": j <= i,
        "blocks": i % 3 == j % 3,
    }
    return np.where(allowed[pattern] | (i == j), cost, np.inf)[rng.permutation(n)]


@pytest.mark.parametrize("pattern", ["random", "band", "triangle", "blocks"])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 80), (300, 300), (300, 400)])
def test_forbidden_pairs_are_never_chosen(n, m, pattern):
    for name in ("image-like", "integers", "column-offsets"):
        for dtype in (np.float32, np.float64):
            cost = forbid(family(name, n, m, dtype), pattern).astype(dtype)
            solution = solve(cost)
            assert solution.exact
            assert solution.total == pytest.approx(optimum(cost), rel=1e-6)
            for limit in ({"max_bids": 10}, {"max_seconds": 0.0}, {"tolerance": 0.5}):
                assert np.isfinite(solve(cost, **limit).total)


@pytest.mark.parametrize("n", [60, 300])
def test_rows_that_cannot_be_matched_are_counted(n):
    cost = family("image-like", n)
    cost[:20, 3:] = np.inf
    with pytest.raises(ValueError, match=f"17 of {n} rows cannot be matched"):
        solve(cost)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("n", [60, 300])
def test_nan_and_minus_infinity_are_refused(n, value):
    cost = family("image-like", n)
    cost[-1, 5] = value
    with pytest.raises(ValueError, match="cost must hold numbers or"):
        solve(cost)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_are_solved_as_alone(threads, monkeypatch):
    monkeypatch.setattr("couplings.kernels._threads._CHUNK", 1)
    sizes = np.array([5, 0, 1, 300, 40, 40, 2])
    for dtype in (np.float32, np.float64):
        costs = [family("image-like", n, dtype=dtype) for n in sizes[sizes > 0]]
        costs[0] = forbid(costs[0], "band").astype(dtype)
        costs[1][:] = 1e-310 if dtype is np.float64 else 3.0
        index, slack = solve_blocks(np.concatenate([c.ravel() for c in costs]), sizes, threads=threads)
        alone = [solve(c) for c in costs]
        assert np.array_equal(index, np.concatenate([s.index for s in alone]))
        assert 0.0 <= slack <= 1e-7 * sum(abs(s.total) for s in alone)


def test_blocks_say_which_has_no_assignment():
    with pytest.raises(ValueError, match="block 1: 2 of 2 rows"):
        solve_blocks(np.array([1.0, np.inf, np.inf, np.inf, np.inf]), np.array([1, 2]))
    with pytest.raises(ValueError, match="costs must be flat"):
        solve_blocks(np.zeros(3), np.array([2]))


@pytest.mark.parametrize(
    ("cost", "error"),
    [
        (np.zeros((3, 2), np.float32), ValueError),
        (np.zeros((0, 2), np.float32), ValueError),
        (np.zeros(4, np.float32), ValueError),
        (np.zeros((2, 2), np.int64), TypeError),
        ([[1.0]], TypeError),
    ],
)
def test_what_is_no_cost_is_refused(cost, error):
    with pytest.raises(error, match="cost must be"):
        solve(cost)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"tolerance": -1.0}, ValueError, "at least 0"),
        ({"max_bids": -1}, ValueError, "at least 0"),
        ({"max_seconds": math.nan}, ValueError, "at least 0"),
        ({"max_bids": 1.5}, ValueError, "max_bids must be a whole number, got 1.5"),
        ({"max_bids": "2"}, TypeError, "max_bids must be a number, got '2'"),
        ({"warm_start": np.zeros(2)}, ValueError, "warm_start must hold a finite price"),
    ],
)
def test_options_out_of_range_are_refused(option, error, message):
    with pytest.raises(error, match=message):
        solve(np.eye(3), **option)


def test_warmup_leaves_nothing_to_compile():
    code = """
        import importlib, pkgutil
        import numpy as np
        import couplings.kernels
        couplings.kernels.warmup()
        from couplings.kernels import assignment, solve, solve_blocks
        from tests.kernels.families import FAMILIES

        def compiled():
            names = [m.name for m in pkgutil.walk_packages(couplings.kernels.__path__, "couplings.kernels.")]
            kernels = {(m, k): v for m in names for k, v in vars(importlib.import_module(m)).items()}
            return {k: len(v.signatures) for k, v in kernels.items() if hasattr(v, "signatures")}

        before = compiled()
        for dtype in (np.float32, np.float64):
            for name, family in FAMILIES.items():
                for rows, columns in ((1, 1), (3, 3), (20, 60), (70, 90), (300, 300), (200, 400)):
                    cost = np.array(family(columns, np.random.default_rng(0))[:rows], dtype=dtype)
                    solve(cost)
                    if rows == columns:
                        solve_blocks(np.tile(cost.ravel(), 2), np.array([rows, rows]))
                    if rows > 1:
                        cost[0, 1:] = np.inf
                        solve(cost)
        assert compiled() == before, {k: v for k, v in compiled().items() if v != before[k]}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=280)
