"""Records of measurements: what ran where, one JSON object a line; and how records become tables."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "Records", "append", "environment", "markdown", "new_page", "provenance", "read"]

Record = dict[str, Any]

PACKAGES = (
    *("couplings", "torch", "numpy", "numba", "scipy", "lapjv", "lapx", "fastlap", "POT", "torchcfm", "torchebm"),
    *("scikit-learn", "scikit-image", "threadpoolctl"),
)
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(
    threads: int,
    extra_path: str | None,
    packages: tuple[str, ...] = PACKAGES,
    sources: tuple[str, ...] = ("couplings",),
) -> dict[str, Any]:
    """Hardware, versions, commit and date.

    Parameters
    ----------
    threads : int
    extra_path : str or None
        Folder with further packages.
    packages : tuple of str
        Whose versions matter.
    sources : tuple of str
        Files and folders of the checkout that decide what is measured.

    Returns
    -------
    dict
        ``kernels`` is the last commit that touched the sources, with "+" if the checkout differs from it; a version is
        None where the package is absent.
    """
    return {
        "hardware": {
            "cpu": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load": round(os.getloadavg()[0], 2),
        },
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name, extra_path) for name in packages},
        "threads": threads,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "kernels": _git("log", "-1", "--format=%h", "--", *sources)
        + ("+" if _git("status", "--porcelain", "--", *sources) else ""),
        "committed": _git("show", "-s", "--format=%cs", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str, extra_path: str | None) -> str | None:
    for path in (None, extra_path):
        found = importlib.metadata.distributions(name=name, **({} if path is None else {"path": [path]}))
        version = next((distribution.version for distribution in found), None)
        if version is not None:
            return version if path is None else f"{version} (in a folder of its own, without its dependencies)"
        if extra_path is None:
            break
    return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def read(path: Path) -> list[Record]:
    """Return the records of a file, without a line that was cut short when a process was killed."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def append(path: Path, record: Record) -> None:
    """Add a record, a line at a time, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + json.dumps(record, allow_nan=False) + "\n")


class Records:
    """A JSONL file with one record for each contender of each group.

    Parameters
    ----------
    path : Path
        Need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all = read(path)

    def of(self, task: str, **fields: Any) -> list[Record]:
        """Return the records of a task with the fields given, in order of size."""
        fields["task"] = task
        found = [record for record in self.all if fields.items() <= record.items()]
        return sorted(found, key=lambda record: record["n"])

    def replace(self, new: list[Record]) -> None:
        """Put in the records of one group and drop the older ones of the same cells; the file is never half written."""
        cells = {_cell(record) for record in new}
        self.all = [record for record in self.all if _cell(record) not in cells] + new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in self.all))
        part.replace(self.path)


def _cell(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("task", "family", "n", "contender"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def provenance(records: Iterable[Record]) -> str:
    """Return a table of the machines, versions, commits, dates and loads of all records that say so."""
    places = [record["environment"] for record in records if "environment" in record]
    versions: dict[str, str | None] = {}
    for place in places:
        versions |= {name: version or versions.get(name) for name, version in place["versions"].items()}
    loads = sorted(place["hardware"]["load"] for place in places)
    every = {
        "hardware": ["{cpu}, {cores} cores, {memory_gib} GiB".format(**place["hardware"]) for place in places],
        "threads": [str(place["threads"]) for place in places],
        "system": [f"{place['system']}, Python {place['python']}" for place in places],
        "versions": [", ".join(f"{name} {version}" for name, version in versions.items() if version)],
        "absent": [", ".join(name for name, version in versions.items() if not version)],
        "library at commit (+: with changes)": [place["kernels"] for place in places],
        "measured": [place["date"][:10] for place in places],
        "load average before a measurement": [
            f"{loads[0]:.1f} to {loads[-1]:.1f}, median {loads[len(loads) // 2]:.1f}"
        ],
    }
    return markdown(["", ""], [[name, ", ".join(sorted(set(values)))] for name, values in every.items()])


def new_page(title: str, about: str, tables: Iterable[tuple[str, str, str]]) -> str:
    """Return a page to begin with: what was measured, and its tables, which `benchmarks.tables` keeps up to date.

    Parameters
    ----------
    title, about : str
    tables : iterable of (heading, name, table)
    """
    parts = [f"# {title}", about.strip()]
    for heading, name, table in tables:
        parts.append(f"## {heading}\n\n<!-- {name}:begin -->\n{table}\n<!-- {name}:end -->")
    return "\n\n".join(parts) + "\n"
