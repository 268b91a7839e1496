"""An ablation from its grid to its records: what is finished is left alone, what is not is measured."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from couplings.ablation.grid import Point
from couplings.ablation.records import Log
from couplings.ablation.sources import open_source
from couplings.ablation.workers import Settings, World, side_by_side
from couplings.environment import describe

__all__ = ["Outcome", "Progress", "environment", "run"]

Record = dict[str, Any]


@dataclass
class Progress:
    """How far an ablation is.

    Attributes
    ----------
    cells, of : int
        Measurements that are finished, of how many; the quality and the time of a cell are two.
    work, total : float
        The same, weighed by the time that they should take.
    title : str
        What was measured last.
    """

    of: int
    total: float
    cells: int = 0
    work: float = 0.0
    title: str = ""


@dataclass
class Outcome:
    """What an ablation came to.

    Attributes
    ----------
    measured, kept : int
        Measurements made now, and found on record.
    skipped, failed : dict
        Reasons, by the title of the cell.
    notes : list of str
        What its reader should know.
    """

    measured: int = 0
    kept: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def environment(threads: int | None) -> Record:
    """Describe what the measurements run on, without what is nobody else's business, such as folders.

    Parameters
    ----------
    threads : int or None
        Of the processes that are timed; None for PyTorch's own choice.
    """
    described = describe()
    packages = {**described["packages"], **{name: each["version"] for name, each in described["optional"].items()}}
    return {
        "couplings": described["couplings"],
        "commit": described["commit"],
        "python": described["python"].partition(" ")[0],
        "platform": described["platform"],
        "cpu": described["cpu"],
        "cpus": described["cpus"],
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": threads or described["threads"],
        "devices": described["devices"],
        "packages": {name: version for name, version in packages.items() if version is not None},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run(
    points: Sequence[Point],
    output: Path,
    settings: Settings,
    *,
    jobs: int,
    times: bool = True,
    restart: bool = False,
    command: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Measure the cells that are not on record.

    Qualities are measured side by side. Times are measured after them, by one process at a time, so that nothing of
    ours disturbs them; the ranks of the global scope likewise.

    Parameters
    ----------
    points : sequence of Point
        Cells of one batch next to each other.
    output : Path
        JSONL file of the records, which are added as cells finish.
    settings : Settings
    jobs : int
        Processes for qualities.
    times : bool
        Measure times and memory too.
    restart : bool
        Drop what is on record.
    command : str
        How to do it again, for the record.
    on_progress : callable
        Called as measurements finish.

    Returns
    -------
    Outcome

    Raises
    ------
    ValueError, TypeError, OSError, RuntimeError
        If a file cannot be read, or `output` not written.
    """
    digests = {}
    for source in dict.fromkeys((point.data, point.labels) for point in points):
        opened = open_source(*source)
        digests[source] = opened.digest
        for point in points:  # mistakes show before anything runs
            if (point.data, point.labels) == source and opened.rows is not None:
                opened.batch(point.n * point.ranks, point.seed, 1, point.condition)
    with Log(output, restart=restart) as log:
        todo = _Todo(points, log, digests, times=times, repeats=settings.repeats)
        outcome = Outcome(kept=todo.kept, notes=_notes(log, todo.kept, settings.threads))
        progress = Progress(todo.count, todo.weight)
        if todo.count:
            number = sum(record.get("task") == "run" for record in log.records)
            header = {"task": "run", "run": number, "command": command, "environment": environment(settings.threads)}
            log.add(header)

        def keep(point: Point, answer: dict[str, Record]) -> bool:
            error = answer.pop("error", None)
            if error is not None:
                answer = {"quality": point.to_dict() | error}
            for task, record in answer.items():
                log.add({"task": task, "run": number, **record})
                outcome.measured += 1
                progress.cells += 1
                progress.work += todo.weigh(point, task)
                for kind, found in (("skipped", outcome.skipped), ("error", outcome.failed)):
                    if record.get(kind):
                        found[point.title] = record[kind]
            good = not any(record.get("error") or record.get("skipped") for record in answer.values())
            if times and not good:  # there is no time to be measured then
                progress.cells += 2 - len(answer)
                progress.work += todo.weigh(point, "time")
            progress.title = point.title
            on_progress(progress)
            return good

        on_progress(progress)
        groups = [list(group) for _, group in groupby(todo.quality, key=_batch)]
        bad = {point.key for point, answer in side_by_side(groups, settings, jobs) if not keep(point, answer)}
        with World("time", settings, settings.threads) as alone:
            for point in todo.time:
                if point.key not in bad:
                    answer = alone.measure(point)
                    failed = answer.pop("error", None)
                    keep(point, answer if failed is None else {"time": point.to_dict() | failed})
        for ranks, group in groupby(sorted(todo.over_ranks, key=lambda point: point.ranks), key=lambda p: p.ranks):
            with World("global", settings, 1, ranks) as world:
                for point in group:
                    keep(point, world.measure(point))
    return outcome


def _batch(point: Point) -> tuple[Any, ...]:
    return (point.data, point.labels, point.n, point.condition, point.seed)


class _Todo:
    """What is not on record yet."""

    def __init__(
        self, points: Iterable[Point], log: Log, digests: dict[Any, str | None], *, times: bool, repeats: int
    ) -> None:
        self.times, self.repeats = times, repeats
        found: dict[tuple[str, str], Record] = {}
        for record in log.records:
            if record.get("task") in ("quality", "time") and not (record.get("error") or record.get("skipped")):
                found[record["task"], Point.from_dict(record).key] = record
        self.quality: list[Point] = []
        self.time: list[Point] = []
        self.over_ranks: list[Point] = []
        self.kept = 0
        for point in points:
            known = found.get(("quality", point.key))
            done = known is not None and known["digest"] == digests[point.data, point.labels]
            timed = done and ("time", point.key) in found
            self.kept += done + timed
            if point.scope == "global":
                if not done or not timed:
                    self.over_ranks.append(point)
                continue
            if not done:
                self.quality.append(point)
            if times and not timed:
                self.time.append(point)

    @property
    def count(self) -> int:
        """Measurements to make."""
        return len(self.quality) + len(self.time) + 2 * len(self.over_ranks)

    @property
    def weight(self) -> float:
        """What they should take, in a unit of its own."""
        local = sum(self.weigh(point, "quality") for point in self.quality)
        local += sum(self.weigh(point, "time") for point in self.time)
        return local + sum(self.weigh(point, task) for point in self.over_ranks for task in ("quality", "time"))

    def weigh(self, point: Point, task: str) -> float:
        """Cost grows with the matrix; the class leakage and the float64 distances of a quality take as long as it."""
        entries = float(point.n * point.ranks) ** 2
        return (self.repeats + 3) * (entries + 200.0**2) if task == "time" else 3 * entries + 1500.0**2


def _notes(log: Log, kept: int, threads: int | None) -> list[str]:
    """Say if what is kept was measured by something else than what runs now."""
    runs = [record["environment"] for record in log.records if record.get("task") == "run"]
    if not kept or not runs:
        return []
    now, before = environment(threads), runs[-1]
    changed = [name for name in ("couplings", "commit", "python", "cpu", "threads") if now[name] != before[name]]
    if not changed:
        return []
    told = ", ".join(f"{name} {before[name]} (now {now[name]})" for name in changed)
    return [f"{kept} measurements are kept that were made with {told}; --restart makes all of them again"]
