"""`check_method` passes what a method may be, and names what it may not."""

import random
import sys
import types

import numpy as np
import pytest
import torch

import couplings
from couplings.assigners import registry
from couplings.testing import PROPERTIES, broken_promise, check_method


def nearest_first(cost, *, generator=None):
    """Rows in order, each the nearest noise that is left."""
    cost, index = cost.clone(), torch.empty(len(cost), dtype=torch.int64)
    for i in range(len(cost)):
        index[i] = cost[i].argmin()
        cost[:, index[i]] = torch.inf
    return index


def drawn(cost, *, generator=None):
    return torch.randint(cost.shape[1], (len(cost),), generator=generator)


def closest(cost, *, generator=None):
    return cost.argmin(1)


def by_torch(cost, *, generator=None):
    return torch.randperm(len(cost))


def by_numpy(cost, *, generator=None):
    return np.random.permutation(len(cost))  # noqa: NPY002


_calls = []


def remembers(cost, *, generator=None):
    _calls.append(1)
    return torch.arange(len(cost)).roll(len(_calls))


def of_absolute_size(cost, *, generator=None):
    order = torch.arange(len(cost))
    return order.flip(0) if cost.abs().max() > 10 else order


def raises(cost, *, generator=None):
    if len(cost) > 3:
        raise RuntimeError("too many rows")
    return torch.arange(len(cost))


@pytest.fixture
def register():
    names = []

    def add(name, fn, marginal="permutation", **options):
        couplings.register(name, fn, marginal=marginal, **options)
        names.append(name)

    yield add
    for name in names:
        del registry._registry[name]


def test_a_sound_method_passes_every_property(register):
    register("nearest-first", nearest_first)
    assert check_method("nearest-first", examples=3) == list(PROPERTIES)


def test_a_method_that_resamples_passes_too(register):
    register("drawn", drawn, "resampled")
    assert check_method("drawn", examples=3) == list(PROPERTIES)


GLOBAL = "global random state is neither read nor moved"


@pytest.mark.parametrize(
    ("fn", "declared", "name", "said"),
    [
        (closest, {"marginal": "resampled"}, "the declared marginal is kept", "MarginalError"),
        (closest, {}, "returned noise is the same multiset or rows of it", "different noise rows"),
        (nearest_first, {"marginal": "resampled"}, "the declared marginal is kept", "declare 'permutation'"),
        (by_torch, {}, GLOBAL, "it drew from torch's global generator"),
        (by_numpy, {}, GLOBAL, "it drew from numpy.random"),
        (remembers, {}, "a call leaves nothing behind for the next", "fails 1 of 1"),
        (remembers, {}, "the same generator gives the same result on one thread and two", "fails 1 of 1"),
        (of_absolute_size, {}, "scaling both sides by a power of two changes no pair", "fails 1 of 1"),
        (
            nearest_first,
            {"exact": True},
            "a permutation is no better than the optimum and an exact method no worse",
            "is above the optimum",
        ),
        (
            nearest_first,
            {"shift_invariant": True},
            "constants on rows and columns change no pair where that is declared",
            "fails 1 of 1",
        ),
        (raises, {}, "autocast changes nothing", "RuntimeError: too many rows"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_method_may_not_do_is_named(register, fn, declared, name, said):
    register("own", fn, **declared)
    with pytest.raises(AssertionError, match=said) as caught:
        check_method("own", skip=PROPERTIES.keys() - {name}, examples=4)
    assert str(caught.value).startswith(f"the method own fails 1 of 1 properties:\n  - {name}: ")


def test_a_property_can_be_left_out(register):
    register("own", of_absolute_size)
    failing = "scaling both sides by a power of two changes no pair"
    few = [failing, "autocast changes nothing"]
    with pytest.raises(AssertionError, match="fails 1 of 2 properties"):
        check_method("own", skip=PROPERTIES.keys() - set(few))
    assert check_method("own", skip=PROPERTIES.keys() - {few[1]}) == few[1:]


def test_wrong_arguments_are_errors_and_no_failed_properties():
    with pytest.raises(ValueError, match="Did you mean 'auction'"):
        check_method("auctoin")
    with pytest.raises(TypeError, match="option of the method greedy"):
        check_method("greedy", reg=1.0)
    with pytest.raises(ValueError, match="autocast changes nothing"):
        check_method("greedy", skip=["autocast changes nothin"])


def test_a_check_leaves_the_global_random_state_and_the_threads_alone():
    states, threads = (torch.get_rng_state(), random.getstate()), torch.get_num_threads()
    check_method("independent", examples=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.get_num_threads() == threads


# --- methods named by module and function


@pytest.fixture
def module(monkeypatch):
    found = types.ModuleType("own_methods")
    found.nearest_first, found.number, found.Holder = nearest_first, 3, types.SimpleNamespace(drawn=drawn)
    monkeypatch.setitem(sys.modules, "own_methods", found)


def test_a_function_is_named_by_its_module(module):
    x, y = (torch.randn(6, 3, generator=torch.Generator().manual_seed(k)) for k in range(2))
    coupling = couplings.Coupling("own_methods:nearest_first", metric="l2")
    assert torch.equal(coupling(x, y).index, couplings.couple(x, y, nearest_first, metric="l2").index)
    assert couplings.Coupling.from_dict(coupling.to_dict()) == coupling
    assert "own_methods:nearest_first" in repr(coupling)
    assert check_method("own_methods:nearest_first", skip=PROPERTIES.keys() - {GLOBAL}) == [GLOBAL]


def test_what_its_module_registered_is_kept(module, register):
    x = torch.randn(64, 3)
    with pytest.raises(ValueError, match="no permutation"):
        couplings.couple(x, x, "own_methods:Holder.drawn")
    register("drawn", drawn, "resampled")
    assert couplings.couple(x, x, "own_methods:Holder.drawn").marginal == "resampled"


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("own_methods:absent", ValueError, "no attribute 'absent'. Name a function"),
        ("absent_module:fn", ValueError, "No module named 'absent_module'"),
        (":fn", ValueError, "Name a function"),
        ("own_methods:number", TypeError, "got int"),
    ],
)
def test_what_cannot_be_imported_is_named(module, name, error, said):
    with pytest.raises(error, match=said):
        couplings.Coupling(name)


@pytest.mark.parametrize("name", ["a:b", "a,b", "a=b", " "])
def test_names_that_would_be_read_as_options_cannot_be_registered(name):
    with pytest.raises(ValueError, match="must not be empty, nor hold"):
        couplings.register(name, nearest_first, marginal="permutation")


# --- before training


def test_a_promise_that_is_broken_is_said_in_a_line(register):
    register("closest", closest, "resampled")
    said = broken_promise(couplings.Coupling("closest"))
    assert said.startswith("the method closest declares the marginal 'resampled' and breaks it: ")
    assert "\n" not in said
    assert "'permutation'" in broken_promise(couplings.Coupling(closest))


def test_no_promise_is_broken_by_sound_and_by_built_in_methods(register):
    register("drawn", drawn, "resampled")
    register("selects", closest, "selected")
    for method in ("drawn", "selects", nearest_first, "nearest", "auction"):
        assert broken_promise(couplings.Coupling(method)) is None


def test_an_error_of_the_method_is_left_to_the_training(register):
    register("own", raises)
    assert broken_promise(couplings.Coupling("own")) is None
