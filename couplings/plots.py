"""The picture of a comparison: what each coupling gains, against the time it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from couplings.ablation.sources import Batch

__all__ = ["check_plot", "plot_comparison"]


def check_plot(path: Path) -> None:
    """Refuse early what could not be drawn in the end.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    ValueError
        If it has no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        msg = "--plot needs the package matplotlib, which is not installed. Type: pip install 'couplings[ablate]'"
        raise ImportError(msg) from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        msg = (
            f"{path}: the suffix says the format, and must be one of {', '.join('.' + each for each in sorted(known))}."
        )
        raise ValueError(msg)


_MARKERS = "osD^vP"


def _colour(i: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # The ten strong colours of tab20 first, then their ten pale ones.
    return str(to_hex(colormaps["tab20"](2 * i % 20 + i // 10 % 2)))


def plot_comparison(cells: Sequence[Any], batch: Batch, path: Path) -> None:
    """Draw distance reduction against milliseconds, a panel for each metric.

    Parameters
    ----------
    cells : sequence of Cell
        Those without a result are left out.
    batch : Batch
    path : Path
        Its suffix says the format.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    # The object interface: pyplot would pick a backend and keep the figure in a global list.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    from couplings.ablation.files import written_atomically

    done = [cell for cell in cells if cell.seconds is not None]
    metrics = list(dict.fromkeys(cell.metric for cell in cells))
    quantizers = list(dict.fromkeys(cell.quantize for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in done))
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(max(7.0, 2.6 + 3.8 * columns), 4.8 if rows == 1 else 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    for panel, metric in zip(panels[: len(metrics)], metrics, strict=True):
        for cell in (cell for cell in done if cell.metric == metric):
            panel.errorbar(
                1000 * (cell.seconds or 0.0),
                100 * (cell.reduction or 0.0),
                xerr=500 * min(cell.seconds_iqr or 0.0, cell.seconds or 0.0),  # a bar to 0 has no end on this axis
                color=_colour(methods.index(cell.method)),
                marker=_MARKERS[quantizers.index(cell.quantize) % len(_MARKERS)],
                # Selected noise is not Gaussian: what it gains is not comparable, and its marker is hollow.
                markerfacecolor="white" if cell.marginal == "selected" else None,
                markersize=8,
                linestyle="none",
            )
        panel.set_xscale("log")
        for axis in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            axis(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
        panel.set_title(metric)
        panel.set_xlabel("milliseconds per call")
        panel.grid(alpha=0.3)
        panel.margins(0.12)
    for panel in panels[::columns]:
        panel.set_ylabel("distance reduction, %")
    selected = {cell.method for cell in done if cell.marginal == "selected"}
    _legend(figure, methods, [quantizer or "no quantizer" for quantizer in quantizers], selected)
    shape = "x".join(map(str, batch.data.shape[1:]))
    figure.suptitle(f"{len(batch.data)} rows of {batch.name}, {shape}", x=0.01, horizontalalignment="left")
    with written_atomically(path, force=True) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)


def _legend(figure: Any, methods: Sequence[str], quantizers: Sequence[str], selected: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=_colour(i),
            marker="o",
            linestyle="none",
            markerfacecolor="white" if method in selected else None,
            label=f"{method} (biased noise)" if method in selected else method,
        )
        for i, method in enumerate(methods)
    ]
    if len(quantizers) > 1:
        handles += [
            Line2D([], [], color="0.4", marker=_MARKERS[i % len(_MARKERS)], linestyle="none", label=name)
            for i, name in enumerate(quantizers)
        ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
