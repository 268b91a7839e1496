"""Tables and a plot of what ``couplings ablate benchmarks/ablation.yaml`` recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from .record import RESULTS, markdown, read

__all__ = ["TABLES", "committed", "draw", "pick"]

CELL = ["data", "n", "method", "options", "metric", "quantize", "condition", "scope", "ranks"]
USUAL = {"data": "crops32", "metric": "sqeuclidean", "quantize": "none", "condition": "none", "scope": "local"}
# Batch: reduction in percent, milliseconds of the assignment (Immiscible Diffusion, arXiv 2406.12303, Table 3).
PAPER_TABLE_3 = {128: (1.93, 5.4), 256: (2.16, 6.7), 512: (2.32, 8.8), 1024: (2.44, 22.8)}


@cache
def committed() -> pd.DataFrame:
    """Return one row for each coupling and seed: its quality and time together, ``options`` as text."""
    rows: dict[str, dict[tuple[Any, ...], Any]] = {"quality": {}, "time": {}}
    for record in read(RESULTS / "ablation.jsonl"):
        if record["task"] in rows and not record.get("skipped") and not record.get("error"):
            record["options"] = " ".join(f"{name}={value}" for name, value in record["options"].items())
            record |= {name: record[name] or "none" for name in ("quantize", "condition")}
            rows[record["task"]][tuple(record[name] for name in (*CELL, "seed"))] = record
    quality, time = (pd.json_normalize(list(found.values())) for found in rows.values())
    fresh = [name for name in time.columns if name not in quality.columns]
    frame = quality.merge(time[[*CELL, "seed", *fresh]], on=[*CELL, "seed"], how="left")
    frame["label"] = (frame["method"] + " " + frame["options"]).str.strip()
    frame["percent"] = 100 * frame["reduction"]
    frame["assignment_ms"] = frame["phases_ms.conversion"] + frame["phases_ms.solve"]
    return frame


def pick(**fixed: Any) -> pd.DataFrame:
    """Return the rows with these values, the usual ones where none is given; None for all."""
    frame = committed()
    for name, value in {**USUAL, **fixed}.items():
        frame = frame if value is None else frame[frame[name] == value]
    return frame


def stouffer(z: pd.Series) -> float:
    """Return standard deviations above chance over all seeds: their sum over the root of their number."""
    return z.sum() / len(z) ** 0.5


def spread(values: pd.Series, show: str) -> str:
    """Mean and standard deviation over seeds."""
    values = values.dropna()
    return f"{show.format(values.mean())} ± {show.format(values.std()).rstrip('%')}" if len(values) else ""


def by(frame: pd.DataFrame, column: str, field: str, show: str) -> str:
    """Lay out a field: labels down, the values of a column across."""
    values = frame.groupby(["label", column], sort=False)[field].agg(lambda seeds: spread(seeds, show)).unstack()
    values = values.reindex(frame["label"].unique()).fillna("")
    values = values[sorted(values)] if column == "n" else values
    across = [f"n = {value}" if column == "n" else str(value) for value in values.columns]
    return markdown(["", *across], [[label, *cells] for label, *cells in values.itertuples()])


def methods(field: str, show: str, data: str) -> str:
    """Lay out a field over methods and batch sizes."""
    return by(pick(data=data, ranks=1), "n", field, show)


def noise_table(n: int = 512) -> str:
    """Distance from the optimum, and what became of the noise."""
    rows = []
    for label, found in pick(n=n, ranks=1).groupby("label", sort=False):
        kept = found["rows_used"] / found["rows"] if (found["noise_rows"] == found["rows"]).all() else None
        agreement = found["agreement"].mean()
        rows.append([
            label, spread(found["gap"] * 100, "{:.3f}%"), "" if agreement != agreement else f"{100 * agreement:.0f}%",
            found["marginal"].iloc[0], "" if kept is None else f"{100 * kept.mean():.0f}%",
            f"{found['drift.norm'].mean() + 0.0:+.2f}", f"{stouffer(found['leakage.z']):+.1f}",
        ])  # fmt: skip
    head = ["method", "above the optimum", "agrees", "marginal", "rows kept", "norm drift", "leakage"]
    return markdown(head, rows)


def phases_table(n: int = 512) -> str:
    """Milliseconds of each phase of a call, means over seeds."""
    names = ("checks", "cost", "conversion", "solve", "gather", "report", "other")
    means = pick(n=n, ranks=1).groupby("label", sort=False)[[f"phases_ms.{name}" for name in names]].mean()
    return markdown(["", *names], [[label, *(f"{ms:.2f}" for ms in cells)] for label, *cells in means.itertuples()])


def paper_table() -> str:
    """Lay out the form of the paper's Table 3, its figures beside ours."""
    rows = []
    for n, (reduction, ms) in PAPER_TABLE_3.items():
        ours, scipy = (
            pick(n=n, method=method, metric="l2", quantize="fp16", ranks=1) for method in ("auction", "hungarian")
        )
        times = [spread(found["assignment_ms"], "{:.1f}") for found in (ours, scipy)]
        found = [spread(100 * ours["reduction"], "{:.2f}%"), f"{ms:.1f}", *times, spread(ours["ms"], "{:.1f}")]
        rows.append([str(n), f"{reduction:.2f}%", *found])
    head = [
        "batch",
        "paper: reduction",
        "ours: reduction",
        "paper: ms",
        "ours: ms",
        "ours, scipy: ms",
        "whole call: ms",
    ]
    return markdown(head, rows)


def formats_table() -> str:
    """Hold number formats against float32."""
    found = pick(quantize=None, metric=None, method="auction", ranks=1)
    found = found[(found["quantize"] != "none") & found["n"].isin([256, 1024])]
    rows = []
    for (metric, name), group in found.groupby(["metric", "quantize"], sort=False):
        sizes = [group[group["n"] == n] for n in (256, 1024)]
        cells = [
            (f"{100 * at['rows_changed'].mean():.1f}%", f"{1e4 * at['reduction_lost'].mean():.2f}") for at in sizes
        ]
        rows.append([metric, name, *(cell for pair in cells for cell in pair)])
    head = ["metric", "format", "n = 256: rows changed", "lost", "n = 1024: rows changed", "lost"]
    return markdown(head, rows)


def _metrics(n: int = 256) -> pd.DataFrame:
    found = pick(metric=None, n=n, ranks=1)
    return found[found["method"].isin(["auction", "greedy"])]


def classes_table() -> str:
    """Coupling across classes, and within them."""
    found = pick(condition=None, ranks=1)
    found = found[found["n"].isin([128, 1024]) & found["method"].isin(["independent", "auction", "greedy"])]
    rows = []
    for (n, label), group in found.groupby(["n", "label"], sort=False):
        row = [label, str(n)]
        for condition in ("none", "class"):
            here = group[group["condition"] == condition]
            row += [spread(100 * here["reduction"], "{:.2f}%"), f"{stouffer(here['leakage.z']):+.1f}"]
        rows.append(row)
    return markdown(["method", "n", "across: reduction", "leakage", "within: reduction", "leakage"], rows)


def ranks_table() -> str:
    """Coupling over ranks."""
    found = pick(scope=None)
    found = found[found["n"].isin([64, 128]) & found["method"].isin(["auction", "sliced"])]
    rows = []
    for (label, n, ranks), group in found.groupby(["label", "n", "ranks"]):
        rows.append(
            [label, str(n), str(ranks), spread(100 * group["reduction"], "{:.2f}%"), spread(group["ms"], "{:.1f}")]
        )
    return markdown(["method", "rows each", "ranks", "reduction", "ms"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "ablation": paper_table,
    "ablation-noise": noise_table,
    "ablation-phases": phases_table,
    "ablation-formats": formats_table,
    "ablation-classes": classes_table,
    "ablation-ranks": ranks_table,
    "ablation-metrics": lambda: by(_metrics(), "metric", "percent", "{:.2f}%"),
    **{
        f"ablation-{data}-{name}": lambda data=data, field=field, show=show: methods(field, show, data)
        for data in ("crops32", "crops64", "latents")
        for name, field, show in (("reduction", "percent", "{:.2f}%"), ("ms", "ms", "{:.2f}"))
    },
}


def draw(folder: Path) -> None:
    """Draw reduction and time over batch size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    colours = dict(zip(pick(ranks=1)["label"].unique(), colormaps["tab20"].colors, strict=False))
    for axes, field, label in zip(
        figure.subplots(1, 2), ("percent", "ms"), ("reduction, %", "milliseconds"), strict=True
    ):
        for name, group in pick(ranks=1).groupby("label", sort=False):
            means = group.groupby("n")[field].mean()
            axes.plot(means.index, means, "o-", label=name, color=colours[name], markersize=3)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rows n", ylabel=label, yscale="log" if field == "ms" else "linear")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(folder / "ablation.png", dpi=120, metadata={"Software": None})
