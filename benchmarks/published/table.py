"""What a published table is to the programs that measure it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .ensemble import Place
from .measures import Value

__all__ = ["Settings", "Table"]

Settings = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A published table.

    Attributes
    ----------
    name : str
    source : str
        Where it was published.
    seeds : tuple of int
        As many as were published.
    settings, quick : dict
        Sizes as published, and tiny ones that only show that the program runs.
    cells : dict
        Its cells; of each, the published values by the name of the measure. Measures without a published value are on
        record too.
    departures : tuple of str
        Where the set-up is not the published one.
    run : callable
        ``run(cell, seeds, settings, place)`` measures a cell: for each seed the values by name of the measure.
    beside : str
        What the values of the cells are: published, or what else ours are held against.
    """

    name: str
    source: str
    seeds: tuple[int, ...]
    settings: Settings
    quick: Settings
    cells: dict[str, dict[str, Value]]
    departures: tuple[str, ...]
    run: Callable[[str, Sequence[int], Settings, Place], list[dict[str, float]]]
    beside: str = "published"
