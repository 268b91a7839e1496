"""What is measured of one cell, in the process that couples it.

A quality is the same in any process and on any number of threads, so qualities may be measured side by side. Times and
memory may not: they are measured by one process at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from couplings import diagnostics
from couplings.ablation.grid import Point
from couplings.ablation.memory import peak_bytes
from couplings.ablation.sources import Source, open_source
from couplings.assigners.registry import find
from couplings.comparison import Batch, Cell, Optimum, Timing, attempt, clock, measured, obstacle, solved, with_gap
from couplings.coupling import Coupled, Coupling

__all__ = ["Measurer", "quality_record"]

Record = dict[str, Any]

# Cells of a batch follow each other, so that its data and its optima are needed for a while and then no more.
_open = lru_cache(maxsize=4)(open_source)


@lru_cache(maxsize=2)
def _drawn(
    data: str, labels: str | None, rows: int, seed: int, candidates: int, condition: str | None
) -> tuple[Source, Batch, Tensor | None]:
    source = _open(data, labels)
    return source, *source.batch(rows, seed, candidates, condition)


def drawn(point: Point) -> tuple[Source, Batch, Tensor | None]:
    """Draw the batch of a point: the rows of all ranks, rank by rank."""
    return _drawn(
        point.data, point.labels, point.n * point.ranks, point.seed, point.candidates, point.condition
    )  # fmt: skip


@lru_cache(maxsize=16)
def _optimum(
    data: str, labels: str | None, rows: int, seed: int, candidates: int, condition: str | None, metric: str
) -> Optimum | None:
    return solved(_drawn(data, labels, rows, seed, candidates, condition)[1], metric)


class Measurer:
    """Measures cells, one after the other.

    Parameters
    ----------
    device : str
        Where the batches lie.
    repeats : int
        Timed calls of a cell.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = torch.device(device), repeats

    def quality(self, point: Point) -> Record:
        """Measure the pairs, not the time.

        Parameters
        ----------
        point : Point
            Of the local scope.

        Returns
        -------
        dict
            Plain values.
        """
        source, batch, labels = drawn(point)
        batch = self._moved(batch)
        cell, coupled = attempt(batch, point.coupling(), point.seed)
        if coupled is None:
            return quality_record(point, source, batch, cell, None, None, None)
        reference = None
        if point.quantize is not None:
            reference = attempt(batch, replace(point, quantize=None).coupling(), point.seed)[1]
        return quality_record(point, source, batch, cell, coupled, reference, labels)

    def time(self, point: Point) -> Record:
        """Measure the time of a cell by phase, and its memory.

        Parameters
        ----------
        point : Point
            Of the local scope; one that `quality` could measure.

        Returns
        -------
        dict
            Plain values.
        """
        batch = self._moved(drawn(point)[1])
        coupling = point.coupling()
        # The first call compiles, imports and fills caches; it is not timed.
        _, error = clock(batch, coupling, point.seed, 1)
        if error is None:
            timing, error = clock(batch, coupling, point.seed, self.repeats)
        if error is not None:
            return point.to_dict() | {"error": error}
        assert timing is not None
        return time_record(point, timing, self._memory(batch, coupling, point))

    def _memory(self, batch: Batch, coupling: Coupling, point: Point) -> int | None:
        def call() -> Coupled:
            noise = batch.noise if point.candidates > 1 else batch.noise[: len(batch.data)]
            generator = torch.Generator().manual_seed(point.seed)
            return coupling(batch.data, noise, condition=batch.condition, generator=generator)

        if self.device.type != "cuda":
            return peak_bytes(call)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _moved(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        condition = None if batch.condition is None else batch.condition.to(self.device)
        return Batch(batch.data.to(self.device), batch.noise.to(self.device), batch.name, condition)


def quality_record(
    point: Point,
    source: Source,
    batch: Batch,
    cell: Cell,
    coupled: Coupled | None,
    reference: Coupled | None,
    labels: Tensor | None,
) -> Record:
    """Put together what is known of a cell's pairs.

    Parameters
    ----------
    point : Point
    source : Source
    batch : Batch
        The rows of all ranks.
    cell : Cell
        Without a gap.
    coupled : Coupled or None
        None where the method was skipped or failed.
    reference : Coupled or None
        What the same method makes of the same rows without a quantizer.
    labels : (n,) Tensor or None

    Returns
    -------
    dict
        The fields of the point and of the cell, and ``shape``, ``rows``, ``digest``, ``leakage`` (the fields of
        `couplings.diagnostics.ClassLeakage`), ``rows_changed`` and ``reduction_lost`` by the quantizer.
    """
    record: Record = point.to_dict() | {
        "digest": source.digest,
        "shape": list(batch.data.shape[1:]),
        "rows": len(batch.data),
    }
    if coupled is not None:
        optimum = _optimum(
            point.data, point.labels, len(batch.data), point.seed, point.candidates, point.condition, point.metric
        )
        index = coupled.index
        cell = with_gap(cell, index, None if optimum is None else (optimum[0], optimum[1].to(index.device)))
        record["leakage"] = None if labels is None else _leakage(coupled.noise, labels, batch.data)
        if reference is not None:
            record["rows_changed"] = float((reference.index != index).double().mean())
            reached = diagnostics.distance_reduction(
                batch.data, batch.noise[: len(batch.data)], reference.noise, metric=point.metric
            )
            assert cell.reduction is not None
            record["reduction_lost"] = reached.reduction - cell.reduction
    kept = cell.to_dict()
    for name in ("n", "method", "metric", "quantize", "options", "seconds", "seconds_iqr", "phases", "repeats"):
        del kept[name]  # the point's own, or the other record's
    return record | kept


def _leakage(noise: Tensor, labels: Tensor, data: Tensor) -> Record | None:
    sizes = torch.bincount(labels)
    sizes = sizes[sizes > 0]
    if len(sizes) < 2 or int(sizes.min()) < 2:
        return None  # too few rows to tell
    found = diagnostics.class_leakage(noise, labels, data=data)
    z = found.z if math.isfinite(found.z) else None
    return {"accuracy": found.accuracy, "chance": found.chance, "z": z, "p_value": found.p_value}


def time_record(point: Point, timing: Timing, memory: int | None) -> Record:
    """Put together what is known of a cell's time.

    Parameters
    ----------
    point : Point
    timing : Timing
    memory : int or None
        Bytes.

    Returns
    -------
    dict
        The fields of the point, ``ms`` and ``ms_iqr``, ``phases_ms``, ``repeats``, ``threads`` and ``peak_bytes``.
    """
    return point.to_dict() | {
        "ms": 1e3 * timing.seconds,
        "ms_iqr": 1e3 * timing.seconds_iqr,
        "phases_ms": {name: 1e3 * seconds for name, seconds in timing.phases.items()},
        "repeats": timing.repeats,
        "threads": torch.get_num_threads(),
        "peak_bytes": memory,
    }


class RankMeasurer:
    """Measures cells of the global scope; every rank calls it with the same point.

    Parameters
    ----------
    rank, ranks : int
    repeats : int
    """

    def __init__(self, rank: int, ranks: int, repeats: int) -> None:
        self.rank, self.ranks, self.repeats = rank, ranks, repeats

    def measure(self, point: Point) -> Mapping[str, Record] | None:
        """Measure the pairs of all ranks, the time of the slowest, and the memory of the one that takes most.

        Parameters
        ----------
        point : Point

        Returns
        -------
        dict or None
            The records ``quality`` and ``time``, on rank 0.
        """
        source, batch, labels = drawn(point)
        coupling = point.coupling()
        info = find(coupling.method).info
        reason = obstacle(info, batch)
        if reason is None and point.candidates > 1:
            reason = "chooses among each row's own candidates, so stays local"
        if reason is not None:
            return self._skipped(point, source, batch, reason)
        mine = slice(self.rank * point.n, (self.rank + 1) * point.n)
        data, noise = batch.data[mine], batch.noise[: len(batch.data)][mine]
        condition = None if batch.condition is None else batch.condition[mine]

        def call(one: Coupling) -> Coupled:
            return one(data, noise, condition=condition, generator=torch.Generator().manual_seed(point.seed))

        # A method that is not installed or fails raises on every rank.
        coupled = self._gathered(call(coupling))
        reference = None
        if point.quantize is not None:
            reference = self._gathered(call(replace(point, quantize=None).coupling()))
        timing, memory = self._times(lambda: call(coupling)), self._peak(lambda: call(coupling))
        if self.rank:
            return None
        cell = Cell(
            info.name, point.metric, point.quantize, point.options,
            n=len(batch.data), noise_rows=len(batch.data), exact=info.exact, marginal=info.marginal,
        )  # fmt: skip
        cell = measured(cell, batch.data, batch.noise[: len(batch.data)], coupled)
        quality = quality_record(point, source, batch, cell, coupled, reference, labels)
        return {"quality": quality, "time": time_record(point, timing, memory)}

    def _skipped(self, point: Point, source: Source, batch: Batch, reason: str) -> Mapping[str, Record] | None:
        if self.rank:
            return None
        info = find(point.method).info
        cell = Cell(
            info.name, point.metric, point.quantize, point.options,
            n=len(batch.data), noise_rows=len(batch.noise), exact=info.exact, marginal=info.marginal, skipped=reason,
        )  # fmt: skip
        return {"quality": quality_record(point, source, batch, cell, None, None, None)}

    def _gathered(self, coupled: Coupled) -> Coupled:
        """Join the pairs of all ranks, as one process with all rows would have them."""
        import torch.distributed as dist

        index = [torch.empty_like(coupled.index) for _ in range(self.ranks)]
        noise = [torch.empty_like(coupled.noise) for _ in range(self.ranks)]
        dist.all_gather(index, coupled.index)
        dist.all_gather(noise, coupled.noise.contiguous())
        return replace(coupled, index=torch.cat(index), noise=torch.cat(noise))

    def _times(self, call: Any) -> Timing:
        import time

        import torch.distributed as dist

        taken, phases = [], []
        for _ in range(self.repeats):
            dist.barrier()
            start = time.perf_counter()
            coupled = call()
            slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken.append(slowest.item())
            phases.append({phase.name: phase.seconds for phase in coupled.trace.phases})
        return Timing.of(taken, phases)

    def _peak(self, call: Any) -> int | None:
        import torch.distributed as dist

        most = torch.tensor(peak_bytes(call) or 0, dtype=torch.int64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most) or None
