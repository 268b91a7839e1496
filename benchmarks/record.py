"""Records of measurements: what ran where, one JSON object a line."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["Records", "environment"]

PACKAGES = (
    *("couplings", "torch", "numpy", "numba", "scipy", "lapjv", "lapx", "fastlap", "POT", "torchcfm", "torchebm"),
    *("scikit-learn", "scikit-image", "threadpoolctl"),
)
ROOT = Path(__file__).parents[1]


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


class Records:
    """A JSONL file with one record for each contender of each group.

    Parameters
    ----------
    path : Path
        Need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = []
        if path.exists():
            self.all = [json.loads(line) for line in path.read_text().splitlines()]

    def of(self, task: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the records of a task with the fields given, in order of size."""
        fields["task"] = task
        found = [record for record in self.all if all(record[key] == value for key, value in fields.items())]
        return sorted(found, key=lambda record: record["n"])

    def replace(self, new: list[dict[str, Any]]) -> None:
        """Put in the records of one group and drop the older ones of the same cells; the file is never half written."""
        cells = {_cell(record) for record in new}
        self.all = [record for record in self.all if _cell(record) not in cells] + new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in self.all))
        part.replace(self.path)


def _cell(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("task", "family", "n", "contender"))
