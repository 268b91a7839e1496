"""Try to break the library on purpose, and record what was tried and what was lost."""

from __future__ import annotations

from collections.abc import Callable

from . import calls, concurrency, damaged, faults, fuzz, memory, statistics
from .trial import Outcome

__all__ = ["PARTS", "Outcome"]

# What is tried, by name; each is given its share of the full size.
PARTS: dict[str, Callable[[float], Outcome]] = {
    **fuzz.PARTS,
    **calls.PARTS,
    **damaged.PARTS,
    **memory.PARTS,
    **statistics.PARTS,
    **faults.PARTS,
    **concurrency.PARTS,
}
