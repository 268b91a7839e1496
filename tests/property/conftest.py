"""Every registered method is a case of every property test: a new method is covered by registering it."""

from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
from oracles import MODULES

import couplings

# For speed alone: what holds for every plan holds for one that has not converged.
DEFAULTS = {"sinkhorn": {"max_iterations": 50}}
# Options that change what a method does. Sinkhorn's reg is raised where its columns have to be right on any batch.
VARIANTS = {
    "sinkhorn": [{"draw": "rows", "reg": 2.0}],
    "sliced": [{"axes": "random", "directions": 4}],
    "stable": [{"noise_rank": "dot"}],
    "nearest": [{"score": "dot"}],
}


@dataclass(frozen=True)
class Case:
    info: couplings.MethodInfo
    options: dict = field(default_factory=dict)

    def __str__(self):
        return "-".join([self.info.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def pool(self):
        """Rows of noise per row of data."""
        return 3 if self.info.marginal == "selected" else 1

    @property
    def marginal(self):
        return "resampled" if self.options.get("draw") == "rows" else self.info.marginal

    def __call__(self, data, noise, **options):
        return couplings.couple(data, noise, self.info.name, **self.options, **options)


def cases():
    return [Case(info, options) for info in couplings.methods() for options in ({}, *VARIANTS.get(info.name, ()))]


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
