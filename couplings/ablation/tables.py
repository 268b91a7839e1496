"""Tables of the command line, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from couplings.ablation.environment import missing_packages
from couplings.ablation.sources import Batch
from couplings.assigners import MethodInfo

__all__ = ["comparison_footnotes", "comparison_tables", "environment_lines", "methods_table"]

Record = Mapping[str, Any]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def methods_table(infos: Iterable[MethodInfo]) -> Table:
    """One row for each method."""
    table = _table("")
    for name in ("method", "exact", "marginal", "needs", "extra", "summary"):
        table.add_column(name, no_wrap=name != "summary", overflow="fold")
    for info in infos:
        extras = (
            f"[red]{extra}: missing[/]" if missing_packages(extra) else f"[green]{extra}: installed[/]"
            for extra in info.requires
        )
        exact = "yes" if info.exact else ""
        name, summary = f"[bold]{escape(info.name)}[/]", escape(info.summary)
        table.add_row(name, exact, info.marginal, info.needs, ", ".join(extras), summary)
    return table


def environment_lines(described: Mapping[str, Any]) -> list[str]:
    """Plain lines of what `environment.describe` returns, ``name  value``, that survive being pasted anywhere."""
    checkout = f", checkout at {described['commit']}" if described["commit"] else ""
    rows = {
        "couplings": f"{described['couplings']}{checkout}",
        **{name: described[name] for name in ("python", "platform")},
        **described["packages"],
        "cpu": described["cpu"],
        "threads": f"{described['threads']} of torch, {described['cpus']} processors available",
        "cuda": described["cuda"] or "torch was built without CUDA",
    }
    for i, device in enumerate(described["devices"]):
        rows[f"device {i}"] = f"{device['name']}, {device['gigabytes']} GB, capability {device['capability']}"
    if not described["devices"]:
        rows["devices"] = "no CUDA device"
    rows["kernel cache"] = described["kernel_cache"] or "none: kernels are compiled in every process"
    for name, package in described["optional"].items():
        rows[name] = package["version"] or f"absent (couplings[{'] or couplings['.join(package['extras'])}])"
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def comparison_tables(records: Sequence[Record], batch: Batch) -> list[Table]:
    """Tables of what `measure.compare` returns, one for each metric and quantizer if there are several methods in it.

    They are narrow enough for 80 columns.
    """
    n, *shape = batch.data.shape
    title = f"{n} rows of {batch.name}, {'x'.join(map(str, shape))}"
    methods = {record["label"] for record in records}
    if len(methods) == 1:
        return [_cells(f"{title}, {methods.pop()}", "metric", [(_kind(record), record) for record in records])]
    return [
        _cells(f"{title}, {kind}", "method", [(record["label"], record) for record in group])
        for kind, group in groupby(records, _kind)
    ]


def _kind(record: Record) -> str:
    return f"{record['metric']}, {record['quantize']}" if record["quantize"] else str(record["metric"])


def _cells(title: str, first: str, named: Iterable[tuple[str, Record]]) -> Table:
    table = _table(escape(title))
    table.add_column(first, no_wrap=True)
    # The widths of usual values, so that tables below each other line up.
    for name, width in (("ms", 5), ("+-", 4), ("reduction", 9), ("gap", 6), ("proven", 6), ("agree", 5)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("marginal", overflow="fold", min_width=11)
    for name, record in named:
        table.add_row(f"[bold]{escape(name)}[/]", *_results(record))
    return table


def _results(record: Record) -> list[str]:
    if record["seconds"] is None:
        return ["[red]failed[/]" if record["error"] is not None else "skipped"]
    agreement = record["agreement"]
    return [
        *(_milliseconds(record["seconds"]), _milliseconds(record["seconds_iqr"])),
        f"{100 * record['reduction']:.3f}%",
        *(_gap(record["gap"]), _gap(record["certified_gap"])),
        "" if agreement is None else f"{100 * agreement:.0f}%",
        _marginal(record),
    ]


def _milliseconds(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def _gap(gap: float | None) -> str:
    if gap is None:
        return ""
    # A mean distance in float32 is known to about 1e-7 of itself.
    return "0" if abs(gap) < 1e-7 else "<0.001%" if abs(gap) < 1e-5 else f"{100 * gap:.3f}%"


def _permuted(record: Record) -> bool:
    return bool(record["rows_used"] == record["n"] == record["noise_rows"])


def _marginal(record: Record) -> str:
    marginal = str(record["marginal"])
    if record["broken"] is not None:
        return f"[red]{marginal}: broken[/], norm {record['drift']['norm']:+.2f} sd"
    if _permuted(record):
        return marginal
    if record["rows_used"] != record["n"]:
        marginal += f", {record['rows_used']} different rows"
    return f"{marginal}, norm {record['drift']['norm']:+.2f} sd"


def comparison_footnotes(records: Sequence[Record], batch: Batch, threads: int) -> list[str]:
    """Lines that a reader needs in order to read the tables; `threads` are those that torch used."""
    done = [record for record in records if record["seconds"] is not None]
    repeats = sorted({record["repeats"] for record in done}) or [0]
    runs = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    lines = [f"ms: median of {runs} warm calls of couple(), torch on {threads} thread(s); +-: interquartile range"]
    if any(record["gap"] is not None for record in done):
        lines.append(
            "gap: cost of the pairs above that of the optimum without quantizer, recomputed in float64; "
            "agree: rows paired as in the optimum"
        )
    elif done:
        lines.append("gap: unknown, since no exact method is in the table")
    if any(record["certified_gap"] is not None for record in done):
        lines.append("proven: the method's own certificate, an upper bound of the gap for the matrix that it solved")
    if any(map(_permuted, done)):
        lines.append("marginal permutation: checked, the same rows bit for bit")
    chosen = sorted({record["label"] for record in done if record["noise_rows"] > record["n"]})
    if chosen:
        k = len(batch.noise) // len(batch.data)
        lines.append(f"{', '.join(chosen)}: k = {k} candidates per row, {k} times the noise of the others, so no gap")
    if not all(map(_permuted, done)):
        lines.append("norm: drift of the mean squared norm of the noise, in standard deviations of one row's")
    for record in records:
        reason = record["error"] or record["skipped"]
        lines += [f"{record['label']}: {reason}"] if reason else []
        lines += [f"{record['label']}: {record['broken']}"] if record["broken"] else []
        lines += [f"{record['label']}, {_kind(record)}: {note}" for note in record["notes"]]
    return list(dict.fromkeys(lines))
