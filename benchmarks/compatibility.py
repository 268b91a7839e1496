"""Run the tests with other versions and record what passed: ``python -m benchmarks.compatibility oldest``.

The Python that runs this runs the tests, the library's and then the trainers': that of ``.venv-oldest``, where
``make setup VERSIONS=oldest`` installed the packages.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree  # nosec B405 - of a file that pytest has just written

from packaging.requirements import Requirement

from .record import RESULTS, ROOT, Record, append, environment, markdown, read

SUITES = {"library": ["--ignore=tests/trainers"], "trainers": ["tests/trainers"]}
COUNTS = ("passed", "failed", "errors", "skipped")
SOURCES = ("couplings", "integrations", "tests")
FILE = "compatibility.jsonl"


def run(arguments: list[str]) -> dict[str, Any]:
    """Run pytest and return its command, how many tests passed and did not, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"], cwd=ROOT, check=False)
        if not report.exists():
            msg = f"pytest {' '.join(arguments)} ended without a report"
            raise RuntimeError(msg)
        (suite,) = ElementTree.parse(report).getroot()  # nosec B314
    failed, errors, skipped = (int(suite.attrib[name]) for name in ("failures", "errors", "skipped"))
    passed = int(suite.attrib["tests"]) - failed - errors - skipped
    counts = dict(zip(COUNTS, (passed, failed, errors, skipped), strict=True))
    return {"command": " ".join(["pytest", *arguments]), **counts, "seconds": round(float(suite.attrib["time"]))}


def packages() -> tuple[str, ...]:
    """Return what the library and its extras name, but for the library."""
    named = (Requirement(line).name for line in importlib.metadata.requires("couplings") or ())
    return tuple(sorted(set(named) - {"couplings"}, key=str.lower))


def committed() -> dict[str, dict[str, Record]]:
    """Return the last record of each suite under each name."""
    latest: dict[str, dict[str, Record]] = {}
    for record in read(RESULTS / FILE):
        latest.setdefault(record["constraints"], {})[record["suite"]] = record
    return latest


def runs_table() -> str:
    """Lay out what passed."""
    rows = []
    for name, suites in committed().items():
        for suite, record in suites.items():
            place, counts = record["environment"], [str(record[count]) for count in COUNTS]
            minutes = f"{record['seconds'] / 60:.0f}"
            rows.append([name, place["python"], suite, *counts, minutes, place["kernels"], place["date"][:10]])
    return markdown(["versions", "Python", "tests", *COUNTS, "minutes", "commit", "date"], rows)


def versions_table() -> str:
    """Lay out the versions of every package that was there in all runs."""
    names = {name: [*suites.values()][-1]["environment"]["versions"] for name, suites in committed().items()}
    common = [package for package in next(iter(names.values())) if all(found.get(package) for found in names.values())]
    return markdown(["", *names], [[package, *(found[package] for found in names.values())] for package in common])


TABLES: dict[str, Callable[[], str]] = {"compatibility-runs": runs_table, "compatibility-versions": versions_table}


def main(argv: list[str] | None = None) -> int:
    """Run and record; exit 1 if a test did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compatibility", description=__doc__)
    parser.add_argument("constraints", choices=["oldest", "newest"])
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--output", type=Path, default=RESULTS / FILE, metavar="FILE")
    arguments, rest = parser.parse_known_args(argv)
    passed = True
    for suite in arguments.suites:
        place = environment(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)), None, packages(), SOURCES)
        result = run([*SUITES[suite], *rest])
        append(arguments.output, {"constraints": arguments.constraints, "suite": suite, **result, "environment": place})
        passed = passed and not result["failed"] + result["errors"]
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
