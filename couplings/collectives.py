"""Collectives between the ranks of a process group: counted, and failing on every rank together.

Collectives hang when one rank does not join. What a rank computes between two of them is therefore attempted
(`attempt`): an error is kept, told to the others with the next message, and then raised by all (`Ranks.fail`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from couplings.stages import stage

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What a rank's error may be raised as on the others; anything else becomes a RuntimeError that names its type.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, TypeError, ImportError, MemoryError, RuntimeError)
}


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A result, or the error in its place."""

    result: T | None = None
    error: Exception | None = None

    @property
    def value(self) -> T:
        """The result; only to be asked for once every rank is known to have one."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # None only where T allows it


class Ranks:
    """The ranks of a process group, as one of them sees the others.

    Parameters
    ----------
    group : ProcessGroup
        With at least this process in it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._backends = dict(part.split(":", 1) for part in dist.get_backend_config(group).split(","))

    def name(self, rank: int) -> str:
        """Name a rank of the group as its process is known everywhere else."""
        return f"rank {dist.get_global_rank(self.group, rank)}"

    def attempt(self, name: str, compute: Callable[..., T], *args: Any) -> Outcome[T]:
        """Do this rank's own work, and keep its error until every rank can raise it."""
        with stage(name):
            try:
                return Outcome(compute(*args))
            except Exception as error:
                return Outcome(error=error)

    def fail(self, error: Exception | None) -> NoReturn:
        """Raise the errors of all ranks on every rank; collective.

        Parameters
        ----------
        error : Exception or None
            This rank's own.
        """
        told = None
        if error is not None:
            known = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS), None)
            text = str(error) or type(error).__name__
            told = (known or "RuntimeError", text if known else f"{type(error).__name__}: {text}")
        heard = self.all_gather_objects("errors", told)
        by_message: dict[tuple[str, str], list[int]] = {}
        for rank, failure in enumerate(heard):
            if failure is not None:
                by_message.setdefault(failure, []).append(rank)
        lines = [f"{self._names(ranks)}: {text}" for (_, text), ranks in by_message.items()]
        kind = _KINDS[next(iter(by_message))[0]]
        raise kind("\n".join(lines)) from error

    def all_gather_objects(self, name: str, value: T) -> list[T]:
        """Collect small picklable values of all ranks on every rank."""
        values: list[Any] = [None] * self.size
        with self._collective(name, 0):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def all_gather(self, name: str, row: Tensor) -> Tensor:
        """Stack small tensors of the same shape, a row from each rank, on the host.

        Parameters
        ----------
        name : str
            Of the stage.
        row : (k,) Tensor
            On the CPU.

        Returns
        -------
        (ranks, k) Tensor
        """
        # Where it travels must not depend on the inputs: they may be wrong, and their device with them.
        row = row.to(self._device(torch.device("cpu")))
        rows = row.new_empty((self.size, *row.shape))
        with self._collective(name, (self.size - 1) * row.nbytes):
            self._all_gather_into(rows, row)
        return rows.cpu()

    def all_gather_rows(self, name: str, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks in their order, on every rank.

        Parameters
        ----------
        name : str
            Of the stage.
        rows : (counts[rank], *shape) Tensor
            Any dtype, the same shape and dtype on every rank.
        counts : sequence of int
            Rows of each rank. Ranks with fewer rows than others pad.

        Returns
        -------
        (sum(counts), *shape) Tensor
            On the device of `rows`, bit for bit.
        """
        device = self._device(rows.device)
        most = max(counts)
        padded = _padded(_as_bytes(rows), most, device)
        gathered = padded.new_empty((self.size, *padded.shape))
        with self._collective(name, (self.size - 1) * padded.nbytes):
            self._all_gather_into(gathered, padded)
        return _from_bytes(_joined(gathered, counts), rows)

    def gather_rows(self, name: str, rows: Tensor, counts: Sequence[int]) -> Tensor | None:
        """Concatenate the rows of all ranks in their order, on the first rank; the others get None.

        The parameters are those of `all_gather_rows`.
        """
        device = self._device(rows.device)
        padded = _padded(_as_bytes(rows), max(counts), device)
        gathered = padded.new_empty((self.size, *padded.shape)) if self.rank == 0 else None
        with self._collective(name, 0 if gathered is None else (self.size - 1) * padded.nbytes):
            into = None if gathered is None else list(gathered.unbind(0))
            dist.gather(padded, into, group=self.group, group_dst=0)
        return None if gathered is None else _from_bytes(_joined(gathered, counts), rows)

    def broadcast(self, name: str, values: Tensor) -> Tensor:
        """Send the first rank's values to all; the others pass a tensor of the same shape and dtype."""
        sent = values.to(self._device(values.device))
        with self._collective(name, sent.nbytes if self.rank else 0):
            dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(values.device)

    def all_to_all_rows(self, name: str, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first ``send[0]`` rows to the first rank, the next ``send[1]`` to the second, and so on.

        Returns
        -------
        (sum(receive), *shape) Tensor
            ``receive[r]`` rows from each rank ``r``, in the order of the ranks, bit for bit.
        """
        outgoing = _as_bytes(rows).to(self._device(rows.device))
        incoming = outgoing.new_empty((sum(receive), outgoing.shape[1]))
        foreign = sum(receive) - receive[self.rank]
        with self._collective(name, foreign * outgoing.shape[1]):
            dist.all_to_all_single(incoming, outgoing, list(receive), list(send), group=self.group)
        return _from_bytes(incoming, rows)

    @contextmanager
    def _collective(self, name: str, received: int) -> Iterator[None]:
        with stage(name, received):
            try:
                yield
            except RuntimeError as error:
                msg = (
                    f"the coupling over {self.size} ranks broke off on {self.name(self.rank)} while exchanging {name}: "
                    "another rank has died, raised an error elsewhere, or did not come within the timeout of the "
                    "process group (init_process_group(timeout=...)). The process group is no longer usable. "
                    f"{str(error).partition(chr(10))[0]}"
                )
                raise RuntimeError(msg) from error

    def _all_gather_into(self, rows: Tensor, row: Tensor) -> None:
        # The second name is the older one, deprecated where the first exists.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(rows.view(-1, *row.shape[1:]), row, group=self.group)

    def _device(self, device: torch.device) -> torch.device:
        """Where tensors from `device` have to be to travel: gloo moves those of a GPU only in part."""
        backend = self._backends.get(device.type)
        if backend is not None and (backend != "gloo" or device.type == "cpu"):
            return device
        if "cpu" in self._backends:
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        return torch.device(accelerator.type if accelerator else "cpu", torch.accelerator.current_device_index())

    def _names(self, ranks: Sequence[int]) -> str:
        if len(ranks) == self.size:
            return "every rank"
        return ", ".join(self.name(rank) for rank in ranks)


def _as_bytes(rows: Tensor) -> Tensor:
    """View as ``(rows, bytes)``: backends move bytes of any type, but not every type."""
    return rows.detach().reshape(len(rows), prod(rows.shape[1:])).contiguous().view(torch.uint8)


def _from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(like.dtype).view(len(rows), *like.shape[1:]).to(like.device)


def _padded(rows: Tensor, count: int, device: torch.device) -> Tensor:
    if len(rows) == count:
        return rows.to(device)
    padded = rows.new_zeros((count, *rows.shape[1:]), device=device)
    padded[: len(rows)] = rows
    return padded


def _joined(padded: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenate the first ``counts[r]`` rows of each ``padded[r]``, without a copy where there is no padding."""
    if min(counts) == padded.shape[1]:
        return padded.view(-1, *padded.shape[2:])
    return torch.cat([block[:count] for block, count in zip(padded, counts, strict=True)])
