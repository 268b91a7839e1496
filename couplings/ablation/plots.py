"""Figures of ablations and comparisons, by Matplotlib."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from couplings._files import written_atomically
from couplings.ablation.sources import Batch

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Figure", "check_plot", "figure_bytes", "lines", "pareto", "plot_comparison"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers say the same again.
_COLOURS = (
    *("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#8a8f98", "#7a5195", "#8c564b"),
)
_MARKERS = "osD^vP*Xp<>h8"


@dataclass(frozen=True)
class Figure:
    """A figure of a page.

    Attributes
    ----------
    caption : str
    content : bytes
        An SVG, as `figure_bytes` returns it.
    """

    caption: str
    content: bytes

    @property
    def url(self) -> str:
        """The figure itself as an address, for pages that need no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.content).decode()}"

    @property
    def file(self) -> str:
        """A name of a file, made of the caption."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.caption.lower()).strip('-')}.svg"


def figure_bytes(figure: Any, file_format: str = "svg") -> bytes:
    """Save a figure of Matplotlib.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    file_format : str
        ``"svg"``, ``"png"`` or another that Matplotlib knows.

    Returns
    -------
    bytes
        Of an SVG, the same for the same figure: it holds no date, and its ids are not random.
    """
    from matplotlib import rc_context

    file = io.BytesIO()
    # Text stays text: smaller, and it can be searched.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "couplings"}):
        figure.savefig(file, format=file_format, dpi=150, metadata={"Date": None} if file_format == "svg" else None)
    return file.getvalue()


def lines(
    cells: pd.DataFrame,
    x: str,
    y: str,
    caption: str,
    *,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
) -> Figure | None:
    """Draw means over seeds against a number, with the standard deviation.

    Parameters
    ----------
    cells : DataFrame
        A row for each measurement, with the columns ``label``, ``biased``, ``seed``, `x` and `y`.
    x, y, caption, xlabel, ylabel : str
    log_y : bool
        A logarithmic axis; that of `x` always is one.

    Returns
    -------
    Figure or None
        A line for each label, dashed where the noise is biased; one for labels whose values are the same. None if
        there is one x.
    """
    samples = cells.pivot_table(index="label", columns=[x, "seed"], values=y, sort=False)
    if samples.empty or samples.columns.get_level_values(x).nunique() < 2:
        return None
    points = samples.T.groupby(level=x).agg(["mean", "std"])
    biased = set(cells.loc[cells["biased"], "label"])
    names = _merged(samples)
    figure, panel = _panel(caption, xlabel, ylabel, entries=len(names))
    for i, (label, name) in enumerate(names.items()):
        line = points[label].dropna(subset="mean")
        dashes = "--" if label in biased else "-"
        _draw(panel, i, name, line.index, line["mean"], None, line["std"].fillna(0.0), linestyle=dashes, markersize=4.5)
    panel.set(xscale="log", yscale="log" if log_y else "linear")
    panel.set_xticks(points.index)
    panel.xaxis.set_major_formatter(_plain)
    panel.minorticks_off()
    if log_y:
        _log_ticks(panel.yaxis)
    return _with_legend(figure, panel, caption)


def pareto(cells: pd.DataFrame, caption: str) -> Figure | None:
    """Draw reduction against time, and the Pareto front of what keeps the noise Gaussian.

    Parameters
    ----------
    cells : DataFrame
        A row for each measurement, with the columns ``label``, ``biased``, ``reduction`` and ``ms``.
    caption : str

    Returns
    -------
    Figure or None
        None if there are fewer than two labels.
    """
    measured = cells.dropna(subset=["ms", "reduction"]).assign(percent=100 * cells["reduction"])
    points = measured.groupby("label", sort=False).agg(
        ms=("ms", "mean"),
        ms_std=("ms", "std"),
        percent=("percent", "mean"),
        percent_std=("percent", "std"),
        biased=("biased", "any"),
    )
    if len(points) < 2:
        return None
    figure, panel = _panel(caption, "milliseconds of a call", "distance reduction, %", entries=len(points))
    for i, point in enumerate(points.fillna(0.0).itertuples()):
        xerr = min(point.ms_std, 0.9 * point.ms)  # a bar to 0 has no end on this axis
        style = {"linestyle": "none", "hollow": point.biased}
        _draw(panel, i, point.Index, point.ms, point.percent, xerr, point.percent_std, **style)
    front = points[~points["biased"]].sort_values("ms", kind="stable")
    front = front[front["percent"] > front["percent"].cummax().shift(fill_value=-np.inf)]
    panel.step(front["ms"], front["percent"], where="post", color="#8a8f98", linewidth=1, zorder=1)
    panel.set_xscale("log")
    _log_ticks(panel.xaxis)
    return _with_legend(figure, panel, caption)


def _merged(samples: pd.DataFrame) -> dict[str, str]:
    """Name the lines to draw: one for labels that have the same values wherever both were measured."""
    names: dict[str, str] = {}
    for label, values in samples.T.items():
        measured = values.dropna()
        for other in names:
            drawn = samples.loc[other].dropna()
            common = measured.index.intersection(drawn.index)
            covered = len(common) in (len(measured), len(drawn))
            if covered and np.allclose(measured[common], drawn[common], rtol=1e-9, atol=0.0):
                longer = label if len(measured) > len(common) else other
                names = {longer if each == other else each: name for each, name in names.items()}
                names[longer] += f" = {label}"
                break
        else:
            names[str(label)] = str(label)
    return names


def _panel(title: str, xlabel: str, ylabel: str, *, entries: int) -> tuple[Any, Any]:
    """Make a figure small enough to be read on a phone, with room for so many entries of a legend."""
    import matplotlib.figure as mpl  # the object interface: pyplot would keep the figure in a global list

    figure = mpl.Figure(figsize=(5.4, 3.4 + 0.17 * (entries // 3 + 1)), layout="constrained")
    panel = figure.subplots()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.set_title(title, loc="left", fontsize=10)
    return figure, panel


def _draw(
    panel: Any, i: int, label: str, x: Any, y: Any, xerr: Any, yerr: Any, *, hollow: bool = False, **style: Any
) -> None:
    """Draw the i-th line or point with its error bars."""
    usual = {"markersize": 7, "linewidth": 1.4, "elinewidth": 0.8, "markerfacecolor": "white" if hollow else None}
    usual |= {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
    panel.errorbar(x, y, xerr=xerr, yerr=yerr, label=label, **{**usual, **style})


def _with_legend(figure: Any, panel: Any, caption: str) -> Figure:
    handles, labels = panel.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 16 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return Figure(caption, figure_bytes(figure))


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(_plain)
    axis.set_minor_locator(NullLocator())


# -- a comparison


def check_plot(path: Path) -> None:
    """Refuse early what could not be drawn in the end.

    Raises
    ------
    ValueError
        If Matplotlib has no such format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        msg = f"{path}: the suffix says the format, and must be one of {', '.join('.' + each for each in known)}."
        raise ValueError(msg)


def plot_comparison(records: Sequence[Mapping[str, Any]], batch: Batch, path: Path) -> None:
    """Draw distance reduction against milliseconds, a panel for each metric.

    Parameters
    ----------
    records : sequence of dict
        From `couplings.ablation.measure.compare`; those without a result are left out.
    batch : Batch
    path : Path
        Its suffix says the format.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib import figure as mpl
    from matplotlib.lines import Line2D

    metrics = list(dict.fromkeys(record["metric"] for record in records))
    records = [record for record in records if record["seconds"] is not None]
    methods, quantizers = (dict.fromkeys(record[axis] for record in records) for axis in ("label", "quantize"))
    biased = {record["label"] for record in records if record["marginal"] == "selected" or record["broken"]}
    tab20: Any = colormaps["tab20"]  # its ten strong colours first, then their ten pale ones
    colours = {method: tab20(2 * i % 20 + i // 10 % 2) for i, method in enumerate(methods)}
    markers = {quantize: _MARKERS[i % 6] for i, quantize in enumerate(quantizers)}
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = mpl.Figure(figsize=(max(7.0, 2.6 + 3.8 * columns), 4.8 if rows == 1 else 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    for i, (panel, metric) in enumerate(zip(panels, metrics, strict=False)):
        for record in (record for record in records if record["metric"] == metric):
            style = {"color": colours[record["label"]], "marker": markers[record["quantize"]], "markersize": 8}
            style |= {"linestyle": "none", "elinewidth": 1.5, "hollow": record["label"] in biased}
            xerr = 500 * min(record["seconds_iqr"], record["seconds"])  # a bar to 0 has no end on this axis
            _draw(panel, 0, "", 1000 * record["seconds"], 100 * record["reduction"], xerr, None, **style)
        panel.set(title=metric, xlabel="milliseconds per call", xscale="log")
        panel.set_ylabel("" if i % columns else "distance reduction, %")
        _log_ticks(panel.xaxis)
        panel.grid(alpha=0.3)
        panel.margins(0.12)
    entry = partial(Line2D, [], [], linestyle="none")
    handles = [
        entry(marker="o", color=colour, markerfacecolor="white", label=f"{method} (biased noise)")
        if method in biased
        else entry(marker="o", color=colour, label=method)
        for method, colour in colours.items()
    ]
    if len(markers) > 1:
        handles += [entry(marker=each, color="0.4", label=name or "no quantizer") for name, each in markers.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    shape = "x".join(map(str, batch.data.shape[1:]))
    figure.suptitle(f"{len(batch.data)} rows of {batch.name}, {shape}", x=0.01, horizontalalignment="left")
    with written_atomically(path, force=True) as file:
        file.write(figure_bytes(figure, path.suffix[1:].lower()))
