"""Tables and plots of what `benchmarks.solvers` recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import COLUMN_ERROR, OURS, TASKS
from .instances import CROPS, HARD
from .record import RESULTS, Records, markdown, provenance
from .solvers import CELLS, LARGE

__all__ = ["TABLES", "best", "draw", "find", "goals", "milliseconds"]

EXACT = 1e-6  # relative gap above which an answer is called wrong

Record = dict[str, Any]


@cache
def committed() -> Records:
    """Return the records that are part of the repository."""
    return Records(RESULTS / "solvers.jsonl")


# -- reading the records


def find(records: Records, task: str, contender: str, n: int, family: str = CROPS) -> Record | None:
    """Return the record of a cell that was measured."""
    found = records.of(task, family=family, n=n, contender=contender, status="ok")
    return found[0] if found else None


def _right(record: Record) -> bool:
    return "gap" not in record or (record["gap"] is not None and record["gap"] <= EXACT)


def best(records: Records, n: int, family: str = CROPS, task: str = "solve") -> Record | None:
    """Return the fastest right answer of another package."""
    names = {entry.name for entry in TASKS[task] if entry.package and entry.name != OURS}
    found = [
        record
        for record in records.of(task, family=family, n=n, status="ok")
        if record["contender"] in names and _right(record) and record.get("column_error", 0) <= 2 * COLUMN_ERROR
    ]
    return min(found, key=lambda record: record["median"], default=None)


def _ratio(over: Record | None, under: Record | None) -> float | None:
    return None if over is None or under is None else over["median"] / under["median"]


def _growth(records: Records, low: int = 512, high: int = 8192) -> float | None:
    """Exponent b of the least-squares fit seconds = a n^b."""
    points = [
        (math.log(record["n"]), math.log(record["median"]))
        for record in records.of("solve", family=CROPS, contender=OURS, status="ok")
        if low <= record["n"] <= high
    ]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 2 else None


def _worst(values: list[float | None], pick: Callable[..., float] = max) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def goals(records: Records) -> list[tuple[str, str, str, float, float | None]]:
    """Return what is compared, with what, ``"<="`` or ``">="``, the goal, and the measured value."""

    def times(cell: str, over: str, under: str, n: int | None = None, pick: Callable[..., float] = max) -> float | None:
        """Ratio of two contenders of a cell, at one size or the worst of all; "best" is the best other package."""
        task, (family, *_), sizes = CELLS[cell]

        def get(name: str, n: int) -> Record | None:
            return best(records, n, family, task) if name == "best" else find(records, task, name, n, family)

        return _worst([_ratio(get(over, n), get(under, n)) for n in ([n] if n else sizes)], pick)

    rows: list[tuple[str, str, str, float, float | None]] = []
    for n, goal in ((32, 3.0), (64, 3.0)):
        rows.append((f"solve, n = {n}", "best other, of its time", "<=", goal, times("solve", OURS, "best", n)))
    for n, goal in ((128, 1.5), (256, 1.5), (1024, 11.0), (4096, 11.0)):
        rows.append((f"solve, n = {n}", "best other, times as fast", ">=", goal, times("solve", "best", OURS, n)))
    for n, goal in ((1024, 40.0), (4096, 60.0)):
        rows.append((f"solve, n = {n}", "scipy, times as fast", ">=", goal, times("solve", "scipy", OURS, n)))
    for n in (1024, 4096):
        rows.append((f"solve, n = {n}", "GEMM, d = 3072, of its time", "<=", 0.16, times("solve", OURS, "GEMM", n)))
    rows.append(("solve, n = 512 to 8192", "exponent of n", "<=", 2.2, _growth(records)))
    for metric in ("sqeuclidean", "l2", "l1", "cosine"):
        value = times("metric", metric, "dot")
        rows.append((f"solve `{metric}`, worst size", "-2 <x, n> of the same data", "<=", 1.3, value))
    for n in CELLS["hard"][2]:
        ratios = {f: _ratio(find(records, "solve", OURS, n, f), best(records, n, f)) for f in HARD}
        family = max(ratios, key=lambda name: ratios[name] or 0.0)
        rows.append((f"solve `{family}`, worst family, n = {n}", "best other", "<=", 1.5, ratios[family]))
    for n in CELLS["small"][2]:
        whole, product = find(records, "small", OURS, n), find(records, "small", "GEMM", n)
        beyond = 1e3 * (whole["median"] - product["median"]) if whole and product else None
        rows.append((f"`couple`, n = {n}", "beyond its matrix product, ms", "<=", 0.2, beyond))
    for n, goal in ((1024, 8.0), (4096, 20.0)):
        for name in ("TorchCFM", "TorchCFM, to the optimum", "cdist + scipy", "squared cdist + scipy"):
            rows.append((f"`couple`, n = {n}", f"{name}, times as fast", ">=", goal, times("couple", name, OURS, n)))
    for name, goal in (("10 classes", 1.2), ("1000 classes", 0.3)):
        value = times("classes", name, "no classes")
        rows.append((f"`couple` within {name}, worst size", "no classes", "<=", goal, value))
    value = times("sinkhorn", "best", OURS, pick=min)
    rows.append(("`sinkhorn`, worst size", "best of POT at the same error, times as fast", ">=", 3.0, value))
    value = times("crowded", "every core busy", "idle")
    rows.append(("`couple`, every core busy, worst size", "idle", "<=", 3.0, value))
    for name, goal in (("first call", 0.5), ("compiling after warmup", 0.5)):
        record = find(records, "start", name, 64)
        rows.append((f"{name}, new process", "seconds", "<=", goal, record["median"] if record else None))
    rows.append(("l1 cost, n = 1024", "torch.cdist, times as fast", ">=", 10.0, times("l1", "torch.cdist", OURS)))
    value = times("threads", "two solves in two threads", "one solve")
    rows.append(("two solves in two threads, n = 2048", "one solve", "<=", 1.25, value))
    large = find(records, "memory", OURS, LARGE)
    memory = large["memory"] / 2**30 if large and large["memory"] is not None and _right(large) else None
    rows.append((f"solve, n = {LARGE}", "GiB beyond the matrix", "<=", 1.3, memory))
    return rows


# -- tables


def milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds with three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goals_table(records: Records) -> str:
    """Lay out `goals`."""
    rows = []
    for what, against, sign, goal, value in goals(records):
        met = value is not None and (value <= goal if sign == "<=" else value >= goal)
        verdict = "not measured" if value is None else "met" if met else "**missed**"
        rows.append([what, against, f"{sign} {goal:g}", "" if value is None else f"{value:.3g}", verdict])
    return markdown(["", "against", "goal", "measured", ""], rows)


def _time(record: Record | None) -> str:
    """Median and half the distance between the quartiles, with a mark where the answer is wrong."""
    if record is None:
        return ""
    if record["status"] != "ok":
        return str(record["status"])
    low, high = record["quartiles"]
    text = f"{milliseconds(record['median'])} ± {milliseconds((high - low) / 2)}"
    if record["runs"] == 1:
        text = f"{milliseconds(record['median'])} (once)"
    return text if _right(record) or not record["exact"] else f"{text} **wrong**"


def _gap(record: Record | None) -> str:
    if record is None or record["status"] != "ok" or "gap" not in record:
        return ""
    return "no permutation" if record["gap"] is None else f"{record['gap']:.0e}" if record["gap"] else "0"


def _quality(record: Record | None) -> str:
    if record is None or record["status"] != "ok":
        return ""
    return f"{100 * record['reduction']:.2f}%, {100 * record['kept']:.0f}%"


def _memory(record: Record | None) -> str:
    if record is None or record["status"] != "ok":
        return _time(record)
    text = "not measured" if record["memory"] is None else f"{record['memory'] / 2**20:,.0f}"
    return text if _right(record) or not record["exact"] else f"{text} **wrong**"


def grid(records: Records, task: str, show: Callable[[Record | None], str] = _time) -> str:
    """Lay out contenders by sizes, on crops."""
    cells = {(record["contender"], record["n"]): record for record in records.of(task, family=CROPS)}
    if not cells:
        return "Not measured."
    sizes = sorted({n for _, n in cells})
    rows = [[entry.name, *(show(cells.get((entry.name, n))) for n in sizes)] for entry in TASKS[task]]
    return markdown(["", *(f"n = {n}" for n in sizes)], [row for row in rows if any(row[1:])])


def hard_table(records: Records) -> str:
    """Lay out the hard families."""
    rows = []
    for family in HARD:
        for n in sorted({record["n"] for record in records.of("solve", family=family)}):
            ours, other = find(records, "solve", OURS, n, family), best(records, n, family)
            ratio = _ratio(ours, other)
            wrong = [
                record["contender"]
                for record in records.of("solve", family=family, n=n, status="ok")
                if record["exact"] and not _right(record)
            ]
            times = [_time(ours), _gap(ours), _time(find(records, "solve", "scipy", n, family))]
            fastest = f"{_time(other)} ({other['contender']})" if other else ""
            rows.append([family, str(n), *times, fastest, "" if ratio is None else f"{ratio:.2f}", ", ".join(wrong)])
    return markdown(["family", "n", "couplings", "gap", "scipy", "best other", "of its time", "wrong"], rows)


def remarks_table(records: Records) -> str:
    """List what was not run, failed or warned, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for record in records.all:
        if record.get("note"):
            what = "warned" if record["status"] == "ok" else record["status"]
            where = f"{record['task']} {record['family']} n = {record['n']}"
            found.setdefault((record["contender"], what, record["note"]), []).append(where)
    return markdown(["", "", "why", "where"], [[*key, "; ".join(where)] for key, where in found.items()])


def readme_table(records: Records) -> str:
    """Lay out how fast assignment and `couple` are, in short."""
    rows = []
    for n in (256, 1024, 4096):
        ours, scipy, other = find(records, "solve", OURS, n), find(records, "solve", "scipy", n), best(records, n)
        whole = find(records, "couple", OURS, n)
        if ours and scipy and other:
            text = f"{milliseconds(other['median'])} ({other['contender']})"
            peers = [find(records, "couple", name, n) for name in ("TorchCFM, to the optimum", "squared cdist + scipy")]
            solves = [ours["median"], scipy["median"]]
            calls = [milliseconds(record["median"]) if record else "" for record in (whole, *peers)]
            rows.append([str(n), *map(milliseconds, solves), text, *calls])
    head = [
        "milliseconds, n =",
        "solve: couplings",
        "scipy",
        "best other package",
        "`couple`",
        "TorchCFM",
        "squared cdist + scipy",
    ]
    return markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "solvers": lambda: readme_table(committed()),
    "solvers-place": lambda: provenance(committed().all),
    "solvers-goals": lambda: goals_table(committed()),
    "solvers-gap": lambda: grid(committed(), "solve", _gap),
    "solvers-hard": lambda: hard_table(committed()),
    "solvers-quality": lambda: grid(committed(), "couple", _quality),
    "solvers-memory": lambda: grid(committed(), "memory", _memory),
    "solvers-remarks": lambda: remarks_table(committed()),
    **{f"solvers-{task}": lambda task=task: grid(committed(), task) for task in TASKS if task != "memory"},
}


# -- pictures


def draw(folder: Path) -> None:
    """Draw time over size for every solver."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    records = committed()
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colours = iter(colormaps["tab20"].colors)
    greys = iter(("black", "dimgrey", "darkgrey", "silver"))  # of what is no competitor, us first
    for entry in TASKS["solve"]:
        colour = next(greys if entry.package is None else colours)
        points = records.of("solve", family=CROPS, status="ok", contender=entry.name)
        ours = entry.name == OURS
        n, medians = ([record[key] for record in points] for key in ("n", "median"))
        spread = [[abs(record["median"] - record["quartiles"][i]) for record in points] for i in (0, 1)]
        axes.errorbar(
            n, medians, yerr=spread, label=entry.name, color=colour, marker="o", markersize=5 if ours else 3,
            linewidth=2.5 if ours else 1, linestyle="--" if entry.package is None and not ours else "-",
            zorder=3 if ours else 2,
        )  # fmt: skip
        wrong = [record for record in points if entry.exact and not _right(record)]
        axes.plot([r["n"] for r in wrong], [r["median"] for r in wrong], "x", color="red", markersize=10, zorder=4)
    axes.set(yscale="log", xlabel="rows n", ylabel="seconds (median, quartiles)")
    axes.set_xscale("log", base=2)
    axes.set_title("Exact assignment, 32x32x3 crops against Gaussian noise (red cross: not optimal)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(folder / "solvers-time.png", dpi=120, metadata={"Software": None})
