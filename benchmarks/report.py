"""Tables, plots and the README's paragraph, made from the records and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import OURS, TASKS
from .instances import CROPS, HARD
from .record import Records

__all__ = ["write"]

EXACT = 1e-6  # relative gap above which an answer is called wrong
BEGIN, END = "<!-- solvers:begin -->", "<!-- solvers:end -->"
PHASES = ("checks", "cost (GEMM)", "conversion and solve", "gather", "pair costs")

Record = dict[str, Any]
Rows = list[list[str]]


def write(records: Records, folder: Path, readme: Path | None = None) -> list[Path]:
    """Write the table, the plots and the marked block of a README.

    Parameters
    ----------
    records : Records
    folder : Path
    readme : Path, optional
        Holds the two marker lines.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ValueError
        If there is no record, or the README has no markers.
    """
    if not records.all:
        msg = f"no records in {records.path}: run python -m benchmarks.solvers first"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    plots = [path for path in (_plot_times(records, folder), _plot_step(records, folder)) if path is not None]
    table = folder / "solvers.md"
    table.write_text(_page(records, plots))
    written = [table, *plots]
    if readme is not None:
        text = readme.read_text()
        if BEGIN not in text or END not in text:
            msg = f"{readme} has no lines {BEGIN} and {END} to write between"
            raise ValueError(msg)
        head, rest = text.split(BEGIN, 1)
        readme.write_text(f"{head}{BEGIN}\n{paragraph(records)}\n{END}{rest.split(END, 1)[1]}")
        written.append(readme)
    return written


# -- reading the records


def _find(records: Records, task: str, contender: str, n: int, family: str = CROPS) -> Record | None:
    """Return the record of a cell that was measured."""
    found = records.of(task, family=family, n=n, contender=contender)
    return found[0] if found and found[0]["status"] == "ok" else None


def _right(record: Record) -> bool:
    return "gap" not in record or (record["gap"] is not None and record["gap"] <= EXACT)


def _others(records: Records, n: int, family: str = CROPS) -> list[Record]:
    """Right answers of the solvers of other packages than scipy, fastest first."""
    names = {entry.name for entry in TASKS["solve"] if entry.package not in (None, "scipy")}
    found = [record for record in records.of("solve", family=family, n=n) if record["contender"] in names]
    return sorted((r for r in found if r["status"] == "ok" and _right(r)), key=lambda record: record["median"])


def _ratio(over: Record | None, under: Record | None) -> float | None:
    return None if over is None or under is None else over["median"] / under["median"]


def _growth(records: Records, low: int = 512, high: int = 8192) -> float | None:
    """Exponent b of the least-squares fit seconds = a n^b."""
    points = [
        (math.log(record["n"]), math.log(record["median"]))
        for record in records.of("solve", family=CROPS, contender=OURS, status="ok")
        if low <= record["n"] <= high
    ]
    if len(points) < 3:
        return None
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def goals(records: Records) -> list[tuple[str, str, str, float | None, Callable[[float], bool]]]:
    """List what is compared, with what, the goal in words, the measured value, and whether a value meets the goal."""
    rows: list[tuple[str, str, str, float | None, Callable[[float], bool]]] = []

    def at_least(what: str, against: str, goal: float, value: float | None) -> None:
        rows.append((what, against, f"≥ {goal:g} x as fast", value, lambda value: value >= goal))

    def at_most(what: str, against: str, unit: str, goal: float, value: float | None) -> None:
        rows.append((what, against, f"≤ {goal:g} {unit}".strip(), value, lambda value: value <= goal))

    for n, scipy, best in ((256, 3, 1.5), (1024, 20, 6), (4096, 60, 9)):
        ours, others = _find(records, "solve", OURS, n), _others(records, n)
        at_least(f"solve, n = {n}", "scipy", scipy, _ratio(_find(records, "solve", "scipy", n), ours))
        fastest = f"best other ({others[0]['contender']})" if others else "best other"
        at_least(f"solve, n = {n}", fastest, best, _ratio(others[0] if others else None, ours))
    at_most("growth of the time, n = 512 to 8192", "", "(exponent of n)", 2.2, _growth(records))
    for n in (1024, 4096):
        gemm = _find(records, "solve", "GEMM", n)
        at_most(
            f"solve, n = {n}", "float32 GEMM, d = 3072", "of it", 0.4, _ratio(_find(records, "solve", OURS, n), gemm)
        )
    for n, goal in ((1024, 8), (4096, 20)):
        ours = _find(records, "couple", OURS, n)
        for name in ("TorchCFM", "TorchCFM, to the optimum", "cdist + scipy", "squared cdist + scipy"):
            at_least(f"couple(), n = {n}", name, goal, _ratio(_find(records, "couple", name, n), ours))
    large = [r for r in records.of("memory", family=CROPS, contender=OURS, status="ok") if r["n"] == 16384]
    memory = large[0]["memory"] / 2**30 if large and large[0]["memory"] is not None and _right(large[0]) else None
    at_most("exact solve, n = 16384", "memory beyond the matrix", "GiB", 1.3, memory)
    at_least(
        "l1 cost, n = 1024",
        "torch.cdist",
        10,
        _ratio(_find(records, "l1", "torch.cdist", 1024), _find(records, "l1", OURS, 1024)),
    )
    two = [_find(records, "threads", name, 2048) for name in ("two solves in two threads", "one solve")]
    at_most("two solves in two threads, n = 2048", "one solve", "of it", 1.25, _ratio(*two))
    worst = [
        (ratio, family)
        for family in HARD
        if (
            ratio := _ratio(_find(records, "solve", OURS, 1024, family), _find(records, "solve", "scipy", 1024, family))
        )
    ]
    slowest, family = max(worst, default=(None, "none measured"))
    at_most(f"hardest family, n = 1024 ({family})", "scipy", "of it", 1.5, slowest)
    return rows


# -- text


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(record: Record | None) -> str:
    """Median and half the distance between the quartiles, with a mark where the answer is wrong."""
    if record is None:
        return ""
    if record["status"] != "ok":
        return str(record["status"])
    low, high = record["quartiles"]
    text = f"{_milliseconds(record['median'])} ± {_milliseconds((high - low) / 2)}"
    if record["runs"] == 1:
        text = f"{_milliseconds(record['median'])} (once)"
    return text if _right(record) or not record["exact"] else f"{text} **wrong**"


def _gap(record: Record | None) -> str:
    if record is None or record["status"] != "ok" or "gap" not in record:
        return ""
    return "no permutation" if record["gap"] is None else f"{record['gap']:.0e}" if record["gap"] else "0"


def _markdown(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _grid(records: Records, task: str, show: Callable[[Record | None], str]) -> str:
    """Contenders by sizes, on crops."""
    cells = {(record["contender"], record["n"]): record for record in records.of(task, family=CROPS)}
    sizes = sorted({n for _, n in cells})
    names = [entry.name for entry in TASKS[task] if any(name == entry.name for name, _ in cells)]
    rows = [[name, *(show(cells.get((name, n))) for n in sizes)] for name in names]
    return _markdown([""] + [f"n = {n}" for n in sizes], [row for row in rows if any(row[1:])])


def _page(records: Records, plots: Iterable[Path]) -> str:
    parts = ["# Exact assignment, measured", _provenance(records)]
    parts += [f"![]({path.name})" for path in plots]
    parts += ["## Against the goals", "Ratios of medians within one group of interleaved runs."]
    rows = []
    for what, against, goal, value, met in goals(records):
        verdict = "not measured" if value is None else "met" if met(value) else "**missed**"
        rows.append([what, against, goal, "" if value is None else f"{value:.3g}", verdict])
    parts.append(_markdown(["", "against", "goal", "measured", ""], rows))
    parts += [
        "## Time to solve",
        "Milliseconds, median ± half the distance between the quartiles. Crops of photographs, 32x32x3, against "
        "Gaussian noise; the float32 cost matrix is given, and conversion and checks are counted in. GEMM is the "
        "float32 product that makes the matrix. Why a solver was not run is said at the end.",
        _grid(records, "solve", _time),
        "## Distance from the optimum",
        f"Relative, from a dual bound evaluated in float64; above {EXACT:g} the answer of a solver that claims the "
        "optimum is called wrong. `greedy` claims none.",
        _grid(records, "solve", _gap),
    ]
    hard = _hard(records)
    if hard:
        parts += [
            "## Hard families",
            "Milliseconds, and the ratio to scipy (below 1: we are faster).",
            hard,
        ]
    if records.of("couple"):
        parts += [
            "## From batch to coupled batch",
            "Milliseconds, on float32 tensors of crops. TorchCFM pairs noise with data, and draws pairs with "
            "replacement. As it comes, its solver stops after 100,000 iterations, in large batches before the optimum; "
            "`to the optimum` is the same with that limit raised.",
            _grid(records, "couple", _time),
            *_ceilings(records),
            "Of the pairs: reduction of the mean squared distance, and share of the noise rows that survive.",
            _grid(records, "couple", _quality),
        ]
    if records.of("step"):
        parts += ["## Where the time of `couple()` goes", "Milliseconds.", _grid(records, "step", _time)]
    for task, title, text in (
        ("l1", "L1 cost matrix", "Milliseconds, d = 3072."),
        ("threads", "Two solves at once", "Milliseconds, each solve with one thread."),
        ("memory", "Memory", "MiB of resident memory at the highest point beyond what was there with the float32 "
         "matrix in place, each in a process of its own; `empty` does nothing."),
    ):  # fmt: skip
        if records.of(task):
            parts += [f"## {title}", text, _grid(records, task, _memory if task == "memory" else _time)]
    parts += ["## Not run, failed or warned", _remarks(records)]
    return "\n\n".join(parts) + "\n"


def _ceilings(records: Records) -> list[str]:
    """Say what no solver could make up for."""
    sentences = []
    for n in sorted({record["n"] for record in records.of("couple", family=CROPS)}):
        product, share = _find(records, "step", "cost (GEMM)", n), _share(records, "cost (GEMM)", n)
        peer = _find(records, "couple", "TorchCFM, to the optimum", n)
        if (most := _ratio(peer, product)) is not None:
            sentences.append(f"n = {n}: {100 * share:.0f}% of `couple()`, and TorchCFM takes {most:.1f} times as long")
    text = "The product of data and noise alone, without which there is no cost to solve, takes at "
    return [f"{text}{'; '.join(sentences)}."] if sentences else []


def _quality(record: Record | None) -> str:
    if record is None or record["status"] != "ok":
        return ""
    return f"{100 * record['reduction']:.2f}%, {100 * record['kept']:.0f}%"


def _memory(record: Record | None) -> str:
    if record is None or record["status"] != "ok":
        return _time(record)
    text = "not measured" if record["memory"] is None else f"{record['memory'] / 2**20:,.0f}"
    return text if _right(record) or not record["exact"] else f"{text} **wrong**"


def _hard(records: Records) -> str:
    rows = []
    for family in HARD:
        for n in sorted({record["n"] for record in records.of("solve", family=family)}):
            ours, scipy = _find(records, "solve", OURS, n, family), _find(records, "solve", "scipy", n, family)
            others, ratio = _others(records, n, family), _ratio(ours, scipy)
            wrong = [
                record["contender"]
                for record in records.of("solve", family=family, n=n, status="ok")
                if record["exact"] and not _right(record)
            ]
            best = f"{_time(others[0])} ({others[0]['contender']})" if others else ""
            ratio_text = "" if ratio is None else f"{ratio:.2f}"
            rows.append([family, str(n), _time(ours), _gap(ours), _time(scipy), ratio_text, best, ", ".join(wrong)])
    head = ["family", "n", "couplings", "gap", "scipy", "ratio", "best other", "wrong"]
    return _markdown(head, rows) if rows else ""


def _provenance(records: Records) -> str:
    """Machine, versions, commits and dates of all records."""
    places = [record["environment"] for record in records.all]

    def distinct(read: Callable[[Record], str]) -> str:
        return ", ".join(sorted({read(place) for place in places}))

    versions: dict[str, str | None] = {}
    for place in places:
        versions |= {name: version or versions.get(name) for name, version in place["versions"].items()}
    absent = sorted(name for name, version in versions.items() if version is None)
    lines = [
        "- Hardware: "
        + distinct(lambda p: "{cpu}, {cores} cores, {memory_gib} GiB".format(**p["hardware"]))
        + f"; {distinct(lambda p: str(p['threads']))} threads in every pool",
        f"- System: {distinct(lambda p: p['system'])}, Python {distinct(lambda p: p['python'])}",
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"- Absent: {', '.join(absent) or 'none'}",
        f"- Library at {distinct(lambda p: p['kernels'])} (+: with changes not committed), checkout at "
        f"{distinct(lambda p: p['commit'])}; measured {distinct(lambda p: p['date'][:10])}",
        *(
            [
                f"- Load average before a group: {crowd}. Other programs had part of the cores: ratios may be off "
                "either way, most where a call ran few times or needs two cores (GEMM, `couple()`, two solves at once)"
            ]
            if (crowd := _crowd(records))
            else []
        ),
        "- Clock: `time.perf_counter`, contenders in turn, in one process with the garbage collector off",
        "- Made by `python -m benchmarks.solvers` from [solvers.jsonl](solvers.jsonl)",
    ]
    return "\n".join(lines)


def _crowd(records: Records) -> str:
    """Range of the load averages before the groups, if more ran than the cores had room for."""
    places = [record["environment"]["hardware"] for record in records.all]
    loads = [place["load"] for place in places if "load" in place]
    crowded = loads and max(loads) > places[-1]["cores"]
    return f"{min(loads):.1f} to {max(loads):.1f}" if crowded else ""


def _remarks(records: Records) -> str:
    lines: dict[str, list[str]] = {}
    for record in records.all:
        if record.get("note"):
            where = f"{record['task']} {record['family']} n = {record['n']}"
            what = "warned" if record["status"] == "ok" else record["status"]
            lines.setdefault(f"{record['contender']}, {what}: {record['note']}", []).append(where)
    return "\n".join(f"- {what} ({'; '.join(where)})" for what, where in lines.items()) or "Nothing."


def paragraph(records: Records) -> str:
    """Write the README's words on performance; what was not measured is left out."""
    place = records.all[-1]["environment"]
    sentences = []
    for n in (256, 1024, 4096):
        ours, scipy, others = _find(records, "solve", OURS, n), _find(records, "solve", "scipy", n), _others(records, n)
        if ours is not None and scipy is not None and others:
            sentences.append(
                f"n = {n}: {_milliseconds(ours['median'])} ms, {scipy['median'] / ours['median']:.1f} times as fast as "
                f"scipy and {others[0]['median'] / ours['median']:.1f} times as fast as the best other package "
                f"({others[0]['contender']})"
            )
    text = (
        "Exact assignment of noise to 32x32x3 image crops, the float32 cost given "
        f"({place['hardware']['cpu']}, {place['threads']} threads): {'; '.join(sentences)}."
        if sentences
        else ""
    )
    couple = [
        f"{ratio:.1f} times as fast as {name.replace(',', ' run')} at n = {n}"
        for n in (1024, 4096)
        for name in ("TorchCFM", "TorchCFM, to the optimum", "squared cdist + scipy")
        if (ratio := _ratio(_find(records, "couple", name, n), _find(records, "couple", OURS, n)))
    ]
    if couple:
        text += f" `couple()`, from batch to coupled batch, is {', '.join(couple)}."
    if crowd := _crowd(records):
        text += f" Other programs ran beside it (load {crowd}), so that these ratios are rough."
    link = "[All sizes, hard families, memory, and where we lose](benchmarks/results/solvers.md)."
    return f"{text} {link}".strip()


# -- plots


def _figure() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plot_times(records: Records, folder: Path) -> Path | None:
    found = records.of("solve", family=CROPS, status="ok")
    if not found:
        return None
    plt = _figure()
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    colours = iter(plt.get_cmap("tab20").colors)
    greys = iter(("black", "dimgrey", "darkgrey", "silver"))  # of what is no competitor, us first
    for entry in TASKS["solve"]:
        colour = next(greys if entry.package is None else colours)
        points = [record for record in found if record["contender"] == entry.name]
        if not points:
            continue
        ours = entry.name == OURS
        axes.errorbar(
            [record["n"] for record in points],
            [record["median"] for record in points],
            yerr=[
                [record["median"] - record["quartiles"][0] for record in points],
                [record["quartiles"][1] - record["median"] for record in points],
            ],
            label=entry.name,
            color=colour,
            linewidth=2.5 if ours else 1,
            linestyle="--" if entry.package is None and not ours else "-",
            marker="o",
            markersize=5 if ours else 3,
            zorder=3 if ours else 2,
        )
        wrong = [record for record in points if entry.exact and not _right(record)]
        axes.plot([r["n"] for r in wrong], [r["median"] for r in wrong], "x", color="red", markersize=10, zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="rows n", ylabel="seconds (median, quartiles)")
    axes.set_xscale("log", base=2)
    axes.set_title("Exact assignment, 32x32x3 crops against Gaussian noise (red cross: not optimal)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return _save(figure, plt, folder / "solvers-time.png")


def _plot_step(records: Records, folder: Path) -> Path | None:
    sizes = sorted({record["n"] for record in records.of("step", status="ok", contender="couple")})
    if not sizes:
        return None
    plt = _figure()
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.6 * len(sizes)), layout="constrained")
    totals = [_find(records, "step", "couple", n)["median"] for n in sizes]  # type: ignore[index]
    labels = [f"n = {n}: {_milliseconds(total)} ms" for n, total in zip(sizes, totals, strict=True)]
    parts = {name: [_share(records, name, n) for n in sizes] for name in PHASES}
    # The phases are timed apart from the whole, so their sum can exceed it by the noise of the clock.
    parts["the rest"] = [max(0.0, 1 - sum(column)) for column in zip(*parts.values(), strict=True)]
    left = np.zeros(len(sizes))
    for name, shares in parts.items():
        axes.barh(labels, shares, left=left, label=name)
        left += shares
    axes.invert_yaxis()
    axes.set(xlabel="share of couple()", title="Where the time of couple() goes")
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return _save(figure, plt, folder / "solvers-step.png")


def _share(records: Records, name: str, n: int) -> float:
    return _ratio(_find(records, "step", name, n), _find(records, "step", "couple", n)) or 0.0


def _save(figure: Any, plt: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
