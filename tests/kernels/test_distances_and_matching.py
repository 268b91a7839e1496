"""L1 distances, distances of pairs, greedy and stable matching against plain references."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from couplings.distances import _distances, _moderate
from couplings.kernels.greedy import greedy, stable
from couplings.kernels.l1 import cdist_l1
from couplings.kernels.pairs import pair_distances
from couplings.quantization import quantized


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (3, 7, 5), (65, 130, 513), (33, 64, 3072)])
def test_l1_equals_scipy(n, m, d, dtype, threads):
    x, y = (np.random.default_rng(0).standard_normal((k, d)).astype(dtype) for k in (n, m))
    got = cdist_l1(x, y, threads=threads)
    assert got.dtype == dtype
    assert np.allclose(got, cdist(x, y, "cityblock"), rtol=1e-6 if dtype is np.float32 else 1e-12)


def test_l1_keeps_its_accuracy_in_high_dimension():
    x, y = np.random.default_rng(1).random((2, 4, 65536)).astype(np.float32) * 255
    assert np.abs(cdist_l1(x, y, threads=1) / cdist(x, y, "cityblock") - 1).max() < 1e-6


@pytest.mark.parametrize("kind", ["squared", "absolute", "angular"])
@pytest.mark.parametrize("threads", [1, 2])
def test_pairs_equal_the_entries_of_the_matrix(kind, threads, monkeypatch):
    monkeypatch.setattr("couplings.kernels._threads._CHUNK", 1)
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 300, 700)).astype(np.float32)
    index = rng.permutation(300)
    name = {"squared": "sqeuclidean", "absolute": "cityblock", "angular": "cosine"}[kind]
    expected = cdist(x, y, name)[np.arange(300), index]
    assert np.allclose(pair_distances(x, y, index, kind, threads=threads), expected, rtol=1e-6)


def test_the_cosine_of_nothing_is_zero():
    assert pair_distances(np.zeros((1, 3)), np.ones((1, 3)), np.array([0]), "angular")[0] == 1.0


def _greedy(cost):
    cost = cost.copy()
    index = np.full(len(cost), -1)
    for _ in range(len(cost)):
        i, j = np.unravel_index(np.argmin(cost), cost.shape)
        index[i] = j
        cost[i], cost[:, j] = np.inf, np.inf
    return index


@pytest.mark.parametrize("ties", [False, True])
def test_greedy_takes_the_smallest_remaining_entry(ties):
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 40))
        shape = (n, n + int(rng.integers(0, 9)))
        cost = rng.integers(0, 6, shape).astype(np.float64) if ties else rng.random(shape)
        assert np.array_equal(greedy(cost), _greedy(cost))


def test_stable_leaves_no_pair_that_would_rather_have_each_other():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 30))
        m = n + int(rng.integers(0, 5))
        cost, score = rng.random((2, n, m))
        index = stable(cost, score)
        assert len(set(index.tolist())) == n
        held = np.full(m, np.inf)
        held[index] = score[np.arange(n), index]
        wants = cost < cost[np.arange(n), index][:, None]
        assert not (wants & (score < held)).any()


def test_stable_is_greedy_where_both_sides_agree():
    cost = np.random.default_rng(3).random((50, 50))
    assert np.array_equal(stable(cost, cost), greedy(cost))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_greedy_and_stable_choose_no_forbidden_pair(dtype):
    cost = np.random.default_rng(4).random((40, 60)).astype(dtype)
    cost[:, ::3] = np.inf
    index = greedy(cost)
    assert np.isfinite(cost[np.arange(40), index]).all()
    assert np.array_equal(index, _greedy(cost))
    assert np.array_equal(index, stable(cost, cost))


def test_rows_that_greedy_cannot_match_are_counted():
    with pytest.raises(ValueError, match="1 of 2 rows cannot be matched"):
        greedy(np.array([[1.0, np.inf], [1.0, np.inf]]))
    with pytest.raises(ValueError, match="1 of 2 rows are left with forbidden pairs"):
        greedy(np.array([[1.0, 2.0], [3.0, np.inf]]))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_greedy_and_stable_refuse_what_is_no_number(value):
    cost = np.ones((3, 3))
    cost[1, 2] = value
    with pytest.raises(ValueError, match="cost must hold numbers"):
        greedy(cost)
    with pytest.raises(ValueError, match="must hold numbers"):
        stable(
            np.ones((3, 3)), np.where(np.isnan(cost), np.nan, np.inf) if np.isnan(value) else np.full((3, 3), np.nan)
        )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["squared", "absolute", "angular"])
def test_distances_away_from_the_cpu_are_those_of_the_kernel(kind, size):
    x, y = (size * torch.randn(9, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = pair_distances(x.numpy(), y.numpy(), np.arange(9), kind)
    assert _distances(x, y, kind).numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("quantizer", [None, "bf16", "fp16"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_products_of_moderate_operands_neither_vanish_nor_overflow(size, quantizer):
    x = _moderate(quantized(size * torch.randn(9, 20, generator=torch.Generator().manual_seed(0)), quantizer))
    codes = x.rows.float() @ x.rows.float().T  # as a device multiplies them
    assert 0.01 < float(codes.diagonal().min()) <= float(codes.diagonal().max()) < 1e3
