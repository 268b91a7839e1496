"""Rounding the operands of the cost: as documented, without overflow, and never of the noise."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import distances, multiset, optimum, paired, same_bits, skip_without

import couplings
from couplings import couple
from couplings.testing import batches

QUANTIZERS = ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8"]
TYPES = {
    "fp16": (torch.float16, 1.0),
    "bf16": (torch.bfloat16, None),
    "fp8_e4m3": (torch.float8_e4m3fn, 448.0),
    "fp8_e5m2": (torch.float8_e5m2, 57344.0),
    "int8": (torch.int8, 127.0),
}


def rounded(x, name):
    """The documented rounding: a scale for the tensor, the narrow type, and back."""
    dtype, top = TYPES[name]
    x = x.double()
    if top is None:
        return x.to(dtype).double()
    peak = x.abs().max()
    scale = peak / top if peak > 0 else torch.ones(())
    scaled = (x / scale).clamp(-top, top)
    return (scaled.round() if dtype is torch.int8 else scaled.float()).to(dtype).double() * scale


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_quantizers_are_listed():
    assert couplings.quantizers() == QUANTIZERS


@pytest.mark.parametrize("name", QUANTIZERS)
def test_pairs_are_optimal_for_the_rounded_operands(name):
    data, noise = 3 * gaussian(40, 6), gaussian(40, 6, seed=1)
    for metric in couplings.metrics():
        coupled = couple(data, noise, "hungarian", metric=metric, quantize=name)
        judged = "sqeuclidean" if metric == "dot" else metric
        cost = distances(rounded(data, name), rounded(noise, name), judged)
        reached = cost[torch.arange(40), coupled.index].mean().item()
        assert reached == pytest.approx(optimum(cost), rel=2e-5, abs=2e-5), metric


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_rounding_to_eight_bits_changes_pairs(name):
    data, noise = gaussian(200, 64), gaussian(200, 64, seed=1)
    plain, narrow = couple(data, noise), couple(data, noise, quantize=name)
    assert 0 < (plain.index != narrow.index).double().mean() < 0.5
    assert 0.9 * plain.reduction < narrow.reduction < plain.reduction


@given(batch=batches(), name=st.sampled_from(QUANTIZERS), metric=st.sampled_from(couplings.metrics()))
def test_returned_noise_and_reported_cost_are_not_rounded(batch, name, metric):
    data, noise = batch
    coupled = couple(data, noise, metric=metric, quantize=name)
    assert multiset(coupled.noise) == multiset(noise)
    assert same_bits(coupled.noise, noise[coupled.index])
    assert coupled.cost.item() == pytest.approx(paired(data, coupled.noise, metric), rel=1e-5, abs=1e-5)


EXTREMES = {
    "pixels": 127.5 * (gaussian(12, 3, 8, 8).clamp(-1, 1) + 1),
    "latents": gaussian(12, 65536),
    "latents times a thousand": 1000 * gaussian(12, 65536),
    "zeros": torch.zeros(12, 20),
    "a constant": torch.full((12, 20), 255.0),
    "a negative constant": torch.full((12, 20), -7.3),
    "one large value among small": torch.cat([torch.full((1, 20), 1e4), 1e-3 * gaussian(11, 20)]),
    "near the top of float32 over d": 1e17 * gaussian(12, 20),
    "denormal": torch.full((12, 20), 1e-42),
    "tiny": 1e-30 * gaussian(12, 20),
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_no_finite_values_overflow(kind):
    data = EXTREMES[kind]
    noise = gaussian(*data.shape, seed=1)
    sides = [(data, noise), (noise, data), (data, data.flip(0))]
    for name, metric, (x, y) in product(QUANTIZERS, ["sqeuclidean", "l1", "cosine"], sides):
        coupled = couple(x, y, metric=metric, quantize=name)
        assert coupled.cost.isfinite(), (name, metric)
        assert coupled.cost_before.isfinite(), (name, metric)
        assert sorted(coupled.index.tolist()) == list(range(12)), (name, metric)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_at_the_limits_of_half_precision_stay_finite(name):
    top = torch.finfo(torch.float16).max
    data = torch.full((4, 3, 16, 16), top, dtype=torch.float16)
    data[1:3] *= -1
    noise = gaussian(4, 3, 16, 16).half()
    coupled = couple(data, noise, quantize=name)
    cost = distances(data, noise, "sqeuclidean")
    assert coupled.cost.isfinite()
    assert paired(data, coupled.noise, "sqeuclidean") == pytest.approx(optimum(cost), rel=1e-3)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_scale_of_each_side_does_not_matter(name):
    # Powers of two: the codes are the same, so are the pairs.
    data, noise = gaussian(24, 10), gaussian(24, 10, seed=1)
    plain, scaled = couple(data, noise, quantize=name), couple(2.0**10 * data, 2.0**-10 * noise, quantize=name)
    assert torch.equal(plain.index, scaled.index)


def test_int8_products_are_exact():
    # 20,000 products of up to 127^2 need 29 bits: float32 sums of them would not be exact.
    data = torch.randint(-127, 128, (8, 20_000), generator=torch.Generator().manual_seed(0)).float()
    data[:, 0] = 127
    noise = data.flip(0).clone()
    noise[:, 1:3] = torch.tensor([1.0, -1.0]) * torch.arange(8)[:, None]
    coupled = couple(data, noise, "hungarian", metric="dot", quantize="int8")
    cost = distances(data, noise, "dot")
    assert cost[torch.arange(8), coupled.index].mean().item() == optimum(cost)


@pytest.mark.parametrize("info", couplings.methods(), ids=lambda i: i.name)
def test_every_method_takes_every_quantizer(info):
    skip_without(info)
    data = gaussian(10, 3, 4, 4)
    noise = gaussian(20 if info.name == "nearest" else 10, 3, 4, 4, seed=1)
    for name in QUANTIZERS:
        coupled = couple(data, noise, info.name, quantize=name)
        assert set(coupled.index.tolist()) <= set(range(len(noise))), name
        assert same_bits(coupled.noise, noise[coupled.index]), name


def test_no_quantizer_is_the_default():
    assert couplings.Coupling().quantize is None
    assert couplings.Coupling(quantize="Int8") == couplings.Coupling(quantize="int8")
