"""Every registered method is a case of every property test: a new method is covered by registering it."""

from importlib.util import find_spec

import pytest
from oracles import MODULES

import couplings
from couplings.testing.methods import Case

# Options that change what a method does. Sinkhorn's reg is raised where its columns have to be right on any batch.
VARIANTS = {
    "sinkhorn": [{"draw": "rows", "reg": 2.0}],
    "sliced": [{"axes": "random", "directions": 4}],
    "stable": [{"noise_rank": "dot"}],
    "nearest": [{"score": "dot"}],
}


def cases():
    variants = ((info, options) for info in couplings.methods() for options in ({}, *VARIANTS.get(info.name, ())))
    return [
        Case(info.name, options, "resampled" if options.get("draw") == "rows" else info.marginal)
        for info, options in variants
    ]


def pytest_generate_tests(metafunc):
    """`case`: every method and variant; `exact`: those that promise the optimum."""
    chosen = {
        "case": cases(),
        "exact": [case for case in cases() if case.info.exact],
        "permutation": [case for case in cases() if case.marginal == "permutation"],
        "shift_invariant": [case for case in cases() if case.info.shift_invariant],
    }
    for name, members in chosen.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [pytest.param(c, id=str(c), marks=_installed(c.info)) for c in members])


def _installed(info):
    absent = [extra for extra in info.requires if find_spec(MODULES[extra]) is None]
    return pytest.mark.skipif(bool(absent), reason=f"couplings[{','.join(absent)}] is not installed")
