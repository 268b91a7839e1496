"""Coupling over all ranks of a process group: the pairs that one process would make of the concatenated batch.

Noise goes to every rank, each rank prices its own data against all of it, the first rank gathers the prices and
solves, and every rank takes the rows that its data was given:

1. one small all-gather: is every rank's input good, how many rows, of what type and scale;
2. one all-gather of the noise (and a small one of conditions, where there are any);
3. one gather of cost rows (of data points for methods that need these), to the first rank, which solves;
4. one broadcast of the index;
5. one small all-gather of the sums of the pairs' costs, so that every rank reports the same mean.

An error on one rank travels with the next of these messages and is then raised by all, so that none waits for a rank
that has left.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import accumulate
from math import ceil, prod
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from couplings import inputs
from couplings._types import Marginal
from couplings.assigners.randomness import private_generator
from couplings.assigners.registry import Assignment
from couplings.collectives import Outcome, Phase, Ranks, Trace
from couplings.conditions import class_rows
from couplings.coupling import Coupled, check_rows, check_tied, prepare, take_tied
from couplings.distances import cost_matrix, full_float32, pair_costs
from couplings.inputs import Array
from couplings.pairing import (
    Batch,
    Plan,
    assign_classes,
    assign_cost,
    assign_points,
    finished_cost,
    may_shift,
    pair,
    pair_conditions,
    reached_marginal,
    relative_gap,
)
from couplings.quantization import Operand, bytes_per_value, quantized

if TYPE_CHECKING:
    from couplings.coupling import Coupling

__all__ = ["Phase", "Trace", "couple_globally", "process_group"]

logger = logging.getLogger(__name__)

_MARGINALS: tuple[Marginal, ...] = get_args(Marginal)

# Values of the noise that two ranks must share to be told that they drew the same: far beyond coincidence.
_COMPARED = 1024


def process_group(group: object) -> dist.ProcessGroup | None:
    """Find the ranks to couple over.

    Parameters
    ----------
    group : ProcessGroup or None
        None is the default group.

    Returns
    -------
    ProcessGroup or None
        None if there is nobody to couple with: no process group, or one of a single rank.

    Raises
    ------
    ValueError
        If `group` is given and this process is not in it.
    TypeError
        If it is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            msg = "group= was given, but there is no process group: call torch.distributed.init_process_group() first."
            raise ValueError(msg)
        return None
    if group is None:
        found = dist.group.WORLD
    elif isinstance(group, dist.ProcessGroup):
        found = group
    elif group == dist.GroupMember.NON_GROUP_MEMBER:
        msg = (
            f"rank {dist.get_rank()} is not in the process group passed as group=. "
            "Pass each rank the group that it belongs to."
        )
        raise ValueError(msg)
    else:
        msg = f"group= takes a torch.distributed process group or None, got {type(group).__name__}."
        raise TypeError(msg)
    return found if dist.get_world_size(found) > 1 else None


@torch.no_grad()
def couple_globally(
    coupling: Coupling,
    data: Array,
    noise: Array,
    condition: Array | None,
    generator: torch.Generator | None,
    group: dist.ProcessGroup,
) -> Coupled:
    """Couple over every rank of a group; collective.

    Every rank calls it with its own rows. The union of the pairs is what one process would make of the batches
    concatenated in the order of the ranks.

    Parameters
    ----------
    coupling : Coupling
        The same on every rank.
    data, noise : (n, *shape), (m, *shape) Tensor or array
        This rank's rows; how many may differ between ranks, but no rank may have none.
    condition : (n,) or (n, c) Tensor or array, optional
        This rank's conditions.
    generator : torch.Generator, optional
        That of the first rank decides; those of the others are not advanced.
    group : ProcessGroup
        Of at least two ranks.

    Returns
    -------
    Coupled
        ``noise`` is that of this rank's data, and ``index`` numbers the concatenated noise. ``cost``, ``cost_before``
        and ``gap`` are those of the whole batch, the same on every rank. ``apply`` is collective. ``trace`` has the
        bytes and seconds of each phase on this rank.

    Raises
    ------
    ValueError, TypeError, ImportError, MemoryError, RuntimeError
        The same on every rank, naming the ranks where it arose. The process group stays usable.
    RuntimeError
        If a rank has died or does not come. Ranks that were exchanging with it see that at once, others when those
        end, all at the latest after the timeout of the process group (``init_process_group(timeout=)``; by default 30
        minutes for gloo, 10 for NCCL).

    Notes
    -----
    Rank r receives all noise but its own, ``(m - m_r) * d`` values; the first rank also the costs of all data rows but
    its own, ``(n - n_0) * m`` values (with integer classes only those within a class), and for methods that work on
    points the data in full. Memory is O(m d) on every rank and O(n m) on the first.

    With ``wire=`` the noise that costs are computed from is rounded and travels in fewer bits; the rows that a rank's
    data was given follow exactly, ``n_r * d`` values. In fp16 that is a quarter of the bytes less on four ranks, and
    nearly half on many; rounding takes time of its own, so that only slow links gain.

    ``nearest`` and ``independent`` look at each row's own candidates only: no noise travels, and ``cost_before`` is the
    mean over ranks of each rank's first n rows.

    Several threads may couple at a time if each has a process group of its own: the ranks of one group must call in
    the same order.
    """
    ranks = Ranks(group)
    checked = ranks.attempt("check", _check, coupling, data, noise, condition, generator)
    layout = _agree(ranks, checked)
    own = checked.value
    with torch.autocast(own.noise.device.type, enabled=False), full_float32(own.noise.device):
        if own.plan.method.ignores_condition:
            coupled = _couple_own_rows(ranks, own, layout)
        else:
            coupled = _couple_all_rows(ranks, own, layout)
    logger.debug("coupled over %d ranks: %s", ranks.size, coupled.trace)
    return coupled


@dataclass(frozen=True)
class _Own:
    """What this rank brings, checked.

    Attributes
    ----------
    plan : Plan
    generator : Generator
    data, noise : (n, *shape), (m, *shape) Tensor
        As they were passed.
    batch : Batch
        The same in the precision of the cost.
    wire : str or None
        The type that noise travels in; None sends it as it is.
    as_numpy : bool
    description : dict
        What has to be the same on every rank.
    """

    plan: Plan
    generator: torch.Generator
    data: Tensor
    noise: Tensor
    batch: Batch
    wire: str | None
    as_numpy: bool
    description: dict[str, str]


@dataclass(frozen=True)
class _Layout:
    """Whose rows are where in the concatenated batch.

    Attributes
    ----------
    data_rows, noise_rows : tuple of int
        Rows of each rank.
    data_peak, noise_peak : float
        Largest magnitude on any rank.
    """

    data_rows: tuple[int, ...]
    noise_rows: tuple[int, ...]
    data_peak: float
    noise_peak: float

    @property
    def n(self) -> int:
        return sum(self.data_rows)

    @property
    def m(self) -> int:
        return sum(self.noise_rows)

    @cached_property
    def data_ends(self) -> list[int]:
        """End of each rank's data, with 0 before the first."""
        return list(accumulate(self.data_rows, initial=0))

    @cached_property
    def noise_ends(self) -> list[int]:
        """End of each rank's noise, with 0 before the first."""
        return list(accumulate(self.noise_rows, initial=0))

    def data_of(self, rank: int) -> slice:
        return slice(self.data_ends[rank], self.data_ends[rank + 1])


@dataclass(frozen=True)
class _Header:
    """What each rank tells the others first.

    Attributes
    ----------
    good : bool
        Whether its input passed the checks; all else is zero if not.
    n, m : int
        Rows.
    settings : bytes
        Digest of what has to be the same on every rank.
    data_peak, noise_peak : float
    drawn : bytes
        Digest of the first values of the noise.
    """

    good: bool = False
    n: int = 0
    m: int = 0
    settings: bytes = bytes(8)
    data_peak: float = 0.0
    noise_peak: float = 0.0
    drawn: bytes = bytes(8)

    _FORMAT = "=?qq8sdd8s"

    def pack(self) -> bytes:
        return struct.pack(
            self._FORMAT, self.good, self.n, self.m, self.settings, self.data_peak, self.noise_peak, self.drawn
        )

    @classmethod
    def unpack(cls, packed: bytes) -> _Header:
        return cls(*struct.unpack(cls._FORMAT, packed))


def _check(
    coupling: Coupling, data: Array, noise: Array, condition: Array | None, generator: torch.Generator | None
) -> _Own:
    inputs.check_generator(generator)
    x, y = inputs.check_pair(data, noise)
    plan = coupling.plan()
    check_rows(plan, len(x), len(y), condition is not None)
    batch = prepare(x, y, condition)
    wire = coupling.options.get("wire")
    if wire is not None and bytes_per_value(wire) >= y.element_size():
        wire = None
    return _Own(
        plan=plan,
        generator=generator or private_generator(),
        data=x,
        noise=y,
        batch=batch,
        wire=wire,
        as_numpy=isinstance(data, np.ndarray),
        description=_describe(coupling, plan, x, y, batch.condition),
    )


def _describe(coupling: Coupling, plan: Plan, x: Tensor, y: Tensor, condition: Tensor | None) -> dict[str, str]:
    said: dict[str, Any] = {"method": coupling.method, "metric": coupling.metric, "quantize": coupling.quantize}
    said |= {name: value for name, value in sorted(coupling.options.items()) if name != "group"}
    described = {name: _plain(value) for name, value in said.items()}
    described |= {"dtype": str(x.dtype), "shape of a row": str(tuple(x.shape[1:])), "device type": x.device.type}
    if condition is None:
        described["condition"] = "None"
    elif condition.is_floating_point():
        described["condition"] = f"{condition.dtype} of width {condition.shape[1]}"
    else:
        described["condition"] = "classes"
    if plan.method.ignores_condition:
        described["noise rows per data row"] = f"{len(y) / len(x):g}"
    return described


def _plain(value: object) -> str:
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _agree(ranks: Ranks, checked: Outcome[_Own]) -> _Layout:
    """Exchange headers; raise together if a rank's input is bad or its settings differ."""
    own = checked.result
    header = _Header() if own is None else _header(own)
    packed = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
    headers = [_Header.unpack(bytes(row.tolist())) for row in ranks.all_gather("header", packed)]
    if not all(header.good for header in headers):
        ranks.fail(checked.error)
    if any(header.settings != headers[0].settings for header in headers):
        _fail_on_difference(ranks, checked.value.description)
    _warn_of_copies(ranks, headers)
    return _Layout(
        data_rows=tuple(header.n for header in headers),
        noise_rows=tuple(header.m for header in headers),
        data_peak=max(header.data_peak for header in headers),
        noise_peak=max(header.noise_peak for header in headers),
    )


def _header(own: _Own) -> _Header:
    rows = ceil(_COMPARED / prod(own.noise.shape[1:]))
    first = own.noise[:rows].reshape(-1)[:_COMPARED].cpu()
    return _Header(
        good=True,
        n=len(own.data),
        m=len(own.noise),
        settings=_digest(json.dumps(own.description).encode()),
        data_peak=own.batch.data_peak,
        noise_peak=own.batch.noise_peak,
        drawn=_digest(first.contiguous().view(torch.uint8).numpy()),
    )


def _digest(content: Any) -> bytes:
    return blake2b(content, digest_size=8).digest()


def _fail_on_difference(ranks: Ranks, description: dict[str, str]) -> NoReturn:
    """Say on every rank which settings differ; collective."""
    said = ranks.all_gather_objects("settings", description)
    names = dict.fromkeys(name for one in said for name in one)
    lines = []
    for name in names:
        values = [one.get(name, "None") for one in said]
        if len(set(values)) > 1:
            listed = ", ".join(f"{value} on {ranks.name(rank)}" for rank, value in enumerate(values))
            lines.append(f"{name} is {listed}")
    msg = f"a coupling over ranks must be the same on every rank, but {'; '.join(lines)}."
    raise (TypeError if [line.split()[0] for line in lines] == ["dtype"] else ValueError)(msg)


def _warn_of_copies(ranks: Ranks, headers: list[_Header]) -> None:
    """Say that ranks drew the same noise: the usual cause is one seed for all, and the pool is then mere copies."""
    by_noise: dict[bytes, list[int]] = {}
    for rank, header in enumerate(headers):
        by_noise.setdefault(header.drawn, []).append(rank)
    for same in by_noise.values():
        if len(same) > 1 and ranks.rank == 0:
            _warn_once(
                f"{', '.join(ranks.name(rank) for rank in same)} hold the same noise, so that the batch has copies "
                "of few different rows. Seed the noise of each rank differently."
            )


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _couple_own_rows(ranks: Ranks, own: _Own, layout: _Layout) -> Coupled:
    """Couple by a method that looks at each row's own candidates only: nothing travels but the costs."""
    batch = replace(own.batch, data_peak=layout.data_peak, noise_peak=layout.noise_peak)
    solved = ranks.attempt("solve", pair, batch, own.plan, own.generator)
    sums = None
    if solved.result is not None:
        means = torch.stack([solved.result.cost, solved.result.cost_before, torch.zeros_like(solved.result.cost)])
        sums = means.double().cpu() * len(own.data)
    cost, before, _ = _report(ranks, sums, solved.error, layout)
    index = solved.value.index
    return _coupled(
        ranks,
        own,
        own.noise.index_select(0, index),
        index + layout.noise_ends[ranks.rank],
        solved.value.marginal,
        (cost, before, None),
        lambda t: take_tied(t, index, len(own.noise)),
    )


def _couple_all_rows(ranks: Ranks, own: _Own, layout: _Layout) -> Coupled:
    pool, values = _share_noise(ranks, own, layout)
    condition = None
    if own.batch.condition is not None:
        mine = own.batch.condition if own.batch.condition.is_floating_point() else own.batch.condition.long()
        condition = ranks.all_gather_rows("condition", mine, layout.data_rows)
    whole = _Whole(own, layout, ranks.rank, values, condition)
    priced = ranks.attempt("cost", whole.price)
    answer = _solve(ranks, own, layout, whole, priced)
    chosen = answer.index[layout.data_of(ranks.rank)]
    exchange = _Exchange(ranks.group, layout, answer.index)
    first = torch.arange(layout.n, device=chosen.device)
    if pool is not None:
        rows, rows_before = pool.index_select(0, chosen), pool[layout.data_of(ranks.rank)]
    else:
        rows = exchange.move(ranks, own.noise)
        aligned = layout.data_rows == layout.noise_rows
        rows_before = own.noise if aligned else _Exchange(ranks.group, layout, first).move(ranks, own.noise)
    measured = ranks.attempt("measure", whole.measure, rows, rows_before, answer, priced.value)
    cost, before, between = _report(ranks, measured.result, measured.error, layout)
    gap = None
    if answer.slack is not None:
        plan = replace(own.plan, quantize=own.plan.quantize or own.wire)
        gap = relative_gap(answer.slack, layout.n, cost, between, plan)
    return _coupled(ranks, own, rows, chosen, answer.marginal, (cost, before, gap), exchange)


def _share_noise(ranks: Ranks, own: _Own, layout: _Layout) -> tuple[Tensor | None, Tensor]:
    """Give every rank all noise: the rows themselves unless they travelled rounded, and the values to price."""
    dtype = own.batch.noise.dtype
    if own.wire is None:
        pool = ranks.all_gather_rows("noise", own.noise, layout.noise_rows)
        return pool, pool.view(layout.m, -1).to(dtype)
    rounded = quantized(own.batch.noise, own.wire, peak=layout.noise_peak)
    assert rounded.codes is not None
    assert rounded.scale is not None
    codes = ranks.all_gather_rows("noise", rounded.codes, layout.noise_rows)
    return None, codes.to(dtype).mul_(rounded.scale)


@dataclass(frozen=True)
class _Answer:
    """What the first rank tells the others.

    Attributes
    ----------
    index : (n,) Tensor
        Into the concatenated noise, for the concatenated data.
    slack : float or None
    marginal : str
    """

    index: Tensor
    slack: float | None
    marginal: Marginal


@dataclass(frozen=True)
class _Priced:
    """Costs of this rank's data rows.

    Attributes
    ----------
    flat : (k,) Tensor or None
        Row by row; class by class where there are classes. None for methods on points.
    matrix : (n_r, m) Tensor or None
        What a callable metric returned, where that is all that is needed to report its costs.
    """

    flat: Tensor | None
    matrix: Tensor | None


class _Whole:
    """The concatenated batch as one rank knows it: all noise and conditions, but only its own data."""

    def __init__(self, own: _Own, layout: _Layout, rank: int, noise: Tensor, condition: Tensor | None) -> None:
        self.own, self.layout, self.rank, self.condition = own, layout, rank, condition
        self.plan = own.plan
        self.peak = max(layout.data_peak, layout.noise_peak)
        self.x = quantized(own.batch.data, self.plan.quantize, peak=layout.data_peak)
        self.y = quantized(noise, self.plan.quantize, peak=layout.noise_peak)

    @cached_property
    def classes(self) -> list[Tensor] | None:
        """Rows of each class in the whole batch, on the host."""
        if self.condition is None or self.condition.is_floating_point():
            return None
        return class_rows(self.condition.cpu())

    @cached_property
    def shares(self) -> list[list[int]]:
        """For each class, where each rank's rows end among the class's, with 0 before the first.

        Classes of one row are paired with their own noise; they get no costs and no share.
        """
        ends = torch.tensor(self.layout.data_ends)
        alone = [0] * len(self.layout.data_ends)
        return [torch.searchsorted(c, ends).tolist() if len(c) > 1 else alone for c in self.classes or []]

    def flat_sizes(self) -> list[int]:
        """How many costs each rank has; at least one, to tell of an error in."""
        if self.classes is None:
            return [rows * self.layout.m for rows in self.layout.data_rows]
        sizes = [0] * len(self.layout.data_rows)
        for rows, ends in zip(self.classes, self.shares, strict=True):
            for rank in range(len(sizes)):
                sizes[rank] += (ends[rank + 1] - ends[rank]) * len(rows)
        return [max(1, size) for size in sizes]

    def price(self) -> _Priced:
        """Compute the costs of this rank's data rows."""
        if self.plan.method.info.needs == "points":
            return _Priced(None, None)
        if self.classes is None:
            cost = self._cost(self.x, self.y)
            matrix = cost if callable(self.plan.metric) and self.condition is None else None
            return _Priced(self._finished(cost).view(-1), matrix)
        parts = []
        device = self.x.values.device
        for rows, ends in zip(self.classes, self.shares, strict=True):
            mine = rows[ends[self.rank] : ends[self.rank + 1]] - self.layout.data_ends[self.rank]
            if ends[-1] and len(mine):
                cost = self._cost(self.x[mine.to(device)], self.y[rows.to(device)])
                parts.append(self._finished(cost).view(-1))
        return _Priced(torch.cat(parts) if parts else self.x.values.new_zeros(1), None)

    def _cost(self, x: Operand, y: Operand) -> Tensor:
        shiftable = may_shift(self.plan, self.layout.n, self.layout.m)
        return cost_matrix(x, y, self.plan.metric, shift_invariant=shiftable)

    def _finished(self, cost: Tensor) -> Tensor:
        conditions = (self.own.batch.condition, self.condition) if self.classes is None else (None, None)
        return finished_cost(cost, *conditions, self.peak, self.x.values.shape[1], self.plan).contiguous()

    def assign(self, costs: Tensor | None, data: Operand | None) -> Assignment:
        """Let the method assign; on the first rank.

        Parameters
        ----------
        costs : (k,) Tensor or None
            What `price` gave on each rank, in the order of the ranks; None for methods on points.
        data : Operand or None
            All data, for methods that ask for points.
        """
        generator, layout = self.own.generator, self.layout
        if costs is None:
            assert data is not None
            if self.classes is None:
                return assign_points(data, self.y, self.condition, self.plan, generator)

            def assign_class_points(rows: Tensor) -> Assignment:
                return assign_points(data[rows], self.y[rows], None, self.plan, generator)

            return assign_classes(layout.n, self._on_device(self.classes), assign_class_points)
        if self.classes is None:
            points = None if data is None else (data.values, self.y.values)
            return assign_cost(costs.view(layout.n, layout.m), self.plan, generator, points)
        blocks = self._class_costs(costs)

        def assign_class(rows: Tensor) -> Assignment:
            points = None if data is None else (data[rows].values, self.y[rows].values)
            return assign_cost(next(blocks), self.plan, generator, points)

        return assign_classes(layout.n, self._on_device(self.classes), assign_class)

    def _on_device(self, classes: list[Tensor]) -> list[Tensor]:
        return [rows.to(self.y.values.device) for rows in classes]

    def _class_costs(self, costs: Tensor) -> Iterator[Tensor]:
        """Cost matrix of each class of several rows, put together from the ranks' rows of it."""
        taken = list(accumulate(self.flat_sizes(), initial=0))
        for rows, ends in zip(self.classes or [], self.shares, strict=True):
            parts = []
            for rank in range(len(ends) - 1):
                size = (ends[rank + 1] - ends[rank]) * len(rows)
                parts.append(costs[taken[rank] : taken[rank] + size])
                taken[rank] += size
            if ends[-1]:
                yield torch.cat(parts).view(len(rows), len(rows))

    def measure(self, rows: Tensor, rows_before: Tensor, answer: _Answer, priced: _Priced) -> Tensor:
        """Sum the reported costs of this rank's pairs: after, before, and between their continuous conditions."""
        batch, index = self.own.batch, answer.index[self.layout.data_of(self.rank)]
        between = torch.zeros(1)
        if answer.slack is not None and self.condition is not None and self.classes is None:
            assert batch.condition is not None
            between = pair_conditions(batch.condition, self.condition, index, self.plan)
        if callable(self.plan.metric):
            matrix = priced.matrix
            if matrix is None:
                matrix = cost_matrix(self.x, self.y, self.plan.metric, shift_invariant=False)
            pairs = matrix.gather(1, index[:, None])
            before = matrix.diagonal(self.layout.data_ends[self.rank])
        else:
            pairs, before = (
                pair_costs(batch.data, noise.reshape(len(index), -1).to(batch.data.dtype), self.plan.metric)
                for noise in (rows, rows_before)
            )
        return torch.stack([costs.sum(dtype=torch.float64).cpu() for costs in (pairs, before, between)])


def _solve(ranks: Ranks, own: _Own, layout: _Layout, whole: _Whole, priced: Outcome[_Priced]) -> _Answer:
    """Gather what the method needs on the first rank, solve there, and tell everyone."""
    method = own.plan.method
    costs, points = None, None
    if method.info.needs == "cost":
        sizes = whole.flat_sizes()
        flat = None if priced.result is None else priced.result.flat
        if flat is None:  # no cost is NaN, or `price` would have raised: this one says that it did
            flat = own.batch.data.new_full((sizes[ranks.rank],), float("nan"))
        costs = ranks.gather_rows("costs", flat, sizes)
    if method.info.needs == "points" or "points" in method.wants:
        points = ranks.gather_rows("points", own.data, layout.data_rows)

    def solve() -> Assignment | None:
        if ranks.rank != 0:
            return None
        if costs is not None:
            starts = list(accumulate(whole.flat_sizes(), initial=0))[:-1]
            if bool(torch.isnan(costs[starts]).any()):
                return None
        data = None
        if points is not None:
            flat_points = points.view(layout.n, -1).to(own.batch.data.dtype)
            data = quantized(flat_points, own.plan.quantize, peak=layout.data_peak)
        return whole.assign(costs, data)

    solved = ranks.attempt("solve", solve)
    message = torch.zeros(2 + layout.n, dtype=torch.int64, device=own.noise.device)
    if solved.result is not None:
        slack = float("nan") if solved.result.slack is None else solved.result.slack
        message[0] = 1 + _MARGINALS.index(reached_marginal(solved.result, own.plan, layout.n, layout.m))
        message[1] = torch.tensor(slack, dtype=torch.float64).view(torch.int64)
        message[2:] = solved.result.index
    message = ranks.broadcast("index", message)
    status, slack_bits = message[:2].tolist()
    if status == 0:
        ranks.fail(priced.error or solved.error)
    slack = torch.tensor(slack_bits).view(torch.float64).item()
    return _Answer(message[2:], None if slack != slack else slack, _MARGINALS[status - 1])


def _report(ranks: Ranks, sums: Tensor | None, error: Exception | None, layout: _Layout) -> tuple[float, float, float]:
    """Turn each rank's sums into the means of the whole batch, the same on every rank."""
    good = sums is not None
    row = torch.cat([torch.tensor([float(good)]).double(), torch.zeros(3).double() if sums is None else sums])
    gathered = ranks.all_gather("report", row)
    if not bool(gathered[:, 0].all()):
        ranks.fail(error)
    cost, before, between = (gathered[:, 1:].sum(0) / layout.n).tolist()
    return cost, before, between


def _coupled(
    ranks: Ranks,
    own: _Own,
    rows: Tensor,
    index: Tensor,
    marginal: Marginal,
    costs: tuple[float, float, float | None],
    apply: Callable[[Any], Any],
) -> Coupled:
    def out(value: Tensor) -> Any:
        return value.numpy() if own.as_numpy else value

    cost, before = (torch.tensor(c, dtype=own.batch.data.dtype, device=own.noise.device) for c in costs[:2])
    return Coupled(
        noise=out(rows),
        index=out(index),
        marginal=marginal,
        cost=out(cost),
        cost_before=out(before),
        gap=costs[2],
        trace=ranks.trace,
        _rows=len(own.noise),
        _apply=apply,
    )


def _as_tied(t: Any, rows: int) -> Tensor:
    check_tied(t, rows)
    return torch.as_tensor(t)


class _Exchange:
    """Sends rows that are tied to the noise to the ranks whose data that noise was given to.

    Parameters
    ----------
    group : ProcessGroup
    layout : _Layout
    index : (n,) Tensor
        Of the whole batch.
    """

    def __init__(self, group: dist.ProcessGroup, layout: _Layout, index: Tensor) -> None:
        self.group, self.layout, self.index = group, layout, index

    def move(self, ranks: Ranks, rows: Tensor) -> Tensor:
        """Give this rank's rows and get those of its data, bit for bit; collective."""
        index, layout = self.index.cpu(), self.layout
        low, high = layout.noise_ends[ranks.rank], layout.noise_ends[ranks.rank + 1]
        wanted = [index[layout.data_of(rank)] for rank in range(ranks.size)]
        sent = [of_rank[(of_rank >= low) & (of_rank < high)] - low for of_rank in wanted]
        mine = wanted[ranks.rank]
        owner = torch.bucketize(mine, torch.tensor(layout.noise_ends[1:]), right=True)
        came_from = torch.bincount(owner, minlength=ranks.size).tolist()
        received = ranks.all_to_all_rows(
            "rows", rows.index_select(0, torch.cat(sent).to(rows.device)), [len(one) for one in sent], came_from
        )
        moved = torch.empty_like(received)
        moved[owner.argsort(stable=True).to(moved.device)] = received
        return moved

    def __call__(self, t: Any) -> Any:
        """`Coupled.apply`: check on every rank, then move."""
        ranks = Ranks(self.group)
        checked = ranks.attempt("check", _as_tied, t, self.layout.noise_rows[ranks.rank])
        row = torch.zeros(9, dtype=torch.uint8)
        if checked.result is not None:
            kind = f"{checked.result.dtype} {tuple(checked.result.shape[1:])}"
            row[0], row[1:] = 1, torch.frombuffer(bytearray(_digest(kind.encode())), dtype=torch.uint8)
        rows = ranks.all_gather("header", row)
        if not bool(rows[:, 0].all()):
            ranks.fail(checked.error)
        if bool((rows != rows[0]).any()):
            _fail_on_difference(
                ranks,
                {"dtype": str(checked.value.dtype), "shape of a row": str(tuple(checked.value.shape[1:]))},
            )
        moved = self.move(ranks, checked.value)
        logger.debug("applied over %d ranks: %s", ranks.size, ranks.trace)
        return moved.numpy() if isinstance(t, np.ndarray) else moved
