"""What the diagnostics measure, against SciPy and closed forms."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import paired
from scipy import stats

import couplings
from couplings import couple
from couplings.diagnostics import class_leakage, distance_reduction, marginal_drift, one_step_prediction
from couplings.testing import batches


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(batch=batches(), metric=st.sampled_from(couplings.metrics()))
def test_reduction_is_that_of_the_pairs(batch, metric):
    data, noise = batch
    after = noise.flip(0)
    found = distance_reduction(data, noise, after, metric=metric)
    assert found.before == pytest.approx(paired(data, noise, metric), rel=1e-9, abs=1e-9)
    assert found.after == pytest.approx(paired(data, after, metric), rel=1e-9, abs=1e-9)
    assert found.reduction == pytest.approx(1 - found.after / found.before if found.before else 0.0)
    assert found.metric == metric


def test_reduction_agrees_with_what_the_coupling_reports():
    data, noise = gaussian(64, 3, 4, 4), gaussian(64, 3, 4, 4, seed=1)
    for metric in couplings.metrics():
        coupled = couple(data, noise, metric=metric)
        found = distance_reduction(data, noise, coupled.noise, metric=metric)
        assert found.reduction == pytest.approx(coupled.reduction.item(), rel=1e-4)


def test_nothing_drifts_where_nothing_was_done():
    noise = gaussian(128, 3, 4, 4)
    drift = marginal_drift(noise, noise.flip(0))
    for name in ("mean", "variance", "kurtosis", "norm", "ks"):
        assert getattr(drift, name) == pytest.approx(0, abs=1e-12), name
    assert (drift.rows, drift.dim) == (128, 48)


def test_sampling_moves_the_drift_by_no_more_than_documented():
    for seed in range(20):
        drift = marginal_drift(gaussian(256, 64, seed=seed))
        size = 256 * 64
        assert abs(drift.mean) < 4 / size**0.5
        assert abs(drift.variance) < 4 * (2 / size) ** 0.5
        assert abs(drift.kurtosis) < 4.5 * (24 / size) ** 0.5
        assert abs(drift.norm) < 4 / 256**0.5
        assert drift.ks < 2.5 / size**0.5


@pytest.mark.parametrize("reference", [True, False])
def test_each_kind_of_drift_shows_in_its_own_field(reference):
    noise = gaussian(512, 64, dtype=torch.float64)
    base = marginal_drift(noise, noise if reference else None)

    def moved(changed):
        return marginal_drift(changed, noise if reference else None)

    assert moved(noise + 0.1).mean - base.mean == pytest.approx(0.1, rel=0.02)
    assert moved(1.1 * noise).variance - base.variance == pytest.approx(0.21, rel=0.02)
    assert moved(1.1 * noise).norm - base.norm == pytest.approx(0.21 * 64 / 128**0.5, rel=0.1)
    assert moved(noise.abs() * noise.sign().abs()).ks > 0.45
    tails = torch.where(noise.abs() > 2, 1.5 * noise, noise)
    assert moved(tails).kurtosis - base.kurtosis > 1


def test_norm_of_the_nearest_of_eight():
    # The least of eight squared norms: the expected minimum of eight normal numbers is -1.424 deviations.
    noise = gaussian(64 * 8, 1024)
    chosen = noise.reshape(64, 8, 1024)[torch.arange(64), noise.norm(dim=1).reshape(64, 8).argmin(1)]
    assert marginal_drift(chosen).norm == pytest.approx(-1.424, abs=0.25)


@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 2**31), scale=st.sampled_from([0.5, 1.0, 2.0]))
def test_ks_is_that_of_scipy(n, m, seed, scale):
    x, y = scale * gaussian(n, seed=seed, dtype=torch.float64), gaussian(m + 1, seed=seed + 1, dtype=torch.float64)
    y = y.mul(4).round() / 4 if seed % 2 else y  # ties
    assert marginal_drift(x).ks == pytest.approx(stats.kstest(x.numpy(), "norm").statistic, abs=1e-12)
    if y.std() > 0:
        assert marginal_drift(x, y).ks == pytest.approx(stats.ks_2samp(x.numpy(), y.numpy()).statistic, abs=1e-12)


def test_moments_are_those_of_scipy():
    noise = torch.from_numpy(np.random.default_rng(0).standard_t(9, size=(200, 5)))
    drift = marginal_drift(noise)
    assert drift.kurtosis == pytest.approx(stats.kurtosis(noise.numpy(), axis=None), rel=1e-9)
    assert drift.variance == pytest.approx(noise.numpy().var() - 1, rel=1e-9)


def test_leakage_of_unrelated_labels_is_at_chance():
    z = []
    for seed in range(30):
        labels = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(seed))
        leak = class_leakage(gaussian(90, 20, seed=seed + 100), labels, shuffles=40)
        assert leak.chance == pytest.approx(1 / 3, abs=0.05)
        assert 0 < leak.p_value <= 1
        z.append(leak.z)
    # z has mean 0 and deviation 1 if chance is judged rightly; the folds alone would give it more.
    assert abs(np.mean(z)) < 4 / 30**0.5
    assert 0.7 < np.std(z) < 1.4


@pytest.mark.parametrize(("rows", "dim"), [(400, 8), (60, 200)], ids=["more rows", "more elements"])
def test_leakage_of_a_shifted_class_is_found(rows, dim):
    labels = torch.arange(rows) % 2
    noise = gaussian(rows, dim) + 2.0 * labels[:, None]
    leak = class_leakage(noise, labels)
    assert leak.accuracy > 0.95
    assert leak.z > 4
    assert leak.p_value == pytest.approx(1 / 201)
    assert (leak.classes, leak.rows) == (2, rows)


def test_leakage_in_one_direction_of_thousands_is_found_along_the_data():
    labels = torch.arange(300) % 3
    direction = torch.nn.functional.normalize(gaussian(3, 2048, seed=1), dim=1)[labels]
    data, noise = 50 * direction + gaussian(300, 2048, seed=2), gaussian(300, 2048, seed=3) + direction
    assert class_leakage(noise, labels, data=data).z > 5
    assert class_leakage(noise, labels, data=data).z > class_leakage(noise, labels).z + 3
    assert abs(class_leakage(gaussian(300, 2048, seed=4), labels, data=data).z) < 4


def test_leakage_is_the_same_for_any_names_of_the_classes():
    labels = torch.arange(80) % 2
    noise = gaussian(80, 4) + labels[:, None]
    first, second = class_leakage(noise, labels), class_leakage(noise, (10 - 7 * labels).to(torch.int32))
    assert second.accuracy == first.accuracy
    assert second.z == pytest.approx(first.z, abs=1.5)


def test_unequal_classes_raise_chance_and_not_leakage():
    labels = (torch.arange(300) % 10 == 0).long()
    leak = class_leakage(gaussian(300, 5), labels)
    assert abs(leak.z) < 4


def test_leakage_draws_from_its_generator_only():
    labels, noise = torch.arange(40) % 2, gaussian(40, 3)
    state = torch.get_rng_state()
    assert class_leakage(noise, labels) == class_leakage(noise, labels)
    first, second = (class_leakage(noise, labels, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: marginal_drift(x.long()), TypeError, "noise.*int64"),
        (lambda x: marginal_drift(x[:0]), ValueError, r"\(0, 4\)"),
        (lambda x: marginal_drift(x * torch.nan), ValueError, "NaN"),
        (lambda x: marginal_drift(x, x[:, :3]), ValueError, "4 elements.*3"),
        (lambda x: marginal_drift(x, torch.ones(6, 4)), ValueError, "constant"),
        (lambda x: distance_reduction(x, x, x[:3]), ValueError, r"\(6, 4\).*\(3, 4\)"),
        (lambda x: distance_reduction(x, x, x, metric="l3"), ValueError, "Did you mean 'l"),
        (lambda x: distance_reduction(x, x, x, metric=torch.cdist), TypeError, "name"),
        (lambda x: class_leakage(x, torch.arange(6) / 2), TypeError, "integers.*float32"),
        (lambda x: class_leakage(x, torch.arange(5) % 2), ValueError, r"\(6,\).*\(5,\)"),
        (lambda x: class_leakage(x, torch.zeros(6).long()), ValueError, "two classes"),
        (lambda x: class_leakage(x, torch.arange(6) // 5), ValueError, "two rows each"),
        (lambda x: class_leakage(x, torch.arange(6) % 2, folds=1), ValueError, "at least 2.*1"),
        (lambda x: class_leakage(x, torch.arange(6) % 2, data=x[:, :2]), ValueError, r"\(6, 2\).*\(6, 4\)"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(gaussian(6, 4))


def test_results_are_frozen_and_arrays_are_taken():
    x = gaussian(8, 3).numpy()
    for result in (marginal_drift(x), distance_reduction(x, x, x[::-1].copy()), class_leakage(x, np.arange(8) % 2)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.ks = 0.0
        assert all(isinstance(value, int | float | str) for value in dataclasses.astuple(result))


def test_halves_and_layouts_are_measured_as_their_values():
    x = gaussian(16, 3, 4)
    assert marginal_drift(x.half()) == marginal_drift(x.half().double())
    assert marginal_drift(x.transpose(1, 2)).ks == marginal_drift(x).ks
    assert marginal_drift(x.requires_grad_()).rows == 16


@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.25, 0.75), (0.0, 1.0), (0.01, 3.0)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_model_that_knows_the_data_predicts_it_in_one_step(prediction, alpha, sigma):
    x0, epsilon = gaussian(5, 2, 3, dtype=torch.float64), gaussian(5, 2, 3, seed=1, dtype=torch.float64)
    x = alpha * x0 + sigma * epsilon
    answers = {
        "epsilon": epsilon,
        "v_prediction": alpha * epsilon - sigma * x0,
        "sample": x0,
        "flow": epsilon - x0,
    }

    def model(seen):
        assert torch.equal(seen, x)
        assert not torch.is_grad_enabled()
        return answers[prediction]

    if prediction == "epsilon" and alpha == 0.0:
        with pytest.raises(ValueError, match="no x0 follows from it"):
            one_step_prediction(model, x, prediction=prediction, alpha=alpha, sigma=sigma)
        return
    found = one_step_prediction(model, x, prediction=prediction, alpha=alpha, sigma=sigma)
    torch.testing.assert_close(found, x0)


def test_one_step_prediction_refuses_what_it_cannot_read():
    noise = gaussian(3, 4)
    with pytest.raises(ValueError, match=r"unknown prediction 'v_predicton'.*v_prediction"):
        one_step_prediction(lambda x: x, noise, prediction="v_predicton")
    with pytest.raises(ValueError, match=r"noise's shape \(3, 4\), got \(3, 2\)"):
        one_step_prediction(lambda x: x[:, :2], noise, prediction="sample")
    with pytest.raises(ValueError, match="must be finite"):
        one_step_prediction(lambda x: x, noise, prediction="sample", alpha=float("nan"))
