"""Exact methods reach the optimum, and methods that promise less are right where the optimum is plain to see."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import brute_force, distances, multiset, optimum, paired

import couplings
from couplings.testing import batches, convex_gradients, planted_permutations, sorted_1d, translations

METRICS = st.sampled_from(couplings.metrics())
WIDE = (torch.float32, torch.float64)


def tolerance(cost, dtype):
    """Rounding of a cost of this size, in the precision that it is solved in."""
    return 64 * torch.finfo(dtype).eps * max(cost.abs().max().item(), 1e-30)


def solved(metric):
    """The metric that an answer is judged by: `dot` has the optimum of `sqeuclidean`."""
    return "sqeuclidean" if metric == "dot" else metric


@given(batch=batches(max_rows=6, dtypes=WIDE), metric=METRICS)
def test_exact_methods_reach_the_optimum_over_all_permutations(exact, batch, metric):
    data, noise = batch
    coupled = exact(data, noise, metric=metric)
    cost = distances(data, noise, solved(metric))
    assert paired(data, coupled.noise, metric) <= brute_force(cost) + tolerance(cost, data.dtype)


def test_exact_methods_reach_the_optimum_of_seven_rows_over_all_permutations(exact):
    generator = torch.Generator().manual_seed(7)
    data, noise = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    cost = distances(data, noise, "l2")
    assert exact(data, noise, metric="l2").cost.item() == pytest.approx(brute_force(cost), rel=1e-9)


@given(instance=st.one_of(translations(), planted_permutations(), sorted_1d(), convex_gradients()), draw=st.data())
def test_exact_methods_solve_instances_of_known_optimum(exact, instance, draw):
    metric = draw.draw(st.sampled_from(instance.metrics))
    coupled = exact(instance.data, instance.noise, metric=metric)
    best = paired(instance.data, instance.noise[instance.index], metric)
    cost = distances(instance.data, instance.noise, solved(metric))
    assert paired(instance.data, coupled.noise, metric) == pytest.approx(best, abs=tolerance(cost, torch.float32))


@pytest.mark.parametrize("name", ["greedy", "stable"])
@given(instance=planted_permutations(), draw=st.data())
def test_greedy_and_stable_find_a_planted_permutation(name, instance, draw):
    metric = draw.draw(st.sampled_from(["sqeuclidean", "l2", "l1"]))
    coupled = couplings.couple(instance.data, instance.noise, name, metric=metric)
    assert torch.equal(coupled.index, instance.index)


@given(instance=sorted_1d(dtype=torch.float64))
def test_sliced_sorts_numbers(instance):
    coupled = couplings.couple(instance.data, instance.noise, "sliced")
    assert coupled.cost.item() == pytest.approx(paired(instance.data, instance.noise[instance.index], "sqeuclidean"))


@given(batch=batches(max_rows=16), metric=METRICS, axes=st.sampled_from(["principal", "random"]))
def test_sliced_is_never_worse_than_independent(batch, metric, axes):
    coupled = couplings.couple(*batch, "sliced", metric=metric, axes=axes, directions=3)
    assert coupled.cost <= coupled.cost_before * (1 + 1e-6)


@given(batch=batches(max_rows=10, dtypes=(torch.float64,)), metric=METRICS)
def test_stable_equals_greedy_where_there_are_no_ties(batch, metric):
    data, noise = batch
    cost = distances(data, noise, metric)
    if len(cost.unique()) == cost.numel():
        greedy, stable = (couplings.couple(data, noise, name, metric=metric) for name in ("greedy", "stable"))
        assert torch.equal(greedy.index, stable.index)


@given(batch=batches(max_rows=10, dtypes=(torch.float64,)))
def test_greedy_takes_the_smallest_remaining_entry_each_time(batch):
    data, noise = batch
    # Integers: equal entries are equal for both, whatever the order of the sum.
    data, noise = data.mul(4).round(), noise.mul(4).round()
    cost = distances(data, noise, "sqeuclidean")
    coupled = couplings.couple(data, noise, "greedy")
    left = cost.clone()
    for _ in range(len(cost)):
        pairs = cost[torch.arange(len(cost)), coupled.index]
        free = torch.isfinite(left[torch.arange(len(cost)), coupled.index])
        best = pairs.masked_fill(~free, torch.inf).argmin()
        assert pairs[best] == left.min()
        left[best], left[:, coupled.index[best]] = torch.inf, torch.inf


@given(batch=batches(max_rows=10, dtypes=(torch.float64,), pool=3), score=st.sampled_from(["l2", "dot"]))
def test_nearest_takes_the_best_of_each_rows_own_candidates(batch, score):
    data, noise = batch
    coupled = couplings.couple(data, noise, "nearest", score=score)
    cost = distances(data, noise, "sqeuclidean" if score == "l2" else "dot")
    for i, j in enumerate(coupled.index.tolist()):
        own = cost[i, 3 * i : 3 * i + 3]
        assert 3 * i <= j < 3 * i + 3
        assert cost[i, j] <= own.min() + 1e-9 * (1 + own.abs().max())


@pytest.mark.parametrize("name", ["hungarian", "auction", "lapjv"])
@given(batch=batches(max_rows=8, dtypes=WIDE, pool=2), metric=METRICS, draw=st.data())
def test_exact_methods_select_the_best_rows_of_a_larger_pool(name, batch, metric, draw):
    data, noise = batch
    noise = noise[: draw.draw(st.integers(len(data), len(noise)), label="m")]
    coupled = couplings.couple(data, noise, name, metric=metric, select=True)
    # Under `dot` the selection is that of minus the inner product: with a choice of noise, norms matter.
    cost = distances(data, noise, metric)
    reached = cost[torch.arange(len(data)), coupled.index].mean().item()
    assert reached <= optimum(cost) + tolerance(cost, data.dtype)
    assert len(coupled.index.unique()) == len(data)
    assert coupled.marginal == ("selected" if len(noise) > len(data) else "permutation")


@pytest.mark.parametrize("name", ["hungarian", "auction", "lapjv"])
@pytest.mark.parametrize("metric", couplings.metrics())
def test_norms_count_where_noise_is_selected(name, metric):
    # A constant added to a column changes no permutation, but it does change which columns are chosen.
    generator = torch.Generator().manual_seed(5)
    data, noise = torch.randn(20, 3, generator=generator), 2 * torch.randn(50, 3, generator=generator)
    coupled = couplings.couple(data, noise, name, metric=metric, select=True)
    cost = distances(data, noise, metric)
    reached = cost[torch.arange(20), coupled.index].mean().item()
    assert reached == pytest.approx(optimum(cost), abs=tolerance(cost, torch.float32))


@pytest.mark.parametrize("name", ["greedy", "stable"])
@given(batch=batches(max_rows=8, dtypes=WIDE, pool=2))
def test_matchings_select_distinct_rows_of_a_larger_pool(name, batch):
    coupled = couplings.couple(*batch, name, select=True)
    assert len(coupled.index.unique()) == len(batch[0])
    assert coupled.marginal == "selected"
    assert not multiset(coupled.noise) - multiset(batch[1])


@pytest.mark.parametrize("scale", [1e-15, 1e-7, 1e10, 1e15])
def test_the_scale_of_a_batch_changes_nothing_for_sinkhorn(scale):
    pytest.importorskip("ot")
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(48, 64, generator=generator) for _ in range(2))

    def saving(factor, dtype=torch.float32):
        batch = ((x * factor).to(dtype) for x in (data, noise))
        return couplings.couple(*batch, "sinkhorn", generator=torch.Generator().manual_seed(1)).reduction.item()

    plain = saving(1.0)
    assert plain > 0.05
    assert saving(scale, torch.float64) == pytest.approx(plain, abs=0.01)
    assert saving(scale) == pytest.approx(plain, abs=0.01)


def test_sinkhorn_nears_the_optimum_as_reg_falls():
    generator = torch.Generator().manual_seed(3)
    data, noise = (torch.randn(48, 4, generator=generator) for _ in range(2))
    least = couplings.couple(data, noise, "hungarian").cost
    costs = [couplings.couple(data, noise, "sinkhorn", reg=reg).cost for reg in (10.0, 1.0, 0.1)]
    assert costs[0] > costs[1] > costs[2] >= least
    assert costs[2] - least < 0.2 * (costs[0] - least)


def test_one_row_far_from_all_others_starts_no_price_war(exact):
    # Every row prefers any column to the far one, by a margin that bidding in small steps takes long to close.
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(12, 20, generator=generator), 1e-3 * torch.randn(12, 20, generator=generator)
    exact(data, noise, metric="l1")
    noise[0] = 1e3
    cost = distances(data, noise, "l1")
    started = time.process_time()
    coupled = exact(data, noise, metric="l1")
    assert time.process_time() - started < 1
    assert paired(data, coupled.noise, "l1") == pytest.approx(optimum(cost), rel=1e-6)
