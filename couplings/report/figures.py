"""Plots as SVG, small enough to be read on a phone: one panel each, its legend below."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from couplings.report.reading import Cells, Series
from couplings.report.sections import Figure, Samples, mean, spread

__all__ = ["Line", "Plot", "drawn", "lines", "pareto", "reduction", "slug", "time"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers say the same again.
_COLOURS = (
    "#000000",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a8f98",
    "#7a5195",
    "#8c564b",
)
_MARKERS = "osD^vP*Xp<>h8"


@dataclass(frozen=True)
class Plot:
    """A panel to be drawn: its name, its caption, and how; None if there is nothing to draw."""

    name: str
    caption: str
    draw: Callable[[], str] | None


@dataclass(frozen=True)
class Line:
    """Values along an axis, each by seed."""

    label: str
    points: Mapping[float, Samples]
    dashed: bool = False


def drawn(plots: Sequence[Plot], suffix: str) -> list[Figure]:
    """Draw what can be drawn.

    Parameters
    ----------
    plots : sequence of Plot
    suffix : str
        Tells figures of the same name apart.

    Returns
    -------
    list of Figure
    """
    return [
        Figure(slug(f"{plot.name} {suffix}"), plot.caption, [plot.draw()]) for plot in plots if plot.draw is not None
    ]


def slug(text: str) -> str:
    """Make a name of a file of it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _figure(height: float = 3.6) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        msg = "a report needs the package matplotlib, which is not installed. Type: pip install 'couplings[plot]'"
        raise ImportError(msg) from error
    # The object interface: pyplot would keep the figure in a global list.
    figure = Drawing(figsize=(5.4, height), layout="constrained")
    panel = figure.subplots()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) < 16 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _svg(figure: Any, title: str) -> str:
    import matplotlib as mpl

    file = io.StringIO()
    # Text stays text: smaller, and it can be read aloud and searched. A salt of its own keeps the ids of several
    # figures on a page apart, and the same figure the same.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px sans-serif", text)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg", f'<svg role="img" aria-label="{label}"', text, count=1)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def lines(
    found: Sequence[Line],
    title: str,
    x: str,
    y: str,
    *,
    log_x: bool = True,
    log_y: bool = False,
) -> Callable[[], str] | None:
    """Plan a panel of lines with the standard deviation over seeds.

    Parameters
    ----------
    found : sequence of Line
    title, x, y : str
        Of the panel and its axes.
    log_x, log_y : bool

    Returns
    -------
    callable or None
        Draws it as SVG; None if no line has two points.
    """
    kept = _merged([line for line in found if line.points])
    if max((len(line.points) for line in kept), default=0) < 2:
        return None

    def draw() -> str:
        figure, panel = _figure(3.4 + 0.17 * (len(kept) // 3 + 1))
        for i, line in enumerate(kept):
            places = sorted(line.points)
            panel.errorbar(
                places,
                [mean(line.points[place]) for place in places],
                yerr=[spread(line.points[place]) or 0.0 for place in places],
                label=line.label,
                color=_colour(i),
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.4,
                elinewidth=0.8,
                linestyle="--" if line.dashed else "-",
            )
        places = sorted({place for line in kept for place in line.points})
        if log_x:
            panel.set_xscale("log")
        _plain_ticks(panel.xaxis, places)
        if log_y:
            panel.set_yscale("log")
            _log_ticks(panel.yaxis)
        panel.set(xlabel=x, ylabel=y)
        panel.set_title(title, loc="left", fontsize=10)
        _legend(figure, panel)
        return _svg(figure, title)

    return draw


def _merged(found: Sequence[Line]) -> list[Line]:
    """Draw lines that are the same as one: methods that make the same pairs."""
    merged: list[Line] = []
    for line in found:
        for i, other in enumerate(merged):
            if _same(line.points, other.points):
                longer = max(other.points, line.points, key=len)
                merged[i] = Line(f"{other.label} = {line.label}", longer, other.dashed)
                break
        else:
            merged.append(line)
    return merged


def _same(points: Mapping[float, Samples], others: Mapping[float, Samples]) -> bool:
    """Whether the lines run over each other, all the way along the shorter one."""
    common = points.keys() & others.keys()
    if len(common) < 2 or common not in (points.keys(), others.keys()):
        return False
    return all(
        points[place].keys() == others[place].keys()
        and all(abs(value - others[place][seed]) <= 1e-9 * abs(value) for seed, value in points[place].items())
        for place in common
    )


def _by_label(cells: Cells, read: Callable[[Series], Samples]) -> list[Line]:
    found: dict[str, dict[float, Samples]] = {}
    for series in cells.series:
        values = read(series)
        if values:
            found.setdefault(series.label, {})[series.rows] = values
    return [Line(label, points, dashed=label.endswith("†")) for label, points in found.items()]


def reduction(cells: Cells, data: str) -> Callable[[], str] | None:
    """Plan reduction against batch size."""
    found = _by_label(cells, lambda series: series.get("reduction", 100))
    return lines(found, f"Reduction, {data}", "rows coupled together, n", "distance reduction, %")


def time(cells: Cells, data: str) -> Callable[[], str] | None:
    """Plan milliseconds against batch size."""
    found = _by_label(cells, lambda series: series.get("ms"))
    return lines(found, f"Time of a call, {data}", "rows coupled together, n", "milliseconds", log_y=True)


def pareto(cells: Cells, data: str, n: int) -> Callable[[], str] | None:
    """Plan reduction against milliseconds, with the front of what nothing is both better and faster than."""
    found = [
        (series, mean(series.get("ms")), mean(series.get("reduction", 100)))
        for series in cells.series
        if series.get("ms") and series.get("reduction")
    ]
    if len(found) < 2:
        return None

    def draw() -> str:
        figure, panel = _figure(3.4 + 0.17 * (len(found) // 3 + 1))
        honest = sorted(((ms, gain) for series, ms, gain in found if not series.biased), key=lambda pair: pair[0])
        front = [pair for i, pair in enumerate(honest) if all(pair[1] > other[1] for other in honest[:i])]
        panel.step(*zip(*front, strict=True), where="post", color="#8a8f98", linewidth=1, zorder=1)
        for i, (series, ms, gain) in enumerate(found):
            panel.errorbar(
                ms,
                gain,
                xerr=min(spread(series.get("ms")) or 0.0, 0.9 * ms),
                yerr=spread(series.get("reduction", 100)) or 0.0,
                label=series.label,
                color=_colour(i),
                marker=_MARKERS[i % len(_MARKERS)],
                markerfacecolor="white" if series.biased else None,
                markersize=7,
                elinewidth=0.8,
                linestyle="none",
            )
        panel.set_xscale("log")
        _log_ticks(panel.xaxis)
        panel.set(xlabel="milliseconds of a call", ylabel="distance reduction, %")
        panel.set_title(f"Reduction against time, {data}, n = {n}", loc="left", fontsize=10)
        _legend(figure, panel)
        return _svg(figure, f"Reduction against time, {data}")

    return draw
