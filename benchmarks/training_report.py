"""Page, plot and README block of the training benchmark, made from its records and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = ["Results", "block", "write"]

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
        self.steps = sorted({n for curve in self.curves.values() for n in curve})
        shared = {kind: self._shared_steps(kind, OURS) for kind in KINDS}
        self.kinds = [kind for kind, steps in shared.items() if steps]
        self.last = {kind: max(shared[kind]) for kind in self.kinds}

    def _shared_steps(self, kind: str, pairing: str) -> set[int]:
        """Return the training steps at which a way of pairing and its baseline were measured in full."""
        curves = [self.curves.get(f"{kind}-{name}", {}).get(n, {}) for name in (BASE, pairing) for n in self.steps]
        return set.intersection(*(set(curve) for curve in curves))

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """Return the records of a kind with the fields given."""
        fields["kind"] = kind
        return [r for r in self.records if all(r.get(key) == value for key, value in fields.items())]

    def pairings(self, kind: str) -> list[str]:
        """Return the ways of pairing that were trained with one prediction, as long as the coupled arm."""
        return [pairing for pairing in PAIRINGS if self.last[kind] in self._shared_steps(kind, pairing)]

    def trained(self, kind: str, pairing: str) -> int:
        """Return the most training steps at which a way of pairing can be compared; 0 if there are none."""
        return max(self._shared_steps(kind, pairing) & self._shared_steps(kind, OURS), default=0)

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
    percent = round(100 * change[0])
    text = f"{percent:+d}%" if percent else "0%"
    return text if change[1] else f"({text})"


def final_table(results: Results) -> str:
    """Distances at the end of training: a row per arm."""
    rows = []
    for kind in results.kinds:
        for pairing in results.pairings(kind):
            cells = [results.at(f"{kind}-{pairing}", n, results.last[kind]) for n in results.steps]
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
    """Change by other couplings, at the end of their training, which may be shorter than that of the plain one."""
    rows = []
    for kind in results.kinds:
        lasts = {pairing: results.trained(kind, pairing) for pairing in PAIRINGS if pairing not in (BASE, OURS)}
        for step in sorted({step for step in lasts.values() if step}):
            for pairing in (OURS, *(pairing for pairing, last in lasts.items() if last == step)):
                changes = [results.change(kind, n, step, pairing) for n in results.steps]
                rows.append([KINDS[kind], f"{step:,}", PAIRINGS[pairing], *map(_percent, changes)])
    return _table(["", "training steps", "noise", *(f"{n} steps" for n in results.steps)], rows) if rows else None


def thresholds(results: Results) -> list[tuple[str, int, float, float | None, float | None]]:
    """Return kind, sampling steps, threshold, and the training steps of the baseline and of coupling to it."""
    found = []
    for kind in results.kinds:
        for n in results.steps:
            curve = results.curves[f"{kind}-{BASE}"].get(n, {})
            curve = {step: fmean(seeds.values()) for step, seeds in curve.items() if step <= results.last[kind]}
            if len(curve) < 2:
                continue
            parts = [part * results.last[kind] for part in PARTS]
            best = [min((value for step, value in curve.items() if step <= part), default=None) for part in parts]
            for threshold in dict.fromkeys(value for value in best if value is not None):
                found.append((kind, n, threshold, *(results.reach(f"{kind}-{p}", n, threshold) for p in (BASE, OURS))))
    return found


def threshold_table(results: Results) -> str:
    """Training steps to fixed distances."""
    rows, before = [], ("", 0)
    for kind, n, threshold, base, ours in thresholds(results):
        last = results.last[kind]
        first = [min(results.curves[f"{kind}-{pairing}"][n]) for pairing in (BASE, OURS)]

        def shown(step: float | None, first: int, last: int = last) -> str:
            return f"> {last:,}" if step is None else f"{'≤ ' * (step == first)}{step:,.0f}"

        sign = "< " if ours is None else "≥ " if ours == first[1] else ""
        ratio = "" if base is None or base == first[0] else f"{sign}{base / (ours or last):.1f} x"
        name = KINDS[kind] if kind != before[0] else ""
        steps = str(n) if (kind, n) != before else ""
        rows.append([name, steps, f"{threshold:.1f}", shown(base, first[0]), shown(ours, first[1]), ratio])
        before = kind, n
    return _table(["", "sampling steps", "Frechet distance", "independent", "coupled", "fewer by"], rows)


def levels(results: Results) -> dict[str, dict[float, dict[int, float]]]:
    """Return the explained share by arm, noise level and seed, at the end of training."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for record in results.of("levels"):
        if record["step"] != results.last.get(record["arm"].split("-")[0]):
            continue
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
        if not results.of("switched", high=f"v-{pairing}", step=results.last.get("epsilon")):
            continue
        for high, low in (("epsilon", "epsilon"), ("v", "epsilon"), ("epsilon", "v"), ("v", "v")):
            found = _shared_sample(results, high, low, pairing)
            rows.append([PAIRINGS[pairing], high, low, *(_spread(found.get(n, {})) for n in steps)])
    return _table(["noise", "noisier half", "cleaner half", *(f"{n} steps" for n in steps)], rows)


def _shared_sample(results: Results, high: str, low: str, pairing: str) -> dict[int, dict[int, float]]:
    """Return distances by sampling steps and seed, of one network for the noisier half and one for the rest."""
    step = results.last.get(low)
    records = results.of("switched", high=f"{high}-{pairing}", low=f"{low}-{pairing}", step=step)
    if high == low:
        records = results.of("point", arm=f"{high}-{pairing}", step=step)
    found: dict[int, dict[int, float]] = {}
    for record in records:
        for n, value in record["frechet"].items():
            found.setdefault(int(n), {})[record["seed"]] = value
    return found


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
        shares = levels(results)
        rows = 3 if shares else 2
        figure, panels = plt.subplots(
            rows,
            len(results.kinds),
            figsize=(width, 3 * rows),
            dpi=120,
            squeeze=False,
            sharey="row",
            layout="constrained",
        )
        for column, kind in enumerate(results.kinds):
            panels[0][column].set_title(KINDS[kind], loc="left", fontsize=12, fontweight="bold")
            for pairing, color in COLORS.items():
                arm = f"{kind}-{pairing}"
                over = {n: results.at(arm, n, results.last[kind]) for n in results.steps}
                _band(panels[0][column], over, color, pairing)
                along = results.curves[arm].get(ALONG) or results.curves[arm][results.steps[0]]
                _band(panels[1][column], along, color, pairing)
                if shares:
                    _band(panels[2][column], shares.get(arm, {}), color, pairing)
            _label(panels[:, column], results)
        panels[0][0].set_ylabel("Frechet distance\nat the end of training")
        panels[1][0].set_ylabel(f"Frechet distance\nat {ALONG} sampling steps")
        if shares:
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

    over, along, *shares = column
    over.set(xscale="log", yscale="log", xlabel="sampling steps")
    over.set_xticks(results.steps, [str(n) for n in results.steps])
    over.xaxis.set_minor_locator(NullLocator())
    along.set(yscale="log", xlabel="training steps")
    for axes in shares:
        axes.set(xlabel="noise level (1: pure noise)", ylim=(-0.3, 1))
        axes.axhline(0, color="#444a52", lw=0.8)
    for axes in (over, along):
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in column:
        axes.grid(axis="y", which="both", color="#e6e8eb")
        axes.set_axisbelow(True)


# -- sentences


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _balance(results: Results, kind: str) -> str:
    """Say how often coupling is better along training, and by how much in the end."""
    arms = [results.curves[f"{kind}-{pairing}"] for pairing in (BASE, OURS)]
    cells = [(n, step) for n in results.steps for step in arms[0].get(n, {}) if step in arms[1].get(n, {})]
    changes = {cell: change for cell in cells if (change := results.change(kind, *cell))}
    better = sum(agreed and change < 0 for change, agreed in changes.values())
    worse = sum(agreed and change >= 0 for change, agreed in changes.values())
    split = len(changes) - better - worse
    last = results.last[kind]
    seeds = max(len(results.at(f"{kind}-{OURS}", n, last)) for n in results.steps)
    at_end = {n: changes[n, last] for n in results.steps if (n, last) in changes}
    ends = _listed([f"{_percent(change)} at {n}" for n, change in at_end.items()])
    return (
        f"**{KINDS[kind]}** (seeds: {seeds}): after {last:,} training steps coupling changes the distance by {ends} "
        f"sampling steps. Of {len(changes)} measurements along training it is better in {better} and worse in {worse}"
        + (f"; in {split} the seeds disagree." if split else ".")
    )


def findings(results: Results) -> list[str]:
    """Return what the records show, as sentences."""
    found = [_balance(results, kind) for kind in results.kinds]
    shares = {
        arm: {level: fmean(seeds.values()) for level, seeds in by_level.items()}
        for arm, by_level in levels(results).items()
    }
    alone = {(r["method"], r["batch"]): r["explained"] for r in results.of("coupling")}
    known = {kind: shares[arm][1.0] for kind in KINDS if 1.0 in shares.get(arm := f"{kind}-{OURS}", {})}
    if ("auction", 128) in alone and known:
        parts = [f"{100 * value:.0f}% ({KINDS[kind]})" for kind, value in known.items()]
        found.append(
            f"**What coupling offers** is that noise tells something of its image: {100 * alone['auction', 128]:.0f}% "
            "of the images' variance, linearly, before any signal is mixed in. From pure noise the coupled networks "
            f"explain {_listed(parts)}. Below zero, the mean image would have been the better answer."
        )
    if ("auction", 128) in alone:
        sizes = sorted(batch for method, batch in alone if method == "auction")
        parts = [f"{100 * alone['auction', batch]:.0f}% with {batch:,}" for batch in sizes]
        found.append(f"**The rows coupled together**: the more, the more their noise tells: {_listed(parts)}.")
    if alone.get(("auction-whitened", 128), 1.0) < alone.get(("auction", 128), 0.0):
        found.append(
            f"**A cost on whitened pixels** leaves {100 * alone['auction-whitened', 128]:.0f}% instead of "
            f"{100 * alone['auction', 128]:.0f}%: coupling is worth most along the few directions in which images "
            "differ most, and whitening takes it away from there."
        )
    return found + [sentence for sentence in (_weights(results), _exchange(results)) if sentence]


def _weights(results: Results) -> str | None:
    """Say whether the weights of the loss alone turn what v prediction gains into what epsilon prediction loses."""
    kinds = ("v", "weighted", "epsilon")
    if not set(kinds) <= set(results.kinds):
        return None
    steps = [n for n in results.steps if 10 <= n <= 20]
    changes = {kind: [results.change(kind, n, results.last[kind]) for n in steps] for kind in kinds}
    v, weighted, epsilon = ([change[0] if change else 0.0 for change in changes[kind]] for kind in kinds)
    if not (max(v) < 0 < min(weighted) and min(epsilon) > 0):
        return None
    told = [
        f"{_listed([f'{_percent(change)} at {n}' for n, change in zip(steps, changes[kind], strict=True)])} {text}"
        for kind, text in (
            ("v", "sampling steps with its own weights"),
            ("weighted", "with epsilon's, SNR / (SNR + 1), which all but leave out the noisiest levels"),
            ("epsilon", "with epsilon prediction itself"),
        )
    ]
    return f"**It is the weight of the loss, not what is predicted**: v prediction changes by {'; '.join(told)}."


def _exchange(results: Results) -> str | None:
    """Say what coupling changes in samples of the epsilon network, alone and with help in the noisier half."""
    changes: dict[str, list[str]] = {}
    steps: list[int] = []
    for high in ("epsilon", "v"):
        base, ours = (_shared_sample(results, high, "epsilon", pairing) for pairing in (BASE, OURS))
        if high == "epsilon":
            steps = [n for n in results.steps if n <= 20]
        for n in steps:
            seeds = base.get(n, {}).keys() & ours.get(n, {}).keys()
            if not seeds:
                return None
            change = fmean(ours[n][seed] for seed in seeds) / fmean(base[n][seed] for seed in seeds) - 1
            changes.setdefault(high, []).append(f"{_percent((change, True))} at {n}")
    return (
        f"**Which half of the steps it is**: by coupling, samples of the epsilon network change by "
        f"{_listed(changes['epsilon'])} sampling steps. Let the v network of the same pairing take the noisier half of "
        f"the steps and the same epsilon network the rest, and they change by {_listed(changes['v'])}."
    )


def page(results: Results) -> str:
    """Return the whole page."""
    sections = [
        ("At the end of training", final_table(results), "Mean over seeds (lowest to highest)."),
        (
            "Change by coupling, along training",
            change_table(results),
            "Of the mean over seeds; in brackets where the seeds do not agree which is better.",
        ),
        (
            "Training steps to fixed distances",
            threshold_table(results),
            "A threshold is the best that the baseline's mean curve has been at by "
            f"{_listed([f'{part:.0%}' for part in PARTS])} of the training; between checkpoints a curve is a "
            "straight line. `>`: not reached; `≤`: at the first "
            "checkpoint already.",
        ),
        ("Other couplings", variant_table(results), "Change of the mean against independent noise."),
        (
            "What the coupling does to the images",
            coupling_table(results),
            "`explained`: the sum over principal directions of the squared correlation of image and noise, weighted "
            "by the images' variance along them.",
        ),
        (
            "What the networks predict of the image, by noise level",
            level_table(results),
            "Share of the images' variance that the clean image implied by the network's answer explains, on pairs as "
            "in training. 1 is pure noise.",
        ),
        (
            "Two networks for one sample",
            switched_table(results),
            "Frechet distance when one network takes the sampling steps of the noisier half of the levels and another "
            "the rest.",
        ),
    ]
    parts = ["# Training with and without coupling", "", *_setting(results), "", "![Curves](training.png)", ""]
    parts += ["## What it shows", "", *(f"- {sentence}" for sentence in findings(results)), ""]
    for title, table, note in sections:
        if table:
            parts += [f"## {title}", "", note, "", table, ""]
    return "\n".join(parts)


def _setting(results: Results) -> list[str]:
    record = results.points[-1]
    settings, here = record["settings"], record["environment"]
    train, optimizer = settings["train"], settings["optimizer"]
    lines = [
        "Written by `python -m benchmarks.training`; do not edit. Lower is better everywhere. A network of "
        f"{settings['model']['name']} blocks, patches of {settings['model']['patch_size']} pixels, width "
        f"{settings['model']['width']}, depth {settings['model']['depth']}; batches of {train['global_batch_size']}, "
        f"{optimizer['name']} at a constant {optimizer['lr']:g}, averaged weights. The distance is the Frechet "
        f"distance of {settings['evaluate']['samples']:,} samples to all images, in the features of a small classifier "
        "trained on the same images."
    ]
    real = results.of("real")
    if real:
        lines[0] += f" {real[-1]['samples']:,} real images are at {real[-1]['frechet']:.1f}."
    dates = sorted(r["environment"]["date"][:10] for r in results.points)
    commits = sorted({r["environment"]["commit"] for r in results.points})
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    hardware = here["hardware"]
    return [
        *lines,
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores, one thread a process, beside other work: times are not "
        f"comparable. Python {here['python']}, {versions}. Commit {', '.join(commits)}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
    ]


def block(results: Results) -> str:
    """Return the lines for the README."""
    head = ["change of the Frechet distance by coupling, at sampling steps", *(str(n) for n in results.steps)]
    rows = [
        [
            f"{KINDS[kind]}, {results.last[kind]:,} training steps",
            *(_percent(results.change(kind, n, results.last[kind])) for n in results.steps),
        ]
        for kind in results.kinds
    ]
    return _table(head, rows)


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
