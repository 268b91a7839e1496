"""What is timed: our functions, the solvers of other packages, and the couplings that trainers use today.

A contender turns an instance into a call without arguments, and that call is what the clock sees. Everything a user
would have to do is in it: conversion, checks, the index as an array. A call that returns a float timed itself.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .instances import CROPS, Instance
from .record import ROOT

__all__ = ["COLUMN_ERROR", "OURS", "TASKS", "Contender", "contenders", "exact"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One entry of a task.

    Attributes
    ----------
    name : str
    package : str or None
        The distribution it needs; None for this library and what it depends on.
    make : callable
        ``make(instance, threads)`` returns the call to be timed; raises ImportError where the package is absent.
    exact : bool
        Whether it claims an optimum.
    crops_only : bool
        Whether it needs the points, not just the cost.
    smallest : int
        The least number of rows that it is timed with.
    """

    name: str
    package: str | None
    make: Callable[[Instance, int], Call]
    exact: bool = True
    crops_only: bool = False
    smallest: int = 0


OURS = "couplings"
LAPX = ("lapjv", "lapjvx", "lapjvc", "lapjvs", "lapjvr", "lapjvh")  # those that take a dense matrix
FASTLAP = (
    *("lapjv", "lapmod", "lapjvsp", "auction", "subgradient", "sinkhorn"),
    *("ssp", "hungarian", "dantzig", "cost_scaling"),
)

MEMORY = (OURS, "scipy", "lapjv", "lapx.lapjv", "lapx.lapjvr", "fastlap.lapjv", "fastlap.auction", "POT")


def exact(cost: np.ndarray[Any, Any], threads: int | None = 1) -> Any:
    """Solve with this library; return ``index``, ``prices``, ``total`` and ``lower_bound``."""
    from couplings.kernels.auction import solve

    return solve(cost, threads=threads)


def _couplings(instance: Instance, threads: int) -> Call:
    return lambda: exact(instance.cost, threads).index


def _greedy(instance: Instance, threads: int) -> Call:
    from couplings.kernels.greedy import greedy

    return lambda: greedy(instance.cost)


def _gemm(instance: Instance, threads: int) -> Call:
    x, y = instance.data.flatten(1), instance.noise.flatten(1)
    return lambda: x @ y.T


def _scipy(instance: Instance, threads: int) -> Call:
    from scipy.optimize import linear_sum_assignment

    return lambda: linear_sum_assignment(instance.cost)[1]


def _lapjv(instance: Instance, threads: int) -> Call:
    from lapjv import lapjv

    return lambda: lapjv(instance.cost)[0]


def _lapx(solver: str) -> Contender:
    def make(instance: Instance, threads: int) -> Call:
        solve = getattr(importlib.import_module("lap"), solver)

        def call() -> Any:
            first, second = solve(instance.cost, return_cost=False)
            if solver == "lapjv":  # column of each row, row of each column; the others give pairs
                return first
            index = np.empty(len(first), np.int64)
            index[first] = second
            return index

        return call

    return Contender(f"lapx.{solver}", "lapx", make)


def _fastlap(algorithm: str) -> Contender:
    def make(instance: Instance, threads: int) -> Call:
        from fastlap import solve_lap

        return lambda: np.array(solve_lap(instance.cost, algorithm=algorithm)[1])

    return Contender(f"fastlap.{algorithm}", "fastlap", make)


def _pot(instance: Instance, threads: int) -> Call:
    import ot

    # Unit masses give a 0-1 plan; with the default limit of 100,000 iterations the plan is none from n = 500 or so.
    mass = np.ones(len(instance.cost))
    return lambda: ot.emd(mass, mass, instance.cost, numItermax=10**9).argmax(1)


def _couple(instance: Instance, threads: int, classes: int | None = None) -> Call:
    import torch

    from couplings import couple

    labels = torch.arange(len(instance.data)) % classes if classes else None
    return lambda: (instance.data, couple(instance.data, instance.noise, condition=labels).noise)


def _classes(classes: int) -> Callable[[Instance, int], Call]:
    return partial(_couple, classes=classes)


def _metric(metric: str) -> Callable[[Instance, int], Call]:
    """Solve the whole matrix of a metric, with all that a solver gains nothing from: norms, roots, offsets."""

    def make(instance: Instance, threads: int) -> Call:
        cost = instance.distances(metric)
        return lambda: exact(cost, threads).index

    return make


def _product_scipy(instance: Instance, threads: int) -> Call:
    from scipy.optimize import linear_sum_assignment

    x, y = instance.data.flatten(1), instance.noise.flatten(1)
    return lambda: linear_sum_assignment((x @ y.T).numpy(), maximize=True)[1]


def _torchcfm(**options: Any) -> Callable[[Instance, int], Call]:
    def make(instance: Instance, threads: int) -> Call:
        from torchcfm.optimal_transport import OTPlanSampler

        sampler = OTPlanSampler("exact")
        sampler.ot_fn = partial(sampler.ot_fn, **options)
        return lambda: sampler.sample_plan(instance.noise, instance.data)[::-1]

    return make


def _torchebm(instance: Instance, threads: int) -> Call:
    from torchebm.couplings import get_coupling

    coupling = get_coupling("exact_ot")
    return lambda: tuple(coupling(instance.noise, instance.data))[::-1]


def _trainer(power: int) -> Callable[[Instance, int], Call]:
    def make(instance: Instance, threads: int) -> Call:
        import torch
        from scipy.optimize import linear_sum_assignment

        def call() -> Any:
            cost = torch.cdist(instance.data.flatten(1), instance.noise.flatten(1))
            _, columns = linear_sum_assignment((cost if power == 1 else cost**2).cpu().numpy())
            return instance.data, instance.noise[torch.from_numpy(columns)]

        return call

    return make


def _l1(instance: Instance, threads: int) -> Call:
    from couplings.kernels.l1 import cdist_l1

    x, y = instance.data.flatten(1).numpy(), instance.noise.flatten(1).numpy()
    return lambda: cdist_l1(x, y, threads=threads)


def _cdist_l1(instance: Instance, threads: int) -> Call:
    import torch

    x, y = instance.data.flatten(1), instance.noise.flatten(1)
    return lambda: torch.cdist(x, y, p=1.0).numpy()


def _solves(count: int, workers: int) -> Callable[[Instance, int], Call]:
    def make(instance: Instance, threads: int) -> Call:
        solve = _couplings(instance, 1)

        def call() -> None:
            with ThreadPoolExecutor(workers) as pool:
                for future in [pool.submit(solve) for _ in range(count)]:
                    future.result()

        return call

    return make


REG = 0.2
COLUMN_ERROR = 1e-5  # of the plan, in sum


def _sinkhorn(instance: Instance, threads: int) -> Call:
    import torch

    from couplings.assigners.sinkhorn import assign

    cost = torch.from_numpy(instance.cost)
    return lambda: assign(cost, reg=REG, generator=torch.Generator().manual_seed(0))


def _pot_sinkhorn(method: str) -> Contender:
    """Let POT make the plan of the same cost, offsets off and scaled; ours also draws from it."""

    def make(instance: Instance, threads: int) -> Call:
        import ot
        import torch

        cost = torch.from_numpy(instance.cost)
        cost = cost - cost.mean(1, keepdim=True)
        cost -= cost.mean(0)
        cost /= cost.std()
        mass = torch.full((len(cost),), 1 / len(cost))
        options = {"method": method, "numItermax": 2000, "stopThr": COLUMN_ERROR / len(cost) ** 0.5, "warn": False}
        return lambda: ot.sinkhorn(mass, mass, cost, REG, **options)

    return Contender(f"POT {method}", "POT", make, exact=False)


_TIMED = """
import time, torch
from couplings import couple, warmup
def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
def first(n, dtype):
    data, noise = torch.randn(2, n, 48).to(dtype)
    return timed(lambda: couple(data, noise))
"""
_LATER = """
warmup()
kinds = [(n, dtype) for n in (8, 64, 512) for dtype in (torch.float32, torch.float64, torch.float16)]
print(sum(first(*kind) - first(*kind) for kind in kinds))
"""


def _fresh(code: str, *, empty: bool) -> Callable[[Instance, int], Call]:
    """Run code in a new process, with the cache of compiled kernels that there is or with none; it prints seconds."""

    def make(instance: Instance, threads: int) -> Call:
        def call() -> float:
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | ({"NUMBA_CACHE_DIR": folder} if empty else {})
                command = [sys.executable, "-c", _TIMED + code]
                done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
            return float(done.stdout)

        return call

    return make


def _beside(processes: int) -> Callable[[Instance, int], Call]:
    """Couple while that many times as many processes as there are threads keep the cores busy."""

    def make(instance: Instance, threads: int) -> Call:
        couple = _couple(instance, threads)

        def call() -> float:
            command = [sys.executable, "-c", "while True: pass"]
            busy = [subprocess.Popen(command) for _ in range(processes * threads)]
            try:
                time.sleep(0.2)
                return statistics.median(timeit.repeat(couple, number=1, repeat=5))
            finally:
                for process in busy:
                    process.kill()
                    process.wait()

        return call

    return make


def _checks(instance: Instance, threads: int) -> Call:
    from couplings.inputs import working_copy

    return lambda: (working_copy(instance.data, "data"), working_copy(instance.noise, "noise"))


def _gather(instance: Instance, threads: int) -> Call:
    import torch

    index = torch.from_numpy(_couplings(instance, threads)())
    return lambda: instance.noise.index_select(0, index)


def _pair_costs(instance: Instance, threads: int) -> Call:
    import torch

    from couplings.distances import pair_costs

    x, y = instance.data.flatten(1), instance.noise.flatten(1)
    index = torch.from_numpy(_couplings(instance, threads)())
    return lambda: (pair_costs(x, y, "sqeuclidean", index), pair_costs(x, y, "sqeuclidean"))


_SOLVERS = [
    Contender(OURS, None, _couplings),
    Contender("couplings, 1 thread", None, lambda instance, threads: _couplings(instance, 1)),
    Contender("scipy", "scipy", _scipy),
    Contender("lapjv", "lapjv", _lapjv),
    *map(_lapx, LAPX),
    *map(_fastlap, FASTLAP),
    Contender("POT", "POT", _pot),
    Contender("greedy", None, _greedy, exact=False),
    Contender("GEMM", None, _gemm, crops_only=True),
]

TASKS: dict[str, list[Contender]] = {
    "solve": _SOLVERS,
    "couple": [
        Contender(OURS, None, _couple),
        Contender("TorchCFM", "torchcfm", _torchcfm()),
        Contender("TorchCFM, to the optimum", "torchcfm", _torchcfm(numItermax=10**9)),
        Contender("cdist + scipy", "scipy", _trainer(1)),
        Contender("squared cdist + scipy", "scipy", _trainer(2)),
        Contender("TorchEBM", "torchebm", _torchebm),
    ],
    "l1": [Contender(OURS, None, _l1), Contender("torch.cdist", None, _cdist_l1)],
    "threads": [
        Contender("one solve", None, _solves(1, 1)),
        Contender("two solves in turn", None, _solves(2, 1)),
        Contender("two solves in two threads", None, _solves(2, 2)),
    ],
    "step": [
        Contender("couple", None, _couple),
        Contender("checks", None, _checks),
        Contender("cost (GEMM)", None, _gemm),
        Contender("conversion and solve", None, _couplings),
        Contender("gather", None, _gather),
        Contender("pair costs", None, _pair_costs),
    ],
    "small": [
        Contender(OURS, None, _couple),
        Contender("cost (GEMM)", None, _gemm),
        Contender("product + scipy", "scipy", _product_scipy),
    ],
    "metric": [Contender(metric, None, _metric(metric)) for metric in ("dot", "sqeuclidean", "l2", "l1", "cosine")],
    "classes": [
        Contender("no classes", None, _couple),
        Contender("10 classes", None, _classes(10)),
        Contender("1000 classes", None, _classes(1000), smallest=4096),
    ],
    "sinkhorn": [
        Contender(OURS, "POT", _sinkhorn, exact=False),
        *map(_pot_sinkhorn, ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")),
    ],
    "start": [
        Contender("first call", None, _fresh("print(first(64, torch.float32))", empty=False)),
        Contender("warmup, nothing cached", None, _fresh("print(timed(warmup))", empty=True)),
        Contender("compiling after warmup", None, _fresh(_LATER, empty=True)),
    ],
    "crowded": [Contender("idle", None, _beside(0)), Contender("every core busy", None, _beside(1))],
    "memory": [
        Contender("empty", None, lambda instance, threads: lambda: None),
        *(solver for solver in _SOLVERS if solver.name in MEMORY),
    ],
}


def contenders(task: str, family: str, n: int, wanted: list[str] | None) -> list[Contender]:
    """Return the entries of a task that fit family and size; of other packages, only the wanted ones (None: all)."""
    return [
        entry
        for entry in TASKS[task]
        if n >= entry.smallest
        and (family == CROPS or not entry.crops_only)
        and (wanted is None or entry.package is None or entry.package in wanted or entry.name in wanted)
    ]
