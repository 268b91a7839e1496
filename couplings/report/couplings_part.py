"""Sections on coupling quality and time, of what `couplings ablate` recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

from couplings.ablation.sources import BUILT_IN
from couplings.report import figures, paper
from couplings.report.reading import Cells, Series
from couplings.report.sections import Entry, Samples, Section, Table, column, mean

__all__ = ["sections", "table_3"]

_PHASES = ("checks", "cost", "conversion", "solve", "gather", "report", "other")

Record = dict[str, Any]
Rows = list[list[Entry | str]]


def sections(cells: Cells) -> list[Section]:
    """Make the sections that the records allow.

    Parameters
    ----------
    cells : Cells

    Returns
    -------
    list of Section
    """
    found = [_table_3_section(cells)]
    plain = cells.of(scope="local", quantize=None, condition=None)
    for data in plain.each("data"):
        found.append(_methods(plain.of(data=data)))
    found += [_metrics(plain), _quantizers(cells), _classes(cells), _scopes(cells)]
    return [section for section in found if section is not None]


def _percent(cells: Cells) -> dict[str, Samples]:
    return cells.by_label(lambda series: series.get("reduction", 100))


def _grid(
    cells: Cells,
    axis: str,
    read: Callable[[Series], Samples],
    show: str,
    *,
    higher: bool | None,
    ratios: bool = False,
) -> tuple[list[Any], Rows]:
    """Rows by name, columns along an axis."""
    across = cells.each(axis)
    columns = []
    for value in across:
        there = cells.of(**{axis: value})
        columns.append(column(there.by_label(read), show, higher=higher, barred=there.biased, ratios=ratios))
    rows: Rows = [[label, *(each.get(label, "") for each in columns)] for label in cells.labels]
    return across, [row for row in rows if any(isinstance(entry, Entry) for entry in row)]


def table_3(cells: Cells) -> Table | None:
    """Lay out the form of the paper's Table 3, its figures beside ours.

    Parameters
    ----------
    cells : Cells

    Returns
    -------
    Table or None
        None where nothing was measured with its settings: l2, fp16, 32x32x3 crops.
    """
    there = cells.of(metric="l2", quantize="fp16", scope="local", condition=None, data="crops32")
    sizes = [n for n in there.each("n") if there.of(n=n, method="auction")]
    if not sizes:
        return None
    head = [
        "batch",
        "paper: reduction",
        "ours: reduction",
        "paper: ms",
        "ours: ms",
        "ours, scipy: ms",
        "whole call: ms",
    ]
    rows: Rows = []
    for n in sizes:
        reduction, milliseconds = paper.TABLE_3.get(n, (None, None))
        (ours,) = there.of(n=n, method="auction").series
        theirs = there.of(n=n, method="hungarian").series
        row: list[Entry | str] = [
            str(n),
            "" if reduction is None else f"{reduction:.2f}%",
            _shown(ours.get("reduction", 100), "{:.2f}%"),
            "" if milliseconds is None else f"{milliseconds:.1f}",
            _shown(ours.values(_assignment), "{:.1f}"),
            _shown(theirs[0].values(_assignment), "{:.1f}") if theirs else "",
            _shown(ours.get("ms"), "{:.1f}"),
        ]
        rows.append(row)
    caption = (
        "Distance reduction and time by batch size: l2, fp16. Paper: CIFAR-10 on its authors' machine "
        f"({paper.SOURCE}, Table 3). Ours: other data (crops of photographs) and another machine. Milliseconds of the "
        "assignment, by `auction` and by scipy, and of the whole call with `auction`: cost matrix, checks and moving "
        "the "
        "noise too. Mean ± standard deviation over seeds."
    )
    return Table(caption, head, rows)


def _assignment(record: Record) -> float | None:
    phases = record.get("phases_ms")
    return None if phases is None else phases["conversion"] + phases["solve"]


def _shown(values: Samples, show: str) -> str:
    return column({"": values}, show, higher=None)[""].text if values else ""


def _table_3_section(cells: Cells) -> Section | None:
    table = table_3(cells)
    return None if table is None else Section("As in the paper: reduction and time by batch size", [table])


def _describe(data: str, series: Series) -> str:
    shape = "x".join(map(str, next(iter(series.by_seed.values()))["shape"]))
    return f"{BUILT_IN[data]}" if data in BUILT_IN else f"{data}, rows of {shape}"


def _methods(cells: Cells) -> Section | None:
    """Methods over batch sizes, under the metric that was measured at most sizes."""
    if not cells:
        return None
    metric = max(cells.each("metric"), key=lambda name: len(cells.of(metric=name).series))
    cells = cells.of(metric=metric)
    if len(cells.labels) < 2:
        return None
    data = cells.each("data")[0]
    section = Section(f"Methods on {data}", [f"{_describe(data, cells.series[0])}; metric {metric}, no quantizer."])
    sizes, rows = _grid(cells, "n", lambda series: series.get("reduction", 100), "{:.2f}%", higher=True)
    head = ["method", *(f"n = {n}" for n in sizes)]
    section.parts.append(Table("Reduction of the mean distance of the pairs.", head, rows))
    timed = Cells([series for series in cells.series if series.get("ms")])
    if timed:
        sizes, rows = _grid(timed, "n", lambda series: series.get("ms"), "{:.2f}", higher=False, ratios=True)
        head = ["method", *(f"n = {n}" for n in sizes)]
        section.parts.append(
            Table(
                "Milliseconds of a call: mean and standard deviation over seeds of the median of its runs.", head, rows
            )
        )
    # The largest size at which nearly everything was measured.
    most = max(len(cells.of(n=n).labels) for n in cells.each("n"))
    n = max(n for n in cells.each("n") if len(cells.of(n=n).labels) >= 0.8 * most)
    section.parts.append(_promises(cells.of(n=n), n))
    if timed.of(n=n):
        section.parts.append(_phases(timed.of(n=n), n))
    plots = [
        figures.Plot("reduction", f"Reduction against batch size, {data}.", figures.reduction(cells, data)),
        figures.Plot("time", f"Time of a call against batch size, {data}.", figures.time(timed, data)),
        figures.Plot(
            "pareto",
            f"Reduction against time, {data}, n = {n}. The line is the Pareto front of what keeps the noise Gaussian.",
            figures.pareto(timed.of(n=n), data, n),
        ),
    ]
    section.parts += figures.drawn(plots, data)
    return section


def _promises(cells: Cells, n: int) -> Table:
    """Hold methods against the optimum, and say what became of the noise."""
    rows: Rows = []
    gap = column(
        cells.by_label(lambda series: series.get("gap", 100)), "{:.3f}%", higher=False, barred=cells.biased
    )  # fmt: skip
    for series in cells.series:
        record = next(iter(series.by_seed.values()))
        used = series.values(lambda record: record["rows_used"] / record["rows"], 100)
        drift = series.values(lambda record: record["drift"]["norm"])
        agreement, certified = series.get("agreement", 100), series.get("certified_gap")
        rows.append(
            [
                series.label,
                gap.get(series.label, ""),
                _bound(certified),
                f"{mean(agreement):.0f}%" if agreement else "",
                record["marginal"],
                f"{mean(used):.0f}%" if record["noise_rows"] == record["rows"] else "",
                f"{mean(drift) + 0.0:+.2f}".replace("-0.00", "+0.00"),
                _leakage(series),
            ]
        )
    head = [
        "method", "gap", "certified", "agrees", "marginal", "rows kept", "norm drift", "leakage z",
    ]  # fmt: skip
    caption = (
        f"n = {n}. Gap: cost above the exact optimum, in float64. Certified: largest gap that the method's own bound "
        "allows. Agrees: rows paired as in the optimum. Rows kept: share of the noise rows that are there after the "
        "coupling. Norm drift: of the squared norm of the noise, in standard deviations. Leakage: how well the class "
        "can be told from the noise, in standard deviations above chance, over all seeds (Stouffer); the couplings "
        "here ignore the classes."
    )
    return Table(caption, head, rows)


def _bound(gaps: Samples) -> str:
    if not gaps:
        return ""
    return f"{max(gaps.values()):.0e}" if any(gaps.values()) else "0"


def _leakage(series: Series) -> str:
    """Add up the seeds' standard deviations above chance: their sum over the root of their number."""
    z = series.values(lambda record: (record.get("leakage") or {}).get("z"))
    return f"{sum(z.values()) / sqrt(len(z)):+.1f}" if z else ""


def _phases(cells: Cells, n: int) -> Table:
    rows: Rows = []
    for series in cells.series:
        phases = {
            name: {
                seed: record["phases_ms"][name] for seed, record in series.by_seed.items() if record.get("phases_ms")
            }
            for name in _PHASES
        }
        memory = series.get("peak_bytes", 2**-20)
        rows.append(
            [
                series.label,
                *(f"{mean(values):.2f}" if values else "" for values in phases.values()),
                f"{mean(memory):.1f}" if memory else "",
            ]
        )
    caption = (
        f"n = {n}. Where the milliseconds go, and the memory (MiB) that a call needs beyond its operands. Conversion: "
        "what a solver needs done to the cost; gather: moving the noise; report: the distances that are returned."
    )
    return Table(caption, ["method", *_PHASES, "peak MiB"], rows)


def _metrics(cells: Cells) -> Section | None:
    found: list[str | Table] = []
    for data in cells.each("data"):
        for n in cells.of(data=data).each("n"):
            there = cells.of(data=data, n=n)
            if len(there.each("metric")) < 2:
                continue
            several = [label for label in there.labels if len(_labelled(there, label).each("metric")) > 1]
            kept = Cells([series for series in there.series if series.label in several])
            metrics, rows = _grid(kept, "metric", lambda series: series.get("reduction", 100), "{:.2f}%", higher=True)
            _, times = _grid(kept, "metric", lambda series: series.get("ms"), "{:.1f}", higher=False, ratios=True)
            head = ["method", *metrics]
            caption = f"{data}, n = {n}. Reduction, each in its own unit: columns do not compare."
            found.append(Table(caption, head, rows))
            if times:
                found.append(Table(f"{data}, n = {n}. Milliseconds of a call.", head, times))
    return Section("Metrics", [*found]) if found else None


def _labelled(cells: Cells, label: str) -> Cells:
    return Cells([series for series in cells.series if series.label == label])


def _quantizers(cells: Cells) -> Section | None:
    """Hold number formats against float32."""
    there = cells.of(scope="local", condition=None)
    tables: list[str | Table] = []
    for data in there.each("data"):
        rounded = Cells([series for series in there.of(data=data).series if series.point.quantize is not None])
        for metric in rounded.each("metric"):
            kept = rounded.of(metric=metric)
            # Where several formats were measured; a single one belongs to another table.
            kept = Cells([s for s in kept.series if len(_labelled(kept.of(n=s.point.n), s.label).each("quantize")) > 1])
            if not kept:
                continue
            sizes = kept.each("n")
            rows: Rows = []
            for label in kept.labels:
                for name in kept.each("quantize"):
                    row: list[Entry | str] = [f"{label}, {name}"]
                    for n in sizes:
                        series = _labelled(kept.of(quantize=name, n=n), label).series
                        changed = series[0].get("rows_changed", 100) if series else {}
                        lost = series[0].get("reduction_lost", 1e4) if series else {}
                        row += [f"{mean(changed):.1f}%" if changed else "", _shown(lost, "{:.2f}")]
                    rows.append(row)
            head = ["", *(text for n in sizes for text in (f"n = {n}: rows changed", "reduction lost"))]
            caption = (
                f"{data}, {metric}, against float32: share of rows that are paired otherwise, and what that costs of "
                "the reduction, in hundredths of a percentage point."
            )
            tables.append(Table(caption, head, rows))
    return Section("Number formats", [*tables]) if tables else None


def _classes(cells: Cells) -> Section | None:
    """Coupling within classes and across them."""
    there = cells.of(scope="local", quantize=None)
    tables: list[str | Table] = []
    for data in there.of(condition="class").each("data"):
        for metric in there.of(condition="class", data=data).each("metric"):
            kept = there.of(data=data, metric=metric, n=there.of(condition="class", data=data, metric=metric).each("n"))
            names = kept.of(condition="class").labels
            rows: Rows = []
            for n in kept.each("n"):
                for label in names:
                    row: list[Entry | str] = [f"{label}, n = {n}"]
                    for condition in (None, "class"):
                        found = _labelled(kept.of(n=n, condition=condition), label).series
                        row += [_shown(found[0].get("reduction", 100), "{:.2f}%") if found else ""]
                        row += [_leakage(found[0]) if found else ""]
                    rows.append(row)
            head = ["method", "across: reduction", "leakage z", "within: reduction", "leakage z"]
            caption = (
                f"{data}, {metric}: coupled across all rows, and within the classes only. Leakage: how well the class "
                "can be told from the noise, in standard deviations above chance, over all seeds (Stouffer)."
            )
            tables.append(Table(caption, head, rows))
    return Section("Classes", [*tables]) if tables else None


def _scopes(cells: Cells) -> Section | None:
    """Coupling over ranks."""
    wide = cells.of(scope="global", condition=None, quantize=None)
    tables: list[str | Table] = []
    for data in wide.each("data"):
        for metric in wide.of(data=data).each("metric"):
            there = cells.of(data=data, metric=metric, condition=None, quantize=None)
            over = there.of(scope="global")
            rows: Rows = []
            for n in over.each("n"):
                for label in over.labels:
                    for ranks in [1, *over.each("ranks")]:
                        scope = "local" if ranks == 1 else "global"
                        found = _labelled(there.of(scope=scope, n=n, ranks=ranks), label).series
                        if not found:
                            continue
                        wire = found[0].values(lambda record: _exchanging(record.get("phases_ms")))
                        rows.append(
                            [
                                f"{label}, {n} rows " + ("alone" if ranks == 1 else f"on each of {ranks}"),
                                _shown(found[0].get("reduction", 100), "{:.2f}%"),
                                _shown(found[0].get("ms"), "{:.1f}"),
                                f"{mean(wire):.1f}" if wire and ranks > 1 else "",
                            ]
                        )
            head = ["method", "reduction", "ms", "of it exchanging"]
            caption = (
                f"{data}, {metric}: one process's rows by themselves, and the rows of all ranks together: gloo "
                "processes of one thread each that share the processors of one machine, so that the times are not "
                "those of a cluster."
            )
            tables.append(Table(caption, head, rows))
    return Section("Over ranks", [*tables]) if tables else None


def _exchanging(phases: Mapping[str, float] | None) -> float | None:
    """Milliseconds of what ranks send each other, waiting for the others included."""
    exchanged = ("header", "noise", "points", "condition", "costs", "index")
    return None if phases is None else sum(phases.get(name, 0.0) for name in exchanged)
