"""Tables and plots of what `benchmarks.pools` recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from .record import RESULTS, Record, markdown, provenance, read
from .training_tables import percent, series, spread

__all__ = ["TABLES", "Results", "committed", "draw"]

OBJECTIVES = {
    "flow": "Flow matching",
    "flow-noisier": "Flow matching at noisier times",
    "v": "DDIM, v prediction",
    "image": "DDIM, image prediction",
    "ct": "as published",
    "ict": "improved",
    "ict-levels": "improved, noisier levels",
    "ict-weights": "improved, all levels weighted alike",
}
PAIRINGS = {
    "independent": "independent",
    "nearest-l2": "nearest, k = 4, l2 (selects)",
    "nearest-dot": "nearest, k = 4, dot (selects)",
    "batch": "exact, 128 rows",
    "batch-l2": "exact, 128 rows, l2",
    "persistent": "persistent, 4 seeds a row",
    "window": "exact, 2,048 rows",
    "semidiscrete": "semidiscrete",
}
BASE = "independent"
COLORS = dict(
    zip(
        PAIRINGS,
        ("#8a8f98", "#c9a227", "#8f6b00", "#4f9d69", "#9bc7a8", "#7b5ea7", "#2e73b8", "#d1495b"),
        strict=True,
    )
)
DENOISED = "data at"
ABSENT = "Not measured yet: `python -m benchmarks.pools`."


class Results:
    """Records of one study.

    Attributes
    ----------
    frechet : Series
        Distances by ``objective, pairing, way, step, seed``; ``way`` is how samples were drawn, such as the number of
        steps, and ``step`` counts training steps. NaN where a sample was not finite.
    ways, denoised : list of str
        Of sampling; and the levels from which data was denoised.
    steps : list of int
    last : int
        Training steps at the end.

    Raises
    ------
    ValueError
        If one objective was trained with different settings.
    """

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        known: dict[str, Any] = {}
        for record in records:
            if known.setdefault(record["objective"], record["settings"]) != record["settings"]:
                msg = f"{record['objective']} is on record with different settings: delete the older ones"
                raise ValueError(msg)
        names = ("objective", "pairing", "way", "step", "seed")
        self.frechet = series(
            {
                (r["objective"], r["pairing"], way, r["step"], r["seed"]): float("nan") if value is None else value
                for r in records
                for way, value in r["frechet"].items()
            },
            names,
        )
        ways = dict.fromkeys(way for record in records for way in record["frechet"])
        self.ways = [way for way in ways if not way.startswith(DENOISED)]
        self.denoised = [way for way in ways if way.startswith(DENOISED)]
        self.steps = sorted(self.frechet.index.unique("step"))
        self.last = self.steps[-1]

    def pairs(self, step: int | None = None) -> list[tuple[str, str]]:
        """Objectives and pairings that were measured after so many steps, the last by default."""
        there = self.frechet.xs(step or self.last, level="step").index
        known = set(zip(there.get_level_values(0), there.get_level_values(1), strict=True))
        return [
            (objective, pairing) for objective in OBJECTIVES for pairing in PAIRINGS if (objective, pairing) in known
        ]

    def at(self, objective: str, pairing: str, way: str, step: int | None = None) -> pd.Series:
        """Return distances by seed."""
        try:
            return self.frechet[objective, pairing, way, step or self.last]
        except KeyError:
            return pd.Series(dtype=float)

    def change(self, objective: str, pairing: str, way: str, step: int | None = None) -> tuple[float, bool] | None:
        """Return the change relative to independent noise over the seeds that both have, and whether all agree."""
        arms = [self.at(objective, name, way, step) for name in (BASE, pairing)]
        both = pd.concat(arms, axis=1, join="inner").dropna()
        if both.empty:
            return None
        base, ours = both.mean()
        return ours / base - 1, (both[1] < both[0]).nunique() == 1


@cache
def committed(study: str) -> Results | None:
    """Return the results that are part of the repository; None before there are any."""
    records = read(RESULTS / f"{study}.jsonl")
    return Results(records) if records else None


# -- tables


def _rows(
    results: Results, cells: Callable[[str, str], list[str]], keep: Callable[[str, str], bool] = lambda *_: True
) -> list[list[str]]:
    rows, before = [], None
    for objective, pairing in (arm for arm in results.pairs() if keep(*arm)):
        title = OBJECTIVES[objective] if objective != before else ""
        rows.append([title, PAIRINGS[pairing], *cells(objective, pairing)])
        before = objective
    return rows


def final_table(results: Results) -> str:
    """Distances at the end of training: mean over seeds, lowest to highest."""
    return _distances(results, results.ways)


def denoised_table(results: Results) -> str:
    """Distances of data that was denoised from a level in one step."""
    return _distances(results, results.denoised)


def _distances(results: Results, ways: list[str]) -> str:
    rows = _rows(results, lambda *arm: [spread(results.at(*arm, way).dropna()) for way in ways])
    return markdown(["", "noise", *ways], rows)


def changes(results: Results, objective: str, pairing: str) -> list[str]:
    """Return the changes relative to independent noise, the best of each way of sampling in bold."""
    cells = []
    for way in results.ways:
        found = {name: results.change(kind, name, way) for kind, name in results.pairs() if kind == objective}
        text = percent(found[pairing])
        best = min((change[0] for change in found.values() if change), default=0.0)
        chosen = found[pairing] and found[pairing][0] == best < 0
        cells.append(f"**{text}**" if chosen else text)
    return cells


def change_table(results: Results) -> str:
    """Lay out the changes of all objectives."""
    return markdown(["", "noise", *results.ways], _rows(results, partial(changes, results), _coupled))


def along_table(results: Results) -> str:
    """Distances along training, sampled in the first way."""
    way = results.ways[0]
    rows = _rows(results, lambda *arm: [spread(results.at(*arm, way, step).dropna()) for step in results.steps])
    return markdown(["", "noise", *(f"{step:,}" for step in results.steps)], rows)


def longer_table(results: Results) -> str:
    """Lay out, along training, the distances of independent noise and the changes of the others."""

    def cell(objective: str, pairing: str, way: str, step: int) -> str:
        if pairing == BASE:
            return spread(results.at(objective, pairing, way, step).dropna())
        return percent(results.change(objective, pairing, way, step))

    rows = [
        [way, PAIRINGS[pairing], *(cell(objective, pairing, way, step) for step in results.steps)]
        for way in results.ways
        for objective, pairing in results.pairs()
    ]
    return markdown(["sampling steps", "noise", *(f"{step:,}" for step in results.steps)], rows)


def renoised_table(results: Results) -> str:
    """Lay out samples in two steps: by what was added between them, and at which level."""
    one, *two = results.ways
    apart = {way: way.removeprefix("2, ").split(" at ") for way in two}
    kinds, levels = (list(dict.fromkeys(parts)) for parts in zip(*apart.values(), strict=True))

    def row(objective: str, pairing: str, kind: str) -> list[str]:
        cells = [spread(results.at(objective, pairing, f"2, {kind} at {level}").dropna()) for level in levels]
        first = kind == kinds[0]
        alone = spread(results.at(objective, pairing, one).dropna())
        return [PAIRINGS[pairing] if first else "", alone if first else "", kind, *cells]

    rows = [row(*arm, kind) for arm in results.pairs() for kind in kinds]
    return markdown(["noise", "one step", "added", *(f"two, level {level}" for level in levels)], rows)


def pairs_table(results: Results) -> str:
    """Lay out how near the pairs were."""
    frame = pd.DataFrame(results.records)
    means = frame.groupby("pairing")["distance"].mean()
    chi2 = frame.groupby("pairing")["chi2"].max()
    rows = [
        [title, f"{means[name]:.1f}", "" if pd.isna(chi2[name]) else f"{chi2[name]:.3f}"]
        for name, title in PAIRINGS.items()
        if name in means.index
    ]
    return markdown(["noise", "mean squared distance of the pairs", "chi^2"], rows)


def readme_table(results: Results) -> str:
    """Lay out the changes of flow matching, and those of DDIM by the batch and by the whole dataset."""

    def keep(objective: str, pairing: str) -> bool:
        return _coupled(objective, pairing) and (objective == "flow" or pairing in ("batch", "semidiscrete"))

    return markdown(["at sampling steps", "noise", *results.ways], _rows(results, partial(changes, results), keep))


def _coupled(objective: str, pairing: str) -> bool:
    return pairing != BASE


def _table(study: str, make: Callable[[Results], str]) -> str:
    results = committed(study)
    return ABSENT if results is None else make(results)


_OF_A_STUDY: dict[str, Callable[[Results], str]] = {
    "place": lambda results: provenance(results.records),
    "final": final_table,
    "change": change_table,
    "along": along_table,
    "denoised": denoised_table,
    "pairs": pairs_table,
}
TABLES: dict[str, Callable[[], str]] = {
    "pools": partial(_table, "pools", readme_table),
    **{
        f"{study}-{name}": partial(_table, study, make)
        for study in ("pools", "begun", "consistency")
        for name, make in _OF_A_STUDY.items()
    },
    **{study: partial(_table, study, longer_table) for study in ("longer", "noisier")},
    "renoised": partial(_table, "renoised", renoised_table),
    **{f"{study}-place": partial(_table, study, _OF_A_STUDY["place"]) for study in ("longer", "noisier", "renoised")},
}


# -- pictures


def draw(folder: Path) -> None:
    """Draw both studies, as far as they are on record."""
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        for study, picture in (("pools", over_steps), ("consistency", along)):
            results = committed(study)
            if results is not None:
                picture(results).savefig(folder / f"{study}.png", dpi=120, metadata={"Software": None})


def over_steps(results: Results) -> Any:
    """Draw distances over sampling steps, and below them relative to independent noise."""
    ways = [way for way in results.ways if way.isdigit()]
    figure, panels = _panels(results, 2)
    for column, objective in zip(panels.T, _objectives(results), strict=True):
        for pairing in (pairing for kind, pairing in results.pairs() if kind == objective):
            by_way = pd.DataFrame({int(way): results.at(objective, pairing, way) for way in ways})
            base = pd.DataFrame({int(way): results.at(objective, BASE, way) for way in ways})
            for axes, values in zip(column, (by_way, by_way / base), strict=True):
                _line(axes, values, pairing)
        for axes in column:
            axes.set(xscale="log", yscale="log", xlabel="sampling steps")
            axes.set_xticks(list(map(int, ways)), ways, minor=False)
            axes.minorticks_off()
        column[1].axhline(1, color="#444a52", lw=0.8)
        column[1].set_yticks([0.3, 0.5, 0.7, 1, 1.3], ["0.3", "0.5", "0.7", "1", "1.3"])
        column[0].set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1000", "2000"])
    panels[0][0].set_ylabel("Frechet distance")
    panels[1][0].set_ylabel("relative to independent noise")
    _legend(figure, panels)
    return figure


def along(results: Results) -> Any:
    """Draw distances of samples in one step along training."""
    figure, panels = _panels(results, 1)
    for axes, objective in zip(panels[0], _objectives(results), strict=True):
        for pairing in (pairing for kind, pairing in results.pairs() if kind == objective):
            _line(axes, results.frechet[objective, pairing, results.ways[0]].unstack("step"), pairing)
        axes.set(yscale="log", xlabel="training steps")
        axes.set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1000", "2000"])
        axes.minorticks_off()
    panels[0][0].set_ylabel("Frechet distance, one step")
    _legend(figure, panels)
    return figure


def _objectives(results: Results) -> list[str]:
    return list(dict.fromkeys(objective for objective, _ in results.pairs()))


def _panels(results: Results, rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    objectives = _objectives(results)
    figure = Figure(figsize=(1 + 3.6 * len(objectives), 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, len(objectives), squeeze=False, sharey="row")
    for axes, objective in zip(panels[0], objectives, strict=True):
        axes.set_title(OBJECTIVES[objective], loc="left", fontsize=10, fontweight="bold")
    for axes in panels.flat:
        axes.grid(axis="y", color="#e6e8eb")
        axes.set_axisbelow(True)
    return figure, panels


def _legend(figure: Any, panels: Any) -> None:
    lines = {line.get_label(): line for line in panels[0][0].get_lines() if line.get_label() in PAIRINGS.values()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)


def _line(axes: Any, by_seed: pd.DataFrame, pairing: str) -> None:
    """Draw the mean of the seeds, which are rows, and their span."""
    color = COLORS[pairing]
    axes.plot(by_seed.columns, by_seed.mean(), "o-", color=color, lw=1.5, ms=3, label=PAIRINGS[pairing])
    axes.fill_between(by_seed.columns, by_seed.min(), by_seed.max(), color=color, alpha=0.2, lw=0)
