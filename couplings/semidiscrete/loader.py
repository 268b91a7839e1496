"""Batches of data with the noise that picked it, from any map-style dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from couplings.noise import STREAMS, as_seed, normal, row_seeds
from couplings.semidiscrete.rows import rows_of

if TYPE_CHECKING:
    from couplings.semidiscrete.plan import Part, Semidiscrete

__all__ = ["PairLoader", "balance"]

logger = logging.getLogger(__name__)

# Noise rows of a block of `balance`, whose cost matrix is solved exactly.
_BLOCK = 2048
_ASSIGNED = 4096

_OURS = ("batch_sampler", "batch_size", "drop_last", "generator", "sampler", "shuffle")


class PairLoader:
    """What `Semidiscrete.loader` returns: an iterable of ``(batch, noise)``, that can be resumed in the middle.

    An epoch is as many noise rows as there is data, each with the data row that it picked. Its noise is a function of
    the seed and of the number of the epoch; noise row i is ``couplings.noise.normal(seeds, shape)[i]``, on the device
    where the plan searches.

    Attributes
    ----------
    epoch : int
        Number of the epoch that comes next, or that is under way.
    moved : int or None
        Noise rows of the last epoch that were moved to another data row to use all equally often; None before, 0 where
        nothing is balanced.

    Notes
    -----
    Leaving the loop stops in the middle of the epoch: the next loop goes on there.
    """

    def __init__(
        self,
        plan: Semidiscrete,
        dataset: Any,
        batch_size: int,
        *,
        seed: int,
        balanced: bool,
        mirror: Callable[[Any], Any] | None,
        rank: int | None,
        world_size: int | None,
        options: dict[str, Any],
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            msg = f"dataset must have rows by number, as a map-style dataset has, got {type(dataset).__name__}."
            raise TypeError(msg)
        if len(dataset) != len(plan):
            msg = f"the plan is of {len(plan)} rows of data, but the dataset has {len(dataset)}."
            raise ValueError(msg)
        for name in _OURS:
            if name in options:
                msg = f"{name}= cannot be set: the noise decides the order of the data."
                raise TypeError(msg)
        self.rank, self.world_size = _place(rank, world_size)
        if batch_size < 1 or batch_size * self.world_size > len(plan):
            msg = (
                f"batch_size= must be from 1 to {len(plan) // self.world_size}, the rows of data for each of "
                f"{self.world_size} ranks, got {batch_size}."
            )
            raise ValueError(msg)
        self._device = plan.parts[0].rows.device  # refused without data
        self.plan, self.batch_size = plan, batch_size
        self.dataset: Any = _Mirrored(dataset, mirror or _flipped) if plan.mirrored else dataset
        self.seed, self.balanced, self._options = as_seed(seed), balanced, options
        self.epoch, self.moved = 0, None if balanced else 0
        self._handed = 0

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return len(self._cuts()) - 1

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        pairs = self.pairs(self.epoch)
        batches = self._batches()[self._handed :]
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[pairs[1][batch].tolist() for batch in batches],
            # Workers seed from it, otherwise in every epoch and on every rank; the global random state is left alone.
            generator=torch.Generator().manual_seed(self._worker_seed()),
            **self._options,
        )
        for rows, batch in zip(batches, loader, strict=True):
            noise = normal(pairs[0][rows], self.plan.shape, device=self._device)
            self._handed += 1
            yield batch, noise
        self.epoch, self._handed = self.epoch + 1, 0

    def pairs(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Find the pairs of an epoch, of all ranks.

        Returns
        -------
        seeds, index : (N,) int64 Tensor
            Of the noise, for `couplings.noise.normal`, and of the data rows, as `Semidiscrete.assign` numbers them.
        """
        plan, count = self.plan, len(self.plan)
        seeds = row_seeds(self.seed, epoch * count, count, stream=STREAMS["epoch"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed((self.seed + epoch) % 2**63))
        index = torch.empty(count, dtype=torch.int64)
        self.moved = 0
        for part in plan.parts:
            # Each class gets as much noise as it has data.
            mine = torch.arange(count) if plan.classes is None else rows_of(plan.classes[order], part.label)
            for some in torch.split(mine, _ASSIGNED):
                classes = None if part.label is None else torch.full((len(some),), part.label)
                index[some] = plan.assign(normal(seeds[some], plan.shape, device=self._device), classes).cpu()
            if self.balanced:
                even = balance(part, seeds[mine], index[mine], plan.shape, order)
                self.moved += int((even % count != index[mine] % count).sum())
                index[mine] = even
        if self.balanced:
            logger.info("epoch %d: %d of %d noise rows moved to use the data equally often", epoch, self.moved, count)
        return seeds, index

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands."""
        return {"epoch": self.epoch, "handed": self._handed, **self._about()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader of the same plan and settings stood.

        Raises
        ------
        ValueError
            If its settings were others, or the state is none of a loader.
        """
        for name, value in self._about().items():
            if state.get(name) != value:
                msg = f"the state is of a loader with {name}={state.get(name)}, not {value}."
                raise ValueError(msg)
        epoch, handed = state.get("epoch", -1), state.get("handed", -1)
        if epoch < 0 or not 0 <= handed <= len(self):
            msg = f"the state is none of this loader: epoch={epoch}, handed={handed}."
            raise ValueError(msg)
        self.epoch, self._handed = epoch, handed

    def _about(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "world_size": self.world_size}

    def _worker_seed(self) -> int:
        numbers = (self.seed % 2**64, self.epoch, self.rank)
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _cuts(self) -> list[int]:
        """Where the batches of all ranks together end; a rest too small for every rank goes to the one before."""
        count, together = len(self.plan), self.batch_size * self.world_size
        cuts = [*range(0, count, together), count]
        if cuts[-1] - cuts[-2] < self.world_size:
            del cuts[-2]
        return cuts

    def _batches(self) -> list[Tensor]:
        cuts = self._cuts()
        return [torch.arange(a, b).tensor_split(self.world_size)[self.rank] for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class _Mirrored:
    """A dataset in which row ``N + j`` is row j flipped."""

    dataset: Any
    mirror: Callable[[Any], Any]

    def __getitem__(self, index: int) -> Any:
        turned, row = divmod(index, len(self.dataset))
        item = self.dataset[row]
        return self.mirror(item) if turned else item


def _flipped(item: Any) -> Any:
    """Flip a tensor or an array along its last axis; of a tuple, such as an image and its label, the first element."""
    if isinstance(item, tuple | list) and item:
        values = (_flipped(item[0]), *item[1:])
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    if isinstance(item, Tensor):
        return item.flip(-1)
    if isinstance(item, np.ndarray):
        return item[..., ::-1].copy()
    msg = f"the data is mirrored, and it is not known how to flip {type(item).__name__}: pass mirror=, a function."
    raise TypeError(msg)


def balance(part: Part, seeds: Tensor, index: Tensor, shape: tuple[int, ...], order: Tensor) -> Tensor:
    """Move noise from rows that were picked too often to those that were not picked, so that each is used once.

    Parameters
    ----------
    part : Part
    seeds, index : (n,) int64 Tensor
        Of the noise rows and the data rows that they picked, as many as the part has rows.
    shape : tuple of int
        Of a row.
    order : (N,) int64 Tensor
        A random order, in which rows come into blocks.

    Returns
    -------
    (n,) int64 Tensor
        Each row of the part once, flipped or not.

    Notes
    -----
    Who stays and who moves is solved exactly within blocks: some rows that were picked too often, all noise that
    picked them, and as many rows that were not picked as there is noise to move. Unsolved is only which of these go
    into the same block, which is random.
    """
    from couplings.coupling import couple

    def nearer_of_both(x: Tensor, z: Tensor) -> Tensor:
        return -torch.maximum(x @ z.T, x @ part.rows.flipped(z).T)

    metric = nearer_of_both if part.rows.mirrored else "sqeuclidean"
    size = len(order)
    picked = index % size
    picks = torch.bincount(picked, minlength=size)
    members = torch.arange(size) if part.members is None else part.members
    place = torch.full((size,), -1)
    place[members] = torch.arange(len(members))
    belongs = (place >= 0)[order]
    ordered = order[belongs]
    often, never = ordered[picks[ordered] > 1], ordered[picks[ordered] == 0]
    # Noise rows sorted by the data row that they picked; those of row j begin at begins[j].
    by_row = picked.argsort(stable=True)
    begins = picks.cumsum(0) - picks
    result = index.clone()
    ends = picks[often].cumsum(0)
    free = 0
    start = 0
    while start < len(often):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + _BLOCK, right=True)))
        block = often[start:stop]
        noise_rows = torch.cat([by_row[int(begins[j]) : int(begins[j] + picks[j])] for j in block])
        spare = len(noise_rows) - len(block)
        data_rows = torch.cat([block, never[free : free + spare]])
        z = normal(seeds[noise_rows], shape, device=part.rows.device).reshape(len(noise_rows), -1)
        chosen = couple(part.rows.take(place[data_rows]), z, metric=metric).index
        facing = part.rows.facing(place[data_rows].to(z.device), z[chosen]).cpu()
        result[noise_rows[chosen.cpu()]] = part.number(facing, size)
        free, start = free + spare, stop
    return result


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Find which share of the batches is this rank's."""
    if (rank is None) != (world_size is None):
        msg = "rank= and world_size= must be given together, or both left to the process group."
        raise ValueError(msg)
    if rank is None or world_size is None:
        import torch.distributed as dist

        running = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
    if not 0 <= rank < world_size:
        msg = f"rank= must be from 0 to {world_size - 1}, got {rank}."
        raise ValueError(msg)
    return rank, world_size
