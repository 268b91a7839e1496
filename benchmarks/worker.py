"""The one process in which everything is timed.

All contenders of a session share a process, so that they meet the same memory, caches and thread pools, and their runs
are interleaved, so that a slow minute of the machine hits all of them. The process is a child: a solver that hangs or
crashes is ended and recorded, and the session goes on.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from couplings.ablation.memory import peak_bytes

from .child import Child, Ended
from .contenders import TASKS, exact
from .instances import Instance

__all__ = ["Worker", "certified_bound", "judge", "timed"]

PREPARE = 600.0  # seconds for imports, compilation and the instance
LOOP = 0.01  # seconds of short calls that are timed together


class Worker(Child):
    """A process that times one call after another.

    Parameters
    ----------
    threads : int
        For every thread pool in it.
    extra_path : str or None
        Folder with further packages.
    """

    def __init__(self, threads: int, extra_path: str | None) -> None:
        super().__init__(_serve, threads, extra_path, threads=threads)

    def run(self, task: str, name: str, family: str, n: int, timeout: float, *, memory: bool = False) -> dict[str, Any]:
        """Run a contender once.

        Parameters
        ----------
        task, name : str
            The contender.
        family : str
        n : int
        timeout : float
            Seconds for the call itself.
        memory : bool
            Whether to measure the memory that the call takes beyond what was there.

        Returns
        -------
        dict
            ``status`` and a ``note`` for ``"absent"`` and ``"failed"``; for ``"ok"`` the ``seconds``, the findings of
            `judge`, and ``memory`` in bytes (None where the system does not tell).
        """
        try:
            self.send((task, name, family, n, memory))
            reply = self.receive(PREPARE, "was not ready")
            if reply is None:
                reply = self.receive(timeout)
            if "seconds" in reply:
                reply.update(self.receive(PREPARE, "was not judged"))
        except Ended as error:
            return {"status": "failed", "note": str(error)}
        return reply


def _serve(connection: Connection, threads: int, extra_path: str | None) -> None:
    if extra_path is not None:
        sys.path.append(extra_path)
    import torch
    from threadpoolctl import threadpool_limits

    from couplings import warmup

    torch.set_num_threads(threads)
    entries = {(task, entry.name): entry for task, all_ in TASKS.items() for entry in all_}
    warm: set[tuple[str, str]] = set()
    key: tuple[str, int] | None = None
    while True:
        try:
            task, name, family, n, memory = connection.recv()
        except EOFError:
            return
        if key != (family, n):
            instance, judging, key = Instance.make(family, n), {}, (family, n)
        try:
            with threadpool_limits(threads), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                entry = entries[task, name]
                if (task, name) not in warm:
                    warmup()
                    if task != "start":  # takes as long again
                        entry.run(Instance.make(family, 32), threads)
                    warm.add((task, name))
                if task == "metric":
                    instance.distances(name)  # made once, and not timed
                call = partial(entry.run, instance, threads)
                connection.send(None)
                caught.clear()
                with _quiet():
                    seconds, answer, growth = _measured(call) if memory else (*timed(call), None)
        except ImportError as error:
            connection.send({"status": "absent", "note": str(error)})
        except Exception as error:  # whatever a solver raises is a finding about it
            connection.send({"status": "failed", "note": f"{type(error).__name__}: {error}"})
        else:
            note = "; ".join(sorted({str(warning.message) for warning in caught}))
            connection.send({"status": "ok", "seconds": seconds, "memory": growth, "note": note})
            connection.send(judge(task, instance, answer, judging))


@contextmanager
def _quiet() -> Any:
    gc.collect()
    gc.freeze()  # what is alive now need not be looked at before every call
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds that a call took, and its answer; a call that returns a float timed itself.

    Of a short call, the mean of as many as take `LOOP` seconds, as `timeit` does: the first one after a pause would
    time how long a core, its clock and its caches take to wake up.
    """
    start = time.perf_counter()
    answer = call()
    seconds = time.perf_counter() - start
    if isinstance(answer, float):
        return answer, None
    loops = int(LOOP / seconds)
    if loops > 1:
        start = time.perf_counter()
        for _ in range(loops):
            call()
        seconds = (time.perf_counter() - start) / loops
    return seconds, answer


def _measured(call: Callable[[], Any]) -> tuple[float, Any, int | None]:
    """Measure the memory of a call too, in bytes."""
    result: list[Any] = []
    growth = peak_bytes(lambda: result.extend(timed(call)))
    return result[0], result[1], growth


def judge(task: str, instance: Instance, answer: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Look at what a contender returned.

    Parameters
    ----------
    task : str
    instance : Instance
    answer : object
        An index for the solvers, a pair (data, noise) for couplings.
    known : dict
        Kept between calls with the same instance.

    Returns
    -------
    dict
        Solvers: ``total`` and ``gap``, relative to the best certified bound; no ``gap`` if the answer is no
        permutation. Couplings: ``reduction`` of the mean squared distance and ``kept``, the share of the noise that
        survives. Plans: ``column_error``, of the column sums, in sum. Nothing for the others.
    """
    if task in ("solve", "memory") and isinstance(answer, np.ndarray):
        n = len(instance.cost)
        if not np.array_equal(np.sort(answer), np.arange(n)):
            return {"total": None, "gap": None}
        if "bound" not in known:
            known["bound"] = certified_bound(instance.cost)
        bound, rounding = known["bound"]
        total = math.fsum(instance.cost[np.arange(n), answer.astype(np.int64)].astype(np.float64))
        above = total - bound
        return {"total": total, "gap": 0.0 if above <= rounding else above / max(abs(total), abs(bound))}
    if task == "couple":
        data, noise = answer
        before = (instance.data - instance.noise).square().sum().item()
        after = (data - noise).square().sum().item()
        kept = len(noise.flatten(1).unique(dim=0)) / len(noise)
        return {"reduction": 1 - after / before, "kept": kept}
    if task == "sinkhorn" and getattr(answer, "ndim", 0) == 2:
        return {"column_error": float((answer.double().sum(0) - 1 / len(answer)).abs().sum())}
    return {}


def certified_bound(cost: np.ndarray[Any, np.dtype[np.float32]]) -> tuple[float, float]:
    """Lower bound of every assignment's cost, from dual prices, evaluated here and not by the solver that gave them.

    Returns
    -------
    bound : float
        ``sum_j v_j + sum_i min_j (c_ij - v_j)`` in float64.
    rounding : float
        What the evaluation may have lost.
    """
    prices = exact(cost).prices
    rows = [float((row - prices).min()) for row in cost]  # in float64, as the prices are
    rounding = 4 * np.finfo(float).eps * (math.fsum(map(abs, rows)) + float(np.abs(prices).sum()))
    return math.fsum([*rows, *prices]), rounding
