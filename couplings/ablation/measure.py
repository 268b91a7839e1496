"""What is measured of a coupling: the pairs that it makes, and the time and memory that it takes.

What is told of the pairs is recomputed in float64 from the noise that came back. It is the same in any process and on
any number of threads, so qualities may be measured side by side; times and memory by one process at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from logging.handlers import BufferingHandler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couplings.ablation.environment import missing_packages, plugin
from couplings.ablation.grid import Point, chooses
from couplings.ablation.memory import peak_bytes
from couplings.ablation.sources import Batch, Source, open_source
from couplings.assigners.registry import find
from couplings.coupling import Coupled, Coupling
from couplings.diagnostics import class_leakage, distance_reduction, marginal_drift
from couplings.stages import recorded

__all__ = ["Measurer", "Ranks", "compare", "obstacle", "optimum", "quality", "timing"]

Record = dict[str, Any]
Optimum = tuple[float, Tensor]

# A coupling is not timed again once its calls have taken this long together, in seconds.
_TIME_PER_CELL = 10.0

# A mean of n rows that is further off than this many standard errors is not by chance.
_CHANCE = 6.0

# Up to this many rows, the optimum is found even if no exact method is compared: it takes a second at most.
_ROWS_TO_SOLVE = 4096


@dataclass(frozen=True)
class Ranks:
    """The processes that couple a batch together, of which this is one; by default it is alone."""

    rank: int = 0
    size: int = 1

    def share(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank."""
        n = len(rows) // self.size
        return rows[self.rank * n : (self.rank + 1) * n]

    def join(self, coupled: Coupled[Any]) -> Coupled[Any]:
        """Return the pairs of all ranks, as one process with all rows would have them."""
        if self.size == 1:
            return coupled
        return replace(coupled, index=self._gather(coupled.index), noise=self._gather(coupled.noise.contiguous()))

    def _gather(self, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)

    def largest(self, value: float) -> float:
        """Return the largest value that any rank has; every rank waits for the others."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
        return held.item()


ALONE = Ranks()


def obstacle(coupling: Coupling, batch: Batch) -> str | None:
    """Reason why a coupling cannot run here on this batch; None if it can."""
    for extra in find(coupling.method).info.requires:
        packages = missing_packages(extra)
        if packages:
            return f"{', '.join(packages)} not installed: pip install 'couplings[{extra}]'"
    if chooses(str(coupling.method)):
        n = len(batch.data)
        if coupling.scope == "global":
            return "chooses among each row's own candidates, so stays local"
        if len(batch.noise) == n:
            return f"chooses among k > 1 candidates per row: needs k * {n} rows of noise, got {n}"
    return None


def quality(
    batch: Batch, coupling: Coupling, seed: int, optimum: Optimum | None, ranks: Ranks = ALONE
) -> tuple[Record, Coupled[Any] | None]:
    """Couple once, and measure the pairs (on rank 0).

    Parameters
    ----------
    batch : Batch
        The rows of all ranks.
    coupling : Coupling
    seed : int
        Of the generator.
    optimum : (float, (n,) Tensor) or None
        From `optimum`; None if it is not known.
    ranks : Ranks

    Returns
    -------
    dict
        - ``noise_rows``: rows of noise that could be chosen from.
        - ``exact``, ``marginal``: what the method declares.
        - ``plugin``: `couplings.ablation.environment.plugin` of the method; None if it is built in.
        - ``broken``: what became of the noise that the method's marginal does not allow, as measured; None if nothing.
        - ``rows_used``: different rows of noise among the pairs, n for a permutation.
        - ``drift``: of the coupled noise against the noise that was offered, as `couplings.diagnostics.marginal_drift`
          measures it; zeros where the rows are the same.
        - ``cost``, ``cost_before``, ``reduction``: mean distance of the pairs, after and before.
        - ``gap``: ``(cost - optimum) / |optimum|``; None where it is unknown, or the method chose from more noise.
        - ``certified_gap``: the method's own upper bound, for the matrix that it solved (after quantization).
        - ``agreement``: share of rows with the same noise as in the optimum; ties make it less than 1 without a loss.
        - ``notes``: warnings that were logged. ``skipped``, ``error``: why there is no result.
    Coupled or None
        The pairs of all ranks; None where the method was skipped or failed.
    """
    info = find(coupling.method).info
    measured = ("broken", "rows_used", "drift", "cost", "cost_before", "reduction", "gap", "certified_gap", "agreement")
    record: Record = {
        "noise_rows": len(_offered(batch, coupling)),
        "exact": info.exact,
        "marginal": info.marginal,
        "plugin": plugin(str(coupling.method)),
        **dict.fromkeys(measured),
        "notes": [],
        "skipped": obstacle(coupling, batch),
        "error": None,
    }
    if record["skipped"] is not None:
        return record, None
    with _logged() as notes:
        try:
            coupled = ranks.join(_couple(batch, coupling, seed, ranks))
        except Exception as error:  # whatever a method raises belongs in its record: the others' results stand
            record["error"], coupled = _said(error), None
    record["notes"] = list(dict.fromkeys(note.getMessage() for note in notes))
    if coupled is not None and ranks.rank == 0:
        record |= _pairs(batch, coupling, coupled, optimum)
    return record, coupled


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _offered(batch: Batch, coupling: Coupling) -> Tensor:
    return batch.noise if chooses(str(coupling.method)) else batch.noise[: len(batch.data)]


def _couple(batch: Batch, coupling: Coupling, seed: int, ranks: Ranks) -> Coupled[Any]:
    return coupling(
        ranks.share(batch.data),
        ranks.share(_offered(batch, coupling)),
        condition=None if batch.condition is None else ranks.share(batch.condition),
        generator=torch.Generator().manual_seed(seed),
    )


@contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    """Catch what the library logs, so that it can be shown beside what it is about."""
    handler, logger = BufferingHandler(capacity=1_000_000), logging.getLogger("couplings")
    handler.setLevel(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _pairs(batch: Batch, coupling: Coupling, coupled: Coupled[Any], optimum: Optimum | None) -> Record:
    n, noise = len(batch.data), _offered(batch, coupling)
    distance = distance_reduction(batch.data, noise[:n], coupled.noise, metric=str(coupling.metric))
    used = len(torch.unique(coupled.index))
    drift: Record = dict.fromkeys(("mean", "variance", "kurtosis", "norm", "ks"), 0.0)
    # The same rows in another order have the same statistics, which need not be computed.
    if used != len(noise) or not torch.equal(coupled.noise, noise[coupled.index]):
        moved = asdict(marginal_drift(coupled.noise, noise))
        drift = {name: _finite(moved[name]) for name in drift}
    record: Record = {
        "marginal": coupled.marginal,
        "broken": _broken(batch.data, noise, coupled),
        "rows_used": used,
        "drift": drift,
        "cost": distance.after,
        "cost_before": distance.before,
        "reduction": distance.reduction,
        "certified_gap": _finite(coupled.gap),
    }
    if optimum is not None and len(noise) == n:
        least, index = optimum
        excess = distance.after - least
        if coupled.marginal == "permutation":
            excess = max(0.0, excess)  # below the optimum by rounding only
        record["gap"] = excess / abs(least) if least else None if excess else 0.0
        record["agreement"] = float((coupled.index == index.to(coupled.index.device)).double().mean())
    return record


def _broken(data: Tensor, noise: Tensor, coupled: Coupled[Any]) -> str | None:
    """Say how the coupled noise departs from a declared marginal, beyond chance.

    Rows that have the right law averaged over data move the mean of any function of a row by about its standard
    deviation over the root of n, or less; the bounds are wide enough for all cells of an ablation together.
    """
    index, n = coupled.index.to(noise.device), len(coupled.index)
    if coupled.marginal == "selected":
        return None
    if coupled.marginal == "permutation":
        used = len(torch.unique(index))
        return None if used == n else f"declares 'permutation', but used {used} different rows of noise for {n}"
    rows, centre = noise.flatten(1).double(), data.flatten(1).double().mean(0)
    functions = {
        "squared norm": rows.square().sum(1),
        "mean": rows.mean(1),
        "component along the mean of the data": rows @ centre,
        "fourth power": rows.pow(4).sum(1),
    }
    for name, values in functions.items():
        moved = float((values[index].mean() - values.mean()) / values.std(correction=0).clamp_min(1e-300))
        if abs(moved) * math.sqrt(n) > _CHANCE:
            return (
                f"declares 'resampled', but moved the {name} of the noise by {moved:+.1f} standard deviations "
                f"({abs(moved) * math.sqrt(n):.0f} times what chance does)"
            )
    return None


def _finite(value: float | None) -> float | None:
    """None for what strict JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


@lru_cache(maxsize=16)
def optimum(batch: Batch, metric: str) -> Optimum:
    """Find the least mean distance over all permutations, and the ``(n,)`` rows of noise that reach it."""
    data, noise = batch.data, batch.noise[: len(batch.data)]
    coupled = Coupling("auction", metric)(data, noise, condition=batch.condition)
    return distance_reduction(data, noise, coupled.noise, metric=metric).after, coupled.index


def timing(batch: Batch, coupling: Coupling, seed: int, repeats: int, ranks: Ranks = ALONE) -> Record:
    """Time a coupling that has been called before, on the slowest rank.

    Returns
    -------
    dict
        ``seconds`` and ``seconds_iqr``, the median and the range of the middle half; ``phases``, median seconds by
        phase; ``repeats``, as many as asked unless they take longer than ten seconds in all.
    """
    totals: list[float] = []
    phases: list[Mapping[str, float]] = []
    with _logged():
        while not totals or (len(totals) < repeats and sum(totals) < _TIME_PER_CELL):
            ranks.largest(0.0)  # begin together
            by_phase, seconds = _seconds(lambda: _couple(batch, coupling, seed, ranks))
            phases.append(by_phase)
            totals.append(ranks.largest(seconds))
    low, high = np.percentile(totals, [25, 75])
    return {
        "seconds": float(np.median(totals)),
        "seconds_iqr": float(high - low),
        "phases": {name: float(np.median([run[name] for run in phases])) for name in phases[0]},
        "repeats": len(totals),
    }


def _seconds(call: Callable[[], object]) -> tuple[Mapping[str, float], float]:
    """Seconds of a call by stage and in all, on a clock that waits for the device."""
    from torch.utils.benchmark import timer

    with recorded(timer) as record:
        call()
    return record.seconds, sum(record.seconds.values())


def compare(
    batch: Batch, points: Sequence[Point], *, repeats: int = 5, on_start: Callable[[int], None] = lambda done: None
) -> list[Record]:
    """Measure couplings on one batch, in this process.

    Parameters
    ----------
    batch : Batch
    points : sequence of Point
        Only their method, metric, quantizer, options and seed are used.
    repeats : int
        Timed calls of each; one call before them is not timed.
    on_start : callable
        Called before each with the number of those that are done.

    Returns
    -------
    list of dict
        In the order of `points`: ``data``, ``seed``, ``label`` (the method with its options), ``method``, ``metric``,
        ``quantize``, ``options``, ``n``, and what `quality` and `timing` tell.
    """
    solve = len(batch.data) <= _ROWS_TO_SOLVE or any(find(point.method).info.exact for point in points)
    records: list[Record] = []
    for point in points:
        on_start(len(records))
        coupling = point.coupling()
        pairs, coupled = quality(batch, coupling, point.seed, optimum(batch, point.metric) if solve else None)
        head = {"data": batch.name, "seed": point.seed, "label": point.label}
        record = head | coupling.to_dict() | {"n": len(batch.data)} | pairs
        record |= {"seconds": None, "seconds_iqr": None, "phases": None, "repeats": 0}
        del record["scope"]
        if coupled is not None:
            try:
                record |= timing(batch, coupling, point.seed, repeats)
            except Exception as error:  # as in `quality`
                record["error"] = _said(error)
        records.append(record)
    return records


# Cells of a batch follow each other, so that its data and its optima are needed for a while and then no more.
_open = lru_cache(maxsize=4)(open_source)


@lru_cache(maxsize=2)
def _drawn(
    data: str, labels: str | None, rows: int, seed: int, candidates: int, condition: str | None, device: str
) -> tuple[Source, Batch]:
    source = _open(data, labels)
    return source, source.batch(rows, seed, candidates, condition).to(device)


class Measurer:
    """Measures the cells of an ablation, one after the other, into the records of its file.

    Parameters
    ----------
    device : str
        Where the batches lie.
    repeats : int
        Timed calls of a cell.
    ranks : Ranks
        Every rank is given the same cells; the records are those of rank 0.
    """

    def __init__(self, device: str, repeats: int, ranks: Ranks = ALONE) -> None:
        self.device, self.repeats, self.ranks = device, repeats, ranks

    def measure(self, point: Point, tasks: Sequence[str]) -> dict[str, Record]:
        """Return the records of a cell by task: ``"quality"``, ``"time"``; no time where there is no quality."""
        found = {}
        for task in tasks:
            try:
                found[task] = self.quality(point) if task == "quality" else self.time(point)
            except Exception as error:  # as in `quality`: the others' results stand
                found[task] = point.to_dict() | {"error": _said(error)}
            if found[task].get("skipped") or found[task].get("error"):
                break
        return found

    def _batch(self, point: Point) -> tuple[Source, Batch]:
        origin = (point.data, point.labels, point.rows, point.seed, point.candidates, point.condition)
        return _drawn(*origin, self.device)

    def quality(self, point: Point) -> Record:
        """Measure the pairs.

        Returns
        -------
        dict
            The fields of the point and of `quality`, and ``digest``, ``shape``, ``rows`` (of all ranks), ``leakage``
            (fields of `couplings.diagnostics.ClassLeakage`), and what the quantizer changed: ``rows_changed`` (a share)
            and ``reduction_lost``.
        """
        source, batch = self._batch(point)
        n, first = len(batch.data), self.ranks.rank == 0
        least = optimum(batch, point.metric) if first and n <= _ROWS_TO_SOLVE else None
        record, coupled = quality(batch, point.coupling(), point.seed, least, self.ranks)
        unrounded = None
        if point.quantize is not None and coupled is not None:
            plain = replace(point, quantize=None).coupling()
            with _logged():
                unrounded = self.ranks.join(_couple(batch, plain, point.seed, self.ranks))
        if coupled is not None and first:
            record["leakage"] = None if batch.labels is None else _leakage(coupled.noise, batch.labels, batch.data)
            if unrounded is not None:
                record["rows_changed"] = float((unrounded.index != coupled.index).double().mean())
                reached = distance_reduction(batch.data, batch.noise[:n], unrounded.noise, metric=point.metric)
                record["reduction_lost"] = reached.reduction - record["reduction"]
        head = {"digest": source.digest, "shape": list(batch.data.shape[1:]), "rows": n}
        return point.to_dict() | head | record

    def time(self, point: Point) -> Record:
        """Measure time and memory of a cell that `quality` could measure.

        Returns
        -------
        dict
            The fields of the point, ``ms`` and ``ms_iqr``, ``phases_ms``, ``repeats``, ``threads``, ``peak_bytes`` and
            ``plugin``.
        """
        batch, coupling = self._batch(point)[1], point.coupling()

        def call() -> Coupled[Any]:
            return _couple(batch, coupling, point.seed, self.ranks)

        with _logged():
            call()  # the first call compiles, imports and fills caches
            found = timing(batch, coupling, point.seed, self.repeats, self.ranks)
            memory = self.ranks.largest(peak_bytes(call, self.device) or 0)
        return point.to_dict() | {
            "ms": 1e3 * found["seconds"],
            "ms_iqr": 1e3 * found["seconds_iqr"],
            "phases_ms": {name: 1e3 * seconds for name, seconds in found["phases"].items()},
            "repeats": found["repeats"],
            "threads": torch.get_num_threads(),
            "peak_bytes": int(memory) or None,
            "plugin": plugin(point.method),
        }


def _leakage(noise: Tensor, labels: Tensor, data: Tensor) -> Record | None:
    sizes = torch.bincount(labels)
    sizes = sizes[sizes > 0]
    if len(sizes) < 2 or int(sizes.min()) < 2:
        return None  # too few rows to tell
    found = class_leakage(noise, labels, data=data)
    return {"accuracy": found.accuracy, "chance": found.chance, "z": _finite(found.z), "p_value": found.p_value}
