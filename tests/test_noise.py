"""Noise addressed by seed: the published generator, the normal law, and rows that depend on their own seed alone."""

import math

import numpy as np
import pytest
import torch

from couplings import noise
from couplings.noise import normal, row_seeds

# Counter, key and output words of philox4x32-10, published with the generator (Random123, kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def signed(value):
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_are_the_published_ones(counter, key, expected):
    low, high = words(key)
    made = noise._philox(tuple(words(counter)), torch.tensor([signed(low | high << 32)]))
    assert [int(word) for word in made] == words(expected)


def test_a_row_depends_on_its_own_seed_alone(monkeypatch):
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12, 0])
    whole = normal(seeds, (3, 5))
    for i in range(len(seeds)):
        assert torch.equal(normal(seeds[i : i + 1], (3, 5))[0], whole[i])
    assert torch.equal(whole[0], whole[5])
    assert len(whole[:5].flatten().unique()) == 75
    monkeypatch.setattr(noise, "_CHUNK", 7)
    assert torch.equal(normal(seeds, (3, 5)), whole)


def test_a_longer_row_begins_like_a_shorter_one():
    assert torch.equal(normal([4], (9,))[:, :6], normal([4], (6,)))


def test_values_are_standard_normal_and_rows_uncorrelated():
    drawn = normal(torch.arange(2000), (500,), dtype=torch.float64)
    count = drawn.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(drawn.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
    sorted_values = drawn.flatten().sort().values
    law = torch.special.ndtr(sorted_values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (law - steps).abs().max() < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov, p about 7e-4
    for products in (drawn[1:] * drawn[:-1], drawn[:, 1:] * drawn[:, :-1]):
        assert abs(products.mean()) < 5 / math.sqrt(products.numel())


def test_tails_reach_beyond_single_precision_uniforms():
    largest = normal(torch.arange(4000), (1000,)).abs().max()
    assert 4.5 < largest < 6.5  # of four million
    assert torch.isfinite(
        noise._box_muller(tuple(torch.full((1,), w) for w in (0, 0, 2**32 - 1, 2**32 - 1)), torch.float32)
    ).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_agree_up_to_rounding(dtype):
    seeds = torch.arange(50)
    exact = normal(seeds, (20,), dtype=torch.float64)
    drawn = normal(seeds, (20,), dtype=dtype)
    assert drawn.dtype is dtype
    torch.testing.assert_close(drawn.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_derived_seeds_are_distinct_and_do_not_depend_on_the_split():
    seeds = row_seeds(7, 0, 5000)
    assert torch.equal(torch.cat([row_seeds(7, 0, 123), row_seeds(7, 123, 4877)]), seeds)
    others = [row_seeds(8, 0, 5000), row_seeds(7, 0, 5000, stream=1), row_seeds(-7, 0, 5000), row_seeds(7, 2**40, 5000)]
    assert len(torch.cat([seeds, *others]).unique()) == 25000


def test_any_integer_is_a_seed_and_nothing_else():
    assert torch.equal(row_seeds(np.int64(-3), 0, 5), row_seeds(-3, 0, 5))
    for seed in (1.5, "a", None):
        with pytest.raises(TypeError, match="seed= must be an integer, got"):
            row_seeds(seed, 0, 5)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    normal([1, 2], (4,))
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_rows_and_no_rows():
    assert normal([], (3, 2)).shape == (0, 3, 2)
    assert normal([1, 2], (0, 2)).shape == (2, 0, 2)
    assert normal([1, 2], ()).shape == (2,)


@pytest.mark.parametrize(
    ("seeds", "options", "error", "message"),
    [
        (torch.rand(3), {}, TypeError, "seeds must be 64-bit integers"),
        (torch.ones(3, dtype=torch.bool), {}, TypeError, "seeds must be 64-bit integers"),
        (torch.ones(3, 2, dtype=torch.long), {}, ValueError, "one dimension"),
        (torch.arange(3), {"dtype": torch.int64}, TypeError, "dtype= must be floating"),
        (torch.arange(3), {"shape": (-1,)}, ValueError, "must not be negative"),
    ],
)
def test_wrong_arguments_are_refused(seeds, options, error, message):
    with pytest.raises(error, match=message):
        normal(seeds, **{"shape": (2,), **options})


@pytest.mark.gpu
def test_devices_agree_up_to_rounding():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    seeds = row_seeds(0, 0, 100)
    torch.testing.assert_close(normal(seeds, (33,), device="cuda").cpu(), normal(seeds, (33,)), rtol=1e-5, atol=1e-6)
