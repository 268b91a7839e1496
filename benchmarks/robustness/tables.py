"""The table of what `benchmarks.robustness` tried, and what it lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..record import RESULTS, Record, markdown, provenance, read

__all__ = ["TABLES", "latest", "tried_table"]

ABSENT = "Not measured yet: `python -m benchmarks.robustness`."


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """Return the last record of each part."""
    return {record["part"]: record for record in records}


def tried_table(records: Iterable[Record]) -> str:
    """Lay out what was tried and lost, by part; the share is that of the full size."""
    rows = [
        [
            f"`{part}`",
            f"{record['share']:.0%}",
            f"{record['tried']:,}",
            f"{record['lost']:,}",
            f"{record['seconds']:,.0f}",
        ]
        for part, record in latest(records).items()
    ]
    return markdown(["part", "share", "tried", "lost", "seconds"], rows) if rows else ABSENT


def refused_table(records: Iterable[Record]) -> str:
    """Lay out how many were answered, and how many refused with a documented error."""
    rows = [
        [f"`{part}`", f"{record['about']['right']:,}", f"{sum(record['about']['refused'].values()):,}"]
        for part, record in latest(records).items()
        if "refused" in record["about"]
    ]
    return markdown(["part", "answered", "refused in one line"], rows) if rows else ABSENT


def _committed() -> list[Record]:
    return read(RESULTS / "robustness.jsonl")


TABLES: dict[str, Callable[[], str]] = {
    "robustness-tried": lambda: tried_table(_committed()),
    "robustness-refused": lambda: refused_table(_committed()),
    "robustness-place": lambda: provenance(latest(_committed()).values()) if _committed() else ABSENT,
}
