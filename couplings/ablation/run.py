"""An ablation from its grid to its records: what is finished is left alone, what is not is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from couplings.ablation.environment import plugin, summary
from couplings.ablation.grid import Point
from couplings.ablation.records import Log
from couplings.ablation.sources import open_source
from couplings.ablation.workers import Settings, measure

__all__ = ["Outcome", "run"]

Record = dict[str, Any]


@dataclass
class Outcome:
    """How far an ablation is, and what it came to.

    Attributes
    ----------
    measured, kept : int
        Measurements made now, and found on record; the quality and the time of a cell are two.
    missing : int
        Measurements that were to be made.
    work, total : float
        Measurements made and to be made, weighed by the time that they should take.
    skipped, failed : dict
        Reasons, by the title of the cell.
    notes : list of str
        What its reader should know.
    title : str
        What was measured last.
    """

    measured: int = 0
    kept: int = 0
    missing: int = 0
    work: float = 0.0
    total: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    title: str = "starting"


def run(
    points: Sequence[Point],
    output: Path,
    settings: Settings,
    *,
    jobs: int,
    times: bool = True,
    restart: bool = False,
    command: str = "",
    on_progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Measure the cells that are not on record.

    Qualities are measured side by side, in `jobs` processes. Times are measured after them, by one process at a time,
    so that nothing of ours disturbs them; the ranks of the global scope likewise.

    Parameters
    ----------
    points : sequence of Point
        Cells of one batch next to each other.
    output : Path
        JSONL file of the records, which are added as cells finish.
    settings : Settings
    jobs : int
    times : bool
        Measure times and memory too.
    restart : bool
        Drop what is on record.
    command : str
        How to do it again, for the record.
    on_progress : callable
        Called as measurements finish.
    """
    digests = _check_sources(points)
    tasks = ["quality", "time"] if times else ["quality"]
    with Log(output, restart=restart) as log:
        plugins = {point.method: plugin(point.method) for point in points}
        todo = _todo(points, tasks, _finished(log.records, digests, plugins))
        wanted = [(point, task) for point in points for task in todo[point.key]]
        outcome = Outcome(
            kept=len(points) * len(tasks) - len(wanted),
            missing=len(wanted),
            total=sum(_work(point, task, settings) for point, task in wanted),
        )
        number = sum(record.get("task") == "run" for record in log.records)
        if wanted:
            here = summary(settings.threads)
            if outcome.kept:
                outcome.notes += _changed(log.records, here, outcome.kept)
            outcome.notes += _changed_plugins(log.records, plugins)
            log.add({"task": "run", "run": number, "command": command, "environment": here})
        on_progress(outcome)

        def keep(point: Point, answer: dict[str, Record]) -> None:
            missing = todo[point.key]
            for task, record in answer.items():
                log.add({"task": task, "run": number, **record})
                missing.remove(task)
                outcome.measured += 1
                outcome.work += _work(point, task, settings)
                for kind, reasons in (("skipped", outcome.skipped), ("error", outcome.failed)):
                    if record.get(kind):
                        reasons[point.title] = record[kind]
                        outcome.missing -= len(missing)
                        outcome.total -= sum(_work(point, task, settings) for task in missing)
                        missing.clear()  # there is no time to be measured then
            outcome.title = point.title
            on_progress(outcome)

        local = [point for point in points if point.scope == "local"]
        batches = groupby((point for point in local if "quality" in todo[point.key]), _batch)
        for point, answer in measure([list(group) for _, group in batches], ["quality"], settings, jobs=jobs):
            keep(point, answer)
        timed = [[point] for point in local if "time" in todo[point.key]]
        for point, answer in measure(timed, ["time"], settings, threads=settings.threads):
            keep(point, answer)
        together = sorted((p for p in points if p.scope == "global" and todo[p.key]), key=lambda point: point.ranks)
        for ranks, group in groupby(together, lambda point: point.ranks):
            for point, answer in measure([list(group)], tasks, settings, ranks=ranks):
                keep(point, answer)
    return outcome


def _check_sources(points: Sequence[Point]) -> dict[Any, str | None]:
    """Open each source, so that mistakes show before anything runs; return the digests of their contents."""
    digests = {}
    for data, labels in dict.fromkeys((point.data, point.labels) for point in points):
        source = open_source(data, labels)
        digests[data, labels] = source.digest
        drawn = {(p.rows, p.seed, p.condition) for p in points if (p.data, p.labels) == (data, labels)}
        for rows, seed, condition in drawn if source.rows is not None else ():
            source.batch(rows, seed, condition=condition)
    return digests


def _finished(
    records: Sequence[Record], digests: dict[Any, str | None], plugins: dict[str, Any]
) -> set[tuple[str, str]]:
    """Tasks and cells on record, without what failed, was skipped, or was measured on other data or another plug-in."""
    found = set()
    for record in records:
        if record.get("task") in ("quality", "time") and not (record.get("error") or record.get("skipped")):
            same = record["task"] == "time" or record["digest"] == digests.get((record["data"], record["labels"]))
            if same and record.get("plugin") == plugins.get(record["method"]):
                found.add((record["task"], Point.from_dict(record).key))
    return found


def _todo(points: Sequence[Point], tasks: Sequence[str], done: set[tuple[str, str]]) -> dict[str, list[str]]:
    """Tasks that are not done, by the key of the cell."""
    todo = {}
    for point in points:
        missing = [task for task in tasks if (task, point.key) not in done]
        # A time goes with its quality, and ranks measure both at once.
        both = "quality" in missing or (missing and point.scope == "global")
        todo[point.key] = list(tasks) if both else missing
    return todo


def _batch(point: Point) -> tuple[Any, ...]:
    return (point.data, point.labels, point.n, point.condition, point.seed)


def _work(point: Point, task: str, settings: Settings) -> float:
    """Cost grows with the matrix; the class leakage and the float64 distances of a quality take as long as it."""
    entries = float(point.rows) ** 2
    return (settings.repeats + 3) * (entries + 200.0**2) if task == "time" else 3 * entries + 1500.0**2


def _changed(records: Sequence[Record], now: Record, kept: int) -> list[str]:
    """Return a note if what is kept was measured by other versions or elsewhere than now."""
    before = [record["environment"] for record in records if record.get("task") == "run"][-1:]
    changed = [
        f"{name} {each[name]} (now {now[name]})"
        for each in before
        for name in ("couplings", "commit", "python", "cpu", "threads")
        if now[name] != each[name]
    ]
    if not changed:
        return []
    return [f"{kept} measurements are kept that were made with {', '.join(changed)}; --restart makes all of them again"]


def _changed_plugins(records: Sequence[Record], now: dict[str, Any]) -> list[str]:
    """Return a note for each method of another package that is not the one on record."""
    before = {each["method"]: each["plugin"] for each in records if each.get("plugin") and each["method"] in now}
    return [
        f"{method} is measured again: {_named(before[method])} is on record, {_named(now[method])} is here"
        for method in before
        if before[method] != now[method]
    ]


def _named(plugin: Record | None) -> str:
    if plugin is None:
        return "couplings' own"
    return f"{plugin['package']} {plugin['version'] or 'without a version'} (source {plugin['source']})"
