"""Tables of what `benchmarks.published` recorded, beside what was published."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, partial

from ..record import RESULTS, Record, markdown, provenance, read
from . import FILE
from . import TABLES as PUBLISHED
from .measures import verdict

__all__ = ["TABLES", "comparison"]


@cache
def committed() -> list[Record]:
    """Read the records at the published sizes."""
    return [r for r in read(RESULTS / FILE) if r["settings"] == PUBLISHED[r["table"]].settings]


def spread(mean: float, deviation: float | None) -> str:
    """Write a mean and, if it is known, its deviation: to three decimals, or as many as the smaller one needs."""
    least = min(abs(value) for value in (mean, deviation) if value is not None)
    decimals = 3 if least >= 0.01 or least == 0 else 4 if least >= 0.001 else 5
    return " ± ".join(f"{value:.{decimals}f}" for value in (mean, deviation) if value is not None)


def comparison(name: str, records: list[Record]) -> str:
    """Lay out every measure of every cell beside the published one: mean and standard deviation over seeds."""
    rows = []
    for cell, published in PUBLISHED[name].cells.items():
        found = [r["measured"] for r in records if (r["table"], r["cell"]) == (name, cell)]
        for measure in dict.fromkeys([*published, *(measure for values in found for measure in values)]):
            value = published.get(measure)
            ours = [values[measure] for values in found if measure in values]
            told = "" if value is None else spread(value.mean, value.deviation)
            mean = spread(statistics.mean(ours), statistics.stdev(ours) if len(ours) > 1 else None) if ours else ""
            judged = verdict(ours, value) if ours and value is not None else "" if ours else "not measured yet"
            rows.append([cell, measure, told, mean, str(len(ours) or ""), judged])
    return markdown(["cell", "measure", PUBLISHED[name].beside, "here", "seeds", ""], rows)


def departures(name: str) -> str:
    """List where the set-up is not the published one."""
    return markdown(["the set-up differs"], [[text] for text in PUBLISHED[name].departures])


TABLES: dict[str, Callable[[], str]] = {
    "published-place": lambda: provenance(committed()) if committed() else "",
    **{f"published-{name}": partial(lambda name: comparison(name, committed()), name) for name in PUBLISHED},
    **{f"published-{name}-departures": partial(departures, name) for name in PUBLISHED},
}
