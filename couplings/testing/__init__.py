"""Test a coupling: checks that it keeps the distribution of the noise, and batches whose best pairing is known.

The checks of the noise (`check_marginal`, `check_coupler`, `broken_promise`) need nothing but couplings. `check_method`
and the strategies (`translations`, `planted_permutations`, `sorted_1d`, `convex_gradients`, `batches`) need Hypothesis,
which ``pip install 'couplings[test]'`` brings; it is imported when one is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from couplings.testing.checks import MarginalError, MarginalReport, broken_promise, check_coupler, check_marginal
from couplings.testing.methods import PROPERTIES, check_method
from couplings.testing.statistics import Statistic

if TYPE_CHECKING:
    from couplings.testing.strategies import (
        Instance,
        batches,
        convex_gradients,
        planted_permutations,
        sorted_1d,
        translations,
    )

__all__ = [
    "PROPERTIES",
    "Instance",
    "MarginalError",
    "MarginalReport",
    "Statistic",
    "batches",
    "broken_promise",
    "check_coupler",
    "check_marginal",
    "check_method",
    "convex_gradients",
    "planted_permutations",
    "sorted_1d",
    "translations",
]


def __getattr__(name: str) -> Any:
    """Import the strategies, and Hypothesis with them, when one is first named."""
    if name in __all__:
        return getattr(import_module(f"{__name__}.strategies"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
