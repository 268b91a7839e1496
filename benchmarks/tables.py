"""Write the tables of the pages, and the plots, from the records: ``python -m benchmarks.tables``.

A page is written by hand. A table in it stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` and is written
here; ``--check`` changes nothing and says which tables are not those of the records.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable

import couplings

from . import (
    ablation_tables,
    ahead,
    compatibility,
    device,
    distributed,
    fit,
    pools_tables,
    solver_tables,
    training_tables,
)
from .published import tables as published_tables
from .record import RESULTS, ROOT, markdown
from .robustness import tables as robustness_tables

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md")))
BLOCK = re.compile(r"<!-- ([\w-]+):begin -->\n(.*?)<!-- \1:end -->", re.DOTALL)


def methods_table() -> str:
    """Lay out the built-in methods."""
    return markdown(
        ["name", "what", "exact", "marginal", "extra"],
        [
            [f"`{info.name}`", info.summary, "yes" if info.exact else "", info.marginal, ", ".join(info.requires)]
            for info in couplings.methods()
        ],
    )


def costs_table() -> str:
    """Lay out what coupling adds to a training step, on the processors that are on record."""
    return ahead.costs_table([*ahead.committed(), *device.committed()])


def demo_table() -> str:
    """Lay out the Frechet distances that the demo recorded; the better of each pair in bold."""
    pairs: dict[str, dict[bool, dict[str, float]]] = {}
    for arm in json.loads((ROOT / "docs" / "demo.json").read_text())["arms"]:
        kind = f"{arm['title'].partition(',')[0]}, {arm['prediction'].replace('_', ' ')}"
        pairs.setdefault(kind, {})[arm["coupling"] != "independent"] = arm["frechet"]
    rows = []
    for kind, pair in pairs.items():
        for coupled, name in ((False, "independent"), (True, "coupled")):
            cells = [f"**{v:.0f}**" if v < pair[not coupled][n] else f"{v:.0f}" for n, v in pair[coupled].items()]
            rows.append(["" if coupled else kind, name, *cells])
    return markdown(["sampling steps", "", *pair[True]], rows)


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "demo": demo_table,
    "costs": costs_table,
    **solver_tables.TABLES,
    **training_tables.TABLES,
    **ablation_tables.TABLES,
    **distributed.TABLES,
    **ahead.TABLES,
    **compatibility.TABLES,
    **device.TABLES,
    **fit.TABLES,
    **pools_tables.TABLES,
    **published_tables.TABLES,
    **robustness_tables.TABLES,
}


def filled(text: str) -> str:
    """Return a page with all of its tables written anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name}:begin -->\n{TABLES[name]()}\n<!-- {name}:end -->"

    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    """Bring the tables and plots up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    arguments = parser.parse_args(argv)
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{'out of date' if arguments.check else 'wrote'}: {page.relative_to(ROOT)}")
        if not arguments.check:
            page.write_text(filled(page.read_text()))
    if arguments.check:
        return int(bool(stale))
    for module in (solver_tables, training_tables, ablation_tables, pools_tables):
        module.draw(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
