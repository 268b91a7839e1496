"""Coupling over ranks makes the pairs that one process would make of the concatenated batch."""

import numpy as np
import pytest
import torch
from cases import Case, couple_share, couple_whole, rows_of

import couplings

METHODS = [info.name for info in couplings.methods()]
ON_COST = [info.name for info in couplings.methods() if info.needs == "cost"]
RECTANGULAR = ["hungarian", "auction", "lapjv", "greedy", "stable"]


def check_same(world, case, *, same_index=True):
    whole, shares = couple_whole(case), world.run(couple_share, case)
    index = np.concatenate([share["index"] for share in shares])
    noise = np.concatenate([share["noise"] for share in shares])
    if same_index:
        assert np.array_equal(index, whole.index.numpy()), case
    assert np.array_equal(noise, case.batch()[1].double().numpy()[index]), case
    for share in shares:
        assert share["marginal"] == whole.marginal, case
        assert share["cost"] == pytest.approx(whole.cost.item(), rel=1e-6), case
        assert share["cost_before"] == pytest.approx(whole.cost_before.item(), rel=1e-6), case
        assert share["gap"] == (None if whole.gap is None else pytest.approx(whole.gap, abs=1e-6)), case
        same = [share[name] == shares[0][name] for name in ("cost", "cost_before", "gap")]
        assert all(same), case
    return index


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_gives_the_pairs_of_one_process(ranks, size):
    world = ranks(size)
    check_same(world, Case(rows_of(world)))
    check_same(world, Case((6,) * size, {"metric": "l2"}, values="images"), same_index=False)
    check_same(world, Case(rows_of(world), condition="classes"))


@pytest.mark.parametrize("method", METHODS)
def test_index_equals_that_of_one_process_on_integer_valued_inputs(world, method):
    for metric in couplings.metrics():
        check_same(world, Case(rows_of(world), {"method": method, "metric": metric}))


@pytest.mark.parametrize("method", METHODS)
def test_cost_equals_that_of_one_process_on_images(world, method):
    for metric in couplings.metrics():
        case = Case((6,) * world.size, {"method": method, "metric": metric}, values="images")
        check_same(world, case, same_index=False)


def test_quantizers_scale_by_the_whole_batch(world):
    for method in ("auction", "greedy", "sliced", "nearest"):
        for quantize in couplings.quantizers():
            check_same(world, Case(rows_of(world), {"method": method, "metric": "l2", "quantize": quantize}))


def test_classes_are_coupled_across_ranks_and_kept(world):
    for method in METHODS:
        case = Case(rows_of(world), {"method": method}, condition="classes")
        index = check_same(world, case)
        _, _, labels = case.batch()
        assert torch.equal(labels[index], labels), method


@pytest.mark.parametrize("condition_metric", ["sqeuclidean", "cosine"])
def test_continuous_conditions_are_part_of_the_cost_across_ranks(world, condition_metric):
    for method in ON_COST:
        options = {"method": method, "condition_weight": 3.0, "condition_metric": condition_metric}
        case = Case(rows_of(world), options, condition="continuous")
        check_same(world, case, same_index=condition_metric != "cosine")


def test_spare_noise_is_selected_from_on_every_rank(world):
    for method in RECTANGULAR:
        for metric in couplings.metrics():
            check_same(world, Case(rows_of(world), {"method": method, "metric": metric}, spare=3))


def test_nearest_chooses_among_a_rows_own_candidates(world):
    case = Case(rows_of(world), {"method": "nearest"}, candidates=4, values="images")
    whole, shares = couple_whole(case), world.run(couple_share, case)
    assert np.array_equal(np.concatenate([share["index"] for share in shares]), whole.index.numpy())
    assert [share["cost"] for share in shares] == [pytest.approx(whole.cost.item(), rel=1e-6)] * world.size


def test_other_types_travel_bit_for_bit(world):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        check_same(world, Case(rows_of(world), {"method": "auction"}, dtype=dtype))
        check_same(world, Case(rows_of(world), {"method": "stable", "noise_rank": "dot"}, dtype=dtype))


def squared(data, noise):
    return torch.cdist(data, noise).square()


def shuffled(cost, *, generator=None):
    return torch.randperm(len(cost), generator=generator)


@pytest.mark.parametrize("condition", [None, "classes", "continuous"])
def test_callables_are_used_on_every_rank(world, condition):
    check_same(world, Case(rows_of(world), {"metric": squared}, condition=condition), same_index=condition is None)
    if condition != "continuous":
        check_same(world, Case(rows_of(world), {"method": shuffled}, condition=condition))


def test_options_reach_the_method(world):
    for options in ({"draw": "rows", "reg": 1.0}, {"reg": 0.05}):
        check_same(world, Case(rows_of(world), {"method": "sinkhorn", **options}))
