"""Methods, metrics and quantizers held against each other on one batch: time, distance, optimum, marginal.

A `Cell` is one of each. All cells couple the same rows; what a cell reports about its pairs is recomputed in float64
from the noise that came back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couplings import inputs
from couplings._names import unknown
from couplings.assigners.registry import MethodInfo, find, methods
from couplings.coupling import Coupled, Coupling
from couplings.environment import missing_packages
from couplings.stages import recorded

__all__ = [
    *("CANDIDATES", "Batch", "Cell", "Optimum", "Timing"),
    *("attempt", "clock", "compare", "grid", "obstacle", "solved", "with_gap"),
]

# Candidates per row for methods such as `nearest`, where the noise is ours to draw.
CANDIDATES = 4

# A cell is not timed again once its runs have taken this long together, in seconds.
_TIME_PER_CELL = 10.0

# Up to this many rows, the optimum is found even if no exact method is compared: it takes a second at most.
_ROWS_TO_SOLVE = 4096

# An answer with a larger certified gap (a time limit, a tolerance) is no reference for the others.
_OPTIMAL = 1e-6


@dataclass(frozen=True, eq=False)
class Batch:
    """What every cell couples.

    Attributes
    ----------
    data : (n, *shape) Tensor
    noise : (k*n, *shape) Tensor
        Methods that choose among candidates get all of it, the others its first n rows.
    name : str
        What the data is, for people.
    condition : (n,) integer or (n, c) floating Tensor, optional
        What every coupling is conditioned on.

    Raises
    ------
    TypeError, ValueError
        If the two cannot be coupled.
    """

    data: Tensor
    noise: Tensor
    name: str
    condition: Tensor | None = None

    def __post_init__(self) -> None:
        inputs.check_pair(self.data, self.noise)
        for value, name in ((self.data, "data"), (self.noise, "noise")):
            inputs.working_copy(value, name)
        if len(self.noise) % len(self.data):
            msg = (
                f"noise must have as many rows as data, or k times as many for methods that choose among candidates: "
                f"got {len(self.noise)} for {len(self.data)}."
            )
            raise ValueError(msg)

    @property
    def candidates(self) -> int:
        """Rows of noise per row of data."""
        return len(self.noise) // len(self.data)


@dataclass(frozen=True)
class Cell:
    """What one method did under one metric and quantizer.

    Attributes
    ----------
    method, metric : str
    quantize : str or None
    options : dict
        What the method was given beside its defaults.
    n, noise_rows : int
        Rows of data, and of noise that it could choose from.
    exact : bool
        Whether the method declares that it reaches the optimum.
    marginal : str
        What it declares to have done to the noise.
    rows_used : int or None
        Different rows of noise among the pairs: n for a permutation.
    drift : dict or None
        `couplings.diagnostics.marginal_drift` of the coupled noise against the noise that was offered; zeros where
        the rows are the same.
    cost, cost_before : float or None
        Mean distance of the pairs, after and before.
    reduction : float or None
        ``1 - cost / cost_before``.
    gap : float or None
        ``(cost - optimum) / optimum``, the optimum being the least cost that an exact method reached without a
        quantizer. None where there is none, or where the method chose from more noise than the optimum.
    certified_gap : float or None
        The method's own upper bound, from dual prices, for the matrix that it solved (after quantization).
    agreement : float or None
        Share of rows with the same noise as in the optimum. Ties make it less than 1 without a loss.
    seconds, seconds_iqr : float or None
        Median time of a call, and the range of the middle half of the runs.
    phases : dict or None
        Median seconds by phase: see `couplings.phases`.
    repeats : int
        Runs that were timed.
    notes : tuple of str
        Warnings that were logged.
    skipped, error : str or None
        Why there is no result.
    """

    method: str
    metric: str
    quantize: str | None
    options: Mapping[str, Any]
    n: int
    noise_rows: int
    exact: bool
    marginal: str
    rows_used: int | None = None
    drift: Mapping[str, float] | None = None
    cost: float | None = None
    cost_before: float | None = None
    reduction: float | None = None
    gap: float | None = None
    certified_gap: float | None = None
    agreement: float | None = None
    seconds: float | None = None
    seconds_iqr: float | None = None
    phases: Mapping[str, float] | None = None
    repeats: int = 0
    notes: tuple[str, ...] = ()
    skipped: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that strict JSON can hold: what is not finite becomes None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grid(
    names: Sequence[str] | None,
    metrics: Sequence[str],
    quantizers: Sequence[str | None],
    options: Mapping[str, Any],
) -> list[Coupling]:
    """Every combination, each once.

    Parameters
    ----------
    names : sequence of str or None
        Methods; None for all that are registered.
    metrics, quantizers : sequence
    options : mapping
        ``name`` goes to every method that takes it, ``method.name`` to that method.

    Returns
    -------
    list of Coupling
        Metric by metric, quantizer by quantizer, method by method.

    Raises
    ------
    ValueError
        For an unknown name.
    TypeError
        For an option that none of the methods takes.
    """
    chosen = [info.name for info in methods()] if names is None else [find(name).info.name for name in names]
    chosen = list(dict.fromkeys(chosen))
    taken: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for option, value in options.items():
        for name in _takers(option, chosen):
            taken[name][option.rpartition(".")[2]] = value
    couplings = [
        Coupling(name, metric, quantizer, **taken[name])
        for metric in metrics
        for quantizer in quantizers
        for name in chosen
    ]
    return [coupling for i, coupling in enumerate(couplings) if coupling not in couplings[:i]]


def _takers(option: str, names: Sequence[str]) -> list[str]:
    """Methods that an option is meant for."""
    method, _, name = option.rpartition(".")
    if method:
        key = find(method).info.name
        if key not in names:
            msg = f"the option {option} is for the method {key}, which is not compared. Compared: {', '.join(names)}."
            raise ValueError(msg)
        return [key]
    known = {key: find(key).option_names for key in names}
    takers = [key for key, options in known.items() if options is None or name in options]
    if not takers:
        all_options = {each for options in known.values() for each in options or ()}
        raise TypeError(unknown("option of the methods compared:", name, all_options))
    return takers


def obstacle(info: MethodInfo, batch: Batch) -> str | None:
    """Say why a method cannot run here on this batch; None if it can."""
    for extra in info.requires:
        packages = missing_packages(extra)
        if packages:
            return f"{', '.join(packages)} not installed: pip install 'couplings[{extra}]'"
    if _takes_candidates(info) and batch.candidates == 1:
        n = len(batch.data)
        return f"chooses among k > 1 candidates per row: needs k * {n} rows of noise, got {n}"
    return None


def _takes_candidates(info: MethodInfo) -> bool:
    return info.needs == "points" and info.marginal == "selected"


def compare(
    batch: Batch,
    couplings: Sequence[Coupling],
    *,
    seed: int = 0,
    repeats: int = 5,
    on_start: Callable[[Coupling], None] = lambda coupling: None,
) -> list[Cell]:
    """Run every coupling on the batch.

    Parameters
    ----------
    batch : Batch
    couplings : sequence of Coupling
        With the method and the metric given by name.
    seed : int
        Of the generator of every call.
    repeats : int
        Timed calls of each, fewer for those that take longer than ten seconds in all; one call before them is not
        timed.
    on_start : callable
        Called with each coupling before it runs.

    Returns
    -------
    list of Cell
        In the order of `couplings`. One that cannot run here has `skipped` set, one that failed `error`.

    Notes
    -----
    Call `couplings.warmup` first: compiling takes longer than coupling.
    """
    cells, indices = [], []
    for coupling in couplings:
        on_start(coupling)
        cell, coupled = attempt(batch, coupling, seed)
        if coupled is not None:
            timing, error = clock(batch, coupling, seed, repeats)
            cell = replace(cell, error=error) if timing is None else replace(cell, **vars(timing))
        cells.append(cell)
        indices.append(None if coupled is None or cell.error else coupled.index)
    optima = {}
    for metric in dict.fromkeys(str(coupling.metric) for coupling in couplings):
        optima[metric] = _optimum(batch, metric, cells, indices)
    return [with_gap(cell, index, optima[cell.metric]) for cell, index in zip(cells, indices, strict=True)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(batch: Batch, info: MethodInfo) -> Tensor:
    return batch.noise if _takes_candidates(info) else batch.noise[: len(batch.data)]


def attempt(batch: Batch, coupling: Coupling, seed: int) -> tuple[Cell, Coupled | None]:
    """Couple once, and measure the pairs.

    Parameters
    ----------
    batch : Batch
    coupling : Coupling
    seed : int
        Of the generator.

    Returns
    -------
    Cell, Coupled or None
        The cell without times and without a gap; no result where the method was skipped or failed.
    """
    info = find(coupling.method).info
    data, noise = batch.data, _noise(batch, info)
    cell = Cell(
        method=info.name,
        metric=str(coupling.metric),
        quantize=coupling.quantize,
        options=coupling.options,
        n=len(data),
        noise_rows=len(noise),
        exact=info.exact,
        marginal=info.marginal,
    )
    reason = obstacle(info, batch)
    if reason is not None:
        return replace(cell, skipped=reason), None
    with _collected_warnings() as notes:
        try:
            coupled = coupling(data, noise, condition=batch.condition, generator=_generator(seed))
        except Exception as error:
            # Whatever a method raises, a third party's too, belongs in its cell: the others' results stand.
            return replace(cell, error=_said(error), notes=tuple(dict.fromkeys(notes))), None
    return replace(measured(cell, data, noise, coupled), notes=tuple(dict.fromkeys(notes))), coupled


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Timing:
    """How long the calls of one coupling took.

    Attributes
    ----------
    seconds, seconds_iqr : float
        Median, and the range of the middle half.
    repeats : int
    phases : dict
        Median seconds by phase.
    """

    seconds: float
    seconds_iqr: float
    repeats: int
    phases: Mapping[str, float]

    @classmethod
    def of(cls, seconds: Sequence[float], phases: Sequence[Mapping[str, float]]) -> Timing:
        """Summarise the runs."""
        low, high = np.percentile(seconds, [25, 75])
        by_name = {name: median(run[name] for run in phases) for name in (phases[0] if phases else ())}
        return cls(median(seconds), float(high - low), len(seconds), by_name)


def clock(batch: Batch, coupling: Coupling, seed: int, repeats: int) -> tuple[Timing | None, str | None]:
    """Time a coupling, on a clock that waits for the device.

    Parameters
    ----------
    batch : Batch
    coupling : Coupling
        Called before: the first call of a method compiles or imports.
    seed : int
    repeats : int
        Calls, fewer where they take longer than ten seconds in all.

    Returns
    -------
    Timing or None, str or None
        The times, or what was raised.
    """
    from torch.utils.benchmark import timer

    noise = _noise(batch, find(coupling.method).info)
    times: list[float] = []
    phases: list[Mapping[str, float]] = []
    with _collected_warnings():
        try:
            while not times or (len(times) < repeats and sum(times) < _TIME_PER_CELL):
                with recorded(timer) as record:
                    coupling(batch.data, noise, condition=batch.condition, generator=_generator(seed))
                times.append(sum(record.seconds.values()))
                phases.append(record.seconds)
        except Exception as error:  # as in `attempt`
            return None, _said(error)
    return Timing.of(times, phases), None


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Catch what the library logs, so that it can be shown beside the cell that it is about."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    collector, logger = Collector(logging.WARNING), logging.getLogger("couplings")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate


def measured(cell: Cell, data: Tensor, noise: Tensor, coupled: Coupled) -> Cell:
    """Measure the pairs on the tensors themselves, not on what the coupling says of them.

    Parameters
    ----------
    cell : Cell
    data : (n, *shape) Tensor
    noise : (m, *shape) Tensor
        As it was offered.
    coupled : Coupled

    Returns
    -------
    Cell
    """
    from couplings.diagnostics import distance_reduction, marginal_drift

    distance = distance_reduction(data, noise[: len(data)], coupled.noise, metric=cell.metric)
    used = len(torch.unique(coupled.index))
    if used == len(noise) and torch.equal(coupled.noise, noise[coupled.index]):
        # The same rows in another order: every statistic of them is the same, and need not be computed.
        drift = dict.fromkeys(("mean", "variance", "kurtosis", "norm", "ks"), 0.0)
    else:
        moved = asdict(marginal_drift(coupled.noise, noise))
        drift = {name: moved[name] for name in ("mean", "variance", "kurtosis", "norm", "ks")}
    return replace(
        cell,
        marginal=coupled.marginal,
        rows_used=used,
        drift=drift,
        cost=distance.after,
        cost_before=distance.before,
        reduction=distance.reduction,
        certified_gap=coupled.gap,
    )


Optimum = tuple[float, Tensor]
"""The least cost over all permutations, and the rows that reach it."""


def solved(batch: Batch, metric: str) -> Optimum | None:
    """Find the optimum; None if the batch is too large to solve on the side."""
    from couplings.diagnostics import distance_reduction

    if len(batch.data) > _ROWS_TO_SOLVE:
        return None
    data, noise = batch.data, batch.noise[: len(batch.data)]
    coupled = Coupling("auction", metric)(data, noise, condition=batch.condition)
    return distance_reduction(data, noise, coupled.noise, metric=metric).after, coupled.index


def _optimum(batch: Batch, metric: str, cells: Sequence[Cell], indices: Sequence[Tensor | None]) -> Optimum | None:
    found = [
        (cell.cost, index)
        for cell, index in zip(cells, indices, strict=True)
        if cell.exact and cell.metric == metric and cell.quantize is None and (cell.certified_gap or 0.0) <= _OPTIMAL
        if cell.cost is not None and index is not None
    ]
    if not found:
        return solved(batch, metric)
    return min(found, key=lambda pair: pair[0])


def with_gap(cell: Cell, index: Tensor | None, optimum: Optimum | None) -> Cell:
    """Hold a cell's cost and pairs against the optimum, where both are known and comparable."""
    if optimum is None or index is None or cell.cost is None or cell.noise_rows > cell.n:
        return cell
    least, reference = optimum
    gap = cell.cost - least
    if cell.marginal == "permutation":
        gap = max(0.0, gap)  # below the optimum by rounding only
    if gap:
        gap = gap / abs(least) if least else math.inf
    return replace(cell, gap=gap, agreement=float((index == reference).double().mean()))
