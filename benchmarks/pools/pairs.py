"""The ways of pairing that are compared: each a stream of batches of data with their noise."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from couplings import Coupling, lookahead, persistent, semidiscrete

Pairs = Iterator[tuple[Tensor, Tensor]]
PLAN = "plan.safetensors"  # of the dataset-level coupling that all runs share
TOLERANCE = 0.05  # of the plan's chi^2
SEEDS_KEPT = 4  # for each data row
AHEAD = 16  # batches for which rows are picked at a time


@dataclass(frozen=True, eq=False)
class Run:
    """What a stream of pairs depends on.

    Attributes
    ----------
    images : (N, c, h, w) Tensor
        The data.
    batch_size, steps, seed : int
    folder : Path
        Where the plan is.
    first : int
        Steps before this one are only counted off: what they give does not matter.
    """

    images: Tensor
    batch_size: int
    steps: int
    seed: int
    folder: Path
    first: int = 1

    def order(self) -> Tensor:
        """Draw the data rows of all steps, epoch by epoch; ``(steps, batch_size)``."""
        count, generator = len(self.images), torch.Generator().manual_seed(self.seed)
        batches = count // self.batch_size
        epochs = [torch.randperm(count, generator=generator) for _ in range(-(-self.steps // batches))]
        rows = torch.cat([epoch[: batches * self.batch_size] for epoch in epochs]).view(-1, self.batch_size)
        return rows[: self.steps].to(self.images.device)


def within(coupling: Coupling, window: int = 1) -> Callable[[Run], Pairs]:
    """Couple batches, or several of them as one, in the background."""

    def pairs(run: Run) -> Pairs:
        loader = run.order()  # each of its rows is a batch: of numbers of images
        for rows, noise in lookahead(
            loader, coupling, window=window, data=lambda rows: run.images[rows], seed=run.seed
        ):
            yield run.images[rows], noise

    return pairs


def picked(run: Run) -> Pairs:
    """Let fresh noise pick its data from the whole dataset."""
    plan = semidiscrete.Semidiscrete.load(run.folder / PLAN, run.images)
    generator = torch.Generator(run.images.device).manual_seed(run.seed)
    shape = (AHEAD * run.batch_size, *run.images.shape[1:])
    for step in itertools.count(1, AHEAD):
        noise = torch.randn(shape, generator=generator, device=run.images.device)
        counted_off = step + AHEAD <= run.first
        rows = torch.zeros(len(noise), dtype=torch.int64) if counted_off else plan.assign(noise)
        for some, each in zip(rows.split(run.batch_size), noise.split(run.batch_size), strict=True):
            yield run.images[some], each


def kept(run: Run) -> Pairs:
    """Let noise stay with its data, and couple it again whenever it is drawn."""
    order = run.order()
    with (
        tempfile.TemporaryDirectory() as folder,
        persistent.Pairs.open(f"{folder}/pairs.bin", rows=len(run.images), seeds=SEEDS_KEPT, seed=run.seed) as pairs,
    ):
        for rows in order:
            yield run.images[rows], pairs.couple(run.images[rows], rows).noise


def fit(images: Tensor, folder: Path) -> None:
    """Fit the dataset-level coupling."""
    folder.mkdir(parents=True, exist_ok=True)
    semidiscrete.fit(images, tolerance=TOLERANCE, progress=True).save(folder / PLAN)


PAIRINGS: dict[str, Callable[[Run], Pairs]] = {
    "independent": within(Coupling("independent")),
    "batch": within(Coupling()),
    "batch-l2": within(Coupling(metric="l2")),
    "window": within(Coupling(), 16),
    "nearest-l2": within(Coupling("nearest", k=4)),
    "nearest-dot": within(Coupling("nearest", k=4, score="dot")),
    "semidiscrete": picked,
    "persistent": kept,
}
