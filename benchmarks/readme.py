"""Write the generated blocks of README.md: ``python -m benchmarks.readme``; ``--check`` only says if they are current.

A block stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from couplings.report.couplings_part import table_3
from couplings.report.reading import read

import couplings

from . import report, training, training_report
from .record import Records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = (ROOT / "docs" / "demo.json",)


def methods_table() -> str:
    """Markdown table of the built-in methods, from their records."""
    lines = ["| name | what | exact | marginal | extra |", "|---|---|---|---|---|"]
    for info in couplings.methods():
        exact = "yes" if info.exact else ""
        lines.append(f"| `{info.name}` | {info.summary} | {exact} | {info.marginal} | {', '.join(info.requires)} |")
    return "\n".join(lines)


def demo_table() -> str:
    """Markdown table of Frechet distances, from the records that the demo wrote; the better of each pair in bold."""
    arms = [arm for record in RECORDS for arm in json.loads(record.read_text())["arms"]]
    pairs: dict[str, dict[bool, dict[str, float]]] = {}
    for arm in arms:
        title = arm["title"].partition(",")[0]
        kind = f"{title}, {arm['prediction'].replace('_', ' ')}"
        pairs.setdefault(kind, {})[arm["coupling"] != "independent"] = arm["frechet"]
    steps = list(next(iter(pairs.values()))[True])
    lines = [f"| sampling steps | | {' | '.join(steps)} |", f"|---|---|{'---|' * len(steps)}"]
    for kind, pair in pairs.items():
        for coupled, name in ((False, "independent"), (True, "coupled")):
            cells = [
                f"**{pair[coupled][n]:.0f}**" if pair[coupled][n] < pair[not coupled][n] else f"{pair[coupled][n]:.0f}"
                for n in steps
            ]
            lines.append(f"| {kind if not coupled else ''} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table() -> str:
    """Markdown table of what coupling changed in the training benchmark."""
    return training_report.block(training.committed())


def solvers_paragraph() -> str:
    """Words on how fast assignment and coupling are, from the records of `benchmarks.solvers`."""
    return report.paragraph(Records(ROOT / "benchmarks" / "results" / "solvers.jsonl"))


def ablation_table() -> str:
    """Markdown table in the form of the paper's Table 3, from the records of the ablation."""
    table = table_3(read([RESULTS / "ablation.jsonl"]).cells)
    if table is None:
        msg = "no record of l2 and fp16 in ablation.jsonl: run couplings ablate benchmarks/ablation.yaml"
        raise ValueError(msg)
    lines = [f"| {' | '.join(fields)} |" for fields in (table.head, ["---"] * len(table.head), *table.rows)]
    return "\n".join(lines)


def with_block(text: str, name: str, content: str) -> str:
    """Replace the block `name` of a text.

    Raises
    ------
    ValueError
        If the text has no such block.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        msg = f"no block {begin} ... {end}"
        raise ValueError(msg)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def main(argv: list[str] | None = None) -> int:
    """Bring the blocks of README.md up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")
    arguments = parser.parse_args(argv)
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = old
    blocks = {
        "methods": methods_table,
        "demo": demo_table,
        "training": training_table,
        "solvers": solvers_paragraph,
        "ablation": ablation_table,
    }
    for name, block in blocks.items():
        new = with_block(new, name, block())
    if arguments.check:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
