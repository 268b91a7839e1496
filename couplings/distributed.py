"""Coupling over all ranks of a process group: the pairs that one process would make of the concatenated batch.

Noise goes to every rank, each rank prices its own data against all of it, the first rank gathers the prices and
solves, and every rank takes the rows that its data was given:

1. one small all-gather: is every rank's input good, how many rows, of what type;
2. one all-gather of the noise (and small ones of conditions, and of scales, where there are any);
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import accumulate
from math import ceil, prod
from typing import Any, NoReturn, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from couplings import inputs
from couplings._transfer import to_host
from couplings._types import Marginal
from couplings.assigners.method import Assignment, Method
from couplings.collectives import Outcome, Ranks
from couplings.conditions import Conditions
from couplings.problem import Distances, Problem, check_tied, take_tied

__all__ = ["couple_over_ranks", "process_group"]

logger = logging.getLogger(__name__)

# This rank's noise, its assignment, the distances of the whole batch, that batch, and `Coupled.apply`.
Paired = tuple[Tensor, Assignment, Distances, Problem, Callable[[Any], Any]]

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
def couple_over_ranks(
    group: dist.ProcessGroup,
    check: Callable[[], Problem],
    noise: inputs.Array,
    method: Method,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    generator: torch.Generator | None,
) -> Paired:
    """Couple over every rank of a group; collective.

    Every rank calls it with its own rows. The union of the pairs is what one process would make of the batches
    concatenated in the order of the ranks.

    Parameters
    ----------
    group : ProcessGroup
        Of at least two ranks.
    check : callable
        Checks this rank's batch and makes a problem of it.
    noise : (m, *shape) Tensor or array
        This rank's, as it was passed; how many rows may differ between ranks, but no rank may have none.
    method : Method
    options : mapping
        The method's own.
    settings : mapping
        What must be the same on every rank.
    generator : Generator or None
        That of the first rank decides; those of the others are not advanced.

    Returns
    -------
    noise : (n, *shape) Tensor
        That of this rank's data.
    assignment : Assignment
        Of this rank's data; its index numbers the concatenated noise.
    distances : Distances
        Of the whole batch, the same on every rank.
    problem : Problem
        The whole batch as this rank sees it.
    apply : callable
        Collective: gives this rank's rows of anything tied to the noise, and gets those of its data.

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

    ``nearest`` and ``independent`` look at each row's own candidates only: no noise travels, and ``cost_before`` is the
    mean over ranks of each rank's first n rows.

    Several threads may couple at a time if each has a process group of its own: the ranks of one group must call in
    the same order.
    """
    ranks = Ranks(group)
    checked = ranks.attempt("checks", _check, check, noise, settings, method)
    layout = _agree(ranks, checked)
    own = checked.value
    with torch.autocast(own.noise.device.type, enabled=False):
        if method.ignores_condition:
            return _couple_own_rows(ranks, own, layout, method, options, generator)
        return _couple_all_rows(ranks, own, layout, method, options, generator)


@dataclass(frozen=True)
class _Own:
    """What this rank brings, checked: its problem, its noise as it was passed, and what every rank must share."""

    problem: Problem
    noise: Tensor
    description: dict[str, str]


@dataclass(frozen=True)
class _Layout:
    """Whose rows are where in the concatenated batch.

    Attributes
    ----------
    data_rows, noise_rows : tuple of int
        Rows of each rank.
    """

    data_rows: tuple[int, ...]
    noise_rows: tuple[int, ...]

    @cached_property
    def data_ends(self) -> list[int]:
        """End of each rank's data, with 0 before the first."""
        return list(accumulate(self.data_rows, initial=0))

    @cached_property
    def noise_ends(self) -> list[int]:
        """End of each rank's noise, with 0 before the first."""
        return list(accumulate(self.noise_rows, initial=0))

    @property
    def n(self) -> int:
        return self.data_ends[-1]

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
    drawn : bytes
        Digest of the first values of the noise.
    """

    good: bool = False
    n: int = 0
    m: int = 0
    settings: bytes = bytes(8)
    drawn: bytes = bytes(8)

    _FORMAT = "=?qq8s8s"

    def pack(self) -> bytes:
        return struct.pack(self._FORMAT, self.good, self.n, self.m, self.settings, self.drawn)

    @classmethod
    def unpack(cls, packed: bytes) -> _Header:
        return cls(*struct.unpack(cls._FORMAT, packed))


def _check(check: Callable[[], Problem], noise: inputs.Array, settings: Mapping[str, Any], method: Method) -> _Own:
    problem = check()
    as_passed = inputs.as_tensor(noise, "noise")
    if problem.pricing.check_finite:  # before the noise travels: on the rank where it is, with its own numbers
        problem.check_finite()
    return _Own(problem, as_passed, _describe(problem, as_passed, settings, method))


def _describe(problem: Problem, noise: Tensor, settings: Mapping[str, Any], method: Method) -> dict[str, str]:
    described = {name: _plain(value) for name, value in settings.items()}
    described |= {"dtype": str(noise.dtype), "shape of a row": str(tuple(noise.shape[1:]))}
    described["device type"] = noise.device.type
    described["condition"] = "None"
    if problem.conditions is not None:
        conditions = problem.conditions
        kinds = [] if conditions.classes is None else ["classes"]
        if conditions.features is not None:
            kinds.append(f"{conditions.features.dtype} of width {conditions.features.shape[1]}")
        if conditions.tagged:
            kinds.append("noise_condition")
        described["condition"] = " and ".join(kinds)
    if method.ignores_condition:
        described["noise rows per data row"] = f"{len(noise) / problem.rows:g}"
    return described


def _plain(value: object) -> str:
    if isinstance(value, str | int | float | bool | list | tuple | dict | None):
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
    return _Layout(tuple(header.n for header in headers), tuple(header.m for header in headers))


def _header(own: _Own) -> _Header:
    rows = ceil(_COMPARED / prod(own.noise.shape[1:]))
    first = own.noise[:rows].detach().reshape(-1)[:_COMPARED].cpu()
    return _Header(
        good=True,
        n=own.problem.rows,
        m=len(own.noise),
        settings=_digest(json.dumps(own.description).encode()),
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


def _couple_own_rows(
    ranks: Ranks,
    own: _Own,
    layout: _Layout,
    method: Method,
    options: Mapping[str, Any],
    generator: torch.Generator | None,
) -> Paired:
    """Couple by a method that looks at each row's own candidates only: nothing travels but the costs."""
    problem = own.problem

    def solve() -> tuple[Assignment, Distances]:
        answer = problem.solve(method, None, options, generator)
        return answer, problem.distances(answer.index)

    solved = ranks.attempt("solve", solve)
    distances = _summed(ranks, None if solved.result is None else solved.result[1], solved.error, own)
    answer = solved.value[0]
    index = answer.index
    numbered = replace(answer, index=index + layout.noise_ends[ranks.rank])
    moved = own.noise.index_select(0, index)
    whole = replace(problem, rows=layout.n)
    return moved, numbered, distances, whole, lambda t: take_tied(t, index, len(own.noise))


def _couple_all_rows(
    ranks: Ranks,
    own: _Own,
    layout: _Layout,
    method: Method,
    options: Mapping[str, Any],
    generator: torch.Generator | None,
) -> Paired:
    pool = ranks.all_gather_rows("noise", own.noise, layout.noise_rows)
    whole = replace(
        own.problem,
        noise=inputs.flat(pool),
        conditions=_gathered_conditions(ranks, own.problem.conditions, layout),
        first=layout.data_ends[ranks.rank],
        rows=layout.n,
    )
    if whole.pricing.quantize is not None:
        largest = ranks.all_gather("scale", whole.magnitude.cpu().reshape(1)).amax()
        whole = replace(whole, data_magnitude=largest.to(whole.data.device))
    assemble, error = None, None
    if method.info.needs == "cost":
        assemble, error = _gathered_costs(ranks, whole, layout, method)
    points = None
    if method.info.needs == "points" or "points" in method.wants:
        points = ranks.gather_rows("points", whole.data, layout.data_rows)

    def solve() -> Assignment | None:
        if ranks.rank != 0 or (assemble is None and method.info.needs == "cost"):
            return None
        problem = whole if points is None else replace(whole, data=points, first=0)
        return problem.solve(method, None if assemble is None else assemble(), options, generator)

    solved = ranks.attempt("solve", solve)
    answer = _told(ranks, solved.result, error or solved.error, own, layout)
    chosen = answer.index[layout.data_of(ranks.rank)]
    measured = ranks.attempt("report", whole.distances, chosen)
    distances = _summed(ranks, measured.result, measured.error, own)
    apply = _Exchange(ranks.group, layout, answer.index)
    return pool.index_select(0, chosen), replace(answer, index=chosen), distances, whole, apply


def _gathered_conditions(ranks: Ranks, own: Conditions | None, layout: _Layout) -> Conditions | None:
    """Conditions of all data rows and all noise rows."""
    if own is None:
        return None

    def gathered(values: Tensor | None, rows: tuple[int, ...]) -> Tensor | None:
        return None if values is None else ranks.all_gather_rows("condition", values, rows)

    classes, features = gathered(own.classes, layout.data_rows), gathered(own.features, layout.data_rows)
    if not own.tagged:
        return Conditions(classes, features, classes, features)
    noise_classes = gathered(own.noise_classes, layout.noise_rows)
    return Conditions(classes, features, noise_classes, gathered(own.noise_features, layout.noise_rows))


def _gathered_costs(
    ranks: Ranks, whole: Problem, layout: _Layout, method: Method
) -> tuple[Callable[[], Tensor] | None, Exception | None]:
    """Gather the costs of all data rows on the first rank; None elsewhere, and where a rank could not price its rows.

    A rank's costs follow one number that says whether they are good, so that one that fails still joins.
    """
    blocks = None if whole.conditions is None else whole.conditions.blocks  # the same on every rank, errors included
    if blocks is None:
        sizes = [rows * len(whole.noise) for rows in layout.data_rows]
    else:
        held = [blocks.held(first, rows)[0] for first, rows in zip(layout.data_ends, layout.data_rows, strict=False)]
        sizes = [int(blocks.row_lengths[of_rank].sum()) for of_rank in held]

    def price() -> Tensor:
        return torch.cat([whole.data.new_ones(1), whole.cost(method, solved_here=False).reshape(-1)])

    priced = ranks.attempt("cost", price)
    message = whole.data.new_zeros(1 + sizes[ranks.rank]) if priced.result is None else priced.result
    told = ranks.gather_rows("costs", message, [1 + size for size in sizes])
    if told is None:
        return None, priced.error
    parts = torch.split(told, [1 + size for size in sizes])
    if not all(bool(part[0]) for part in parts):
        return None, priced.error

    def assemble() -> Tensor:
        costs = torch.cat([part[1:] for part in parts])
        costs = costs if method.on_device else to_host(costs)[0]
        return costs.view(layout.n, -1) if blocks is None else blocks.joined(costs, held)

    return assemble, None


def _told(ranks: Ranks, solved: Assignment | None, error: Exception | None, own: _Own, layout: _Layout) -> Assignment:
    """Tell every rank the first rank's answer, or that there is none; collective."""
    message = torch.zeros(2 + layout.n, dtype=torch.int64, device=own.noise.device)
    if solved is not None:
        assert solved.marginal is not None
        slack = float("nan") if solved.slack is None else solved.slack
        message[0] = 1 + _MARGINALS.index(solved.marginal)
        message[1] = torch.tensor(slack, dtype=torch.float64).view(torch.int64)
        message[2:] = solved.index
    message = ranks.broadcast("index", message)
    status, slack_bits = message[:2].tolist()
    if status == 0:
        ranks.fail(error)
    slack = torch.tensor(slack_bits).view(torch.float64).item()
    return Assignment(message[2:], None if slack != slack else slack, _MARGINALS[status - 1])


def _summed(ranks: Ranks, own: Distances | None, error: Exception | None, rank: _Own) -> Distances:
    """Sum every rank's distances, so that all report the same; collective."""
    row = torch.zeros(4, dtype=torch.float64)
    if own is not None:
        row = torch.stack([torch.ones_like(own.after), own.after, own.before, own.conditions]).double().cpu()
    gathered = ranks.all_gather("sums", row)
    if not bool(gathered[:, 0].all()):
        ranks.fail(error)
    after, before, conditions = gathered[:, 1:].sum(0)
    pricing = rank.problem.pricing
    if pricing.check_finite and not bool(after.isfinite()):
        reported = ranks.attempt(
            "report", inputs.report_not_finite, rank.problem.data, rank.problem.noise, pricing.metric
        )
        ranks.fail(reported.error)
    device = rank.noise.device
    wide = own.after.dtype if own is not None else torch.float64
    return Distances(*(total.to(device=device, dtype=wide) for total in (after, before, conditions)))


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

    def over(self, group: dist.ProcessGroup) -> _Exchange:
        """Do the same over another group of the same ranks."""
        return _Exchange(group, self.layout, self.index)

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
        return moved.numpy() if isinstance(t, np.ndarray) else moved
