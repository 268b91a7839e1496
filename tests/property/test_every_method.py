"""What holds for every method on every batch."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import distances, multiset, optimum, paired, rows_of, same_bits

import couplings
from couplings.testing import batches, check_marginal

METRICS = st.sampled_from(couplings.metrics())


def draw_batch(draw, case, **options):
    return draw.draw(batches(pool=case.pool, **options), label="data, noise")


@given(draw=st.data(), metric=METRICS)
def test_returned_noise_is_the_same_multiset_or_rows_of_it(case, draw, metric):
    data, noise = draw_batch(draw, case)
    coupled = case(data, noise, metric=metric)
    assert coupled.marginal == case.marginal
    if coupled.marginal == "permutation":
        assert multiset(coupled.noise) == multiset(noise)
        assert sorted(coupled.index.tolist()) == list(range(len(noise)))
    else:
        assert set(rows_of(coupled.noise)) <= set(rows_of(noise))


def test_declared_marginal_is_kept(case):
    report = check_marginal(case.info.name, marginal=case.marginal, **case.options)
    assert report.passed
    assert report.permutation == (case.marginal == "permutation")


@given(draw=st.data(), metric=METRICS)
def test_noise_is_what_index_says_with_its_shape_dtype_and_device(case, draw, metric):
    data, noise = draw_batch(draw, case)
    coupled = case(data, noise, metric=metric)
    assert coupled.index.shape == (len(data),)
    assert coupled.index.dtype is torch.int64
    assert coupled.index.device == coupled.noise.device == noise.device
    assert coupled.noise.shape == data.shape
    assert same_bits(coupled.noise, noise[coupled.index])
    tag = torch.arange(len(noise))
    assert torch.equal(coupled.apply(tag), coupled.index)


@given(draw=st.data(), metric=METRICS)
def test_cost_is_that_of_the_returned_tensors(case, draw, metric):
    # The inverse permutation would give a valid multiset, and a reduction of nothing.
    data, noise = draw_batch(draw, case)
    coupled = case(data, noise, metric=metric)
    after, before = paired(data, coupled.noise, metric), paired(data, noise, metric)
    assert coupled.cost.shape == coupled.cost_before.shape == coupled.reduction.shape == ()
    assert coupled.cost.item() == pytest.approx(after, rel=1e-5, abs=1e-5)
    assert coupled.cost_before.item() == pytest.approx(before, rel=1e-5, abs=1e-5)
    if before > 1e-3:
        assert coupled.reduction.item() == pytest.approx(1 - after / before, abs=1e-4)
    if after == before == 0:
        assert coupled.reduction.item() == 0


@given(draw=st.data())
def test_inputs_are_not_modified(case, draw):
    data, noise = (t.requires_grad_() for t in draw_batch(draw, case))
    kept, versions = (data.detach().clone(), noise.detach().clone()), (data._version, noise._version)
    coupled = case(data, noise)
    assert same_bits(data, kept[0])
    assert same_bits(noise, kept[1])
    assert (data._version, noise._version) == versions
    assert data.requires_grad
    assert noise.requires_grad
    assert not coupled.cost.requires_grad
    coupled.noise.detach().zero_()
    assert same_bits(noise, kept[1]), "the returned noise shares memory with the input"


@given(draw=st.data())
def test_global_random_state_is_neither_read_nor_moved(case, draw):
    data, noise = draw_batch(draw, case)
    seed = draw.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what is watched
    random.seed(seed)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = case(data, noise)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(seed + 1)
    np.random.seed(seed + 1)  # noqa: NPY002
    random.seed(seed + 1)
    assert torch.equal(case(data, noise).index, first.index)


@given(draw=st.data(), seed=st.integers(0, 2**32), metric=METRICS)
def test_same_generator_gives_the_same_result_on_one_thread_and_two(case, draw, seed, metric):
    data, noise = draw_batch(draw, case, max_rows=24)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(seed)
            results.append(case(data, noise, metric=metric, generator=generator))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.index, results[0].index)
        assert torch.equal(other.cost, results[0].cost)


@given(draw=st.data())
def test_memory_layout_does_not_matter(case, draw):
    data, noise = draw_batch(draw, case)
    spread = [torch.stack([t, -t], -1)[..., 0] for t in (data, noise)]
    assert data.numel() == 1 or not spread[0].is_contiguous()
    reversed_axes = [t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]) for t in (data, noise)]
    expected = case(data, noise)
    for x, y in (spread, reversed_axes):
        coupled = case(x, y)
        assert torch.equal(coupled.index, expected.index)
        assert same_bits(coupled.noise, expected.noise)


@given(draw=st.data())
def test_numpy_in_numpy_out(case, draw):
    data, noise = draw_batch(draw, case, dtypes=(torch.float16, torch.float32, torch.float64))
    expected = case(data, noise)
    coupled = case(data.numpy(), noise.numpy())
    for name in ("noise", "index", "cost", "cost_before", "reduction"):
        value = getattr(coupled, name)
        assert isinstance(value, np.ndarray), name
        assert value.shape == tuple(getattr(expected, name).shape), name
    assert coupled.noise.dtype == noise.numpy().dtype
    assert coupled.index.dtype == np.int64
    assert (coupled.index == expected.index.numpy()).all()
    assert same_bits(torch.from_numpy(coupled.noise), expected.noise)
    assert (coupled.apply(np.arange(len(noise))) == coupled.index).all()


@given(draw=st.data())
def test_half_precision_is_coupled_as_its_float32_values(case, draw):
    data, noise = draw_batch(draw, case, dtypes=(torch.float16, torch.bfloat16))
    narrow, wide = case(data, noise), case(data.float(), noise.float())
    assert torch.equal(narrow.index, wide.index)
    assert torch.equal(narrow.cost, wide.cost)
    assert narrow.cost.dtype is torch.float32


def test_cost_has_the_precision_of_the_input(case):
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(rows, 3, generator=generator) for rows in (4, 4 * case.pool))
    assert case(data.double(), noise.double()).cost.dtype is torch.float64
    assert case(data.bfloat16(), noise.bfloat16()).cost.dtype is torch.float32


@given(draw=st.data())
def test_autocast_changes_nothing(case, draw):
    data, noise = draw_batch(draw, case, dtypes=(torch.float32,))
    expected = case(data, noise)
    with torch.autocast("cpu", torch.bfloat16):
        coupled = case(data, noise)
    assert torch.equal(coupled.index, expected.index)
    assert torch.equal(coupled.cost, expected.cost)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 4), (4, 2, 2, 2)], ids=str)
def test_a_batch_of_one_gets_its_own_noise(case, shape):
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(1, *shape, generator=generator), torch.randn(case.pool, *shape, generator=generator)
    coupled = case(data, noise)
    assert 0 <= coupled.index.item() < case.pool
    if case.pool == 1:
        assert coupled.reduction.item() == 0
    assert same_bits(coupled.noise, noise[coupled.index])


@given(draw=st.data(), power=st.integers(-6, 6))
def test_scaling_both_sides_by_a_power_of_two_changes_no_pair(case, draw, power):
    # Such a scale is exact in floating point, so no rounding can hide behind it.
    data, noise = draw_batch(draw, case, dtypes=(torch.float32, torch.float64))
    scale = 2.0**power
    expected, coupled = case(data, noise), case(data * scale, noise * scale)
    assert torch.equal(coupled.index, expected.index)
    assert coupled.cost.item() == pytest.approx(expected.cost.item() * scale**2, rel=1e-6)


@given(draw=st.data(), metric=METRICS)
def test_gap_bounds_the_distance_from_the_optimum(case, draw, metric):
    data, noise = draw_batch(draw, case, dtypes=(torch.float64,))
    coupled = case(data, noise, metric=metric)
    if coupled.gap is None:
        return
    assert coupled.gap >= 0
    least = optimum(distances(data, noise, "sqeuclidean" if metric == "dot" else metric))
    assert coupled.cost.item() - least <= coupled.gap * abs(coupled.cost.item()) + 1e-12
    if case.info.exact and coupled.cost.item() > 1e-3:
        assert coupled.gap <= 1e-6


@given(draw=st.data())
def test_a_call_leaves_nothing_behind_for_the_next(case, draw):
    coupling = couplings.Coupling(case.info.name, **case.options)
    data, noise = draw_batch(draw, case)
    first = coupling(data, noise)
    coupling(noise[: len(data)] + 1, torch.flip(noise, [0]))
    assert torch.equal(coupling(data, noise).index, first.index)


def test_noise_keeps_its_memory_format(case):
    generator = torch.Generator().manual_seed(3)
    data, noise = (torch.randn(rows, 3, 4, 5, generator=generator) for rows in (6, 6 * case.pool))
    noise = noise.to(memory_format=torch.channels_last)
    coupled = case(data, noise)
    assert coupled.noise.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(coupled.noise, noise[coupled.index])


def test_the_default_device_of_the_process_does_not_matter(case):
    generator = torch.Generator().manual_seed(3)
    data, noise = (torch.randn(rows, 5, generator=generator) for rows in (6, 6 * case.pool))
    expected = case(data, noise)
    with torch.device("meta"):
        assert torch.equal(case(data, noise).index, expected.index)
        assert (case(data.numpy(), noise.numpy()).apply(noise.numpy()) == expected.noise.numpy()).all()


def test_one_thread_or_three_give_the_same_pairs_of_a_few_long_rows(case):
    # Few rows and many coordinates: products are split over the coordinates, and rounded otherwise.
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(rows, 8192, generator=generator) for rows in (64, 64 * case.pool))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case(data, noise))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.index, results[0].index)
        assert torch.equal(other.cost, results[0].cost)


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (4, 2)], ids=str)
def test_neither_layout_nor_threads_matter_to_fewer_rows_than_directions(case, shape):
    # Integers tie often, and a few rows extend along few axes: the others would be found by rounding alone.
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    for _ in range(5):
        data, noise = (
            torch.randn(shape, generator=generator),
            torch.randint(-1, 2, (case.pool * shape[0], shape[1]), generator=generator),
        )
        noise = noise.float()
        expected = case(data, noise)
        turned = [t.T.contiguous().T for t in (data, noise)]
        try:
            torch.set_num_threads(3)
            assert torch.equal(case(*turned).index, expected.index)
        finally:
            torch.set_num_threads(threads)
