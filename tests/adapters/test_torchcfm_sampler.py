"""The sampler for TorchCFM: what its own tests ask of it, and what they do not."""

import copy
import pickle

import numpy as np
import pytest
import torch

from couplings import Coupling, couple
from couplings.adapters.torchcfm import OTPlanSampler

METHODS = ("exact", "sinkhorn", "unbalanced", "partial")


def own(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=32, shape=(2, 2, 2), m=None, seed=0):
    generator = own(seed)
    return torch.randn(n, *shape, generator=generator), torch.rand(m or n, *shape, generator=generator)


def sampler(method="exact", **options):
    if method in ("unbalanced", "partial"):
        pytest.importorskip("ot")
    return OTPlanSampler(method, reg=options.pop("reg", 0.5), **options)


def rows_in(part, whole):
    """Where each row of `part` stands in `whole`."""
    return [(whole.flatten(1) == row.flatten()).all(1).nonzero().item() for row in part]


def test_the_exact_map_is_that_of_pot():
    ot = pytest.importorskip("ot")
    x0, x1 = batch(64)
    cost = torch.cdist(x0.flatten(1), x1.flatten(1)).square().numpy()
    assert np.array_equal(sampler().get_map(x0, x1), ot.emd(ot.unif(64), ot.unif(64), cost))


@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("method", METHODS)
def test_maps_between_unequal_numbers_of_rows_have_their_marginals(method, n, m):
    pytest.importorskip("ot")
    plan = sampler(method, reg=1.0).get_map(*batch(n, m=m))
    assert plan.shape == (n, m)
    if method != "unbalanced":
        assert np.allclose(plan.sum(1), 1 / n, atol=1e-4)
        assert np.allclose(plan.sum(0), 1 / m, atol=1e-4)


@pytest.mark.parametrize("reg", [0.1, 2.0])
def test_the_sinkhorn_map_is_that_of_pot_with_reg_in_units_of_the_cost(reg):
    ot = pytest.importorskip("ot")
    x0, x1 = batch(24)
    cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().numpy()
    expected = ot.sinkhorn(ot.unif(24), ot.unif(24), cost, reg, method="sinkhorn_log", numItermax=5000, warn=False)
    assert np.abs(sampler("sinkhorn", reg=reg).get_map(x0, x1) - expected).sum() < 1e-3
    scaled = ot.sinkhorn(ot.unif(24), ot.unif(24), cost / cost.max(), reg, method="sinkhorn_log", warn=False)
    assert np.abs(sampler("sinkhorn", reg=reg, normalize_cost=True).get_map(x0, x1) - scaled).sum() < 1e-3


def test_a_small_reg_nears_the_exact_map_and_never_the_uniform_one(caplog):
    x0, x1 = batch(24)
    near = sampler("sinkhorn", reg=0.01).get_map(x0, x1)
    assert np.abs(near - sampler().get_map(x0, x1)).sum() < 0.01
    assert not caplog.records
    sampler("sinkhorn", reg=1e-7, warn=False).get_map(x0, x1)
    assert not caplog.records
    plan = sampler("sinkhorn", reg=1e-7).get_map(x0, x1)
    assert "did not converge" in caplog.text
    assert plan.max(1).min() > 0.1 / 24


def test_a_plan_without_mass_is_an_error_that_says_what_to_change():
    ot = pytest.importorskip("ot")
    broken = sampler("partial")
    broken._by_pot = lambda cost: np.full_like(cost, np.nan)
    with pytest.raises(ValueError, match="reg="):
        broken.get_map(*batch(4))
    assert ot


def test_sample_map_without_replacement_takes_every_pair_of_a_permutation_once():
    plan = np.eye(64)[np.random.default_rng(0).permutation(64)] / 64
    i, j = sampler().sample_map(plan, batch_size=64, replace=False)
    rebuilt = np.zeros_like(plan)
    rebuilt[i, j] = 1 / 64
    assert np.array_equal(rebuilt, plan)
    some = sampler().sample_map(plan, batch_size=10)
    assert (plan[some] > 0).all()
    assert len(set(some[0])) == len(set(some[1])) == 10
    with pytest.raises(ValueError, match="replace=True"):
        sampler().sample_map(plan, batch_size=65)


def test_sample_map_with_replacement_draws_pairs_as_often_as_the_plan_says():
    plan = np.array([[0.5, 0.0, 0.1], [0.0, 0.25, 0.15]])
    i, j = sampler().sample_map(plan, batch_size=20_000, replace=True)
    counts = np.zeros_like(plan)
    np.add.at(counts, (i, j), 1 / 20_000)
    assert np.abs(counts - plan).max() < 0.015
    assert (counts[plan == 0] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_sample_plan_with_replacement_is_get_map_then_sample_map(method):
    x0, x1 = batch()
    one = sampler(method, generator=own(3))
    plan = one.get_map(x0, x1)
    i, j = sampler(method, generator=own(3)).sample_map(plan, 32, replace=True)
    new0, new1 = sampler(method, generator=own(3)).sample_plan(x0, x1, replace=True)
    assert torch.equal(new0, x0[i])
    assert torch.equal(new1, x1[j])
    assert len(set(i)) < 32


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_used_once_by_default_and_the_data_keep_their_order(method, shape):
    x0, x1 = batch(16, shape)
    new0, new1 = sampler(method, reg=5.0).sample_plan(x0, x1)
    assert torch.equal(new1, x1)
    assert new0.shape == x0.shape
    assert sorted(rows_in(new0, x0)) == list(range(16))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_labels_go_with_their_rows(method, replace):
    x0, x1 = batch(16)
    y0, y1 = torch.arange(16)[:, None], torch.arange(16.0) + 100
    new0, new1, of0, of1 = sampler(method).sample_plan_with_labels(x0, x1, y0, y1, replace=replace)
    assert torch.equal(x0[of0.squeeze(1)], new0)
    assert torch.equal(x1[of1.long() - 100], new1)
    assert of0.shape == y0.shape
    assert sampler(method).sample_plan_with_labels(x0, x1)[2:] == (None, None)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_condition_couples_within_classes(method, replace):
    x0, x1 = batch(24)
    classes = torch.arange(24)[:, None] % 3
    x1[classes.squeeze(1) == 1] += 1.0
    one = sampler(method, condition="y1")
    new0, _, of0, of1 = one.sample_plan_with_labels(x0, x1, classes, classes, replace=replace)
    assert torch.equal(of0, of1)
    if not replace:
        assert sorted(rows_in(new0, x0)) == list(range(24))
    blind = sampler(method).sample_plan_with_labels(x0, x1, classes, classes, replace=replace)
    assert not torch.equal(blind[2], blind[3])


def test_condition_is_what_couple_does_also_with_floating_conditions():
    x0, x1 = batch(16)
    for condition in (torch.arange(16) % 4, torch.rand(16, 3, generator=own(1))):
        expected = couple(x1, x0, condition=condition).noise
        one = sampler(condition="y1")
        assert torch.equal(one.sample_plan_with_labels(x0, x1, y1=condition)[0], expected)
    with pytest.raises(ValueError, match="integer classes"):
        sampler("sinkhorn", condition="y1").sample_plan_with_labels(x0, x1, y1=condition)


def test_a_condition_that_is_not_given_is_an_error():
    x0, x1 = batch(4)
    one = sampler(condition="y1")
    with pytest.raises(ValueError, match="sample_plan_with_labels"):
        one.sample_plan(x0, x1)
    with pytest.raises(ValueError, match="y1="):
        one.sample_plan_with_labels(x0, x1)


def test_sample_plan_with_scipy_reaches_the_optimum_and_keeps_shapes():
    from scipy.optimize import linear_sum_assignment

    x0, x1 = batch(32)
    new0, new1 = sampler().sample_plan_with_scipy(x0, x1)
    cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    assert torch.equal(new1, x1)
    assert new0.shape == x0.shape
    assert (new0 - new1).double().square().sum().item() == pytest.approx(cost[rows, columns].sum().item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_trajectories_start_in_order_and_use_every_row_of_every_time_once(method):
    populations = torch.randn(12, 4, 3, generator=own())
    path = sampler(method).sample_trajectory(populations)
    assert isinstance(path, np.ndarray)
    assert path.shape == (12, 4, 3)
    path = torch.from_numpy(path)
    assert torch.equal(path[:, 0], populations[:, 0])
    for t in range(4):
        assert sorted(rows_in(path[:, t], populations[:, t])) == list(range(12))


def test_exact_trajectories_follow_the_maps_from_one_time_to_the_next():
    populations = torch.randn(10, 3, 2, 2, generator=own(), dtype=torch.float64)
    one = sampler()
    path = torch.from_numpy(one.sample_trajectory(populations))
    index = torch.arange(10)
    for t in range(2):
        index = torch.from_numpy(one.get_map(populations[:, t], populations[:, t + 1]).argmax(1))[index]
        assert torch.equal(path[:, t + 1], populations[:, t + 1][index])


@pytest.mark.parametrize("method", METHODS)
def test_draws_come_from_a_generator_of_its_own(method):
    x0, x1 = batch(16)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is watched
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = sampler(method), sampler(method)
    first = one.sample_plan(x0, x1, replace=True)[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.equal(two.sample_plan(x0, x1, replace=True)[0], first)
    assert not torch.equal(one.sample_plan(x0, x1, replace=True)[0], first)
    assert not torch.equal(sampler(method, generator=own(9)).sample_plan(x0, x1, replace=True)[0], first)


def test_a_coupling_pairs_as_it_says():
    x0, x1 = batch(16)
    coupling = Coupling("greedy", metric="l1")
    one = OTPlanSampler(coupling)
    assert torch.equal(one.sample_plan(x0, x1)[0], coupling(x1, x0).noise)
    assert torch.equal(x0[one.get_map(x0, x1).argmax(0)], coupling(x1, x0).noise)


def test_gradients_of_the_source_are_kept():
    x0, x1 = batch(8)
    sampler().sample_plan(x0.requires_grad_(), x1)[0].sum().backward()
    assert torch.equal(x0.grad, torch.ones_like(x0))


def test_it_can_be_copied_and_pickled():
    x0, x1 = batch(16)
    one = sampler("sinkhorn")
    copies = copy.deepcopy(one), pickle.loads(pickle.dumps(one))
    expected = one.sample_plan(x0, x1)[0]
    for other in copies:
        assert torch.equal(other.sample_plan(x0, x1)[0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "exakt"}, "Did you mean 'exact'"), ({"condition": "y0"}, "Did you mean 'y1'")],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OTPlanSampler(**arguments)


@pytest.fixture(scope="module")
def flow():
    return pytest.importorskip("torchcfm.conditional_flow_matching", exc_type=ImportError)


def test_the_exact_flow_matcher_of_torchcfm_takes_it(flow):
    x0, x1 = batch(16)
    matcher = flow.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    matcher.ot_sampler = OTPlanSampler("exact")
    t = torch.full((16,), 0.25)
    _, mixed, target = matcher.sample_location_and_conditional_flow(x0, x1, t=t)
    paired = couple(x1, x0).noise
    assert torch.allclose(mixed, 0.75 * paired + 0.25 * x1)
    assert torch.allclose(target, x1 - paired)


def test_the_schroedinger_bridge_of_torchcfm_takes_it(flow):
    x0, x1 = batch(16)
    matcher = flow.SchrodingerBridgeConditionalFlowMatcher(sigma=0.5, ot_method="sinkhorn")
    matcher.ot_sampler = OTPlanSampler("sinkhorn", reg=2 * matcher.sigma**2)
    t, mixed, target = matcher.sample_location_and_conditional_flow(x0, x1)
    assert mixed.shape == target.shape == x1.shape
    assert t.shape == (16,)


def test_guided_flow_matching_of_torchcfm_couples_within_classes(flow):
    x0, x1 = batch(16)
    classes = torch.randint(4, (16, 1), generator=own())
    matcher = flow.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    matcher.ot_sampler = OTPlanSampler("exact", condition="y1")
    found = matcher.guided_sample_location_and_conditional_flow(x0, x1, y0=classes, y1=classes)
    assert torch.equal(found[3], found[4])
    assert torch.equal(found[4], classes)


def test_it_has_every_method_of_torchcfms_sampler(flow):
    import inspect

    from torchcfm.optimal_transport import OTPlanSampler as Theirs

    for name, theirs in inspect.getmembers(Theirs, inspect.isfunction):
        ours = list(inspect.signature(getattr(OTPlanSampler, name)).parameters)
        assert ours[: len(inspect.signature(theirs).parameters)] == list(inspect.signature(theirs).parameters), name
