"""Batches that every process can make for itself, and one rank's share of the coupling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from couplings import couple
from couplings.stages import recorded

_UNEVEN = ((7,), (5, 8), (6, 3, 7), (4, 6, 5, 3))


def rows_of(world):
    """Rows of data on each rank: unequal ones."""
    return _UNEVEN[world.size - 1]


@dataclass(frozen=True)
class Case:
    """A batch spread over ranks: how many rows each has, and how to couple them."""

    rows: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    spare: int = 0  # noise rows beyond the data rows, on every rank
    candidates: int = 1
    values: str = "integers"
    condition: str | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def batch(self):
        generator = torch.Generator().manual_seed(self.seed)
        shape = (3, 4, 4)
        n, m = sum(self.rows), sum(self.noise_rows)
        if self.values == "integers":  # exact in float32, whatever the order of summation
            data, noise = (torch.randint(-9, 10, (k, *shape), generator=generator).to(self.dtype) for k in (n, m))
            data[-1] *= 31  # ranks have different largest values
            noise[0] *= 5
        else:
            data = torch.rand(n, *shape, generator=generator).to(self.dtype)
            noise = torch.randn(m, *shape, generator=generator).to(self.dtype)
        condition = None
        if self.condition == "classes":
            condition = torch.randint(0, 4, (n,), generator=generator)
            condition[0] = 99  # a class of one row
        elif self.condition == "continuous":
            condition = torch.randint(0, 4, (n, 2), generator=generator).float()
        return data, noise, condition

    @property
    def all_options(self):
        return {**self.options, "select": True} if self.spare else self.options

    @property
    def noise_rows(self):
        return tuple(self.candidates * n + self.spare for n in self.rows)

    def share(self, rank):
        data, noise, condition = self.batch()
        mine = slice(sum(self.rows[:rank]), sum(self.rows[: rank + 1]))
        mine_of_noise = slice(sum(self.noise_rows[:rank]), sum(self.noise_rows[: rank + 1]))
        return data[mine], noise[mine_of_noise], None if condition is None else condition[mine]


def couple_whole(case):
    data, noise, condition = case.batch()
    return couple(data, noise, condition=condition, **case.all_options)


def couple_share(case):
    """Couple this rank's share over all ranks; everything in it as NumPy and numbers, to go through a pipe."""
    data, noise, condition = case.share(dist.get_rank())
    with recorded() as record:
        coupled = couple(data, noise, condition=condition, scope="global", **case.all_options)
    return {**told(coupled), "received": record.received}


def told(coupled):
    return {
        "noise": coupled.noise.double().numpy(),
        "index": coupled.index.numpy(),
        "cost": coupled.cost.item(),
        "cost_before": coupled.cost_before.item(),
        "gap": coupled.gap,
        "marginal": coupled.marginal,
    }
