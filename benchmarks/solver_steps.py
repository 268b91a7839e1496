"""Record the steps of one solve, and draw them for the page on the solver: ``python -m benchmarks.solver_steps``.

What is recorded are counts, gaps and prices, which are the same on every machine up to the rounding of one matrix
product; no time is taken. ``--draw`` only draws, from the committed record.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from .instances import CROPS, Instance
from .record import RESULTS, ROOT, environment

RECORD = RESULTS / "solver-steps.json"
PICTURES = ROOT / "docs" / "pictures"
ROWS = 1024
SHOWN = 128  # of the sorted prices of a phase

Floats = npt.NDArray[np.float64]

INK, SKETCH, LISTS, PATHS, GREY = "#22577a", "#38a3a5", "#22577a", "#d1495b", "#8a8f98"


def watch(n: int) -> dict[str, Any]:
    """Solve crops of photographs against Gaussian noise, and return what happened in each step."""
    from couplings import kernels
    from couplings.kernels.assignment import bidding, paths, solver
    from couplings.kernels.assignment.tuning import TUNING

    cost = Instance.make(CROPS, n).cost
    searches: list[Any] = []
    phases: list[dict[str, Any]] = []
    freed: list[int] = []
    steps: list[dict[str, Any]] = []
    listed = np.zeros(n)  # prices that the lists are made at

    class Watched(solver.Search):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            searches.append(self)

    def after(where: str, epsilon: float, bids: int, free: int, prices: Floats) -> None:
        search = searches[-1]
        phases.append(
            {
                "where": where,
                "epsilon": epsilon / search.spread,
                "bids": bids,
                "free": free,
                "gap": gap(cost, search, prices),
                "prices": shown((prices - prices.min()) / search.spread),
            }
        )
        if where == "sketch":
            listed[:] = prices / search.costs.scale

    def on_sketch(
        sketch: Any, p: Any, row4col: Any, col4row: Any, free: Any, left: int, epsilon: int, most: int
    ) -> Any:
        found = originals["bid_on_sketch"](sketch, p, row4col, col4row, free, left, epsilon, most)
        costs = searches[-1].costs
        after("sketch", epsilon * costs.step, found[1], found[0], p * costs.step - costs.offset)
        return found

    def on_lists(costs: Any, prices: Any, *rest: Any) -> Any:
        found = originals["bid"](costs, prices, *rest)
        after("lists", rest[5], found[1], found[0], prices.exact)
        return found

    def free_loose(*arguments: Any) -> int:
        freed.append(int(originals["free_loose_rows"](*arguments)))
        return freed[-1]

    def step(name: str) -> Any:
        def run(*arguments: Any) -> Any:
            before = searches[-1].left
            found = originals[name](*arguments)
            left = int(found[0] if isinstance(found, tuple) else found)
            steps.append({"what": name, "before": int(before), "left": left})
            return found

        return run

    replaced = {
        "bid_on_sketch": (bidding, on_sketch),
        "bid": (bidding, on_lists),
        "free_loose_rows": (bidding, free_loose),
        "augment": (paths, step("augment")),
        "grow_forest": (paths, step("grow_forest")),
        "match_tight": (paths, step("match_tight")),
    }
    originals = {name: getattr(module, name) for name, (module, _) in replaced.items()}
    with ExitStack() as stack:
        for name, (module, function) in replaced.items():
            stack.enter_context(patch.object(module, name, function))
        stack.enter_context(patch.object(solver, "Search", Watched))
        solution = kernels.solve(cost)
    search = searches[-1]
    return {
        "n": n,
        "phases": phases,
        "freed": freed[-1],
        "paths": steps,
        "gap": solution.gap,
        "exact": solution.exact,
        "bids": solution.bids,
        "list_size": TUNING.list_size,
        "step": search.costs.step / search.spread,
        "places": places(cost, solution.index),
        "places_at_prices": places(cost + listed, solution.index),
    }


def gap(cost: Any, search: Any, prices: Floats) -> float | None:
    """Return the gap that prices prove of the matching, relative to its total; None while rows are free."""
    if search.col4row.min() < 0:
        return None
    p = prices / search.costs.scale
    total = float(cost[np.arange(len(cost)), search.col4row].astype(np.float64).sum())
    bound = float((cost + p).min(1).sum() - p.sum())
    return (total - bound) / abs(total)


def places(cost: Any, index: Any) -> list[int]:
    """Return how many columns of each row cost at most as much as its own, in order of size."""
    found: list[int] = np.sort((cost <= cost[np.arange(len(cost)), index][:, None]).sum(1)).tolist()
    return found


def shown(prices: Floats) -> list[float]:
    """Return some quantiles of the prices."""
    return [round(float(p), 4) for p in np.quantile(prices, np.linspace(0, 1, SHOWN))]


def pairs(n: int = 70) -> dict[str, Any]:
    """Pair two half moons with Gaussian noise, as they come and coupled."""
    import torch

    from couplings import couple

    generator = torch.Generator().manual_seed(3)
    angle = torch.rand(n, generator=generator) * torch.pi
    moons = torch.stack([angle.cos(), angle.sin()], 1)
    moons[n // 2 :] = torch.tensor([1.0, 0.4]) - moons[n // 2 :]
    data = 1.6 * (moons - torch.tensor([0.5, 0.2])) + 0.08 * torch.randn(n, 2, generator=generator)
    noise = torch.randn(n, 2, generator=generator)
    coupled = couple(data, noise)
    return {
        "data": data.tolist(),
        "independent": noise.tolist(),
        "coupled": coupled.noise.tolist(),
        "distance": {"independent": float(coupled.cost_before), "coupled": float(coupled.cost)},
    }


def draw(record: dict[str, Any], folder: Path) -> None:
    """Draw the pictures of the page."""
    import matplotlib as mpl

    with mpl.rc_context(
        {"svg.hashsalt": "couplings", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        for name, picture in (
            ("pairs", draw_pairs),
            ("phases", draw_phases),
            ("prices", draw_prices),
            ("places", draw_places),
        ):
            picture(record).savefig(folder / f"solver-{name}.svg", metadata={"Date": None, "Creator": None})


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def draw_pairs(record: dict[str, Any]) -> Any:
    """Draw the pairs of both couplings as lines."""
    figure = _figure(7, 3.4)
    data = np.array(record["pairs"]["data"])
    for axes, kind in zip(figure.subplots(1, 2), ("independent", "coupled"), strict=True):
        noise = np.array(record["pairs"][kind])
        for x, z in zip(data, noise, strict=True):
            axes.plot([x[0], z[0]], [x[1], z[1]], color=GREY, linewidth=0.7, zorder=1)
        axes.scatter(*noise.T, s=14, color=SKETCH, label="noise", zorder=2)
        axes.scatter(*data.T, s=14, color=PATHS, label="data", zorder=2)
        axes.set(title=f"{kind}: mean squared distance {record['pairs']['distance'][kind]:.2f}", xticks=[], yticks=[])
        axes.set_aspect("equal")
        for spine in axes.spines.values():
            spine.set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure


def draw_phases(record: dict[str, Any]) -> Any:
    """Draw bids and certified gap, phase by phase."""
    figure = _figure(7, 3.2)
    phases = [phase for phase in record["phases"] if phase["epsilon"] > 0]
    upper, lower = figure.subplots(1, 2)
    x = np.arange(len(phases))
    colours = [SKETCH if phase["where"] == "sketch" else LISTS for phase in phases]
    upper.bar(x, [phase["bids"] / record["n"] for phase in phases], color=colours)
    upper.bar([0], [0], color=SKETCH, label="on the sketch")
    upper.bar([0], [0], color=LISTS, label="on lists")
    upper.legend(frameon=False)
    upper.set(ylabel="bids for each row", title="work of each phase")
    gaps = [(i, phase["gap"]) for i, phase in enumerate(phases) if phase["gap"] is not None]
    lower.plot(*zip(*gaps, strict=True), color=GREY, zorder=1)
    lower.scatter(*zip(*gaps, strict=True), color=[colours[i] for i, _ in gaps], zorder=2)
    lower.set(yscale="log", ylabel="certified gap, of the total", title="distance from the optimum")
    for axes in (upper, lower):
        axes.set_xticks(x, [f"{phase['epsilon']:.2g}" for phase in phases])
        axes.set_xlabel("epsilon, in deviations of the cost")
    return figure


def draw_prices(record: dict[str, Any]) -> Any:
    """Draw the prices after each phase, in order of size."""
    figure = _figure(7, 3.2)
    axes = figure.subplots()
    phases = [phase for phase in record["phases"] if phase["epsilon"] > 0]
    share = np.linspace(0, 100, SHOWN)
    for i, phase in enumerate(phases):
        strength = 0.25 + 0.75 * i / max(1, len(phases) - 1)
        axes.plot(share, phase["prices"], color=INK, alpha=strength, label=f"epsilon {phase['epsilon']:.2g}")
    axes.set(xlabel="columns in order of their price, %", ylabel="price, in deviations of the cost")
    axes.legend(frameon=False)
    return figure


def draw_places(record: dict[str, Any]) -> Any:
    """Draw how far down its own costs a row finds its column, with and without prices."""
    figure = _figure(7, 3.0)
    axes = figure.subplots()
    share = 100 * np.arange(1, record["n"] + 1) / record["n"]
    for name, label, colour in (
        ("places", "by cost alone", GREY),
        ("places_at_prices", "by cost and price, where lists are made", INK),
    ):
        axes.plot([1, *record[name]], [0, *share], color=colour, drawstyle="steps-post", label=label)
    axes.axvline(
        record["list_size"], color=PATHS, linestyle="--", label=f"room in a list: {record['list_size']} columns"
    )
    axes.set(xscale="log", xlabel="place of the optimal column in its row", ylabel="rows, %", ylim=(0, 101))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.05))
    return figure


def committed() -> dict[str, Any]:
    """Return the committed record."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def main(argv: list[str] | None = None) -> None:
    """Record, and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver_steps", description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw, from the committed record")
    if not parser.parse_args(argv).draw:
        record = {"environment": environment(1, None), **watch(ROWS), "pairs": pairs()}
        RECORD.write_text(json.dumps(record, allow_nan=False) + "\n")
    draw(committed(), PICTURES)


if __name__ == "__main__":
    main()
