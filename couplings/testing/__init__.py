"""Test a coupling: checks that it keeps the distribution of the noise, and batches whose best pairing is known.

The checks (`check_marginal`, `check_coupler`) need nothing but couplings. The strategies (`translations`,
`planted_permutations`, `sorted_1d`, `convex_gradients`, `batches`) are for Hypothesis, which
``pip install 'couplings[test]'`` brings; it is imported when a strategy is first named.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from couplings.testing.checks import MarginalError, MarginalReport, check_coupler, check_marginal
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
    "Instance",
    "MarginalError",
    "MarginalReport",
    "Statistic",
    "batches",
    "check_coupler",
    "check_marginal",
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
