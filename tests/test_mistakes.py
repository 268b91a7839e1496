"""Mistakes found in other trainers, each planted beside the library to show that its check would see it."""

import subprocess
import sys

import pytest
import torch
from oracles import distances, optimum, paired, same_bits, skip_without
from scipy.optimize import linear_sum_assignment

import couplings
from couplings import couple
from couplings.diagnostics import class_leakage, distance_reduction, marginal_drift
from couplings.testing import check_coupler, check_marginal


def images(n, size=32, seed=0):
    """Smooth random pictures of unequal brightness and contrast, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, size // 8, size // 8, generator=generator)
    contrast, brightness = torch.rand(2, n, 1, 1, 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * contrast + brightness - 0.5).clamp(-1, 1)


def gaussian(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("info", [i for i in couplings.methods() if i.exact], ids=lambda i: i.name)
def test_inverse_permutation(info):
    skip_without(info)
    data, noise = images(256), gaussian(256, 3, 32, 32)
    coupled = couple(data, noise, info.name)
    found = distance_reduction(data, noise, coupled.noise).reduction
    assert found == pytest.approx(coupled.reduction.item(), abs=1e-5)
    assert found > 0.01
    planted = noise[coupled.index.argsort()]
    assert abs(distance_reduction(data, noise, planted).reduction) < found / 5


def test_data_permuted_and_labels_forgotten():
    data, noise = images(64), gaussian(64, 3, 32, 32)
    # The label can be read off the row, so that a row that moved without its label is found.
    labels = torch.arange(64)
    data[:, 0, 0, 0] = labels / 64
    coupled = couple(data, noise)
    assert torch.equal((data[:, 0, 0, 0] * 64).long(), labels)
    assert not hasattr(coupled, "data")
    assert paired(data, coupled.noise, "sqeuclidean") == pytest.approx(coupled.cost.item(), rel=1e-5)
    planted = data[coupled.index.argsort()]
    assert paired(planted, noise, "sqeuclidean") == pytest.approx(coupled.cost.item(), rel=1e-5), (
        "the pairs are the same"
    )
    assert not torch.equal((planted[:, 0, 0, 0] * 64).long(), labels), "but the labels are not"


_MEMORY = """
import pathlib, torch
import couplings

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

def used(n, fn):
    data, noise = torch.rand(n, 3, 32, 32), torch.randn(n, 3, 32, 32)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak: compilers have been here
    before = status("VmRSS")
    fn(data, noise)
    return status("VmHWM") - before

for metric in couplings.metrics():
    for method in ("auction", "greedy"):
        fn = lambda x, y: couplings.couple(x, y, method, metric=metric)
        used(4, fn)
        print(metric, method, used(256, fn))
print("planted", "broadcast", used(64, lambda x, y: (x[:, None] - y[None]).square().flatten(2).sum(2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_broadcast_of_all_differences_in_memory():
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    used = {tuple(line.split()[:2]): int(line.split()[2]) for line in run.stdout.splitlines()}
    # The differences of 256 images are 805 MB, of 64 images 50 MB; a matrix of costs is a quarter of one.
    assert used.pop(("planted", "broadcast")) > 45e6
    assert len(used) == 2 * len(couplings.metrics())
    assert max(used.values()) < 25e6, used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", couplings.metrics())
def test_half_precision_overflow_in_high_dimension(dtype, metric):
    data, noise = gaussian(8, 65536, seed=2).to(dtype), gaussian(8, 65536).to(dtype)
    coupled = couple(data, noise, metric=metric)
    cost = distances(data, noise, "sqeuclidean" if metric == "dot" else metric)
    assert coupled.cost.isfinite()
    assert paired(data, coupled.noise, metric) == pytest.approx(optimum(cost), rel=1e-5)
    planted = (data[:, None, :] - noise[None]).square().sum(2, dtype=torch.float16)
    assert not planted.isfinite().all()


def test_half_precision_overflow_of_pixels():
    data = (127.5 * (images(32) + 1)).half()
    noise = gaussian(32, 3, 32, 32).half()
    coupled = couple(data, noise)
    cost = distances(data, noise, "sqeuclidean")
    assert paired(data, coupled.noise, "sqeuclidean") == pytest.approx(optimum(cost), rel=1e-6)
    assert not (data.flatten(1) @ data.flatten(1).T).isfinite().all(), "the planted product does not overflow"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["data", "noise"])
def test_values_that_are_not_finite_are_swallowed(bad, side):
    batch = {"data": images(8), "noise": gaussian(8, 3, 32, 32)}
    batch[side][3, 1, 2, 2] = bad
    with pytest.raises(ValueError, match=f"{side}.*row 3"):
        couple(**batch)
    planted = torch.cdist(batch["data"].flatten(1), batch["noise"].flatten(1)).nan_to_num(0.0, 0.0, 0.0)
    assert linear_sum_assignment(planted.numpy())[1].size == 8, "which goes through in silence"


@pytest.mark.parametrize("quantize", couplings.quantizers())
def test_rounding_to_codes_hides_values_that_are_not_finite(quantize):
    data, noise = images(8), gaussian(8, 3, 32, 32)
    noise[3, 1, 2, 2] = float("nan")
    for metric in ("sqeuclidean", "cosine", torch.cdist):
        with pytest.raises(ValueError, match=r"not finite|NaN"):
            couple(data, noise, metric=metric, quantize=quantize)
    planted = noise.to(torch.int8)  # NaN has no code
    assert planted.float().isfinite().all(), "which goes through in silence"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 64])
def test_distances_computed_in_half_precision(n, dtype):
    data, noise = images(n).to(dtype), gaussian(n, 3, 32, 32).to(dtype)
    cost = distances(data, noise, "l2")
    coupled = couple(data, noise, metric="l2")
    assert coupled.cost.item() == pytest.approx(optimum(cost), rel=1e-6)
    # The cost of the same pairs, rounded where the pairs are: a distance of 55 is known to 1/32 or 1/4.
    x, y = data.flatten(1), coupled.noise.flatten(1)
    planted = (x - y).norm(dim=1).float().mean().item()
    assert planted != pytest.approx(optimum(cost), rel=1e-6)


def test_l2_and_squared_l2_called_the_same():
    data, noise = images(128), gaussian(128, 3, 32, 32)
    plain, squared = couple(data, noise, metric="l2"), couple(data, noise, metric="sqeuclidean")
    differing = (plain.index != squared.index).double().mean().item()
    assert 0.02 < differing < 0.5
    assert plain.cost.item() == pytest.approx(paired(data, plain.noise, "l2"), rel=1e-6)
    assert squared.cost.item() == pytest.approx(paired(data, squared.noise, "sqeuclidean"), rel=1e-6)
    # Each is the best in its own metric; the other's pairs are worse there, if only by a little.
    assert paired(data, plain.noise, "l2") < paired(data, squared.noise, "l2")
    assert paired(data, squared.noise, "sqeuclidean") < paired(data, plain.noise, "sqeuclidean")
    assert squared.reduction > 1.5 * plain.reduction


def test_nearest_of_k_sold_as_assignment():
    data, noise = images(256), gaussian(8 * 256, 3, 32, 32)
    drift = {s: marginal_drift(couple(data, noise, "nearest", score=s).noise).norm for s in ("l2", "dot")}
    assert drift["l2"] < -0.9
    assert abs(drift["dot"]) < 0.3
    assert couple(data, noise, "nearest").marginal == "selected"
    for score in ("l2", "dot"):
        with pytest.raises(AssertionError, match="multiset"):
            check_marginal("nearest", score=score)
        with pytest.raises(AssertionError, match="mean"):
            check_marginal("nearest", marginal="resampled", score=score)
    exact = couple(data, noise[:256]).noise
    assert marginal_drift(exact, noise[:256]).norm == pytest.approx(0, abs=1e-9)


def test_pairs_drawn_with_replacement():
    # What a plan is commonly drawn with: the law is kept, but a third of the noise is not used.
    data, noise = images(64), gaussian(64, 3, 32, 32)

    def with_replacement(cost, *, generator=None):
        return torch.randint(cost.shape[1], (len(cost),), generator=generator)

    assert len(couple(data, noise, "sinkhorn").index.unique()) == 64
    assert check_marginal(with_replacement, marginal="resampled").passed
    with pytest.raises(AssertionError, match="multiset"):
        check_marginal(with_replacement)
    with pytest.raises(ValueError, match="register"):
        couple(data, noise, with_replacement)


def test_coupling_blind_to_labels():
    with pytest.raises(AssertionError, match=r"mean \| class"):
        check_coupler(lambda data, noise, condition: couple(data, noise).noise)
    assert check_coupler(lambda data, noise, condition: couple(data, noise, condition=condition).noise).passed
    labels = torch.arange(256) % 2
    data = images(256) * 0.2 + (labels - 0.5)[:, None, None, None]
    noise = gaussian(256, 3, 32, 32)
    assert class_leakage(couple(data, noise).noise, labels, data=data).z > 5
    assert abs(class_leakage(couple(data, noise, condition=labels).noise, labels, data=data).z) < 4


def _failing(cost, *, generator=None):
    raise ZeroDivisionError("the solver broke")


def _fallback(data, noise):
    try:
        return couple(data, noise, _failing)
    except ZeroDivisionError:
        return couple(data, noise, "independent")


def test_exceptions_replaced_by_independent_pairing():
    data, noise = images(8), gaussian(8, 3, 32, 32)

    def check(fn):
        with pytest.raises(ZeroDivisionError, match="the solver broke"):
            fn(data, noise)

    check(lambda x, y: couple(x, y, _failing))
    check(lambda x, y: couple(x, y, metric=lambda a, b: _failing(a)))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(_fallback)


def test_plan_that_did_not_converge_is_not_drawn_from():
    pytest.importorskip("ot")
    data, noise = 20 * images(32), gaussian(32, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"converge.*reg"):
        couple(data, noise, "sinkhorn", draw="rows", reg=1e-3, max_iterations=2)


def test_plan_too_sharp_for_floating_point_is_no_uniform_plan():
    # exp(-cost / reg) is 0 everywhere; implementations without logarithms then fall back to uniform, silently.
    pytest.importorskip("ot")
    generator = torch.Generator().manual_seed(4)
    data = torch.randn(16, 4, generator=generator)
    order = torch.randperm(16, generator=generator)
    noise = data[order]
    coupled = couple(data, noise, "sinkhorn", reg=0.003)
    assert torch.exp(-distances(data, noise, "sqeuclidean") / 0.003).float().median() == 0
    assert coupled.cost < 0.2 * coupled.cost_before


def test_a_coupling_that_rescales_its_noise():
    with pytest.raises(AssertionError, match="variance"):
        check_coupler(lambda data, noise: 1.02 * couple(data, noise).noise)


def test_returned_noise_is_a_copy_of_the_very_bits():
    # Denormals, signed zeros and the largest values survive; arithmetic on the noise would not keep them.
    data, noise = images(8, 8), gaussian(8, 3, 8, 8)
    noise[0, 0, 0, :4] = torch.tensor([1e-42, -0.0, 1e-38, -1e18])
    coupled = couple(data, noise)
    assert same_bits(coupled.noise, noise[coupled.index])
    assert not same_bits(1.0 * (noise + 0.0), noise)
