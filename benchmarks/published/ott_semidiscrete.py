"""OTT-JAX's semidiscrete tutorial: 96 points of a half ring, chi^2 of the picks along stochastic ascent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from couplings import semidiscrete

from .clouds import half_ring, normal
from .ensemble import CHECK, DATA, TEST, TRAIN, Place, generator
from .measures import Value, chi2
from .table import Settings, Table

__all__ = ["TABLE", "ascend"]

RATE, AVERAGE = 0.02, 0.99
EVERY = 5000  # steps between two published values
REPEATS = 16  # batches from which a published value is estimated
PUBLISHED = (1.1769, 0.5923, 0.3147, 0.1715, 0.0881, 0.0379, 0.0423, 0.0283)


def picks(points: Tensor, potentials: Tensor, noise: Tensor) -> Tensor:
    """Return the point of highest ``potential - |noise - point|^2`` of each noise row: (..., rows) int64."""
    scores = 2 * noise @ points.mT - points.square().sum(-1)[..., None, :] + potentials[..., None, :]
    return scores.argmax(-1)


def ascend(
    points: Tensor, seeds: Sequence[int], *, steps: int, batch: int, every: int
) -> tuple[list[list[float]], Tensor]:
    """Ascend the dual of all seeds as the tutorial does: constant steps from 0, an exponential average.

    Parameters
    ----------
    points : (seeds, N, 2) Tensor
    seeds : sequence of int
    steps, batch : int
    every : int
        Steps between two estimates.

    Returns
    -------
    list
        For each seed its estimates.
    (seeds, N) Tensor
        The averages.
    """
    count = points.shape[1]
    potentials = torch.zeros(len(seeds), count, device=points.device)
    average = potentials.clone()
    estimates: list[list[float]] = [[] for _ in seeds]
    ahead = 100  # steps whose noise is drawn together
    for step in range(steps):
        if step % ahead == 0:
            drawn = [normal(ahead * batch, generator(seed, TRAIN, step)).view(ahead, batch, 2) for seed in seeds]
            noise = torch.stack(drawn, 1).to(points.device)
        chosen = picks(points, potentials, noise[step % ahead])
        shares = torch.zeros_like(potentials).scatter_add_(
            1, chosen, torch.ones_like(chosen, dtype=potentials.dtype)
        )  # fmt: skip
        potentials -= RATE * (shares / batch - 1 / count)
        average.lerp_(potentials, 1 - AVERAGE)
        if (step + 1) % every == 0:
            for i, seed in enumerate(seeds):
                checks = normal(REPEATS * batch, generator(seed, CHECK)).view(REPEATS, batch, 2).to(points.device)
                found = [chi2(picks(points[i], average[i], check), count) for check in checks]
                estimates[i].append(sum(found) / REPEATS)
    return estimates, average


def run(cell: str, seeds: Sequence[int], settings: Settings, place: Place) -> list[dict[str, float]]:
    """Measure the tutorial's ascent, or `semidiscrete.fit` after less and less noise."""
    points = torch.stack([half_ring(settings["points"], generator(seed, DATA)) for seed in seeds])
    fresh = [normal(settings["tests"], generator(seed, TEST)) for seed in seeds]
    if cell == "tutorial":
        estimates, average = ascend(
            points.to(place.device), seeds, steps=settings["steps"], batch=settings["batch"], every=settings["every"]
        )
        average = average.cpu()
        return [
            {str((i + 1) * EVERY): value for i, value in enumerate(estimates[k])}
            | {"exact": chi2(picks(points[k], average[k], fresh[k]), settings["points"])}
            for k in range(len(seeds))
        ]
    measured: list[dict[str, float]] = []
    for k, seed in enumerate(seeds):
        values = {}
        for steps in settings["fits"]:
            plan = semidiscrete.fit(
                points[k], batch_size=settings["batch"], steps=steps, tolerance=1e-6, seed=seed, device=place.device
            )
            values[str(steps)] = chi2(plan.assign(fresh[k]), settings["points"])
        measured.append(values)
    return measured


FITS = (50, 500, 5000)

TABLE = Table(
    name="ott-semidiscrete",
    source="OTT-JAX, docs/tutorials/linear/950_semidiscrete.ipynb, commit 6aace50f",
    seeds=tuple(range(10)),
    settings={"points": 96, "steps": 40_000, "batch": 128, "every": EVERY, "fits": list(FITS), "tests": 1_000_000},
    quick={"points": 12, "steps": 80, "batch": 8, "every": 10, "fits": list(FITS[:1]), "tests": 1000},
    cells={
        "tutorial": {str((i + 1) * EVERY): Value(value) for i, value in enumerate(PUBLISHED)},
        "fit": {str(steps): Value(PUBLISHED[-1]) for steps in FITS},
    },
    departures=(
        "other points from the same law: the tutorial draws its own with JAX's generator",
        "one run was published",
        "of fit, chi^2 is measured on a million fresh noise rows and held against the tutorial's last value, which is "
        "reached after 40,000 steps and estimated from 2,048 rows",
    ),
    run=run,
)
