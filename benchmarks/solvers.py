"""Time exact assignment on the problems that training poses, against every other solver that can be installed.

    pip install -e '.[all,bench]'
    python -m benchmarks.solvers

TorchCFM asks for torchvision, which is not built for every torch. Where that gets in the way, install the couplings of
others in a folder of their own and name it; what is timed needs nothing but POT and torch:

    pip install --no-deps --target build/peers torchcfm torchebm
    python -m benchmarks.solvers --extra-path build/peers

Everything is timed in one process with pinned thread pools, one call of each contender in turn (`worker.py`), with
`time.perf_counter` and the garbage collector off, after a call on a small problem. Records go to
`results/solvers.jsonl` as they come, so an interrupted run goes on where it stopped; groups measured with the library
as it is now are not measured again. The table and the plots are made from the records: ``--report-only`` makes them
anew.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report
from .contenders import OURS, TASKS, Contender, contenders
from .instances import CROPS, HARD
from .record import ROOT, Records, environment
from .worker import Worker

SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
HARD_SIZES = (256, 1024)
COUPLE_SIZES = (256, 1024, 4096)
LEAST = 2.0  # seconds that a call may take at any size
PATIENCE = 5.0  # seconds beyond twice the limit before a call is ended
LARGE = 16384  # solved by us alone, for the memory it takes
REFERENCES = (OURS, "scipy")  # not held to the shorter limit of the hard families
KERNELS = ("couplings/kernels",)
COUPLE = (
    *KERNELS,
    *(f"couplings/{name}" for name in ("assigners", "coupling.py", "distances.py", "inputs.py", "pairing.py")),
)
SOURCES = {"couple": COUPLE, "step": COUPLE}  # what a task measures of the library; KERNELS for the others
GROWTH = 2.5  # exponent by which a time is predicted from that of the next smaller size


@dataclass(frozen=True)
class Config:
    """How long measuring goes on.

    Attributes
    ----------
    limit : float
        Seconds that one call may take at n = 4096 and above, proportionally less below (but `LEAST`); a contender
        predicted to take longer is not run.
    hard_limit : float
        Seconds, for any size, on the hard families, for all but the references.
    runs : int
        At most, of each contender in a group.
    share : float
        Seconds after which a contender has run enough, if it ran three times.
    most : float
        Seconds after which it has, however often it ran.
    """

    limit: float = 25.0
    hard_limit: float = 1.5
    runs: int = 25
    share: float = 1.0
    most: float = 20.0


QUICK = Config(limit=5.0, hard_limit=1.0, runs=3, share=0.5, most=2.0)


@dataclass(frozen=True)
class Group:
    """Contenders that are timed in turn on one instance."""

    task: str
    family: str
    n: int
    contenders: tuple[Contender, ...]

    def __str__(self) -> str:
        return f"{self.task} {self.family} n={self.n}"


def groups(arguments: argparse.Namespace) -> list[Group]:
    """All that was asked for, smaller sizes first: they predict the larger ones."""
    sizes, quick = sorted(arguments.sizes or ((128, 256) if arguments.quick else SIZES)), arguments.quick
    top = max(sizes)
    cells: list[tuple[str, str, int]] = []
    if CROPS in arguments.families:
        cells += [("solve", CROPS, n) for n in sizes]
        couple_sizes = [n for n in COUPLE_SIZES if n <= top] or [top]
        cells += [(task, CROPS, n) for task in ("couple", "step") for n in couple_sizes]
        cells += [("l1", CROPS, min(1024, top)), ("threads", CROPS, min(2048, top)), ("memory", CROPS, min(2048, top))]
        if not quick and arguments.sizes is None:
            cells.append(("memory", CROPS, LARGE))
    hard_sizes = [n for n in HARD_SIZES if n <= top] or [top]
    cells += [("solve", family, n) for family in arguments.families if family != CROPS for n in hard_sizes]
    return [
        Group(task, family, n, tuple(entry for entry in entries if n < LARGE or entry.name in (OURS, "empty")))
        for task, family, n in cells
        if task in arguments.tasks and (entries := contenders(task, family, arguments.peers))
    ]


def done(group: Group, records: Records, here: dict[str, Any], config: Config, *, resume: bool) -> bool:
    """Whether every cell of the group is on record, with this library and configuration or with `resume` any."""
    found = {
        record["contender"]
        for record in records.of(group.task, family=group.family, n=group.n)
        if resume
        or (
            record["config"] == vars(config)
            and "+" not in here["kernels"]
            and all(record["environment"][key] == here[key] for key in ("kernels", "threads", "versions"))
        )
    }
    return found.issuperset(entry.name for entry in group.contenders)


def predicted(entry: Contender, group: Group, records: Records) -> float:
    """Seconds that a call will take, from the next smaller size; infinite if that did not finish.

    Without a smaller size, crops of the same size are the guess for a hard family.
    """
    task = "solve" if group.task == "memory" else group.task
    known = [
        record
        for record in records.of(task, contender=entry.name)
        if (record["family"] == group.family and record["n"] < group.n)
        or (record["family"] == CROPS and record["n"] == group.n and (task, CROPS) != (group.task, group.family))
    ]
    known = [record for record in known if record["family"] == group.family] or known
    if not known or known[-1]["status"] == "absent":
        return 0.0
    last = known[-1]
    seconds: float = last["median"] if last["status"] == "ok" else math.inf
    growth: float = (group.n / last["n"]) ** GROWTH
    return seconds * growth


def measure(
    group: Group, records: Records, config: Config, worker: Worker, fresh: Callable[[], Worker]
) -> list[dict[str, Any]]:
    """Time the contenders of a group in turn until each has had its share; return a result for each.

    Memory is measured once, each time in a process of its own, which `fresh` starts.
    """
    results: dict[str, dict[str, Any]] = {
        entry.name: {"contender": entry.name, "exact": entry.exact} for entry in group.contenders
    }
    turns: list[tuple[Contender, float]] = []
    for entry in group.contenders:
        limit = config.limit if entry.name in REFERENCES else config.hard_limit
        if group.family == CROPS:
            limit = max(LEAST, config.limit * min(1.0, group.n / 4096))
        expected = 0.0 if entry.name == OURS else predicted(entry, group, records)
        results[entry.name] |= {"status": "ok", "limit": limit, "seconds": []}
        if expected > limit:
            why = "a smaller size did not finish" if expected == math.inf else f"predicted {expected:.1f} s"
            results[entry.name] |= {"status": "not run", "note": f"{why}; limit {limit:.1f} s"}
        else:
            turns.append((entry, limit))
    while turns:
        for turn in list(turns):
            entry, limit = turn
            result = results[entry.name]
            # The limit decides what is started; what was let in is given time to finish.
            call = (group.task, entry.name, group.family, group.n, PATIENCE + 2 * limit)
            if group.task == "memory":
                with fresh() as single:
                    reply = single.run(*call, memory=True)
            else:
                reply = worker.run(*call)
            if reply["status"] == "ok":
                result["seconds"].append(reply.pop("seconds"))
                if "gap" in result and _worse(result["gap"], reply["gap"]):
                    del reply["gap"]
            result |= reply
            spent, runs = sum(result["seconds"]), len(result["seconds"])
            enough = runs >= config.runs or spent > config.most or (runs >= 3 and spent > config.share)
            if reply["status"] != "ok" or enough or group.task == "memory":
                turns.remove(turn)
    return [_summarized(result) for result in results.values()]


def _worse(one: float | None, other: float | None) -> bool:
    """Whether a gap is larger than another; None, no permutation at all, is the largest."""
    return one is None or (other is not None and one > other)


def _summarized(result: dict[str, Any]) -> dict[str, Any]:
    seconds = result["seconds"]
    if not seconds:
        return result
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return result | {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "runs": len(seconds)}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [CROPS, *HARD]
    packages = sorted({entry.package for all_ in TASKS.values() for entry in all_ if entry.package})
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="rows of the crops (128 to 8192)")
    parser.add_argument("--families", nargs="+", choices=everything, default=everything, metavar="FAMILY")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"of {', '.join(packages)}, or one of their solvers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every thread pool (all cores)")
    parser.add_argument("--extra-path", metavar="DIR", help="folder with further packages")
    parser.add_argument("--quick", action="store_true", help="small sizes, few runs: whether it works, not how fast")
    parser.add_argument("--resume", action="store_true", help="keep records of earlier versions of the library too")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--report-only", action="store_true", help="make the table and the plots from the records")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="file whose marked block is written anew")
    arguments = parser.parse_args(argv)
    records = Records(arguments.output / "solvers.jsonl")
    if not arguments.report_only:
        run(arguments, records)
    for path in report.write(records, arguments.output, arguments.readme):
        print(f"wrote {path}")


def run(arguments: argparse.Namespace, records: Records) -> None:
    """Measure what is not on record."""
    config = QUICK if arguments.quick else Config()
    here = environment(arguments.threads, arguments.extra_path)
    print(f"{here['hardware']['cpu']}, {here['threads']} threads, load {here['hardware']['load']}")
    todo = groups(arguments)
    begun = time.perf_counter()

    def fresh() -> Worker:
        return Worker(arguments.threads, arguments.extra_path)

    with fresh() as worker:
        for position, group in enumerate(todo, 1):
            label = f"[{position}/{len(todo)}, {time.perf_counter() - begun:4.0f} s] {group}"
            now = environment(arguments.threads, arguments.extra_path, sources=SOURCES.get(group.task, KERNELS))
            if done(group, records, now, config, resume=arguments.resume):
                print(f"{label}: on record")
                continue
            print(f"{label}: {len(group.contenders)} contenders", flush=True)
            cell = {"task": group.task, "family": group.family, "n": group.n}
            results = measure(group, records, config, worker, fresh)
            records.replace([cell | result | {"config": vars(config), "environment": now} for result in results])
            for result in results:
                print(f"    {_line(result)}", flush=True)


def _line(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['contender']:28} {result['status']}: {result['note']}"
    gap = "" if "gap" not in result else f"  gap {'no permutation' if result['gap'] is None else result['gap']}"
    return f"{result['contender']:28} {1e3 * result['median']:10.2f} ms x{result['runs']}{gap}"


if __name__ == "__main__":
    main()
