"""Conditions: noise stays within its class, or pays for leaving the neighbourhood of its condition."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import distances, multiset, optimum, paired, skip_without

import couplings
from couplings import couple
from couplings.testing import batches, check_coupler

SQUARE = [info for info in couplings.methods() if info.marginal == "permutation"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("info", SQUARE, ids=lambda i: i.name)
@given(batch=batches(), draw=st.data(), metric=st.sampled_from(couplings.metrics()))
def test_noise_of_a_class_is_the_same_multiset_after_coupling(info, batch, draw, metric):
    skip_without(info)
    data, noise = batch
    labels = torch.tensor(draw.draw(st.lists(st.integers(-2, 2), min_size=len(data), max_size=len(data))))
    coupled = couple(data, noise, info.name, metric=metric, condition=labels)
    assert coupled.marginal == "permutation"
    assert sorted(coupled.index.tolist()) == list(range(len(data)))
    assert torch.equal(labels[coupled.index], labels)
    for c in labels.unique():
        assert multiset(coupled.noise[labels == c]) == multiset(noise[labels == c])
    assert coupled.cost.item() == pytest.approx(paired(data, coupled.noise, metric), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("info", [i for i in SQUARE if i.exact], ids=lambda i: i.name)
@given(seed=st.integers(0, 2**31), metric=st.sampled_from(["sqeuclidean", "l2", "cosine", "dot"]))
def test_each_class_is_coupled_as_it_would_be_alone(info, seed, metric):
    skip_without(info)
    data, noise = gaussian(18, 4, seed=seed).double(), gaussian(18, 4, seed=seed + 1).double()
    labels = torch.randint(0, 3, (18,), generator=torch.Generator().manual_seed(seed))
    coupled = couple(data, noise, info.name, metric=metric, condition=labels)
    for c in labels.unique():
        mine = labels == c
        alone = couple(data[mine], noise[mine], info.name, metric=metric)
        assert torch.equal(coupled.noise[mine], alone.noise)
    if coupled.gap is not None:
        assert 0 <= coupled.gap <= 1e-6


def test_noise_given_the_class_stays_gaussian():
    labels = torch.arange(60) % 3
    for info in SQUARE:
        if not info.requires:

            def fn(data, noise, condition, name=info.name):
                return couple(data, noise, name, condition=condition).noise

            assert check_coupler(fn, condition=labels, batches=32).permutation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool])
def test_classes_come_in_any_integer_type(dtype):
    data, noise, labels = gaussian(10, 3), gaussian(10, 3, seed=1), torch.arange(10) % 2
    expected = couple(data, noise, condition=labels)
    assert torch.equal(couple(data, noise, condition=labels.to(dtype)).index, expected.index)


def test_conditions_come_as_arrays_too():
    data, noise = gaussian(10, 3), gaussian(10, 3, seed=1)
    for condition in (torch.arange(10) % 2, gaussian(10, 2, seed=2)):
        expected = couple(data, noise, condition=condition)
        found = couple(data.numpy(), noise.numpy(), condition=condition.numpy())
        assert isinstance(found.index, np.ndarray)
        assert (found.index == expected.index.numpy()).all()


def test_a_class_of_one_keeps_its_noise_and_one_class_is_no_condition():
    data, noise = gaussian(8, 3), gaussian(8, 3, seed=1)
    assert torch.equal(couple(data, noise, condition=torch.arange(8)).index, torch.arange(8))
    assert torch.equal(couple(data, noise, condition=torch.full((8,), 5)).index, couple(data, noise).index)


@pytest.mark.parametrize("metric", couplings.metrics())
@pytest.mark.parametrize("method", ["auction", "hungarian"])
def test_a_continuous_condition_adds_its_weighted_distance(metric, method):
    data, noise, condition = gaussian(30, 5), gaussian(30, 5, seed=1), gaussian(30, 2, seed=2)
    for weight, between in product([0.0, 0.5, 1, 20.0], ["sqeuclidean", "cosine"]):
        cost = distances(data, noise, metric) + weight * distances(condition, condition, between)
        options = {"condition_weight": weight, "condition_metric": between}
        coupled = couple(data, noise, method, metric=metric, condition=condition, **options)
        reached = cost[torch.arange(30), coupled.index].mean().item()
        assert reached == pytest.approx(optimum(cost), rel=1e-5, abs=1e-5), options
        # What is reported is the distance of data and noise alone.
        assert coupled.cost.item() == pytest.approx(paired(data, coupled.noise, metric), rel=1e-5), options


def test_defaults_of_a_continuous_condition():
    data, noise, condition = gaussian(30, 5), gaussian(30, 5, seed=1), gaussian(30, 2, seed=2)
    default = couple(data, noise, condition=condition)
    spelled = couple(data, noise, condition=condition, condition_weight=1.0, condition_metric="sqeuclidean")
    assert torch.equal(default.index, spelled.index)
    assert not torch.equal(default.index, couple(data, noise).index)


def test_a_heavy_weight_keeps_noise_with_equal_conditions():
    data, noise = gaussian(20, 5), gaussian(20, 5, seed=1)
    labels = torch.arange(20) % 4
    one_hot = torch.nn.functional.one_hot(labels).float()
    heavy = couple(data, noise, condition=one_hot, condition_weight=1e5)
    assert torch.equal(labels[heavy.index], labels)
    within = couple(data, noise, condition=labels)
    assert heavy.cost.item() == pytest.approx(within.cost.item(), rel=1e-3)


def test_conditions_far_from_the_origin_are_told_apart():
    # The expanded square of 1e4 + 0.01 cancels to nothing in float32.
    data, noise = gaussian(16, 3), gaussian(16, 3, seed=1)
    condition = 1e4 + torch.arange(16)[:, None] % 2 * 0.125
    coupled = couple(data, noise, condition=condition, condition_weight=1e6)
    assert torch.equal(condition[coupled.index], condition)


@pytest.mark.parametrize("condition", [torch.arange(8) % 2, gaussian(8, 2)], ids=["classes", "continuous"])
def test_methods_that_do_not_move_noise_between_rows_need_no_condition(condition):
    data, noise = gaussian(8, 3), gaussian(8, 3, seed=1)
    assert torch.equal(couple(data, noise, "independent", condition=condition).index, torch.arange(8))
    pool = gaussian(32, 3, seed=2)
    assert torch.equal(couple(data, pool, "nearest", condition=condition).index, couple(data, pool, "nearest").index)


def test_a_method_without_a_cost_matrix_refuses_a_continuous_condition():
    with pytest.raises(ValueError, match=r"sliced.*condition.*auction"):
        couple(gaussian(8, 3), gaussian(8, 3, seed=1), "sliced", condition=gaussian(8, 2))


@given(seed=st.integers(0, 2**31), weight=st.floats(0, 10))
def test_gap_covers_the_condition(seed, weight):
    data, noise, condition = (gaussian(12, 3, seed=seed + k).double() for k in range(3))
    coupled = couple(data, noise, condition=condition, condition_weight=weight)
    assert 0 <= coupled.gap <= 1e-6


def test_callables_take_conditions():
    data, noise, labels = gaussian(12, 3), gaussian(12, 3, seed=1), torch.arange(12) % 3
    for condition in (labels, gaussian(12, 2, seed=2)):
        coupled = couple(
            data, noise, metric=lambda x, y: torch.cdist(x, y) ** 2, condition=condition, method="hungarian"
        )
        expected = couple(data, noise, condition=condition, method="hungarian")
        assert torch.equal(coupled.index, expected.index)
        assert coupled.cost.item() == pytest.approx(expected.cost.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["uint16", "uint64", ">i4", "bool"])
def test_classes_come_in_arrays_of_any_integer_type(dtype):
    data, noise, labels = gaussian(10, 3), gaussian(10, 3, seed=1), torch.arange(10) % 2
    found = couple(data.numpy(), noise.numpy(), condition=labels.numpy().astype(dtype))
    assert (found.index == couple(data, noise, condition=labels).index.numpy()).all()


def test_classes_that_are_words_are_refused():
    with pytest.raises(TypeError, match=r"condition.*integer or floating.*U1"):
        couple(gaussian(2, 3).numpy(), gaussian(2, 3).numpy(), condition=np.array(["a", "b"]))


# A source with conditions of its own, and both kinds of condition at once.


def shuffled(x, seed=3):
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("info", SQUARE, ids=lambda i: i.name)
def test_noise_with_classes_of_its_own_goes_to_data_of_its_class(info):
    skip_without(info)
    if info.name == "independent":
        pytest.skip("pairs by position")
    data, noise = gaussian(18, 4), gaussian(18, 4, seed=1)
    labels = torch.arange(18) % 3
    of_noise = shuffled(labels)
    coupled = couple(data, noise, info.name, condition=labels, noise_condition=of_noise)
    assert torch.equal(of_noise[coupled.index], labels)
    assert coupled.marginal == "permutation"
    if info.exact:
        cost = distances(data, noise, "sqeuclidean")
        cost[labels[:, None] != of_noise[None]] = 1e6
        assert coupled.cost.item() == pytest.approx(optimum(cost), rel=1e-5)


@pytest.mark.parametrize("method", ["auction", "hungarian", "lapjv", "emd", "greedy", "stable"])
def test_a_class_of_one_row_whose_only_pair_is_forbidden_is_refused(method):
    skip_without(next(iter(couplings.methods(method))))

    def metric(x, y):
        return torch.cdist(x, y).index_put((torch.tensor(2), torch.tensor(2)), torch.tensor(float("inf")))

    with pytest.raises(ValueError, match="1 of 1 rows cannot be matched"):
        couple(gaussian(5, 3), gaussian(5, 3), method, metric=metric, condition=torch.tensor([0, 0, 1, 2, 2]))


def test_noise_tagged_as_the_data_is_the_default():
    data, noise, labels, features = gaussian(18, 4), gaussian(18, 4, seed=1), torch.arange(18) % 3, gaussian(18, 2)
    for condition in (labels, features):
        default = couple(data, noise, condition=condition)
        spelled = couple(data, noise, condition=condition, noise_condition=condition)
        assert torch.equal(default.index, spelled.index)


@pytest.mark.parametrize("between", ["sqeuclidean", "cosine"])
def test_noise_with_features_of_its_own_pays_their_distance(between):
    data, noise, features, of_noise = gaussian(30, 5), gaussian(30, 5, seed=1), gaussian(30, 2), gaussian(30, 2, seed=2)
    options = {"condition_weight": 2.0, "condition_metric": between}
    coupled = couple(data, noise, condition=features, noise_condition=of_noise, **options)
    cost = distances(data, noise, "sqeuclidean") + 2.0 * distances(features, of_noise, between)
    assert cost[torch.arange(30), coupled.index].mean().item() == pytest.approx(optimum(cost), rel=1e-5)
    assert coupled.cost.item() == pytest.approx(paired(data, coupled.noise, "sqeuclidean"), rel=1e-5)
    assert 0 <= coupled.gap <= 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"condition": torch.arange(6) % 2, "noise_condition": torch.arange(6) % 3}, "equally often.*noise_condition"),
        (
            {"condition": torch.arange(6) % 2, "noise_condition": torch.arange(5) % 2},
            r"noise_condition.*\(6,\).*\(5,\)",
        ),
        ({"condition": torch.zeros(6, 2), "noise_condition": torch.zeros(6, 3)}, "noise_condition"),
        ({"noise_condition": torch.arange(6) % 2}, "condition="),
        ({"condition": torch.arange(6) % 2, "noise_condition": torch.zeros(6, 2)}, "noise_condition"),
    ],
    ids=["other counts", "other length", "other width", "without condition", "another kind"],
)
def test_conditions_of_the_noise_that_do_not_fit_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        couple(gaussian(6, 3), gaussian(6, 3, seed=1), **call)


@pytest.mark.parametrize("method", ["auction", "hungarian", "greedy"])
def test_classes_and_features_at_once(method):
    data, noise, labels, features = gaussian(24, 4), gaussian(24, 4, seed=1), torch.arange(24) % 3, gaussian(24, 2)
    coupled = couple(data, noise, method, condition=(labels, features), condition_weight=3.0)
    assert torch.equal(labels[coupled.index], labels)
    assert torch.equal(
        coupled.index, couple(data, noise, method, condition=(labels, features), condition_weight=3.0).index
    )
    if method != "greedy":
        cost = distances(data, noise, "sqeuclidean") + 3.0 * distances(features, features, "sqeuclidean")
        cost[labels[:, None] != labels[None]] = 1e6
        assert cost[torch.arange(24), coupled.index].mean().item() == pytest.approx(optimum(cost), rel=1e-5)


def test_classes_and_features_of_the_noise_at_once():
    data, noise, labels, features = gaussian(24, 4), gaussian(24, 4, seed=1), torch.arange(24) % 3, gaussian(24, 2)
    of_noise = shuffled(labels), gaussian(24, 2, seed=7)
    coupled = couple(data, noise, condition=(labels, features), noise_condition=of_noise)
    assert torch.equal(of_noise[0][coupled.index], labels)
    cost = distances(data, noise, "sqeuclidean") + distances(features, of_noise[1], "sqeuclidean")
    cost[labels[:, None] != of_noise[0][None]] = 1e6
    assert cost[torch.arange(24), coupled.index].mean().item() == pytest.approx(optimum(cost), rel=1e-5)


@given(seed=st.integers(0, 2**31), classes=st.integers(1, 24))
def test_many_small_classes_are_each_coupled_as_alone(seed, classes):
    data, noise = gaussian(24, 4, seed=seed).double(), gaussian(24, 4, seed=seed + 1).double()
    labels = torch.randint(0, classes, (24,), generator=torch.Generator().manual_seed(seed))
    coupled = couple(data, noise, condition=labels)
    for c in labels.unique():
        mine = labels == c
        assert torch.equal(coupled.noise[mine], couple(data[mine], noise[mine]).noise)


@pytest.mark.parametrize("method", ["auction", "hungarian", "greedy", "sinkhorn", "sliced"])
@pytest.mark.parametrize("tagged", [False, True])
def test_classes_that_arrive_with_the_costs_change_nothing(method, tagged, monkeypatch):
    """As they do from a device: the costs of all pairs are made, and those within classes taken on the host."""
    data, noise, labels = gaussian(40, 6, seed=1), gaussian(40, 6, seed=2), torch.arange(40) % 5 % 3
    own = {"noise_condition": labels[torch.randperm(40, generator=torch.Generator().manual_seed(3))]} if tagged else {}
    known = couple(data, noise, method, condition=labels, **own)
    monkeypatch.setattr(couplings.conditions.Conditions, "away", True)
    assert torch.equal(couple(data, noise, method, condition=labels, **own).index, known.index)
