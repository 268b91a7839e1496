"""What a report consists of: sections of text, tables, plots and pictures, without a format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from couplings.report.significance import Mark, marks

__all__ = ["Entry", "Figure", "Picture", "Section", "Table", "column", "mean", "spread"]


@dataclass(frozen=True)
class Entry:
    """What stands in a field of a table, and how it did."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column names the rows.

    Attributes
    ----------
    caption : str
    head : sequence of str
    rows : sequence of sequences of Entry or str
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Entry | str]]


@dataclass(frozen=True)
class Figure:
    """Plots side by side, each an SVG, with a caption."""

    name: str
    caption: str
    panels: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """Images of few pixels, base64 PNG by title, with a caption."""

    name: str
    caption: str
    images: Mapping[str, str]


@dataclass
class Section:
    """A headline and what follows it; strings are paragraphs."""

    title: str
    parts: list[str | Table | Figure | Picture] = field(default_factory=list)


Samples = Mapping[int, float]


def mean(values: Samples) -> float:
    """Average over seeds."""
    return fmean(values.values())


def spread(values: Samples) -> float | None:
    """Return the standard deviation over seeds, if there are several."""
    return stdev(values.values()) if len(values) > 1 else None


def column(
    samples: Mapping[str, Samples],
    show: str,
    *,
    higher: bool | None,
    barred: Sequence[str] = (),
    ratios: bool = False,
) -> dict[str, Entry]:
    """Format a column and mark its best rows.

    Parameters
    ----------
    samples : mapping
        Name of a row to its values by seed; rows without any are left out.
    show : str
        Format of a number, such as ``"{:.2f}%"``.
    higher : bool or None
        Whether larger values are better; None marks nothing.
    barred : sequence of str
        Rows that are not compared.
    ratios : bool
        Compare logarithms: what varies by factors, such as time on a busy machine.

    Returns
    -------
    dict
        Entries by name.
    """
    known = {name: values for name, values in samples.items() if values}
    compared = {name: values for name, values in known.items() if name not in barred}
    if ratios:
        compared = {name: {s: math.log(value) for s, value in values.items()} for name, values in compared.items()}
    # Nothing is best of one.
    marked = marks(compared, higher=higher) if higher is not None and len(compared) > 1 else {}
    entries = {}
    for name, values in known.items():
        deviation = spread(values)
        text = show.format(mean(values))
        if deviation is not None:
            text += f" ± {show.format(deviation).rstrip('%')}"
        entries[name] = Entry(text, marked.get(name, ""))
    return entries
