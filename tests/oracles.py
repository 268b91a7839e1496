"""Slow, obvious versions of what the library computes, and which packages its extras bring."""

import pytest

from couplings.testing.oracles import (
    brute_force,
    distances,
    flat,
    multiset,
    optimum,
    paired,
    rows_of,
    same_bits,
)

__all__ = [
    "MODULES",
    "brute_force",
    "distances",
    "flat",
    "multiset",
    "optimum",
    "paired",
    "rows_of",
    "same_bits",
    "skip_without",
]

# Modules that the extras bring.
MODULES = {"lapjv": "lapjv", "pot": "ot"}


def skip_without(info):
    """Skip the test where a package that the method needs is not installed."""
    for extra in info.requires:
        pytest.importorskip(MODULES[extra])
