"""Sinkhorn against POT's plan, its unit of entropy, and the draws from the plan."""

import logging
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from couplings import couple
from couplings.ablation.sources import photo_crops
from couplings.assigners import sinkhorn


def crops(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return photo_crops(n, 32, generator)[0].flatten(1), torch.randn(n, 3072, generator=generator)


def cost_of(n, seed=0):
    data, noise = crops(n, seed)
    return -2 * data @ noise.T


def plan_of(cost, reg=0.2, max_iterations=2000):
    return sinkhorn._solve(sinkhorn._scaled(cost, reg), max_iterations)


def matrix(plan):
    return plan.u[:, None].double() * plan.kernel * plan.v


@pytest.fixture
def on_device(monkeypatch):
    """Run what runs away from the CPU."""
    monkeypatch.setattr(sinkhorn, "_balance_on_cpu", sinkhorn._balance)


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize(("n", "reg"), [(1, 0.2), (2, 0.2), (7, 1.0), (64, 5.0), (64, 0.2), (100, 0.3)])
def test_the_plan_is_that_of_pot(request, device, n, reg):
    ot = pytest.importorskip("ot")
    if device == "other":
        request.getfixturevalue("on_device")
    plan = plan_of(cost_of(n), reg)
    mass = np.ones(n) / n
    expected = ot.sinkhorn(mass, mass, plan.scaled.double().numpy(), 1.0, "sinkhorn_log", 20_000, 1e-7)
    ours = matrix(plan) / n
    assert plan.error <= 1e-5
    assert (ours - torch.from_numpy(expected)).abs().sum() < 1e-3
    assert (ours.sum(1) * n - 1).abs().max() < 1e-5
    assert (ours.sum(0) * n - 1).abs().mean() < 1.2e-5


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize("reg", [0.003, 0.02])
def test_scalings_beyond_float32_are_put_into_the_kernel(request, device, reg):
    if device == "other":
        request.getfixturevalue("on_device")
    plan = plan_of(cost_of(96), reg)
    assert plan.log_v.max() - plan.log_v.min() > 60
    conditional = torch.softmax(plan.log_v.double() - plan.scaled, 1)
    assert (conditional.sum(0) - 1).abs().mean() < 1e-3
    assert (conditional - matrix(plan)).abs().max() < 1e-2


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_huge_entries_leave_finite_plans(request, device):
    if device == "other":
        request.getfixturevalue("on_device")
    for huge in (1e30, -1e30):
        cost = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
        cost[2, 3] = huge
        plan = plan_of(cost, max_iterations=200)
        assert matrix(plan).isfinite().all()
        assert plan.error < 1e-2
        assert (matrix(plan)[2, 3] > 0.9) == (huge < 0)


def test_acceleration_saves_most_of_the_iterations():
    ot = pytest.importorskip("ot")
    plan = plan_of(cost_of(256))
    mass = np.ones(256) / 256
    _, log = ot.sinkhorn(mass, mass, plan.scaled.double().numpy(), 1.0, stopThr=1e-5 / 16, log=True)
    assert plan.iterations < log["niter"] / 2


def test_the_unit_is_the_standard_deviation_of_normal_entries():
    for n in (16, 64, 300):
        cost = 7 * torch.randn(n, n, generator=torch.Generator().manual_seed(n))
        moved = cost + 50 * torch.arange(n)[:, None] - 30 * torch.arange(n)
        assert sinkhorn.deviation(cost) == pytest.approx(7, rel=0.08)
        assert sinkhorn.deviation(moved) == pytest.approx(float(sinkhorn.deviation(cost)), rel=0.01)


def test_the_unit_is_near_the_standard_deviation_of_crops():
    for n in (64, 512):
        cost = cost_of(n)
        centred = cost - cost.mean(1, keepdim=True) - cost.mean(0) + cost.mean()
        assert 0.7 < sinkhorn.deviation(cost) / centred.std() < 0.9


@pytest.mark.parametrize("cost", [torch.zeros(5, 5), torch.arange(6.0) + torch.arange(6.0)[:, None], torch.ones(1, 1)])
def test_constants_of_rows_and_columns_have_no_deviation(cost):
    assert sinkhorn.deviation(cost) == 1
    assert len(set(sinkhorn.assign(cost).index.tolist())) == len(cost)


def test_equal_rows_leave_the_unit_of_the_others():
    cost = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    cost[:45] = cost[0]
    assert sinkhorn.deviation(cost) == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("weight", [30.0, 100.0, 1e3, 1e6])
@pytest.mark.parametrize("classes", [2, 4, 10])
@pytest.mark.parametrize("dimensions", [32, 3072])
def test_a_heavy_condition_leaves_the_saving_within_its_classes(weight, classes, dimensions):
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(128, dimensions, generator=generator) for _ in range(2))
    labels = torch.arange(128) % classes
    within = couple(data, noise, "sinkhorn", condition=labels).reduction
    heavy = couple(data, noise, "sinkhorn", condition=one_hot(labels).float(), condition_weight=weight).reduction
    assert heavy > 0.8 * within


@pytest.mark.parametrize("distance", [100.0, 1e6])
def test_a_far_row_leaves_the_saving_of_the_others(distance):
    data, noise = crops(128)
    plain = couple(data, noise, "sinkhorn")
    far = data.clone()
    far[0] += distance
    coupled = couple(far, noise, "sinkhorn")

    def saving(index):
        before, after = ((data - paired)[1:].square().sum() for paired in (noise, noise[index]))
        return 1 - after / before

    assert saving(coupled.index) > 0.8 * saving(plain.index) > 0


def test_a_few_huge_entries_leave_the_saving():
    cost = cost_of(128)
    spoilt = cost.clone()
    spoilt.view(-1)[::97] = 1e12
    plain, coupled = (sinkhorn.assign(c).index for c in (cost, spoilt))
    rows = torch.arange(128)
    assert spoilt[rows, coupled].max() < 1e12

    def saving(index):
        return (cost.diagonal() - cost[rows, index]).sum()

    assert saving(coupled) > 0.8 * saving(plain) > 0


@pytest.mark.parametrize("reg", [0.003, 0.2, 2.0])
def test_rows_are_drawn_from_their_conditionals(reg):
    cost = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    plan = plan_of(cost, reg)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sinkhorn._draw(plan, generator, replace=True) for _ in range(4000)])
    frequencies = torch.stack([(draws == j).double().mean(0) for j in range(4)], 1)
    assert (frequencies - matrix(plan)).abs().max() < 0.04


@pytest.mark.parametrize("reg", [0.2, 2.0])
def test_rows_without_replacement_draw_among_the_columns_left(reg):
    cost = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    plan = plan_of(cost, reg)
    conditional = matrix(plan).tolist()
    law = {}
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        first, second, third = order
        for a in range(3):
            for b in {0, 1, 2} - {a}:
                (c,) = {0, 1, 2} - {a, b}
                share = conditional[second][b] / (conditional[second][b] + conditional[second][c])
                key = tuple(column for _, column in sorted(zip((first, second, third), (a, b, c), strict=True)))
                law[key] = law.get(key, 0) + conditional[first][a] * share / 6
    generator = torch.Generator().manual_seed(0)
    draws = [tuple(sinkhorn._draw(plan, generator, replace=False).tolist()) for _ in range(6000)]
    for key, probability in law.items():
        assert draws.count(key) / 6000 == pytest.approx(probability, abs=0.03)


def test_columns_of_which_the_kernel_has_vanished_are_drawn_by_their_logarithms():
    # Both rows prefer column 0; the one that comes second must take one of the others, in the ratio e to 1.
    scaled = torch.tensor([[0.0, 200.0, 201.0]] * 3)
    ones = torch.ones(3)
    plan = sinkhorn.Plan(scaled, torch.zeros(3), torch.exp(-scaled), ones, ones, 0.0, 1)
    generator = torch.Generator().manual_seed(0)
    orders, counts = 3000, 0
    for _ in range(orders):
        index = sinkhorn._draw(plan, generator, replace=False)
        assert sorted(index.tolist()) == [0, 1, 2]
        counts += int(index[1] == 1)
    # Row 1 gets column 1 where it comes second, with e / (1 + e), or last, with the rest.
    assert counts / orders == pytest.approx(1 / 3, abs=0.04)
    fixed = np.array([0, 1, 2])
    from couplings.kernels.sinkhorn import draw

    arrays = [t.numpy() for t in (plan.kernel, plan.u, plan.v, plan.scaled, plan.log_v)]
    second = [draw(*arrays, fixed, np.array([0.5, uniform, 0.5]), False)[1] for uniform in np.linspace(0, 0.999, 1000)]
    assert second.count(1) / 1000 == pytest.approx(np.e / (1 + np.e), abs=2e-3)


def test_the_last_uniform_number_below_one_draws_a_column():
    from couplings.kernels.sinkhorn import draw

    plan = plan_of(torch.rand(9, 9, generator=torch.Generator().manual_seed(0)))
    arrays = [t.numpy() for t in (plan.kernel, plan.u, plan.v, plan.scaled, plan.log_v)]
    index = draw(*arrays, np.arange(9), np.full(9, np.nextafter(1.0, 0.0)), False)
    assert sorted(index) == list(range(9))


def test_what_did_not_converge_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(sinkhorn, "_logged", set())
    with caplog.at_level(logging.WARNING, "couplings"):
        for _ in range(3):
            sinkhorn.assign(cost_of(32), reg=0.01, max_iterations=2)
        assert len(caplog.records) == 1
        assert "2 iterations at reg=0.01" in caplog.text
        sinkhorn.assign(cost_of(32), reg=0.02, max_iterations=2)
    assert len(caplog.records) == 2


def test_rows_are_not_drawn_from_a_plan_that_did_not_converge():
    with pytest.raises(RuntimeError, match="did not converge in 2 iterations"):
        sinkhorn.assign(cost_of(32), reg=0.01, draw="rows", max_iterations=2)


def test_the_cost_is_not_modified_and_float64_is_taken():
    cost = cost_of(40).double()
    kept = cost.clone()
    index, single = (
        sinkhorn.assign(matrix, generator=torch.Generator().manual_seed(0)).index for matrix in (cost, cost.float())
    )
    assert torch.equal(cost, kept)
    assert torch.equal(index, single)


def test_warning_filters_of_the_process_are_left_alone(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(warnings, "catch_warnings", refuse)
    sinkhorn.assign(cost_of(16))
