"""Page, plot and README block of the training benchmark, made from its records and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = ["write"]

KINDS = {
    "v": "DDIM, v prediction",
    "epsilon": "DDIM, epsilon prediction",
    "image": "DDIM, image prediction",
    "flow": "Flow matching",
}
PAIRINGS = {
    "independent": "independent",
    "coupled": "coupled",
    "whitened": "coupled, cost on whitened pixels",
    "of32": "coupled, 32 rows at a time",
}
BASE, OURS = "independent", "coupled"
PARTS = (0.5, 0.75, 1.0)  # of the baseline's training: where the thresholds are read off its curve

Record = dict[str, Any]
Curve = dict[int, dict[int, dict[int, float]]]  # distances by sampling steps, training step and seed


class Results:
    """The records, sorted.

    Parameters
    ----------
    records : list of dict

    Raises
    ------
    ValueError
        If there is none, or one arm was run with different settings.
    """

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.points = self.of("point")
        if not self.points:
            msg = "no record of a training run: run python -m benchmarks.training --data DIR first"
            raise ValueError(msg)
        self.settings: dict[str, Record] = {}
        self.curves: dict[str, Curve] = {}
        for record in self.points:
            arm = record["arm"]
            known = self.settings.setdefault(arm, _seedless(record["settings"]))
            if known != _seedless(record["settings"]):
                msg = f"{arm} is on record with different settings: choose another --output, or delete older records"
                raise ValueError(msg)
            for steps, value in record["frechet"].items():
                at = self.curves.setdefault(arm, {}).setdefault(int(steps), {}).setdefault(record["step"], {})
                at[record["seed"]] = value
        self.last = max(record["step"] for record in self.points)
        self.kinds = [kind for kind in KINDS if {f"{kind}-{BASE}", f"{kind}-{OURS}"} <= self.curves.keys()]
        self.steps = sorted({n for curve in self.curves.values() for n in curve})

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """Return the records of a kind with the fields given."""
        fields["kind"] = kind
        return [r for r in self.records if all(r.get(key) == value for key, value in fields.items())]

    def pairings(self, kind: str) -> list[str]:
        """Return the ways of pairing that were trained with one prediction."""
        return [pairing for pairing in PAIRINGS if f"{kind}-{pairing}" in self.curves]

    def at(self, arm: str, steps: int, step: int) -> dict[int, float]:
        """Return the distances by seed."""
        return self.curves[arm].get(steps, {}).get(step, {})

    def change(self, kind: str, steps: int, step: int, pairing: str = OURS) -> tuple[float, bool] | None:
        """Return the relative change by coupling over the seeds that both have, and whether all agree in its sign."""
        base, ours = self.at(f"{kind}-{BASE}", steps, step), self.at(f"{kind}-{pairing}", steps, step)
        seeds = base.keys() & ours.keys()
        if not seeds:
            return None
        signs = {ours[seed] < base[seed] for seed in seeds}
        mean = fmean(ours[seed] for seed in seeds) / fmean(base[seed] for seed in seeds) - 1
        return mean, len(signs) == 1

    def reach(self, arm: str, steps: int, threshold: float) -> float | None:
        """Return the training steps after which the mean curve first reaches a threshold, None if it never does.

        Between two checkpoints the curve is a straight line.
        """
        before: tuple[int, float] | None = None
        for step, values in sorted(self.curves[arm].get(steps, {}).items()):
            value = fmean(values.values())
            if value <= threshold:
                if before is None:
                    return step
                return before[0] + (step - before[0]) * (before[1] - threshold) / (before[1] - value)
            before = step, value
        return None


def _seedless(settings: Record) -> Record:
    return {**settings, "train": {key: value for key, value in settings["train"].items() if key != "seed"}}


# -- tables


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: dict[int, float]) -> str:
    if not values:
        return ""
    mean = f"{fmean(values.values()):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values.values()):.1f} to {max(values.values()):.1f})"


def _percent(change: tuple[float, bool] | None) -> str:
    if change is None:
        return ""
    text = f"{100 * change[0]:+.0f}%"
    return text if change[1] else f"({text})"


def final_table(results: Results) -> str:
    """Distances at the end of training: a row per arm."""
    rows = []
    for kind in results.kinds:
        for pairing in results.pairings(kind):
            cells = [results.at(f"{kind}-{pairing}", n, results.last) for n in results.steps]
            seeds = max(len(cell) for cell in cells)
            rows.append([KINDS[kind] if pairing == BASE else "", PAIRINGS[pairing], str(seeds), *map(_spread, cells)])
    return _table(["", "noise", "seeds", *(f"{n} steps" for n in results.steps)], rows)


def change_table(results: Results) -> str:
    """Change by coupling along training."""
    rows = []
    for kind in results.kinds:
        steps = sorted({step for n in results.steps for step in results.curves[f"{kind}-{OURS}"].get(n, {})})
        for i, step in enumerate(steps):
            cells = [_percent(results.change(kind, n, step)) for n in results.steps]
            rows.append(["" if i else KINDS[kind], f"{step:,}", *cells])
    return _table(["", "training steps", *(f"{n} sampling steps" for n in results.steps)], rows)


def variant_table(results: Results) -> str | None:
    """Change by other couplings, at the end of training."""
    rows = [
        [KINDS[kind], PAIRINGS[pairing]]
        + [_percent(results.change(kind, n, results.last, pairing)) for n in results.steps]
        for kind in results.kinds
        if len(results.pairings(kind)) > 2
        for pairing in results.pairings(kind)
        if pairing != BASE
    ]
    return _table(["", "noise", *(f"{n} steps" for n in results.steps)], rows) if rows else None


def thresholds(results: Results) -> list[tuple[str, int, float, float | None, float | None]]:
    """Return kind, sampling steps, threshold, and the training steps of the baseline and of coupling to it."""
    found = []
    for kind in results.kinds:
        for n in results.steps:
            curve = results.curves[f"{kind}-{BASE}"].get(n, {})
            for part in PARTS:
                step = part * results.last
                if step in curve:
                    threshold = fmean(curve[int(step)].values())
                    reached = [results.reach(f"{kind}-{pairing}", n, threshold) for pairing in (BASE, OURS)]
                    found.append((kind, n, threshold, *reached))
    return found


def threshold_table(results: Results) -> str:
    """Training steps to fixed distances."""

    def shown(steps: float | None) -> str:
        return f"> {results.last:,}" if steps is None else f"{steps:,.0f}"

    rows, before = [], ("", 0)
    for kind, n, threshold, base, ours in thresholds(results):
        ratio = "" if base is None or ours is None else f"{base / ours:.1f} x"
        name = KINDS[kind] if kind != before[0] else ""
        steps = str(n) if (kind, n) != before else ""
        rows.append([name, steps, f"{threshold:.1f}", shown(base), shown(ours), ratio])
        before = kind, n
    return _table(["", "sampling steps", "Frechet distance", "independent", "coupled", "fewer by"], rows)


def levels(results: Results) -> dict[str, dict[float, dict[int, float]]]:
    """Return the explained share by arm, noise level and seed."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for record in results.of("levels"):
        for level, value in record["explained"].items():
            found.setdefault(record["arm"], {}).setdefault(float(level), {})[record["seed"]] = value
    return found


def level_table(results: Results) -> str | None:
    """Share of the clean image explained, by noise level."""
    found = levels(results)
    arms = [f"{kind}-{pairing}" for kind in KINDS for pairing in PAIRINGS if f"{kind}-{pairing}" in found]
    if not arms:
        return None
    columns = sorted({level for arm in arms for level in found[arm]}, reverse=True)
    rows = []
    for arm in arms:
        kind, pairing = arm.split("-")
        cells = [fmean(found[arm][level].values()) for level in columns]
        rows.append([KINDS[kind], PAIRINGS[pairing], *(f"{100 * cell:.1f}%" for cell in cells)])
    return _table(["", "noise", *(f"{level:g}" for level in columns)], rows)


def switched_table(results: Results) -> str | None:
    """Distances of samples that two networks share."""
    records = results.of("switched")
    if not records:
        return None
    steps = sorted({int(n) for record in records for n in record["frechet"]})
    rows = []
    for pairing in PAIRINGS:
        if not results.of("switched", high=f"v-{pairing}"):
            continue
        for high, low in (("epsilon", "epsilon"), ("v", "epsilon"), ("epsilon", "v"), ("v", "v")):
            mine = results.of("switched", high=f"{high}-{pairing}", low=f"{low}-{pairing}")
            cells = [
                results.at(f"{high}-{pairing}", n, results.last)
                if high == low
                else {record["seed"]: record["frechet"][str(n)] for record in mine}
                for n in steps
            ]
            rows.append([PAIRINGS[pairing], high, low, *map(_spread, cells)])
    return _table(["noise", "noisier half", "cleaner half", *(f"{n} steps" for n in steps)], rows)


def coupling_table(results: Results) -> str | None:
    """Lay out what the couplings do to the data."""
    records = results.of("coupling")
    if not records:
        return None
    names = {"auction": "pixels", "auction-whitened": "whitened pixels", "auction-standardised": "standardised pixels"}
    rows = [
        [names[r["method"]], str(r["batch"]), f"{100 * r['reduction']:.1f}%", f"{100 * r['explained']:.1f}%"]
        + [f"{100 * r[f'top_{k}']:.0f}%" for k in (1, 10, 100)]
        for r in sorted(records, key=lambda r: (r["method"], r["batch"]))
    ]
    head = ["cost on", "rows coupled together", "squared distance cut", "variance of the image that its noise explains"]
    return _table([*head, *(f"of that, along the first {k}" for k in (1, 10, 100))], rows)


COLORS = {BASE: "#8a8f98", OURS: "#d1495b"}
ALONG = 10  # sampling steps of the curves along training


def picture(results: Results, path: Path) -> None:
    """Draw distances over sampling steps, along training, and what the networks know of the image at each level."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "couplings"}
    with plt.rc_context(style):
        width = 1 + 3.4 * len(results.kinds)
        figure, panels = plt.subplots(
            3, len(results.kinds), figsize=(width, 9), dpi=120, squeeze=False, sharey="row", layout="constrained"
        )
        shares = levels(results)
        for column, kind in enumerate(results.kinds):
            panels[0][column].set_title(KINDS[kind], loc="left", fontsize=12, fontweight="bold")
            for pairing, color in COLORS.items():
                arm = f"{kind}-{pairing}"
                over = {n: results.at(arm, n, results.last) for n in results.steps}
                _band(panels[0][column], over, color, pairing)
                along = results.curves[arm].get(ALONG) or results.curves[arm][results.steps[0]]
                _band(panels[1][column], along, color, pairing)
                _band(panels[2][column], shares.get(arm, {}), color, pairing)
            _label(panels[:, column], results)
        panels[0][0].set_ylabel(f"Frechet distance\nafter {results.last:,} training steps")
        panels[1][0].set_ylabel(f"Frechet distance\nat {ALONG} sampling steps")
        panels[2][0].set_ylabel("share of the image's variance\nthat the network predicts")
        panels[0][0].legend(frameon=False)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _band(axes: Any, values: dict[Any, dict[int, float]], color: str, name: str) -> None:
    """Draw the mean over seeds, and from the lowest to the highest."""
    found = sorted((x, by_seed) for x, by_seed in values.items() if by_seed)
    if not found:
        return
    x = [x for x, _ in found]
    axes.plot(
        x, [fmean(by_seed.values()) for _, by_seed in found], "o-", color=color, lw=2, ms=4, label=f"{name} noise"
    )
    low, high = zip(*((min(by_seed.values()), max(by_seed.values())) for _, by_seed in found), strict=True)
    axes.fill_between(x, low, high, color=color, alpha=0.25, lw=0)


def _label(column: Any, results: Results) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    over, along, shares = column
    over.set(xscale="log", yscale="log", xlabel="sampling steps")
    over.set_xticks(results.steps, [str(n) for n in results.steps])
    over.xaxis.set_minor_locator(NullLocator())
    along.set(yscale="log", xlabel="training steps")
    shares.set(xlabel="noise level (1: pure noise)", ylim=(-0.1, 1))
    for axes in (over, along):
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    shares.axhline(0, color="#444a52", lw=0.8)
    for axes in column:
        axes.grid(axis="y", which="both", color="#e6e8eb")
        axes.set_axisbelow(True)


def page(results: Results) -> str:
    """Return the whole page."""
    sections = [
        ("At the end of training", final_table(results)),
        ("Change by coupling, along training", change_table(results)),
        ("Training steps to fixed distances", threshold_table(results)),
        ("Other couplings", variant_table(results)),
        ("What the coupling does to the images", coupling_table(results)),
        ("What the networks know of the image, by noise level", level_table(results)),
        ("Two networks for one sample", switched_table(results)),
    ]
    return "\n".join(f"## {title}\n\n{table}\n" for title, table in sections if table)


def write(records: list[Record], folder: Path) -> list[Path]:
    """Write page and plot; return their paths: none before an arm and its baseline are on record."""
    results = Results(records)
    if not results.kinds:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training.md"
    path.write_text(page(results))
    picture(results, path.with_suffix(".png"))
    return [path, path.with_suffix(".png")]
