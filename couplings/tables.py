"""What the command line prints: tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from couplings.assigners.registry import MethodInfo
from couplings.comparison import Batch, Cell
from couplings.environment import missing_packages

__all__ = ["comparison_footnotes", "comparison_tables", "environment_lines", "methods_table"]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def methods_table(infos: Iterable[MethodInfo]) -> Table:
    """One row for each method.

    Parameters
    ----------
    infos : iterable of MethodInfo
    """
    table = _table("")
    for name in ("method", "exact", "marginal", "needs", "extra", "summary"):
        table.add_column(name, no_wrap=name != "summary", overflow="fold")
    for info in infos:
        table.add_row(
            f"[bold]{escape(info.name)}[/]",
            "yes" if info.exact else "",
            info.marginal,
            info.needs,
            ", ".join(_extra(extra) for extra in info.requires),
            escape(info.summary),
        )
    return table


def _extra(extra: str) -> str:
    return f"[red]{extra}: missing[/]" if missing_packages(extra) else f"[green]{extra}: installed[/]"


def environment_lines(described: Mapping[str, Any]) -> list[str]:
    """Plain lines, ``name  value``, that survive being pasted anywhere.

    Parameters
    ----------
    described : mapping
        From `couplings.environment.describe`.
    """
    version = f"{described['couplings']}, checkout at {described['commit']}" if described["commit"] else None
    rows = [("couplings", version or described["couplings"])]
    rows += [(name, described[name]) for name in ("python", "platform")]
    rows += described["packages"].items()
    rows += [
        ("cpu", described["cpu"]),
        ("threads", f"{described['threads']} of torch, {described['cpus']} processors available"),
        ("cuda", described["cuda"] or "torch was built without CUDA"),
    ]
    rows += [
        (f"device {i}", f"{device['name']}, {device['gigabytes']} GB, capability {device['capability']}")
        for i, device in enumerate(described["devices"])
    ] or [("devices", "no CUDA device")]
    rows.append(("kernel cache", described["kernel_cache"] or "none: kernels are compiled in every process"))
    rows += [
        (name, package["version"] or f"absent (couplings[{'] or couplings['.join(package['extras'])}])")
        for name, package in described["optional"].items()
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def comparison_tables(cells: Sequence[Cell], batch: Batch) -> list[Table]:
    """One row for each cell, and a table for each metric and quantizer if there are several methods to list in it.

    Parameters
    ----------
    cells : sequence of Cell
        Metric by metric, quantizer by quantizer.
    batch : Batch

    Returns
    -------
    list of Table
        Narrow enough for 80 columns.
    """
    n, *shape = batch.data.shape
    title = f"{n} rows of {batch.name}, {'x'.join(map(str, shape))}"
    methods = {cell.method for cell in cells}
    if len(methods) == 1:
        named = [(_kind(cell.metric, cell.quantize), cell) for cell in cells]
        return [_cells_table(f"{title}, {methods.pop()}", "metric", named)]
    kinds = dict.fromkeys((cell.metric, cell.quantize) for cell in cells)
    return [
        _cells_table(
            f"{title}, {_kind(*kind)}",
            "method",
            [(cell.method, cell) for cell in cells if (cell.metric, cell.quantize) == kind],
        )
        for kind in kinds
    ]


def _cells_table(title: str, first: str, named: Iterable[tuple[str, Cell]]) -> Table:
    table = _table(escape(title))
    table.add_column(first, no_wrap=True)
    # The widths of usual values, so that tables below each other line up.
    for name, width in (("ms", 5), ("+-", 4), ("reduction", 9), ("gap", 6), ("proven", 6), ("agree", 5)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("marginal", overflow="fold", min_width=11)
    for name, cell in named:
        table.add_row(f"[bold]{escape(name)}[/]", *_results(cell))
    return table


def _kind(metric: str, quantize: str | None) -> str:
    return f"{metric}, {quantize}" if quantize else metric


def _results(cell: Cell) -> list[str]:
    if cell.seconds is None or cell.seconds_iqr is None:
        return ["[red]failed[/]" if cell.error is not None else "skipped", "", "", "", "", "", ""]
    return [
        _milliseconds(cell.seconds),
        _milliseconds(cell.seconds_iqr),
        _percent(cell.reduction),
        _gap(cell.gap),
        _gap(cell.certified_gap),
        "" if cell.agreement is None else f"{100 * cell.agreement:.0f}%",
        _marginal(cell),
    ]


def _milliseconds(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3f}%"


def _gap(gap: float | None) -> str:
    if gap is None:
        return ""
    # A mean distance in float32 is known to about 1e-7 of itself.
    return "0" if abs(gap) < 1e-7 else "<0.001%" if abs(gap) < 1e-5 else f"{100 * gap:.3f}%"


def _marginal(cell: Cell) -> str:
    if cell.rows_used == cell.n == cell.noise_rows:
        return cell.marginal
    parts = [cell.marginal] if cell.rows_used == cell.n else [f"{cell.marginal}, {cell.rows_used} different rows"]
    if cell.drift is not None:
        parts.append(f"norm {cell.drift['norm']:+.2f} sd")
    return ", ".join(parts)


def comparison_footnotes(cells: Sequence[Cell], batch: Batch, threads: int) -> list[str]:
    """Say what a reader needs to know to read the table.

    Parameters
    ----------
    cells : sequence of Cell
    batch : Batch
    threads : int
        Threads that torch used.
    """
    repeats = sorted({cell.repeats for cell in cells if cell.repeats})
    runs = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}" if repeats else "0"
    lines = [f"ms: median of {runs} warm calls of couple(), torch on {threads} thread(s); +-: interquartile range"]
    if any(cell.gap is not None for cell in cells):
        lines.append(
            "gap: cost of the pairs above that of the optimum without quantizer, recomputed in float64; "
            "agree: rows paired as in the optimum"
        )
    elif any(cell.seconds is not None for cell in cells):
        lines.append("gap: unknown, since no exact method is in the table")
    if any(cell.certified_gap is not None for cell in cells):
        lines.append("proven: the method's own certificate, an upper bound of the gap for the matrix that it solved")
    if any(cell.rows_used == cell.n == cell.noise_rows for cell in cells):
        lines.append("marginal permutation: checked, the same rows bit for bit")
    drawn = sorted({cell.method for cell in cells if cell.noise_rows > cell.n and cell.seconds is not None})
    if drawn:
        lines.append(
            f"{', '.join(drawn)}: k = {batch.candidates} candidates per row, {batch.candidates} times the noise of the "
            "others, so no gap"
        )
    if any(cell.drift is not None and not cell.rows_used == cell.n == cell.noise_rows for cell in cells):
        lines.append("norm: drift of the mean squared norm of the noise, in standard deviations of one row's")
    for cell in cells:
        reason = cell.error or cell.skipped
        lines += [f"{cell.method}: {reason}"] if reason else []
        lines += [f"{cell.method}, {_kind(cell.metric, cell.quantize)}: {note}" for note in cell.notes]
    return list(dict.fromkeys(lines))
