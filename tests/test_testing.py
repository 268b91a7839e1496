"""The checks catch what is planted, let pass what keeps the law, and the strategies know their optimum."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import brute_force, distances, paired, rows_of

from couplings import Coupling, couple
from couplings.testing import (
    MarginalError,
    MarginalReport,
    batches,
    check_coupler,
    check_marginal,
    convex_gradients,
    planted_permutations,
    sorted_1d,
    translations,
)


def own(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(x):
    return x.flatten(1)


# Functions that keep the law.


def with_replacement(generator):
    return lambda data, noise: noise[torch.randint(len(noise), (len(noise),), generator=generator)]


def shuffled(generator):
    return lambda data, noise: noise[torch.randperm(len(noise), generator=generator)]


def resampled_by_sinkhorn(generator):
    return lambda data, noise: couple(data, noise, "sinkhorn", draw="rows", reg=1.0, generator=generator).noise


KEEPING = {
    "identity": lambda data, noise: noise,
    "identity of a copy": lambda data, noise: noise.clone(),
    "a fixed shuffle": lambda data, noise: noise.flip(0),
    "a random shuffle": shuffled(own()),
    "a coupling": lambda data, noise: couple(data, noise).noise,
    "a Coupling": Coupling("greedy", metric="l2"),
    "couple itself": couple,
    "rows drawn with replacement": with_replacement(own()),
    "rows drawn from a plan": resampled_by_sinkhorn(own()),
    "a coupling within the class": lambda data, noise, condition: couple(data, noise, condition=condition).noise,
    "a shuffle across classes": lambda data, noise, c: shuffled(own(1))(data, noise),
    "the condition by keyword": lambda data, noise, *, condition: couple(data, noise, condition=condition).noise,
}


@pytest.mark.parametrize("name", KEEPING)
def test_check_coupler_passes_what_keeps_the_law(name):
    if "plan" in name:
        pytest.importorskip("ot")
    drawn = "drawn" in name
    report = check_coupler(KEEPING[name], marginal="resampled" if drawn else "permutation")
    assert report.passed
    assert report.permutation == (not drawn)


# Functions that break it, and the word in the report that says how.


def dropped(target, source, coupled):
    def fn(data, noise):
        out = couple(data, noise).noise if coupled else noise.clone()
        out[target] = out[source]
        return out

    return fn


def largest_replaced(data, noise):
    out, norms = noise.clone(), rows(noise).norm(dim=1)
    out[norms.argmax()] = out[norms.argmin()]
    return out


def best_of(k, score, generator):
    def fn(data, noise):
        candidates = torch.randint(len(noise), (len(noise), k), generator=generator)
        best = score(rows(data)[:, None], rows(noise)[candidates]).argmin(1)
        return noise[candidates[torch.arange(len(noise)), best]]

    return fn


def by_class(key):
    """A permutation that hands the classes their noise in the order of some key."""
    return lambda data, noise, c: noise[key(rows(noise)).argsort()][c.argsort(stable=True).argsort()]


def half_blind(data, noise, condition):
    out = noise.clone()
    out[:8] = couple(data[:8], noise[:8]).noise
    return out


def wrong_stride(data, noise):
    return noise.repeat_interleave(2, 0)[: len(noise)]


BREAKING = {
    "rescaled by 2 percent": (lambda data, noise: 1.02 * noise, "variance"),
    "shifted by 5 percent": (lambda data, noise: noise + 0.05, "mean"),
    "normalised per batch": (lambda data, noise: (noise - noise.mean()) / noise.std(), "not rows of the noise"),
    "clipped": (lambda data, noise: noise.clamp(-3, 3), "not rows of the noise"),
    "rounded": (lambda data, noise: noise.half().float(), "not rows of the noise"),
    "fresh": (lambda data, noise: torch.randn(noise.shape, generator=own(5)), "not rows of the noise"),
    "the data": (lambda data, noise: data, "not rows of the noise"),
    "small norms": (best_of(4, lambda x, y: y.norm(dim=2), own()), "norm"),
    "large norms": (best_of(2, lambda x, y: -y.norm(dim=2), own()), "norm"),
    "best of 2 by distance": (best_of(2, lambda x, y: (x - y).norm(dim=2), own()), "mean"),
    "best of 2 by inner product": (best_of(2, lambda x, y: -(x * y).sum(2), own()), "mean"),
    "nearest of all": (lambda data, noise: noise[torch.cdist(rows(data), rows(noise)).argmin(1)], "mean"),
    "nearest by cosine": (best_of(4, lambda x, y: -torch.cosine_similarity(x, y, dim=2), own()), "mean"),
    "first row dropped": (lambda data, noise: noise[1:], "returned shape"),
    "a row too many": (lambda data, noise: torch.cat([noise, noise[:1]]), "returned shape"),
    "flattened": (lambda data, noise: rows(noise), "returned shape"),
    "first row replaced": (dropped(0, 1, False), "use of rows"),
    "last row replaced after a coupling": (dropped(-1, 0, True), "mean"),
    "largest row replaced": (largest_replaced, "norm"),
    "half of the rows twice": (wrong_stride, "use of rows"),
    "one row for all": (lambda data, noise: noise[:1].expand_as(noise), "use of rows"),
    "NaN": (lambda data, noise: noise * torch.nan, "NaN"),
    "another dtype": (lambda data, noise: noise.double(), "float64"),
    "an array": (lambda data, noise: noise.numpy(), "ndarray"),
    "nothing": (lambda data, noise: None, "NoneType"),
    "noise modified in place": (lambda data, noise: noise.mul_(1.0).add_(1e-3).sub_(1e-3).mul_(1.5), "inputs"),
    "data modified in place": (lambda data, noise: couple(data.mul_(2), noise).noise, "inputs"),
    "blind to the class": (lambda data, noise, condition: couple(data, noise).noise, r"mean \| class 0"),
    "blind to the class in a quarter": (half_blind, r"mean \| class 1"),
    "class added": (lambda data, noise, c: noise + 0.1 * c[:, None, None, None], r"mean \| class 1"),
    "sorted by class": (by_class(lambda y: y[:, 0]), r"mean \| class"),
    "norms by class": (by_class(lambda y: y.norm(dim=1)), r"norm \| class"),
    "correlation by class": (by_class(lambda y: y[:, 0] * y[:, 1]), r"correlation \| class"),
    "tails by class": (by_class(lambda y: y.pow(4).sum(1) - 3 * y.square().sum(1)), r"kurtosis \| class"),
}


@pytest.mark.parametrize("name", BREAKING)
def test_check_coupler_catches(name):
    fn, word = BREAKING[name]
    with pytest.raises(AssertionError, match=word) as caught:
        check_coupler(fn)
    report = caught.value.report
    assert not report.passed
    assert not report.permutation or "class" in name
    assert str(report) == str(caught.value)


def test_check_coupler_finds_a_leak_in_a_function_of_two_arguments():
    def blind(data, noise):
        return couple(data, noise).noise

    assert check_coupler(blind).passed
    with pytest.raises(MarginalError, match="class"):
        check_coupler(blind, condition=True)
    with pytest.raises(MarginalError, match="class 7"):
        check_coupler(blind, condition=torch.tensor([3, 7] * 20))


def test_check_coupler_takes_own_data_and_classes():
    labels = torch.arange(48) % 3
    data = torch.randn(48, 1, 4, 4, generator=own(), dtype=torch.float64) + 3 * labels[:, None, None, None]

    def blind(x, noise, condition):
        assert torch.equal(x, data)
        assert torch.equal(condition, labels)
        assert noise.dtype is torch.float64
        return couple(x, noise).noise

    with pytest.raises(MarginalError, match="class 2"):
        check_coupler(blind, data=data, condition=labels)
    assert check_coupler(Coupling("auction"), data=data, condition=labels).rows == 48


def test_check_coupler_tells_the_classes_to_a_third_argument_that_may_be_left_out():
    def within(data, noise, labels=None):
        return couple(data, noise, condition=labels).noise

    assert check_coupler(within, condition=True).passed
    assert not any("class" in s.name for s in check_coupler(within).statistics)


def test_a_random_row_lost_breaks_a_permutation_but_not_the_law():
    generator = own()

    def fn(data, noise):
        order = torch.randperm(len(noise), generator=generator)
        order[0] = order[1]
        return noise[order]

    assert check_coupler(fn, marginal="resampled").passed
    with pytest.raises(MarginalError, match="multiset"):
        check_coupler(fn)
    assert check_coupler(fn, marginal="selected").passed


def argmin(cost, *, generator=None):
    return cost.argmin(1)


def reverse(cost, *, generator=None):
    return torch.arange(len(cost) - 1, -1, -1)


def drawn(cost, *, generator=None):
    return torch.randint(cost.shape[1], (len(cost),), generator=generator)


def small(data, noise, *, generator=None, among=2):
    """Of a few rows drawn at random, the one of least norm."""
    candidates = torch.randint(len(noise), (len(data), among), generator=generator)
    return candidates.gather(1, noise[candidates].norm(dim=2).argmin(1, keepdim=True)).squeeze(1)


@pytest.mark.parametrize(
    ("method", "options", "marginal"),
    [
        ("auction", {}, "permutation"),
        ("AUCTION", {"metric": "l1", "quantize": "int8"}, "permutation"),
        ("auction", {}, "resampled"),
        ("auction", {}, "selected"),
        ("sinkhorn", {"draw": "rows", "reg": 1.0}, "resampled"),
        ("nearest", {}, "selected"),
        ("nearest", {"score": "dot"}, "selected"),
        (reverse, {}, "permutation"),
        (drawn, {}, "resampled"),
        (argmin, {}, "selected"),
        (small, {"needs": "points", "among": 3}, "selected"),
    ],
)
def test_check_marginal_passes_a_kept_promise(method, options, marginal):
    if method == "sinkhorn":
        pytest.importorskip("ot")
    report = check_marginal(method, marginal=marginal, **options)
    assert isinstance(report, MarginalReport)
    assert report.marginal == marginal
    assert report.permutation == (method in ("auction", "AUCTION", reverse))


@pytest.mark.parametrize(
    ("method", "options", "marginal", "word"),
    [
        ("nearest", {}, "permutation", "multiset"),
        ("nearest", {}, "resampled", "norm"),
        ("nearest", {"score": "dot"}, "resampled", "variance"),
        ("sinkhorn", {"draw": "rows", "reg": 1.0}, "permutation", "multiset"),
        (argmin, {}, "permutation", "multiset"),
        (argmin, {}, "resampled", "mean"),
        (drawn, {}, "permutation", "multiset"),
        (small, {"needs": "points"}, "resampled", "norm"),
        (lambda cost, *, generator=None: torch.zeros(len(cost)).long(), {}, "resampled", "use of rows"),
        (lambda cost, *, generator=None: torch.arange(len(cost)) + 1, {}, "permutation", "returned rows"),
        (lambda cost, *, generator=None: torch.arange(len(cost) - 1), {}, "selected", "shape"),
        (lambda cost, *, generator=None: cost.argmax(1).clamp_min(1 * (len(cost) > 1)), {}, "resampled", "mean"),
    ],
)
def test_check_marginal_catches_a_broken_promise(method, options, marginal, word):
    if method == "sinkhorn":
        pytest.importorskip("ot")
    with pytest.raises(AssertionError, match=word) as caught:
        check_marginal(method, marginal=marginal, **options)
    assert caught.value.report.failures


def test_check_marginal_sees_a_permutation_that_is_one_only_for_distinct_rows():
    def by_rank(cost, *, generator=None):
        # Ranks of the column means with ties: equal noise rows share a rank.
        means = cost.double().mean(0)
        return (means[:, None] > means[None]).sum(1)

    with pytest.raises(MarginalError, match="multiset"):
        check_marginal(by_rank)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"marginal": "permuted"}, ValueError, "Did you mean 'permutation'"),
        ({"batches": 2}, ValueError, "at least 8.*2"),
        ({"false_alarm": 0.0}, ValueError, "probability.*0.0"),
        ({"needs": "costs"}, ValueError, "Did you mean 'cost'"),
        ({"method": "auctoin"}, ValueError, "Did you mean 'auction'"),
        ({"reg": 0.1}, TypeError, "reg"),
        ({"method": "sinkhorn", "reg": -1.0}, ValueError, "reg"),
    ],
)
def test_wrong_arguments_are_errors_and_not_failed_checks(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        check_marginal(**{"method": "auction", **arguments})
    assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize("arguments", [{"condition": torch.zeros(4)}, {"data": torch.zeros(3).long()}, {"batches": 1}])
def test_check_coupler_refuses_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        check_coupler(lambda data, noise: noise, **arguments)


def test_an_error_of_the_function_is_not_swallowed():
    def broken(*args, **kwargs):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        check_coupler(broken)
    with pytest.raises(ZeroDivisionError, match="mine"):
        check_marginal(broken)


def test_report_carries_statistics_thresholds_and_p_values():
    report = check_coupler(with_replacement(own()), marginal="resampled", false_alarm=1e-4)
    assert {s.name for s in report.statistics} == {
        "mean",
        "variance",
        "norm",
        "kurtosis",
        "correlation",
        "ks",
        "use of rows",
    }
    assert sum(s.threshold for s in report.statistics) == pytest.approx(1e-4)
    for s in report.statistics:
        assert 0 <= s.p_value <= 1
        assert s.passed
        assert s.name in str(report)
    assert (report.batches, report.rows, report.dim) == (128, 32, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.batches = 0


@pytest.mark.parametrize("seed", [0, 1])
def test_checks_are_deterministic_and_leave_the_global_random_state_alone(seed):
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    first, second, other = (
        check_coupler(with_replacement(own()), marginal="resampled", seed=s) for s in (seed, seed, seed + 1)
    )
    assert first == dataclasses.replace(second, subject=first.subject)
    assert other.statistics != first.statistics
    check_marginal(drawn, marginal="resampled", seed=seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_false_alarms_stay_below_the_stated_rate():
    # Rows drawn with replacement keep the law but depend on one another within a batch. 8 or more alarms in 60 would
    # come by chance once in 100 if the rate were 0.05.
    alarms = 0
    for seed in range(60):
        try:
            check_coupler(with_replacement(own(seed)), marginal="resampled", batches=32, false_alarm=0.05, seed=seed)
        except MarginalError:
            alarms += 1
    assert alarms < 8


# The strategies.


@pytest.mark.parametrize("strategy", [translations, planted_permutations, sorted_1d, convex_gradients])
@given(draw=st.data())
def test_instances_have_the_optimum_they_name(strategy, draw):
    instance = draw.draw(strategy(max_rows=6))
    assert sorted(instance.index.tolist()) == list(range(len(instance.data)))
    assert instance.data.shape == instance.noise.shape
    for metric in instance.metrics:
        named = paired(instance.data, instance.noise[instance.index], metric)
        cost = distances(instance.data, instance.noise, "sqeuclidean" if metric == "dot" else metric)
        assert named == pytest.approx(brute_force(cost), abs=1e-5 * (1 + cost.abs().max().item()))


@given(draw=st.data(), dtype=st.sampled_from([torch.float16, torch.float64]))
def test_instances_come_in_any_dtype(draw, dtype):
    instance = draw.draw(translations(dtype=dtype))
    assert instance.data.dtype is instance.noise.dtype is dtype
    # Multiples of 1/8 are exact: the translation is the same for every row.
    assert len(torch.unique(instance.noise[instance.index] - instance.data, dim=0)) == 1


@given(batch=batches(pool=3, min_rows=2, max_rows=5, dtypes=(torch.bfloat16,)))
def test_batches_are_finite_and_of_the_size_asked_for(batch):
    data, noise = batch
    assert 2 <= len(data) <= 5
    assert len(noise) == 3 * len(data)
    assert data.shape[1:] == noise.shape[1:]
    assert data.dtype is noise.dtype is torch.bfloat16
    assert data.isfinite().all()
    assert noise.isfinite().all()


def test_checks_work_without_hypothesis_and_strategies_name_the_extra():
    program = """
import sys
sys.modules["hypothesis"] = None
from couplings import testing
assert testing.check_marginal("independent", batches=8).passed
for name in ("translations", "planted_permutations", "sorted_1d", "convex_gradients", "batches"):
    try:
        getattr(testing, name)()
    except ImportError as error:
        assert "pip install 'couplings[test]'" in str(error), error
    else:
        raise SystemExit(name)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_rows_are_seen_through_any_strides_and_types():
    column = torch.arange(6.0).reshape(2, 3).T[:, :1]  # an axis of one element, with a stride of its own
    assert rows_of(column) == rows_of(column.clone(memory_format=torch.contiguous_format))
    assert rows_of(torch.tensor(1.5, dtype=torch.bfloat16)) == rows_of(torch.tensor([1.5], dtype=torch.bfloat16))
    assert check_coupler(lambda data, noise: noise.T.contiguous().T, data=torch.zeros(32, 1)).passed
