"""Time exact assignment and coupling on the problems that training poses, against every other solver there is.

    pip install -e '.[all,bench]'
    python -m benchmarks.solvers

TorchCFM asks for torchvision, which is not built for every torch. Where that gets in the way, install the couplings of
others in a folder of their own and name it; what is timed needs nothing but POT and torch:

    pip install --no-deps --target build/peers torchcfm torchebm
    python -m benchmarks.solvers --extra-path build/peers

Everything is timed in one process with pinned thread pools, one call of each contender in turn (`worker.py`), with
`time.perf_counter` and the garbage collector off, after a call on a small problem. Records go to
`results/solvers.jsonl` as they come, so an interrupted run goes on where it stopped; groups measured with the library
as it is now are not measured again. ``python -m benchmarks.tables`` makes tables and plots of the records.
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

from .contenders import OURS, TASKS, Contender, contenders
from .instances import CROPS, HARD
from .record import RESULTS, Records, environment
from .worker import Worker

LEAST = 2.0  # seconds that a call may take at any size
PATIENCE = 5.0  # seconds beyond twice the limit before a call is ended
LARGE = 16384  # solved by us alone, for the memory it takes
REFERENCES = (OURS, "scipy")  # not held to the shorter limit of the hard families
SOURCES = {"solve": ("couplings/kernels",), "memory": ("couplings/kernels",)}  # of the library, what a task measures
GROWTH = 2.5  # exponent by which a time is predicted from that of the next smaller size

# What is measured, smaller sizes first: they predict the larger ones. Task of `contenders`, families, sizes.
CELLS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "solve": ("solve", (CROPS,), (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    "hard": ("solve", tuple(HARD), (256, 1024)),
    "metric": ("metric", (CROPS,), (512, 1024, 2048, 4096)),
    "small": ("small", (CROPS,), (8, 16, 32, 64)),
    "couple": ("couple", (CROPS,), (256, 1024, 4096)),
    "classes": ("classes", (CROPS,), (128, 512, 1024, 4096)),
    "sinkhorn": ("sinkhorn", (CROPS,), (256, 512, 1024, 2048)),
    "start": ("start", (CROPS,), (64,)),
    "crowded": ("crowded", (CROPS,), (128, 256)),
    "l1": ("l1", (CROPS,), (1024,)),
    "threads": ("threads", (CROPS,), (2048,)),
    "memory": ("memory", (CROPS,), (2048, LARGE)),
}


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

    def seconds(self, group: Group, entry: Contender) -> float:
        """Return the limit of one call."""
        if group.task == "start":  # compiles
            return 10 * self.limit
        if group.family == CROPS:
            return max(LEAST, self.limit * min(1.0, group.n / 4096))
        return self.limit if entry.name in REFERENCES else self.hard_limit


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
    """Return all that was asked for."""
    found = []
    for name in arguments.only or CELLS:
        task, families, sizes = CELLS[name]
        for family in families:
            for n in sorted(arguments.sizes or sizes):
                entries = contenders(task, family, n, arguments.peers)
                if n >= LARGE:
                    entries = [entry for entry in entries if entry.name in (OURS, "empty")]
                if entries and (arguments.families is None or family in arguments.families):
                    found.append(Group(task, family, n, tuple(entries)))
    return found


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

    Memory is measured once, each time in a process of its own, which `fresh` starts; so are first calls, by themselves.
    """
    results: dict[str, dict[str, Any]] = {
        entry.name: {"contender": entry.name, "exact": entry.exact} for entry in group.contenders
    }
    turns: list[tuple[Contender, float]] = []
    for entry in group.contenders:
        limit = config.seconds(group, entry)
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
            if reply["status"] != "ok" or enough or group.task in ("memory", "start"):  # once: they take minutes
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


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    packages = sorted({entry.package for all_ in TASKS.values() for entry in all_ if entry.package})
    parser.add_argument("--only", nargs="+", choices=list(CELLS), metavar="CELL", help=f"some of {', '.join(CELLS)}")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="rows, instead of those of each cell")
    parser.add_argument("--families", nargs="+", choices=[CROPS, *HARD], metavar="FAMILY", help="only these")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"of {', '.join(packages)}, or one of their solvers")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every thread pool (all cores)")
    parser.add_argument("--extra-path", metavar="DIR", help="folder with further packages")
    parser.add_argument("--quick", action="store_true", help="few runs: whether it works, not how fast")
    parser.add_argument("--resume", action="store_true", help="keep records of earlier versions of the library too")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure what is not on record."""
    arguments = parser().parse_args(argv)
    records, config = Records(arguments.output / "solvers.jsonl"), QUICK if arguments.quick else Config()
    place = (arguments.threads, arguments.extra_path)
    todo = groups(arguments)
    begun = time.perf_counter()
    with Worker(*place) as worker:
        for position, group in enumerate(todo, 1):
            label = f"[{position}/{len(todo)}, {time.perf_counter() - begun:4.0f} s] {group}"
            here = environment(*place, sources=SOURCES.get(group.task, ("couplings",)))
            if done(group, records, here, config, resume=arguments.resume):
                print(f"{label}: on record")
                continue
            print(f"{label}: {len(group.contenders)} contenders, load {here['hardware']['load']}", flush=True)
            cell = {"task": group.task, "family": group.family, "n": group.n}
            results = measure(group, records, config, worker, lambda: Worker(*place))
            records.replace([cell | result | {"config": vars(config), "environment": here} for result in results])
            for result in results:
                print(f"    {_line(result)}", flush=True)


def _line(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['contender']:28} {result['status']}: {result['note']}"
    gap = "" if "gap" not in result else f"  gap {'no permutation' if result['gap'] is None else result['gap']}"
    return f"{result['contender']:28} {1e3 * result['median']:10.2f} ms x{result['runs']}{gap}"


if __name__ == "__main__":
    main()
