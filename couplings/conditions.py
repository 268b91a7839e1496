"""Conditions: what keeps the noise Gaussian given a label, a prompt or any other condition of the data.

Coupling data with noise regardless of the class makes the noise of each class lean towards that class, while
sampling starts from noise that does not. Coupling within a class leaves the noise given the class exactly as it was;
for continuous conditions, a price on moving noise between different conditions approximates that (C2OT, arXiv
2503.10636).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from couplings._names import unknown
from couplings._transfer import to_device, to_host
from couplings.distances import cost_matrix
from couplings.quantization import Operand

CONDITION_METRICS = ("sqeuclidean", "cosine")


def check_condition_weight(weight: object, ratio: object) -> None:
    """Check ``condition_weight=`` and ``condition_ratio=``.

    Raises
    ------
    TypeError
        If the weight is no number.
    ValueError
        If the weight is negative or not finite, or the ratio is given without ``"auto"`` or is no number in (0, 1).
    """
    if weight == "auto":
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio < 1.0:
            msg = (
                "condition_weight='auto' needs condition_ratio=, the share of pairs in (0, 1) that may stay no dearer "
                f"than a row's own noise, got {ratio!r}. Type: condition_ratio=0.01"
            )
            raise ValueError(msg)
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        msg = f"condition_weight= takes a number or 'auto', got {type(weight).__name__}."
        raise TypeError(msg)
    if not 0.0 <= weight < float("inf"):
        msg = f"condition_weight= must be finite and not negative, got {weight}."
        raise ValueError(msg)
    if ratio is not None:
        msg = f"condition_ratio= belongs to condition_weight='auto', got condition_weight={weight}."
        raise ValueError(msg)


def canonical_condition_metric(metric: object) -> str:
    """Lower-case the name in ``condition_metric=`` and check that it exists."""
    key = metric.strip().lower() if isinstance(metric, str) else metric
    if key not in CONDITION_METRICS:
        raise ValueError(unknown("condition_metric", metric, CONDITION_METRICS))
    return str(key)


@dataclass(eq=False)
class Conditions:
    """Conditions of data rows, and those that noise rows are tagged with.

    Attributes
    ----------
    classes, noise_classes : (n,), (m,) int64 Tensor or None
        Couple within a class. On the device of the data or on the host.
    features, noise_features : (n, c), (m, c) floating Tensor or None
        Add the distance between them to the cost.
    """

    classes: Tensor | None = None
    features: Tensor | None = None
    noise_classes: Tensor | None = None
    noise_features: Tensor | None = None

    @property
    def tagged(self) -> bool:
        """Whether the noise has conditions of its own."""
        return self.noise_classes is not self.classes or self.noise_features is not self.features

    @property
    def labels(self) -> list[Tensor]:
        """Classes of data rows, and of noise rows where these have their own."""
        labels = [self.classes, self.noise_classes if self.noise_classes is not self.classes else None]
        return [values for values in labels if values is not None]

    @property
    def away(self) -> bool:
        """Whether classes are on a device, so that `blocks` would wait for it."""
        return any(values.device.type != "cpu" for values in self.labels)

    @cached_property
    def blocks(self) -> Blocks | None:
        """The classes as blocks of the cost; None without classes. Waits for a device that they are on."""
        return Blocks.of(*to_host(*self.labels)) if self.labels else None


@dataclass(frozen=True, eq=False)
class Blocks:
    """The square blocks of a cost matrix within which rows may be paired: one for each class, smaller ones first.

    Attributes
    ----------
    rows, columns : (n,) int64 Tensor
        Data rows and noise rows of each block, block after block, each in increasing order. On the CPU.
    sizes : (b,) int64 Tensor
        Rows, and columns, of each block.
    """

    rows: Tensor
    columns: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, classes: Tensor, noise_classes: Tensor | None = None) -> Blocks:
        """Sort rows by class; noise rows have the classes of the data, or their own.

        Raises
        ------
        ValueError
            If a class occurs more often on one side than on the other.
        """
        labels, of_row, counts = torch.unique(classes, return_inverse=True, return_counts=True)
        if noise_classes is not None:
            noise_labels, noise_counts = torch.unique(noise_classes, return_counts=True)
            if not (torch.equal(labels, noise_labels) and torch.equal(counts, noise_counts)):
                raise ValueError(_unequal_classes(classes, noise_classes))
        by_size = counts.argsort(stable=True)
        rank = torch.empty_like(by_size)
        rank[by_size] = torch.arange(len(by_size))
        rows = rank[of_row].argsort(stable=True)
        columns = rows
        if noise_classes is not None:
            columns = rank[torch.searchsorted(labels, noise_classes)].argsort(stable=True)
        return cls(rows, columns, counts[by_size])

    @cached_property
    def ends(self) -> list[int]:
        """Where each block ends in `rows` and `columns`, with 0 before the first."""
        return [0, *self.sizes.cumsum(0).tolist()]

    @cached_property
    def row_lengths(self) -> Tensor:
        """(n,) int64 Tensor: how many costs each of `rows` has."""
        return self.sizes.repeat_interleave(self.sizes)

    def index_of_rows(self, within: Tensor) -> Tensor:
        """Turn columns within blocks, block after block, into the noise row of each data row.

        Parameters
        ----------
        within : (n,) int64 Tensor
            For each of `rows`, a column of its block.
        """
        starts = torch.tensor(self.ends[:-1]).repeat_interleave(self.sizes)
        rows, columns, starts = (to_device(part, within.device) for part in (self.rows, self.columns, starts))
        index = torch.empty_like(rows)
        index[rows] = columns[starts + within]
        return index

    def held(self, first: int, count: int) -> tuple[Tensor, list[int]]:
        """Which of `rows` are among `count` rows from `first` on, and how many in each block.

        Returns
        -------
        (k,) int64 Tensor
            Positions in `rows`.
        list of int
        """
        inside = (self.rows >= first) & (self.rows < first + count)
        counted = torch.cat([torch.zeros(1, dtype=torch.int64), inside.cumsum(0)])[self.ends]
        return inside.nonzero().squeeze(1), counted.diff().tolist()

    def costs_of(self, matrix: Tensor, first: int) -> Tensor:
        """Take the costs within blocks out of a matrix of the rows from `first` on.

        Parameters
        ----------
        matrix : (k, m) Tensor
        first : int

        Returns
        -------
        1-d Tensor
            The held rows' costs: block after block, row after row.
        """
        held, _ = self.held(first, len(matrix))
        lengths = self.row_lengths[held]
        rows = (self.rows[held] - first).repeat_interleave(lengths)
        starts = torch.tensor(self.ends[:-1]).repeat_interleave(self.sizes)[held]
        columns = self.columns[_ragged(starts, lengths)]
        return matrix[to_device(rows, matrix.device), to_device(columns, matrix.device)]

    def joined(self, flat: Tensor, held: list[Tensor]) -> Tensor:
        """Put the costs that several ranks hold, concatenated, in the order of the whole.

        Parameters
        ----------
        flat : 1-d Tensor
        held : list of Tensor
            Each rank's positions in `rows`.
        """
        order = torch.cat(held)
        lengths = self.row_lengths[order]
        starts = torch.empty_like(lengths)
        starts[order] = lengths.cumsum(0) - lengths
        return flat[_ragged(starts, self.row_lengths).to(flat.device)]

    def groups(self, first: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Gather blocks of about the same size, to be computed together; for the rows of one rank.

        Returns
        -------
        list of (rows, columns, wanted)
        rows : (g, a) int64 Tensor
            Held rows of each of g blocks, less `first`; shorter lists repeat a row.
        columns : (g, s) int64 Tensor
            Noise rows of each, likewise.
        wanted : (g, a, s) bool Tensor
            Which of the products are costs, and not repetitions.
        """
        held, counts = self.held(first, count)
        own = self.rows[held] - first
        sizes, ends = self.sizes.tolist(), self.ends
        row_ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        found = []
        for start, stop in _alike(sizes):
            kept = [b for b in range(start, stop) if counts[b]]
            if not kept:
                continue
            most, wide = max(counts[b] for b in kept), sizes[kept[-1]]
            row_counts, widths = torch.tensor([counts[b] for b in kept]), torch.tensor([sizes[b] for b in kept])
            along, across = torch.arange(most), torch.arange(wide)
            at = torch.tensor([row_ends[b] for b in kept])[:, None] + along.minimum(row_counts[:, None] - 1)
            beside = torch.tensor([ends[b] for b in kept])[:, None] + across.minimum(widths[:, None] - 1)
            wanted = (along < row_counts[:, None])[:, :, None] & (across < widths[:, None])[:, None, :]
            found.append((own[at], self.columns[beside], wanted))
        return found


_TOGETHER = 1024  # rows of blocks that are computed together, repetitions included
_PADDING = 1.25  # the largest block of a group over the smallest


def _alike(sizes: list[int]) -> list[tuple[int, int]]:
    """Cut increasing sizes into runs that are padded to a common size with little waste."""
    cuts = [0]
    for b, size in enumerate(sizes):
        first = cuts[-1]
        if size > max(_PADDING * sizes[first], sizes[first] + 1) or (b - first + 1) * size > max(_TOGETHER, size):
            cuts.append(b)
    return list(pairwise([*cuts, len(sizes)]))


def _ragged(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate ``range(start, start + length)`` for all starts and lengths."""
    total = int(lengths.sum())
    skipped = lengths.cumsum(0) - lengths
    return torch.arange(total) + (starts - skipped).repeat_interleave(lengths)


def _unequal_classes(classes: Tensor, noise_classes: Tensor) -> str:
    for label in sorted({*classes.tolist(), *noise_classes.tolist()}):
        of_data, of_noise = int((classes == label).sum()), int((noise_classes == label).sum())
        if of_data != of_noise:
            return (
                f"class {label} has {of_data} rows of data and {of_noise} rows of noise. Classes must occur equally "
                "often on both sides: pair each data row's class with as many noise_condition= rows."
            )
    raise AssertionError


def condition_cost(data: Tensor, noise: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """Distance between the conditions of data rows and the conditions that noise rows are tagged with.

    Parameters
    ----------
    data, noise : (..., n, c), (..., m, c) floating Tensor
    metric : {"sqeuclidean", "cosine"}
    dtype : torch.dtype
        float32 or float64.

    Returns
    -------
    (..., n, m) Tensor
    """
    x, y = data.to(dtype), noise.to(dtype)
    if metric == "sqeuclidean":
        # Centred: conditions may lie far from the origin, where the expanded square cancels badly.
        centre = y.mean(-2, keepdim=True)
        x, y = x - centre, y - centre
    return cost_matrix(Operand(x), Operand(y), metric, shift_invariant=False)


def pair_condition_costs(data: Tensor, noise: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """Distance between the conditions of the rows of `data` and `noise`, each with its own.

    Parameters
    ----------
    data, noise : (n, c) floating Tensor
    metric : {"sqeuclidean", "cosine"}
    dtype : torch.dtype

    Returns
    -------
    (n,) Tensor
    """
    x, y = data.to(dtype), noise.to(dtype)
    if metric == "sqeuclidean":
        apart: Tensor = (x - y).square_().sum(1)
        return apart
    return condition_cost(x[:, None], y[:, None], metric, dtype).flatten()


def weight_for_ratio(distances: Tensor, conditions: Tensor, ratio: float) -> Tensor:
    """Find the weight at which a share of all pairs is still no dearer than the row's own noise.

    C2OT searches for the weight ``w`` at which ``(distances + w * conditions <= diagonal(distances)).mean()`` is
    `ratio`. That mean falls step by step as ``w`` grows, each pair leaving at a weight of its own, so that the answer
    is an order statistic of these.

    Parameters
    ----------
    distances : (n, n) Tensor
        True distances, not shifted.
    conditions : (n, n) Tensor
    ratio : float

    Returns
    -------
    0-d Tensor
        At least 0, and no more than it takes to keep every pair of different conditions out.

    References
    ----------
    Cheng and Schwing (2025), arXiv 2503.10636, Algorithm 1.
    """
    saving = distances.diagonal()[:, None] - distances
    # Where the conditions agree no weight changes anything: such a pair leaves never, or is out from the start.
    leaves_at = torch.where(conditions > 0, saving / conditions, torch.where(saving >= 0, torch.inf, -torch.inf))
    kept = max(1, round(ratio * distances.numel()))
    weights = leaves_at.flatten()
    limit = torch.where(weights.isinf(), 0.0, weights).amax()
    return weights.kthvalue(weights.numel() - kept + 1).values.minimum(limit).clamp_min(0.0)
