"""Tables and plots of what `benchmarks.training` recorded."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from .record import RESULTS, Record, markdown, provenance, read

__all__ = ["TABLES", "Results", "committed", "draw"]

KINDS = {
    "v": "DDIM, v prediction",
    "epsilon": "DDIM, epsilon prediction",
    "weighted": "DDIM, v prediction, epsilon's weights",
    "image": "DDIM, image prediction",
    "flow": "Flow matching",
}
PAIRINGS = {
    "independent": "independent",
    "coupled": "coupled",
    "whitened": "coupled, cost on whitened pixels",
    "of32": "coupled, 32 rows at a time",
    "l2": "coupled, l2",
    "l1": "coupled, l1",
    "sinkhorn0.2": "sinkhorn, reg 0.2",
    "sinkhorn0.5": "sinkhorn, reg 0.5",
    "sinkhorn1": "sinkhorn, reg 1",
    "greedy": "greedy",
    "sliced": "sliced",
    "nearest_l2": "nearest, k = 4, l2 (selects)",
    "nearest_dot": "nearest, k = 4, dot (selects)",
}
BASE, OURS = "independent", "coupled"
PARTS = (0.5, 0.75, 1.0)  # of the baseline's training: where the thresholds are read off its curve
COLORS = {BASE: "#8a8f98", OURS: "#d1495b"}
ALONG = 10  # sampling steps of the curves along training


class Results:
    """Records of training, those of one arm with one setting.

    Attributes
    ----------
    frechet : Series
        Distances by ``kind, pairing, nfe, step, seed``; ``nfe`` counts sampling steps, ``step`` training steps.
    nfe : list of int
    last : dict
        Each kind, to the most training steps at which it and its baseline were measured in full.

    Raises
    ------
    ValueError
        If there is no record, or one arm was run with different settings.
    """

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        points = self.of("point")
        if not points:
            msg = "no record of a training run: run python -m benchmarks.training first"
            raise ValueError(msg)
        known: dict[str, Record] = {}
        for record in points:
            train = {key: value for key, value in record["settings"]["train"].items() if key != "seed"}
            settings = {**record["settings"], "train": train}
            if known.setdefault(record["arm"], settings) != settings:
                msg = f"{record['arm']} is on record with different settings: choose another --output, or delete some"
                raise ValueError(msg)
        self.frechet = series(
            {(*arm_of(r["arm"]), int(nfe), r["step"], r["seed"]): v for r in points for nfe, v in r["frechet"].items()},
            ("kind", "pairing", "nfe", "step", "seed"),
        )
        self.nfe = sorted(self.frechet.index.unique("nfe"))
        self._full: dict[tuple[str, str], set[int]] = {}
        for (kind, pairing, step), values in self.frechet.groupby(level=["kind", "pairing", "step"]):
            if values.index.unique("nfe").size == len(self.nfe):
                self._full.setdefault((kind, pairing), set()).add(step)
        shared = {kind: self.shared(kind, OURS) for kind in KINDS}
        self.last = {kind: max(steps) for kind, steps in shared.items() if steps}

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """Return the records of a kind with the fields given."""
        fields["kind"] = kind
        return [record for record in self.records if fields.items() <= record.items()]

    def at(self, kind: str, pairing: str, nfe: int, step: int) -> pd.Series:
        """Return distances by seed."""
        try:
            return self.frechet[kind, pairing, nfe, step]
        except KeyError:
            return pd.Series(dtype=float)

    def shared(self, kind: str, pairing: str) -> set[int]:
        """Return the training steps at which a way of pairing and its baseline were measured in full."""
        return self._full.get((kind, BASE), set()) & self._full.get((kind, pairing), set())

    def change(self, kind: str, nfe: int, step: int, pairing: str = OURS) -> tuple[float, bool] | None:
        """Return the relative change by coupling over the seeds that both have, and whether all agree in its sign."""
        pair = pd.concat([self.at(kind, name, nfe, step) for name in (BASE, pairing)], axis=1, join="inner")
        if pair.empty:
            return None
        base, ours = pair.mean()
        return ours / base - 1, (pair[1] < pair[0]).nunique() == 1

    def reach(self, kind: str, pairing: str, nfe: int, threshold: float) -> float | None:
        """Return the training steps after which the mean curve first reaches a threshold, None if it never does.

        Between two checkpoints the curve is a straight line.
        """
        before: tuple[int, float] | None = None
        for step, value in mean(self.frechet[kind, pairing, nfe]).items():
            if value <= threshold:
                if before is None:
                    return step
                return before[0] + (step - before[0]) * (before[1] - threshold) / (before[1] - value)
            before = step, value
        return None


def series(values: dict[Any, float], names: tuple[str, ...]) -> pd.Series:
    """Return values by their keys, sorted."""
    index = pd.MultiIndex.from_tuples(list(values), names=names)
    return pd.Series(list(values.values()), index, dtype=float).sort_index()


def arm_of(name: str) -> tuple[str, str]:
    """Return what an arm predicts, and how it pairs."""
    kind, _, pairing = name.partition("-")
    return kind, pairing


def mean(by_step_and_seed: pd.Series) -> pd.Series:
    """Return the mean over seeds, by step."""
    return by_step_and_seed.groupby(level=0).mean()


@cache
def committed(suite: str = "training") -> Results:
    """Return the results that are part of the repository."""
    return Results(read(RESULTS / f"{suite}.jsonl"))


# -- tables


def spread(values: pd.Series) -> str:
    """Mean over seeds, and lowest to highest."""
    if values.empty:
        return ""
    text = f"{values.mean():.1f}"
    return text if len(values) == 1 else f"{text} ({values.min():.1f} to {values.max():.1f})"


def percent(change: tuple[float, bool] | None) -> str:
    """Relative change; in brackets where the seeds disagree."""
    if change is None:
        return ""
    rounded = round(100 * change[0])
    text = f"{rounded:+d}%" if rounded else "0%"
    return text if change[1] else f"({text})"


def _table(results: Results, head: list[str], rows: Iterable[list[str]]) -> str:
    return markdown([*head, *(f"{nfe} sampling step{'s' * (nfe > 1)}" for nfe in results.nfe)], rows)


def pairings(results: Results) -> dict[str, str]:
    """Return all ways of pairing and how they are named: those of the suites, then other methods on record."""
    return PAIRINGS | {name: name for name in results.frechet.index.unique("pairing") if name not in PAIRINGS}


def final_table(results: Results) -> str:
    """Distances at the end of training: a row per arm that was trained as long as the plain coupling."""
    rows, named = [], pairings(results)
    for kind, last in results.last.items():
        for pairing in (pairing for pairing in named if last in results.shared(kind, pairing)):
            cells = [spread(results.at(kind, pairing, nfe, last)) for nfe in results.nfe]
            rows.append([KINDS[kind] if pairing == BASE else "", named[pairing], *cells])
    return _table(results, ["", "noise"], rows)


def change_table(results: Results) -> str:
    """Change by coupling along training; by other couplings, at the end of theirs, which may be shorter."""
    rows, named = [], pairings(results)
    for kind in results.last:
        for pairing in named:
            steps = sorted(results.frechet.loc[kind].index.unique("step")) if pairing == OURS else []
            shared = results.shared(kind, pairing) if pairing not in (BASE, OURS) else set()
            for step in (*steps, *sorted(shared)[-1:]):
                cells = [percent(results.change(kind, nfe, step, pairing)) for nfe in results.nfe]
                rows.append([KINDS[kind], named[pairing], f"{step:,}", *cells])
    return _table(results, ["", "noise", "training steps"], rows)


def thresholds(results: Results) -> list[tuple[str, int, float, float | None, float | None]]:
    """Return kind, sampling steps, threshold, and the training steps of the baseline and of coupling to it."""
    found = []
    for kind, last in results.last.items():
        for nfe in results.nfe:
            curve = mean(results.frechet[kind, BASE, nfe]).loc[:last]
            if len(curve) > 1:
                best = (curve[curve.index <= part * last].min() for part in PARTS)
                for threshold in dict.fromkeys(value for value in best if not math.isnan(value)):
                    reached = (results.reach(kind, pairing, nfe, threshold) for pairing in (BASE, OURS))
                    found.append((kind, nfe, float(threshold), *reached))
    return found


def threshold_table(results: Results) -> str:
    """Training steps to fixed distances."""
    rows = []
    for kind, nfe, threshold, base, ours in thresholds(results):
        last = results.last[kind]
        first = [min(mean(results.frechet[kind, pairing, nfe]).index) for pairing in (BASE, OURS)]
        shown = [
            f"> {last:,}" if step is None else f"{'≤ ' if step == start else ''}{step:,.0f}"
            for step, start in zip((base, ours), first, strict=True)
        ]
        sign = "< " if ours is None else "≥ " if ours == first[1] else ""
        ratio = "" if base is None or base == first[0] else f"{sign}{base / (ours or last):.1f} x"
        rows.append([KINDS[kind], str(nfe), f"{threshold:.1f}", *shown, ratio])
    return markdown(["", "sampling steps", "Frechet distance", "independent", "coupled", "fewer by"], rows)


def levels(results: Results) -> pd.Series:
    """Return the explained share by arm, noise level and seed, at the end of training."""
    found = {
        (record["arm"], float(level), record["seed"]): value
        for record in results.of("levels")
        if record["step"] == results.last.get(arm_of(record["arm"])[0])
        for level, value in record["explained"].items()
    }
    return series(found, ("arm", "level", "seed"))


def level_table(results: Results) -> str:
    """Share of the clean image explained, by noise level."""
    table = levels(results).groupby(level=["arm", "level"]).mean().unstack().sort_index(axis=1, ascending=False)
    named = pairings(results)
    arms = [(kind, pairing) for kind in KINDS for pairing in named if f"{kind}-{pairing}" in table.index]
    rows = [[KINDS[k], named[p], *(f"{100 * value:.1f}%" for value in table.loc[f"{k}-{p}"])] for k, p in arms]
    return markdown(["", "noise", *(f"{level:g}" for level in table.columns)], rows)


def switched(results: Results, high: str, low: str, pairing: str) -> dict[int, pd.Series]:
    """Return distances by sampling steps, of one network for the noisier half of the levels and one for the rest."""
    fields = {"high": f"{high}-{pairing}", "low": f"{low}-{pairing}"}
    kind, fields = ("point", {"arm": fields["high"]}) if high == low else ("switched", fields)
    records = results.of(kind, step=results.last.get(low), **fields)
    steps = [nfe for nfe in results.nfe if nfe <= 20]
    return {n: pd.Series({r["seed"]: r["frechet"][str(n)] for r in records}, dtype=float) for n in steps}


def switched_table(results: Results) -> str:
    """Distances of samples that two networks share."""
    rows, head = [], ["noise", "noisier half", "cleaner half"]
    for pairing in PAIRINGS:
        for high, low in (("epsilon", "epsilon"), ("v", "epsilon"), ("epsilon", "v"), ("v", "v")):
            if results.of("switched", high=f"v-{pairing}", step=results.last.get("epsilon")):
                shared = switched(results, high, low, pairing)
                rows.append([PAIRINGS[pairing], high, low, *map(spread, shared.values())])
                columns = [f"{nfe} sampling steps" for nfe in shared]
    return markdown([*head, *columns], rows)


def coupling_table(results: Results) -> str:
    """Lay out what the couplings do to the data."""
    names = {"auction": "pixels", "auction-whitened": "whitened pixels", "auction-standardised": "standardised pixels"}
    rows = [
        [names[r["method"]], str(r["batch"]), f"{100 * r['reduction']:.1f}%", f"{100 * r['explained']:.1f}%"]
        + [f"{100 * r[f'top_{k}']:.0f}%" for k in (1, 10, 100)]
        for r in sorted(results.of("coupling"), key=lambda r: (r["method"], r["batch"]))
    ]
    head = ["cost on", "rows coupled together", "squared distance cut", "variance of the image that its noise explains"]
    return markdown([*head, *(f"of that, along the first {k}" for k in (1, 10, 100))], rows)


def cost_table(results: Results) -> str:
    """Lay out what the coupling did at the end of training, and what it took: means over seeds."""
    ends = [r for r in results.of("point") if r["step"] == results.last.get(arm_of(r["arm"])[0]) and "loss" in r]
    frame = pd.DataFrame(ends)
    frame["share"] = frame["coupling_ms"] / frame["step_ms"]
    means = frame.groupby("arm")[["reduction", "loss", "coupling_ms", "share"]].mean()
    rows = []
    for kind in KINDS:
        for pairing in (pairing for pairing in PAIRINGS if f"{kind}-{pairing}" in means.index):
            row = means.loc[f"{kind}-{pairing}"]
            shown = [
                f"{100 * row.reduction:.2f}%",
                f"{row.loss:.4f}",
                f"{row.coupling_ms:.2f}",
                f"{100 * row.share:.1f}%",
            ]
            rows.append([KINDS[kind], PAIRINGS[pairing], *shown])
    return markdown(["", "noise", "reduction", "loss", "ms of coupling", "share of a step"], rows)


def readme_table(results: Results) -> str:
    """Change by coupling at the end of training."""
    rows = [
        [f"{KINDS[kind]}, {last:,} training steps", *(percent(results.change(kind, n, last)) for n in results.nfe)]
        for kind, last in results.last.items()
    ]
    return markdown(["change of the Frechet distance by coupling, at sampling steps", *map(str, results.nfe)], rows)


_OF_A_SUITE: dict[str, Callable[[Results], str]] = {
    "place": lambda results: provenance(results.of("point")),
    "final": final_table,
    "change": change_table,
    "cost": cost_table,
}
TABLES: dict[str, Callable[[], str]] = {
    "training": lambda: readme_table(committed()),
    "training-thresholds": lambda: threshold_table(committed()),
    "training-couplings": lambda: coupling_table(committed()),
    "training-levels": lambda: level_table(committed()),
    "training-switched": lambda: switched_table(committed()),
    **{
        f"{suite}-{name}": lambda make=make, suite=suite: make(committed(suite))
        for suite in ("training", "training-digits")
        for name, make in _OF_A_SUITE.items()
    },
}


# -- pictures


def draw(folder: Path) -> None:
    """Draw curves of both suites, and what networks make of pure noise."""
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figures = {suite: _curves(committed(suite)) for suite in ("training", "training-digits")}
        figures["training-one-step"] = _one_step(committed("training-digits"))
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})


def _curves(results: Results) -> Any:
    """Draw distances over sampling steps, along training, and what the networks know of the image at each level."""
    from matplotlib.figure import Figure

    shares = levels(results)
    labels = ["Frechet distance\nat the end of training", f"Frechet distance\nat {ALONG} sampling steps"]
    labels += [] if shares.empty else ["share of the image's variance\nthat the network predicts"]
    figure = Figure(figsize=(1 + 3.4 * len(results.last), 3 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), len(results.last), squeeze=False, sharey="row")
    for column, (kind, last) in zip(panels.T, results.last.items(), strict=True):
        column[0].set_title(KINDS[kind], loc="left", fontsize=10, fontweight="bold")
        for pairing, color in COLORS.items():
            curves = [results.frechet[kind, pairing].xs(last, level="step"), results.frechet[kind, pairing, ALONG]]
            curves += [] if shares.empty else [shares[f"{kind}-{pairing}"]]
            for axes, values in zip(column, curves, strict=True):
                over = values.groupby(level=0).agg(["mean", "min", "max"])  # of the seeds
                axes.plot(over.index, over["mean"], "o-", color=color, lw=2, ms=4, label=f"{pairing} noise")
                axes.fill_between(over.index, over["min"], over["max"], color=color, alpha=0.25, lw=0)
        _label(*column, nfe=results.nfe)
    for axes, label in zip(panels[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    panels[0][0].legend(frameon=False)
    return figure


def _label(over: Any, along: Any, *shares: Any, nfe: list[int]) -> None:
    from matplotlib.ticker import LogFormatter, NullLocator

    over.set(xscale="log", yscale="log", xlabel="sampling steps")
    over.set_xticks(nfe, map(str, nfe))
    over.xaxis.set_minor_locator(NullLocator())
    along.set(yscale="log", xlabel="training steps")
    for axes in shares:
        axes.set(xlabel="noise level (1: pure noise)", ylim=(-0.3, 1))
        axes.axhline(0, color="#444a52", lw=0.8)
    for axes in (over, along):
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    for axes in (over, along, *shares):
        axes.grid(axis="y", which="both", color="#e6e8eb")
        axes.set_axisbelow(True)


def _one_step(results: Results) -> Any:
    """Show the x0 that each network predicts from the same pure noise, in one evaluation."""
    from matplotlib.figure import Figure
    from PIL import Image

    pictures = {record["arm"]: record for record in reversed(results.of("one step"))}  # of the first seed
    kinds = [kind for kind in KINDS if f"{kind}-{OURS}" in pictures]
    figure = Figure(figsize=(8, 1.8 * len(kinds)), layout="constrained")
    for row, kind in zip(figure.subplots(len(kinds), 2), kinds, strict=True):
        for axes, pairing in zip(row, (BASE, OURS), strict=True):
            record = pictures[f"{kind}-{pairing}"]
            axes.imshow(Image.open(io.BytesIO(base64.b64decode(record["png"]))), cmap="gray")
            axes.set_title(f"{KINDS[kind]}, {pairing}: spread {record['spread']:.2f}", fontsize=9)
            axes.set_axis_off()
    return figure
