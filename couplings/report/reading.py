"""Records of one or several files, those of a cell put together and its seeds beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from couplings.ablation.grid import Point
from couplings.ablation.records import read_lines
from couplings.report.sections import Samples

__all__ = ["Cells", "Series", "read"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One cell of the grid over its seeds.

    Attributes
    ----------
    point : Point
        Of the first seed.
    by_seed : dict
        Seed to its record, quality and time together.
    """

    point: Point
    by_seed: dict[int, Record]

    @property
    def label(self) -> str:
        """Method with its options, as rows of tables are named."""
        options = "".join(f" {name}={value}" for name, value in self.point.options.items())
        return f"{self.point.method}{options}" + (" †" if self.biased else "")

    @property
    def biased(self) -> bool:
        """Whether the noise is no longer Gaussian."""
        return any(record.get("marginal") == "selected" for record in self.by_seed.values())

    @property
    def rows(self) -> int:
        """Rows that are coupled together, on all ranks."""
        return self.point.n * self.point.ranks

    def values(self, read: Callable[[Record], Any], factor: float = 1.0) -> Samples:
        """Read a number from each seed's record that has it."""
        found = {}
        for seed, record in self.by_seed.items():
            value = read(record)
            if value is not None:
                found[seed] = factor * float(value)
        return found

    def get(self, field: str, factor: float = 1.0) -> Samples:
        """Return a field of each seed's record."""
        return self.values(lambda record: record.get(field), factor)


class Cells:
    """Series that can be asked for by what they have in common."""

    def __init__(self, series: Sequence[Series]) -> None:
        self.series = list(series)

    def __bool__(self) -> bool:
        return bool(self.series)

    def of(self, **fixed: Any) -> Cells:
        """Return those whose point has these values; a list allows any of its values."""

        def fits(series: Series) -> bool:
            for name, wanted in fixed.items():
                value = getattr(series.point, name)
                if value not in wanted if isinstance(wanted, list) else value != wanted:
                    return False
            return True

        return Cells([series for series in self.series if fits(series)])

    def each(self, axis: str) -> list[Any]:
        """Return the values on an axis, in their order in the records; numbers sorted."""
        found = list(dict.fromkeys(getattr(series.point, axis) for series in self.series))
        return sorted(found) if all(isinstance(value, int) for value in found) else found

    @property
    def labels(self) -> list[str]:
        """Names of rows."""
        return list(dict.fromkeys(series.label for series in self.series))

    def by_label(self, read: Callable[[Series], Samples]) -> dict[str, Samples]:
        """Read the values of every series, by name of its row."""
        return {series.label: read(series) for series in self.series}

    @property
    def biased(self) -> list[str]:
        """Names of the rows that are not compared."""
        return [series.label for series in self.series if series.biased]


@dataclass(frozen=True)
class Read:
    """All records of a report.

    Attributes
    ----------
    runs : list of dict
        Environments, with the ``command``.
    cells : Cells
    training : list of dict
        Records of trained arms, of equal methods and of predictions.
    troubles : list of str
        Cells that were skipped or failed, with the reason.
    names : list of str
        The files.
    """

    runs: list[Record]
    cells: Cells
    training: list[Record]
    troubles: list[str]
    names: list[str]


def read(paths: Iterable[Path]) -> Read:
    """Read files that `couplings ablate` and ``python -m benchmarks.ablation`` wrote.

    Parameters
    ----------
    paths : iterable of Path

    Returns
    -------
    Read

    Raises
    ------
    ValueError
        If a file holds other lines, or none that can be reported.
    OSError
        If it cannot be read.
    """
    paths = list(paths)
    runs: list[Record] = []
    training: dict[tuple[Any, ...], Record] = {}
    latest: dict[tuple[str, str], Record] = {}
    for path in paths:
        for record in read_lines(path)[0]:
            task = record.get("task")
            if task == "run":
                runs.append({**record["environment"], "command": record.get("command", "")})
            elif task in ("quality", "time"):
                latest[task, Point.from_dict(record).key] = record
            elif task in ("training", "equality", "one step"):
                key = (task, *(str(record.get(name)) for name in ("data", "objective", "arm", "seed", "of")))
                training[key] = record
                if "environment" in record:
                    runs.append(_plain(record["environment"]))
    series: dict[str, Series] = {}
    troubles: dict[str, None] = {}
    for (task, _), record in latest.items():
        point = Point.from_dict(record)
        reason = record.get("error") or record.get("skipped")
        if reason:
            kind = "failed" if record.get("error") else "skipped"
            troubles[f"{point.title} {kind}: {' '.join(str(reason).split())}"] = None
            continue
        for note in record.get("notes") or ():
            troubles[f"{point.title}: {note}"] = None
        plain = {name: value for name, value in point.to_dict().items() if name != "seed"}
        together = series.setdefault(str(plain), Series(point, {}))
        together.by_seed.setdefault(point.seed, {}).update(record if task == "quality" else _times(record))
    if not series and not training:
        named = ", ".join(map(str, paths))
        msg = f"{named}: no records of couplings ablate or python -m benchmarks.ablation that could be reported."
        raise ValueError(msg)
    # A time without its quality was interrupted between the two.
    whole = [Series(each.point, _whole(each.by_seed)) for each in series.values()]
    return Read(
        _distinct(runs),
        Cells([each for each in whole if each.by_seed]),
        list(training.values()),
        list(troubles),
        [path.name for path in paths],
    )


def _times(record: Record) -> Record:
    return {name: record[name] for name in ("ms", "ms_iqr", "phases_ms", "repeats", "threads", "peak_bytes")}


def _whole(by_seed: dict[int, Record]) -> dict[int, Record]:
    return {seed: record for seed, record in sorted(by_seed.items()) if "reduction" in record}


def _plain(environment: Record) -> Record:
    """Bring the environment of a training record into the form of the others."""
    hardware = environment["hardware"]
    versions = {name: version for name, version in environment["versions"].items() if version is not None}
    return {
        "couplings": versions.pop("couplings", None),
        "commit": environment["kernels"],
        "python": environment["python"],
        "platform": environment["system"],
        "cpu": hardware["cpu"],
        "cpus": hardware["cores"],
        "load": hardware["load"],
        "threads": environment["threads"],
        "devices": [],
        "packages": versions,
        "date": environment["date"],
        "command": environment.get("command", ""),
    }


def _distinct(runs: list[Record]) -> list[Record]:
    """Each environment once, the last of those that differ in the date only."""
    by_content = {str({name: value for name, value in run.items() if name != "date"}): run for run in runs}
    return list(by_content.values())
