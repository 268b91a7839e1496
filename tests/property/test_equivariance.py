"""What a change of the batch may change in the answer, and what not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import same_bits

import couplings

# Under l1 different pairings of distinct points may cost the same; under the others they do not.
STRICT = st.sampled_from(["sqeuclidean", "l2", "cosine", "dot"])
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.integers(1, 12)


def gaussian(n, seed, shape=(3,)):
    """Batches without ties, where pairs can be compared and not only costs."""
    generator = torch.Generator().manual_seed(seed)
    data, noise = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return data, noise, torch.randperm(n, generator=generator)


@given(n=ROWS, seed=SEEDS)
def test_order_of_either_side_does_not_matter_to_the_cost_of_exact_methods(exact, n, seed):
    data, noise, order = gaussian(n, seed)
    first = exact(data, noise, metric="l1").cost.item()
    assert exact(data, noise[order], metric="l1").cost.item() == pytest.approx(first, rel=1e-7)
    assert exact(data[order], noise, metric="l1").cost.item() == pytest.approx(first, rel=1e-7)


@given(n=ROWS, seed=SEEDS, metric=STRICT)
def test_order_of_the_noise_does_not_matter_to_exact_methods(exact, n, seed, metric):
    data, noise, order = gaussian(n, seed)
    first, second = exact(data, noise, metric=metric), exact(data, noise[order], metric=metric)
    assert second.cost.item() == pytest.approx(first.cost.item(), rel=1e-7)
    assert same_bits(second.noise, first.noise)


@given(n=ROWS, seed=SEEDS, metric=STRICT)
def test_order_of_the_data_carries_the_noise_along_in_exact_methods(exact, n, seed, metric):
    data, noise, order = gaussian(n, seed)
    first, second = exact(data, noise, metric=metric), exact(data[order], noise, metric=metric)
    assert same_bits(second.noise, first.noise[order])


@pytest.mark.parametrize("name", ["greedy", "stable"])
@given(n=ROWS, seed=SEEDS)
def test_order_does_not_matter_to_matchings_either(name, n, seed):
    data, noise, order = gaussian(n, seed)
    first = couplings.couple(data, noise, name)
    assert same_bits(couplings.couple(data, noise[order], name).noise, first.noise)
    assert same_bits(couplings.couple(data[order], noise, name).noise, first.noise[order])


@given(n=ROWS, seed=SEEDS)
def test_order_within_its_candidates_does_not_matter_to_nearest(n, seed):
    data, _, _ = gaussian(n, seed)
    noise, _, _ = gaussian(3 * n, seed + 1)
    turned = noise.reshape(n, 3, -1).flip(1).reshape(3 * n, -1)
    assert same_bits(couplings.couple(data, turned, "nearest").noise, couplings.couple(data, noise, "nearest").noise)


@given(n=ROWS, seed=SEEDS, metric=st.sampled_from(["sqeuclidean", "dot"]))
def test_moving_all_the_noise_changes_no_pair_of_exact_methods_under_squared_distances(exact, n, seed, metric):
    data, noise, _ = gaussian(n, seed)
    first, second = exact(data, noise, metric=metric), exact(data, noise + 5.0, metric=metric)
    assert torch.equal(first.index, second.index)


@given(n=ROWS, seed=SEEDS)
def test_exact_methods_are_symmetric_in_data_and_noise(exact, n, seed):
    data, noise, _ = gaussian(n, seed)
    forth, back = exact(data, noise), exact(noise, data)
    assert torch.equal(forth.index[back.index], torch.arange(n))


@given(n=ROWS, seed=SEEDS, metric=st.sampled_from(["sqeuclidean", "l2", "dot", "cosine"]))
def test_a_rotation_of_both_sides_changes_no_pair_of_exact_methods(exact, n, seed, metric):
    data, noise, _ = gaussian(n, seed)
    rotation = torch.linalg.qr(gaussian(3, seed)[0]).Q
    first, second = exact(data, noise, metric=metric), exact(data @ rotation, noise @ rotation, metric=metric)
    assert torch.equal(first.index, second.index)


@pytest.mark.parametrize("quantize", [None, "int8", "fp8_e4m3"])
@pytest.mark.parametrize(("of_data", "of_noise"), [(-30, 0), (30, 0), (-30, -30), (30, 30), (-35, 30)])
def test_the_length_of_a_batch_changes_no_cosine(of_data, of_noise, quantize):
    data, noise = (x.float() for x in gaussian(24, 0, (48,))[:2])
    plain = couplings.couple(data, noise, metric="cosine", quantize=quantize)
    scaled = couplings.couple(data * 10.0**of_data, noise * 10.0**of_noise, metric="cosine", quantize=quantize)
    assert torch.equal(scaled.index, plain.index)
    assert torch.allclose(scaled.cost, plain.cost)


@pytest.mark.parametrize("length", [1e-30, 1e-25, 1e8])
def test_the_length_of_a_row_changes_no_cosine(length):
    data, noise = (x.float() for x in gaussian(24, 0, (48,))[:2])
    plain = couplings.couple(data, noise, metric="cosine")
    data[::3] *= length
    scaled = couplings.couple(data, noise, metric="cosine")
    assert torch.equal(scaled.index, plain.index)
    assert scaled.gap == pytest.approx(0, abs=1e-6)
