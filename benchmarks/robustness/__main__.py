"""Try to break the library on purpose: ``python -m benchmarks.robustness``.

Each part tries one kind of misfortune many times and counts what was lost. A record goes to
``benchmarks/results/robustness.jsonl`` after each. A part that is on record, at the share asked for or a larger one,
from the same sources and versions, is skipped. Exits 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..record import RESULTS, append, environment, read
from . import PARTS

SOURCES = ("couplings", "integrations", "benchmarks/robustness")


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are not on record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of the full size of each part (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="also what is on record")
    parser.add_argument("--output", type=Path, default=RESULTS / "robustness.jsonl", metavar="FILE")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not 0.0 < arguments.share <= 1.0:
        parser.error(f"--share: expected more than 0 and at most 1, got {arguments.share:g}")
    here = environment(threads=1, extra_path=None, sources=SOURCES)
    lost = 0
    for name in arguments.parts or PARTS:
        earlier = [record for record in read(arguments.output) if record["part"] == name and _same(record, here)]
        done = [record for record in earlier if record["share"] >= arguments.share]
        if done and not arguments.again:
            print(f"{name}: on record, {done[-1]['lost']} of {done[-1]['tried']} lost", flush=True)
            lost += done[-1]["lost"]
            continue
        began = time.perf_counter()
        outcome = PARTS[name](arguments.share)
        seconds = round(time.perf_counter() - began, 1)
        record = {"part": name, "share": arguments.share, "tried": outcome.tried, "lost": outcome.lost}
        append(arguments.output, {**record, "about": outcome.about, "seconds": seconds, "environment": here})
        print(f"{name}: {outcome.lost} of {outcome.tried} lost, {seconds} s", flush=True)
        for what in outcome.about.get("lost", []):
            print(f"  {what}", flush=True)
        lost += outcome.lost
    return int(lost > 0)


def _same(record: dict[str, object], here: dict[str, object]) -> bool:
    there = record["environment"]
    alike = all(there[name] == here[name] for name in ("kernels", "versions", "python"))
    return alike and "+" not in here["kernels"]


if __name__ == "__main__":
    sys.exit(main())
