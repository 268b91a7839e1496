"""`check_method`: the properties that every built-in method is tested for, for methods of your own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import couplings
from couplings._names import unknown
from couplings._types import Marginal
from couplings.assigners.registry import find
from couplings.coupling import Coupled
from couplings.testing.checks import check_marginal
from couplings.testing.oracles import distances, multiset, optimum, paired, rows_of, same_bits

METRICS = ("sqeuclidean", "l2", "l1", "cosine", "dot")


@dataclass(frozen=True)
class Case:
    """A method with options, as the properties call it.

    Attributes
    ----------
    name : str
    options : mapping
    marginal : str
        What it promises with these options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    marginal: Marginal = "permutation"

    @property
    def info(self) -> couplings.MethodInfo:
        """The method's record."""
        return find(self.name).info

    @property
    def pool(self) -> int:
        """Rows of noise for each row of data: a method that selects is given a choice."""
        return 3 if self.info.marginal == "selected" else 1

    def __call__(self, data: Any, noise: Any, **options: Any) -> Coupled[Any]:
        """Couple."""
        return couplings.couple(data, noise, self.name, **self.options, **options)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


Property = Callable[[Case, Any], None]

PROPERTIES: dict[str, Property] = {}
"""What holds for every method on every batch: functions of a case and of Hypothesis's ``data()``, by their names."""


def check_method(
    name: str,
    *,
    marginal: Marginal | None = None,
    skip: Iterable[str] = (),
    examples: int = 10,
    **options: Any,
) -> list[str]:
    """Run the property tests that built-in methods pass.

    Parameters
    ----------
    name : str
        A registered name, or ``package.module:function``.
    marginal : {"permutation", "resampled", "selected"}, optional
        What it promises with these options; by default what it declares.
    skip : iterable of str
        Names of properties that the method does not promise, from `couplings.testing.PROPERTIES`.
    examples : int
        Batches that are tried for each property.
    **options
        Of the method.

    Returns
    -------
    list of str
        Names of the properties that hold.

    Raises
    ------
    AssertionError
        Naming every property that does not hold, with the smallest batch that was found.
    ValueError
        If the method or a property to skip is unknown.
    ImportError
        Without Hypothesis, which ``pip install 'couplings[test]'`` brings.

    Examples
    --------
    >>> from couplings.testing import check_method
    >>> "the declared marginal is kept" in check_method("independent", examples=2)
    True
    """
    from couplings.testing.strategies import given_data

    left_out = set(skip)
    for each in left_out - PROPERTIES.keys():
        raise ValueError(unknown("property", each, PROPERTIES))
    info = find(name).info
    case = Case(name, options, marginal or info.marginal)
    couplings.Coupling(name, **options)  # wrong options are errors, and no failed properties
    held, failures = [], []
    for title, check in PROPERTIES.items():
        if title in left_out:
            continue
        try:
            given_data(partial(check, case), examples)
            held.append(title)
        except Exception as error:  # whatever a method raises is its failure
            notes = "".join(f"\n      {line}" for note in getattr(error, "__notes__", ()) for line in note.splitlines())
            failures.append(f"  - {title}: {type(error).__name__}: {error}{notes}")
    if failures:
        msg = f"the method {case} fails {len(failures)} of {len(held) + len(failures)} properties:\n"
        raise AssertionError(msg + "\n".join(failures))
    return held


def _property(check: Property) -> Property:
    PROPERTIES[check.__name__.removeprefix("_").replace("_", " ")] = check
    return check


def _expect(held: object, said: str = "") -> None:
    """Assert, also where Python runs without assertions."""
    if not held:
        raise AssertionError(said)


def _close(value: float, expected: float, relative: float, absolute: float = 0.0) -> bool:
    return abs(value - expected) <= max(absolute, relative * abs(expected))


def _batch(draw: Any, case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    from couplings.testing.strategies import batches

    data, noise = draw.draw(batches(pool=case.pool, **options), label="data, noise")
    return data, noise


def _metric(draw: Any) -> str:
    from hypothesis import strategies as st

    return str(draw.draw(st.sampled_from(METRICS), label="metric"))


def _seed(draw: Any) -> int:
    from hypothesis import strategies as st

    return int(draw.draw(st.integers(0, 2**31 - 1), label="seed"))


def _gaussian(case: Case, n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(n, d, generator=generator, dtype=dtype)
    return data, torch.randn(n * case.pool, d, generator=generator, dtype=dtype)


@contextmanager
def _threads() -> Iterator[None]:
    """Leave the process's number of threads as it was."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- what becomes of the noise


@_property
def _returned_noise_is_the_same_multiset_or_rows_of_it(case: Case, draw: Any) -> None:
    data, noise = _batch(draw, case)
    coupled = case(data, noise, metric=_metric(draw))
    _expect(coupled.marginal == case.marginal, f"it says {coupled.marginal!r}, and promises {case.marginal!r}")
    if coupled.marginal == "permutation":
        _expect(multiset(coupled.noise) == multiset(noise))
        _expect(sorted(coupled.index.tolist()) == list(range(len(noise))))
    else:
        _expect(set(rows_of(coupled.noise)) <= set(rows_of(noise)))


@_property
def _the_declared_marginal_is_kept(case: Case, draw: Any) -> None:
    report = check_marginal(case.name, marginal=case.marginal, **case.options)
    _expect(report.permutation == (case.marginal == "permutation"), "it permutes the noise: declare 'permutation'")


@_property
def _noise_is_what_index_says_with_its_shape_dtype_and_device(case: Case, draw: Any) -> None:
    data, noise = _batch(draw, case)
    coupled = case(data, noise, metric=_metric(draw))
    _expect(coupled.index.shape == (len(data),))
    _expect(coupled.index.dtype is torch.int64)
    _expect(coupled.index.device == coupled.noise.device == noise.device)
    _expect(coupled.noise.shape == data.shape)
    _expect(same_bits(coupled.noise, noise[coupled.index]))
    _expect(torch.equal(coupled.apply(torch.arange(len(noise))), coupled.index))


@_property
def _noise_keeps_its_memory_format(case: Case, draw: Any) -> None:
    data, noise = (x.reshape(-1, 3, 4, 5) for x in _gaussian(case, 6, 60, seed=3))
    noise = noise.to(memory_format=torch.channels_last)
    coupled = case(data, noise)
    _expect(coupled.noise.is_contiguous(memory_format=torch.channels_last))
    _expect(same_bits(coupled.noise, noise[coupled.index]))


@_property
def _a_batch_of_one_gets_its_own_noise(case: Case, draw: Any) -> None:
    for shape in ((), (1,), (7,), (3, 4, 4), (4, 2, 2, 2)):
        generator = torch.Generator().manual_seed(1)
        data, noise = (torch.randn(rows, *shape, generator=generator) for rows in (1, case.pool))
        coupled = case(data, noise)
        _expect(0 <= coupled.index.item() < case.pool)
        _expect(case.pool > 1 or coupled.reduction.item() == 0)
        _expect(same_bits(coupled.noise, noise[coupled.index]))


@_property
def _shape_is_a_view_of_the_same_numbers(case: Case, draw: Any) -> None:
    data, noise = _gaussian(case, 1 + _seed(draw) % 12, 12, _seed(draw), torch.float64)
    flat = case(data, noise)
    for shape in ((3, 2, 2), (4, 3), (1, 12)):
        shaped = case(data.reshape(len(data), *shape), noise.reshape(-1, *shape))
        _expect(torch.equal(shaped.index, flat.index))
        _expect(shaped.noise.shape == (len(data), *shape))


# --- what is reported


@_property
def _cost_is_that_of_the_returned_tensors(case: Case, draw: Any) -> None:
    # The inverse permutation would give a valid multiset, and a reduction of nothing.
    (data, noise), metric = _batch(draw, case), _metric(draw)
    coupled = case(data, noise, metric=metric)
    after, before = paired(data, coupled.noise, metric), paired(data, noise, metric)
    _expect(coupled.cost.shape == coupled.cost_before.shape == coupled.reduction.shape == ())
    _expect(_close(coupled.cost.item(), after, 1e-5, 1e-5))
    _expect(_close(coupled.cost_before.item(), before, 1e-5, 1e-5))
    _expect(before <= 1e-3 or _close(coupled.reduction.item(), 1 - after / before, 0.0, 1e-4))
    _expect(not after == before == 0 or coupled.reduction.item() == 0)


@_property
def _cost_has_the_precision_of_the_input(case: Case, draw: Any) -> None:
    data, noise = _gaussian(case, 4, 3)
    _expect(case(data.double(), noise.double()).cost.dtype is torch.float64)
    _expect(case(data.bfloat16(), noise.bfloat16()).cost.dtype is torch.float32)


@_property
def _gap_bounds_the_distance_from_the_optimum(case: Case, draw: Any) -> None:
    (data, noise), metric = _batch(draw, case, dtypes=(torch.float64,)), _metric(draw)
    coupled = case(data, noise, metric=metric)
    if coupled.gap is None:
        return
    _expect(coupled.gap >= 0)
    least = optimum(distances(data, noise, "sqeuclidean" if metric == "dot" else metric))
    _expect(coupled.cost.item() - least <= coupled.gap * abs(coupled.cost.item()) + 1e-12)
    _expect(not case.info.exact or coupled.cost.item() <= 1e-3 or coupled.gap <= 1e-6)


@_property
def _a_permutation_is_no_better_than_the_optimum_and_an_exact_method_no_worse(case: Case, draw: Any) -> None:
    if case.marginal != "permutation":
        return
    (data, noise), metric = _batch(draw, case, dtypes=(torch.float32, torch.float64)), _metric(draw)
    cost = distances(data, noise, "sqeuclidean" if metric == "dot" else metric)
    rounding, least = 64 * max(cost.abs().max().item(), 1e-30), optimum(cost)
    reached = paired(data, case(data, noise, metric=metric).noise, metric)
    _expect(reached >= least - rounding * torch.finfo(torch.float64).eps)
    if case.info.exact:
        _expect(reached <= least + rounding * torch.finfo(data.dtype).eps, f"{reached} is above the optimum {least}")


@_property
def _constants_on_rows_and_columns_change_no_pair_where_that_is_declared(case: Case, draw: Any) -> None:
    if not case.info.shift_invariant:
        return
    seed, n = _seed(draw), 1 + _seed(draw) % 12
    data, noise = _gaussian(case, n, 3, seed, torch.float64)
    cost = distances(data, noise, "sqeuclidean")
    for size in (1.0, 100.0):
        shifts = size * torch.arange(n, dtype=torch.float64)
        moved = cost + shifts[:, None] - 3 * shifts.flip(0)[None]
        first, second = (
            case(data, noise, metric=lambda x, y, c=c: c, generator=torch.Generator().manual_seed(seed))
            for c in (cost, moved)
        )
        _expect(torch.equal(first.index, second.index))


# --- what must not matter


@_property
def _inputs_are_not_modified(case: Case, draw: Any) -> None:
    data, noise = (t.requires_grad_() for t in _batch(draw, case))
    kept, versions = (data.detach().clone(), noise.detach().clone()), (data._version, noise._version)
    coupled = case(data, noise)
    _expect(same_bits(data, kept[0]))
    _expect(same_bits(noise, kept[1]))
    _expect((data._version, noise._version) == versions)
    _expect(data.requires_grad and noise.requires_grad and not coupled.cost.requires_grad)
    coupled.noise.detach().zero_()
    _expect(same_bits(noise, kept[1]), "the returned noise shares memory with the input")


@_property
def _global_random_state_is_neither_read_nor_moved(case: Case, draw: Any) -> None:
    (data, noise), seed = _batch(draw, case), _seed(draw)

    def set_all(seed: int) -> tuple[Tensor, Any, object]:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what is watched
        random.seed(seed)
        return torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # type: ignore[index]  # noqa: NPY002

    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        states = set_all(seed)
        numbers = states[1].copy()
        first = case(data, noise)
        _expect(torch.equal(torch.get_rng_state(), states[0]), "it drew from torch's global generator")
        _expect(bool((np.random.get_state()[1] == numbers).all()), "it drew from numpy.random")  # type: ignore[index]  # noqa: NPY002
        _expect(random.getstate() == states[2], "it drew from random")
        set_all(seed + 1)
        _expect(torch.equal(case(data, noise).index, first.index), "another global seed gave another answer")
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


@_property
def _the_same_generator_gives_the_same_result_on_one_thread_and_two(case: Case, draw: Any) -> None:
    (data, noise), seed, metric = _batch(draw, case, max_rows=24), _seed(draw), _metric(draw)
    results = []
    with _threads():
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(case(data, noise, metric=metric, generator=torch.Generator().manual_seed(seed)))
    for other in results[1:]:
        _expect(torch.equal(other.index, results[0].index))
        _expect(torch.equal(other.cost, results[0].cost))


@_property
def _one_thread_or_three_give_the_same_pairs_of_a_few_long_rows(case: Case, draw: Any) -> None:
    # Few rows and many coordinates: products are split over the coordinates, and rounded otherwise.
    data, noise = _gaussian(case, 64, 8192)
    results = []
    with _threads():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case(data, noise))
    for other in results[1:]:
        _expect(torch.equal(other.index, results[0].index))
        _expect(torch.equal(other.cost, results[0].cost))


@_property
def _neither_layout_nor_threads_matter_to_fewer_rows_than_directions(case: Case, draw: Any) -> None:
    # Integers tie often, and a few rows extend along few axes: the others would be found by rounding alone.
    generator = torch.Generator().manual_seed(0)
    for n, d in ((5, 5), (3, 40), (4, 2)):
        for _ in range(5):
            data = torch.randn(n, d, generator=generator)
            noise = torch.randint(-1, 2, (case.pool * n, d), generator=generator).float()
            expected = case(data, noise)
            turned = [t.T.contiguous().T for t in (data, noise)]
            with _threads():
                torch.set_num_threads(3)
                _expect(torch.equal(case(*turned).index, expected.index))


@_property
def _memory_layout_does_not_matter(case: Case, draw: Any) -> None:
    data, noise = _batch(draw, case)
    spread = [torch.stack([t, -t], -1)[..., 0] for t in (data, noise)]
    reversed_axes = [t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]) for t in (data, noise)]
    expected = case(data, noise)
    for x, y in (spread, reversed_axes):
        coupled = case(x, y)
        _expect(torch.equal(coupled.index, expected.index))
        _expect(same_bits(coupled.noise, expected.noise))


@_property
def _arrays_in_arrays_out(case: Case, draw: Any) -> None:
    data, noise = _batch(draw, case, dtypes=(torch.float16, torch.float32, torch.float64))
    expected, coupled = case(data, noise), case(data.numpy(), noise.numpy())
    for name in ("noise", "index", "cost", "cost_before", "reduction"):
        value = getattr(coupled, name)
        _expect(isinstance(value, np.ndarray), name)
        _expect(value.shape == tuple(getattr(expected, name).shape), name)
    _expect(coupled.noise.dtype == noise.numpy().dtype and coupled.index.dtype == np.int64)
    _expect(bool((coupled.index == expected.index.numpy()).all()))
    _expect(same_bits(torch.from_numpy(coupled.noise), expected.noise))
    _expect(bool((coupled.apply(np.arange(len(noise))) == coupled.index).all()))


@_property
def _half_precision_is_coupled_as_its_float32_values(case: Case, draw: Any) -> None:
    data, noise = _batch(draw, case, dtypes=(torch.float16, torch.bfloat16))
    narrow, wide = case(data, noise), case(data.float(), noise.float())
    _expect(torch.equal(narrow.index, wide.index))
    _expect(torch.equal(narrow.cost, wide.cost))
    _expect(narrow.cost.dtype is torch.float32)


@_property
def _autocast_changes_nothing(case: Case, draw: Any) -> None:
    data, noise = _batch(draw, case, dtypes=(torch.float32,))
    expected = case(data, noise)
    with torch.autocast("cpu", torch.bfloat16):
        coupled = case(data, noise)
    _expect(torch.equal(coupled.index, expected.index))
    _expect(torch.equal(coupled.cost, expected.cost))


@_property
def _scaling_both_sides_by_a_power_of_two_changes_no_pair(case: Case, draw: Any) -> None:
    # Such a scale is exact in floating point, so no rounding can hide behind it.
    data, noise = _batch(draw, case, dtypes=(torch.float32, torch.float64))
    scale = 2.0 ** (_seed(draw) % 13 - 6)
    expected, coupled = case(data, noise), case(data * scale, noise * scale)
    _expect(torch.equal(coupled.index, expected.index))
    _expect(_close(coupled.cost.item(), expected.cost.item() * scale**2, 1e-6, 1e-12))


@_property
def _a_call_leaves_nothing_behind_for_the_next(case: Case, draw: Any) -> None:
    coupling = couplings.Coupling(case.name, **case.options)
    data, noise = _batch(draw, case)
    first = coupling(data, noise)
    coupling(noise[: len(data)] + 1, torch.flip(noise, [0]))
    _expect(torch.equal(coupling(data, noise).index, first.index))
