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

__all__ = ["CANDIDATES", "Batch", "Cell", "compare", "grid", "obstacle"]

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

    Raises
    ------
    TypeError, ValueError
        If the two cannot be coupled.
    """

    data: Tensor
    noise: Tensor
    name: str

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
        cell, index = _run(batch, coupling, seed, repeats)
        cells.append(cell)
        indices.append(index)
    optima = {}
    for metric in dict.fromkeys(str(coupling.metric) for coupling in couplings):
        optima[metric] = _optimum(batch, metric, cells, indices)
    return [_with_gap(cell, index, optima[cell.metric]) for cell, index in zip(cells, indices, strict=True)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _run(batch: Batch, coupling: Coupling, seed: int, repeats: int) -> tuple[Cell, Tensor | None]:
    info = find(coupling.method).info
    data = batch.data
    noise = batch.noise if _takes_candidates(info) else batch.noise[: len(data)]
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
            coupled = coupling(data, noise, generator=_generator(seed))
            times = _times(lambda: coupling(data, noise, generator=_generator(seed)), repeats)
        except Exception as error:
            # Whatever a method raises, a third party's too, belongs in its cell: the others' results stand.
            return replace(cell, error=f"{type(error).__name__}: {error}", notes=tuple(dict.fromkeys(notes))), None
    low, high = np.percentile(times, [25, 75])
    measured = replace(
        _measured(cell, data, noise, coupled),
        seconds=median(times),
        seconds_iqr=float(high - low),
        repeats=len(times),
        notes=tuple(dict.fromkeys(notes)),
    )
    return measured, coupled.index


def _times(call: Callable[[], Coupled], repeats: int) -> list[float]:
    """Seconds of each call, on a clock that waits for the device."""
    from torch.utils.benchmark import timer

    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < _TIME_PER_CELL):
        start = timer()
        call()
        times.append(timer() - start)
    return times


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


def _measured(cell: Cell, data: Tensor, noise: Tensor, coupled: Coupled) -> Cell:
    """Measure the pairs on the tensors themselves, not on what the coupling says of them."""
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


def _optimum(
    batch: Batch, metric: str, cells: Sequence[Cell], indices: Sequence[Tensor | None]
) -> tuple[float, Tensor] | None:
    """Least cost over all permutations and the rows that reach it; None if nobody knows."""
    from couplings.diagnostics import distance_reduction

    found = [
        (cell.cost, index)
        for cell, index in zip(cells, indices, strict=True)
        if cell.exact and cell.metric == metric and cell.quantize is None and (cell.certified_gap or 0.0) <= _OPTIMAL
        if cell.cost is not None and index is not None
    ]
    if not found and len(batch.data) <= _ROWS_TO_SOLVE:
        data, noise = batch.data, batch.noise[: len(batch.data)]
        coupled = Coupling("auction", metric)(data, noise)
        return distance_reduction(data, noise, coupled.noise, metric=metric).after, coupled.index
    return min(found, key=lambda pair: pair[0], default=None)


def _with_gap(cell: Cell, index: Tensor | None, optimum: tuple[float, Tensor] | None) -> Cell:
    if optimum is None or index is None or cell.cost is None or cell.noise_rows > cell.n:
        return cell
    least, reference = optimum
    gap = cell.cost - least
    if cell.marginal == "permutation":
        gap = max(0.0, gap)  # below the optimum by rounding only
    if gap:
        gap = gap / abs(least) if least else math.inf
    return replace(cell, gap=gap, agreement=float((index == reference).double().mean()))
