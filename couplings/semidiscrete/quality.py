"""How good a dataset-level coupling is, against the couplings of minibatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from couplings.noise import STREAMS, normal, row_seeds
from couplings.semidiscrete.search import GROUP, Search

if TYPE_CHECKING:
    from couplings.semidiscrete.plan import Part, Semidiscrete

__all__ = ["Quality", "measure"]


@dataclass(frozen=True)
class Quality:
    """What `Semidiscrete.quality` measures, on fresh noise.

    Attributes
    ----------
    distance : float
        Mean squared Euclidean distance of noise and the data row that it picks.
    independent : float
        The same for data rows drawn at random.
    minibatch_128, minibatch_1024, minibatch_2048 : float
        The same for exact couplings of minibatches of so many rows, or of all rows where there are fewer.
    used : float
        Share of the data rows that at least one of ``16 N`` picks, or of 30,720, falls on.
    gap : float
        Dual objective less that of the pairs, over `distance`, in size: 0 at the optimum. It is what uneven use of the
        data brings the pairs beyond, or leaves them short of, the best coupling that uses it evenly.
    rows : int
        Noise rows that were measured on.
    """

    distance: float
    independent: float
    minibatch_128: float
    minibatch_1024: float
    minibatch_2048: float
    used: float
    gap: float
    rows: int


def measure(plan: Semidiscrete, rows: int, seed: int) -> Quality:
    """Measure the quality of a plan; see `Quality`.

    Raises
    ------
    ValueError
        If `rows` is below 2,048.
    """
    if not isinstance(rows, int) or rows < 2048:
        msg = f"rows= must be an integer of at least 2,048, got {rows!r}."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(seed)
    distances = dict.fromkeys(("plan", "independent", "128", "1024", "2048"), 0.0)
    used, gap = 0, 0.0
    for number, (part, potentials) in enumerate(zip(plan.parts, plan._by_part, strict=True)):
        share = part.rows.count / len(plan)
        mine = max(GROUP, round(rows * share))
        offset = number << 32  # each class has noise of its own
        z = _noise(part, seed, offset, mine)
        picked = part.rows.facing(Search(part.rows).highest(potentials, z)[1][:, 0], z)
        distances["plan"] += share * _distance(part, picked, z)
        drawn = _drawn(part, mine, generator)
        distances["independent"] += share * _distance(part, drawn, z)
        for size in (128, 1024, 2048):
            distances[str(size)] += share * _minibatch_distance(part, drawn, z, size)
        hit, excess = _spread(part, potentials, seed, offset + mine)
        used += hit
        gap += share * 2.0 * excess
    return Quality(
        distance=distances["plan"],
        independent=distances["independent"],
        minibatch_128=distances["128"],
        minibatch_1024=distances["1024"],
        minibatch_2048=distances["2048"],
        used=used / len(plan),
        gap=abs(gap) / distances["plan"],
        rows=rows,
    )


def _noise(part: Part, seed: int, first: int, count: int) -> Tensor:
    seeds = row_seeds(seed, first, count, stream=STREAMS["quality"], device=part.rows.device)
    return normal(seeds, (part.rows.dim,))


def _drawn(part: Part, count: int, generator: torch.Generator) -> Tensor:
    """Draw data rows as an epoch does: all, in random order, before any comes again; half of them flipped."""
    every = part.rows.count
    drawn = torch.cat([torch.randperm(every, generator=generator) for _ in range(-(-count // every))])[:count]
    if part.rows.mirrored:
        drawn += every * torch.randint(2, drawn.shape, generator=generator)
    return drawn.to(part.rows.device)


def _distance(part: Part, index: Tensor, noise: Tensor) -> float:
    total = 0.0
    for start in range(0, len(index), 1024):
        block = slice(start, start + 1024)
        total += float((_rows(part, index[block]) - noise[block]).square().sum(dtype=torch.float64))
    return total / len(index)


def _minibatch_distance(part: Part, index: Tensor, noise: Tensor, size: int) -> float:
    from couplings.coupling import couple

    total = 0.0
    for start in range(0, len(index), size):
        block = slice(start, start + size)
        coupled = couple(_rows(part, index[block]), noise[block])
        total += float(coupled.cost) * len(coupled.index)
    return total / len(index)


def _rows(part: Part, index: Tensor) -> Tensor:
    return part.rows.true(part.rows.take(index))


def _spread(part: Part, potentials: Tensor, seed: int, first: int) -> tuple[int, float]:
    """Count the rows that are picked, and find the mean potential of the picks less that of all rows."""
    search, count = Search(part.rows), part.rows.count
    hit = torch.zeros(count, dtype=torch.bool, device=potentials.device)
    total, picks = 0.0, 0
    while picks < 16 * count or picks == 0:
        found = search.combined(potentials, _noise(part, seed, first + picks, 1024))
        hit[found] = True
        total += float(potentials[found].sum(dtype=torch.float64))
        picks += found.numel()
    if part.rows.copies is not None:
        first_copy = part.rows.copies.first
        hit = torch.zeros_like(hit).index_fill_(0, first_copy[hit], True)[first_copy]
    return int(hit.sum()), total / picks - float(potentials.mean(dtype=torch.float64))
