"""Coupling over ranks makes the pairs that one process would make of the concatenated batch."""

import numpy as np
import pytest
import torch
from cases import UNEVEN, Case, couple_share, couple_whole

import couplings

METHODS = [info.name for info in couplings.methods()]
ON_COST = [info.name for info in couplings.methods() if info.needs == "cost"]
RECTANGULAR = ["hungarian", "auction", "lapjv", "greedy", "stable"]


def rows_of(world, even=False):
    return (6,) * world.size if even else UNEVEN[world.size - 1]


def assert_same(world, case, *, same_index=True):
    whole, shares = couple_whole(case), world.run(couple_share, case)
    index = np.concatenate([share["index"] for share in shares])
    noise = np.concatenate([share["noise"] for share in shares])
    if same_index:
        assert np.array_equal(index, whole.index.numpy())
    assert np.array_equal(noise, case.batch()[1].double().numpy()[index])
    for share in shares:
        assert share["marginal"] == whole.marginal
        assert share["cost"] == pytest.approx(whole.cost.item(), rel=1e-6)
        assert share["cost_before"] == pytest.approx(whole.cost_before.item(), rel=1e-6)
        assert share["gap"] == (None if whole.gap is None else pytest.approx(whole.gap, abs=1e-6))
        assert (share["cost"], share["cost_before"], share["gap"]) == (
            shares[0]["cost"],
            shares[0]["cost_before"],
            shares[0]["gap"],
        )


@pytest.mark.parametrize("method", METHODS)
def test_index_equals_that_of_one_process_on_integer_valued_inputs(world, method):
    for metric in couplings.metrics():
        assert_same(world, Case(rows_of(world), {"method": method, "metric": metric}))


@pytest.mark.parametrize("method", METHODS)
def test_cost_equals_that_of_one_process_on_images(world, method):
    for metric in couplings.metrics():
        case = Case(rows_of(world, even=True), {"method": method, "metric": metric}, values="images")
        assert_same(world, case, same_index=False)


@pytest.mark.parametrize("method", ["auction", "greedy", "sliced", "nearest"])
def test_quantizers_scale_by_the_whole_batch(world, method):
    for quantize in couplings.quantizers():
        assert_same(world, Case(rows_of(world), {"method": method, "metric": "l2", "quantize": quantize}))


@pytest.mark.parametrize("method", METHODS)
def test_classes_are_coupled_across_ranks_and_kept(world, method):
    case = Case(rows_of(world), {"method": method}, condition="classes")
    assert_same(world, case)
    _, _, labels = case.batch()
    index = np.concatenate([share["index"] for share in world.run(couple_share, case)])
    assert torch.equal(labels[index], labels)


@pytest.mark.parametrize("method", ON_COST)
@pytest.mark.parametrize("condition_metric", ["sqeuclidean", "cosine"])
def test_continuous_conditions_are_priced_across_ranks(world, method, condition_metric):
    options = {"method": method, "condition_weight": 3.0, "condition_metric": condition_metric}
    assert_same(world, Case(rows_of(world), options, condition="continuous"), same_index=condition_metric != "cosine")


@pytest.mark.parametrize("method", RECTANGULAR)
def test_spare_noise_is_selected_from_on_every_rank(world, method):
    for metric in couplings.metrics():
        assert_same(world, Case(rows_of(world), {"method": method, "metric": metric}, spare=3))


def test_nearest_chooses_among_a_rows_own_candidates(world):
    case = Case(rows_of(world), {"method": "nearest"}, candidates=4, values="images")
    whole, shares = couple_whole(case), world.run(couple_share, case)
    assert np.array_equal(np.concatenate([share["index"] for share in shares]), whole.index.numpy())
    assert [share["cost"] for share in shares] == [pytest.approx(whole.cost.item(), rel=1e-6)] * world.size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types_travel_bit_for_bit(world, dtype):
    assert_same(world, Case(rows_of(world), {"method": "auction"}, dtype=dtype))
    assert_same(world, Case(rows_of(world), {"method": "stable", "noise_rank": "dot"}, dtype=dtype))


def squared(data, noise):
    return torch.cdist(data, noise).square()


def shuffled(cost, *, generator=None):
    return torch.randperm(len(cost), generator=generator)


@pytest.mark.parametrize("condition", [None, "classes", "continuous"])
def test_callable_metric(world, condition):
    assert_same(world, Case(rows_of(world), {"metric": squared}, condition=condition), same_index=condition is None)


@pytest.mark.parametrize("condition", [None, "classes"])
def test_callable_method(world, condition):
    assert_same(world, Case(rows_of(world), {"method": shuffled}, condition=condition))


@pytest.mark.parametrize("options", [{"draw": "rows", "reg": 1.0}, {"reg": 0.05}], ids=["rows", "permutation"])
def test_options_reach_the_method(world, options):
    assert_same(world, Case(rows_of(world), {"method": "sinkhorn", **options}))
