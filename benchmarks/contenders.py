"""What is timed: our functions, the solvers of other packages, and the couplings that trainers use today.

A contender is a function of an instance and a number of threads, and that call is what the clock sees. Everything a
user would have to do is in it: conversion, checks, the index as an array. One that returns a float timed itself; one
that raises ImportError is absent.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Contender:
    """One entry of a task.

    Attributes
    ----------
    name : str
    run : callable
        ``run(instance, threads)`` returns the answer.
    package : str or None
        The distribution it needs; None for this library and what it depends on.
    exact : bool
        Whether it claims an optimum.
    crops_only : bool
        Whether it needs the points, not just the cost.
    smallest : int
        The least number of rows that it is timed with.
    """

    name: str
    run: Callable[[Instance, int], Any]
    package: str | None = None
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


# -- solvers: the index of the column of each row


def exact(cost: np.ndarray[Any, Any], threads: int | None = 1) -> Any:
    """Solve with this library; return ``index``, ``prices``, ``total`` and ``lower_bound``."""
    from couplings.kernels.auction import solve

    return solve(cost, threads=threads)


def _couplings(instance: Instance, threads: int) -> Any:
    return exact(instance.cost, threads).index


def _metric(metric: str, instance: Instance, threads: int) -> Any:
    """Solve the whole matrix of a metric, with all that a solver gains nothing from: norms, roots, offsets."""
    return exact(instance.distances(metric), threads).index


def _greedy(instance: Instance, threads: int) -> Any:
    from couplings.kernels.greedy import greedy

    return greedy(instance.cost)


def _scipy(instance: Instance, threads: int) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(instance.cost)[1]


def _lapjv(instance: Instance, threads: int) -> Any:
    from lapjv import lapjv

    return lapjv(instance.cost)[0]


def _lapx(solver: str, instance: Instance, threads: int) -> Any:
    import lap

    first, second = getattr(lap, solver)(instance.cost, return_cost=False)
    if solver == "lapjv":  # column of each row, row of each column; the others give pairs
        return first
    index = np.empty(len(first), np.int64)
    index[first] = second
    return index


def _fastlap(algorithm: str, instance: Instance, threads: int) -> Any:
    from fastlap import solve_lap

    return np.array(solve_lap(instance.cost, algorithm=algorithm)[1])


def _pot(instance: Instance, threads: int) -> Any:
    import ot

    # Unit masses give a 0-1 plan; with the default limit of 100,000 iterations the plan is none from n = 500 or so.
    mass = np.ones(len(instance.cost))
    return ot.emd(mass, mass, instance.cost, numItermax=10**9).argmax(1)


def _solves(count: int, workers: int, instance: Instance, threads: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(_couplings, instance, 1) for _ in range(count)]:
            future.result()


# -- products and distances


def _gemm(instance: Instance, threads: int) -> Any:
    return instance.data.flatten(1) @ instance.noise.flatten(1).T


def _product_scipy(instance: Instance, threads: int) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(_gemm(instance, threads).numpy(), maximize=True)[1]


def _l1(instance: Instance, threads: int) -> Any:
    from couplings.kernels.l1 import cdist_l1

    return cdist_l1(instance.data.flatten(1).numpy(), instance.noise.flatten(1).numpy(), threads=threads)


def _cdist_l1(instance: Instance, threads: int) -> Any:
    import torch

    return torch.cdist(instance.data.flatten(1), instance.noise.flatten(1), p=1.0).numpy()


# -- couplings: data and the noise of each row


def _couple(instance: Instance, threads: int, classes: int | None = None) -> Any:
    import torch

    from couplings import couple

    labels = torch.arange(len(instance.data)) % classes if classes else None
    return instance.data, couple(instance.data, instance.noise, condition=labels).noise


def _torchcfm(limit: int | None, instance: Instance, threads: int) -> Any:
    from torchcfm.optimal_transport import OTPlanSampler

    sampler = OTPlanSampler("exact")
    if limit is not None:
        sampler.ot_fn = partial(sampler.ot_fn, numItermax=limit)
    return sampler.sample_plan(instance.noise, instance.data)[::-1]


def _torchebm(instance: Instance, threads: int) -> Any:
    from torchebm.couplings import get_coupling

    return tuple(get_coupling("exact_ot")(instance.noise, instance.data))[::-1]


def _trainer(power: int, instance: Instance, threads: int) -> Any:
    import torch
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(instance.data.flatten(1), instance.noise.flatten(1))
    _, columns = linear_sum_assignment((cost if power == 1 else cost**2).cpu().numpy())
    return instance.data, instance.noise[torch.from_numpy(columns)]


# For a minute at most: should this process be ended meanwhile, nobody else would end it.
BUSY = "import time; end = time.time() + 60\nwhile time.time() < end: pass"


def _beside(processes: int, instance: Instance, threads: int) -> float:
    """Couple while that many times as many processes as there are threads keep the cores busy."""
    command = [sys.executable, "-c", BUSY]
    busy = [subprocess.Popen(command) for _ in range(processes * threads)]
    try:
        time.sleep(0.5)  # until they have started
        return statistics.median(timeit.repeat(lambda: _couple(instance, threads), number=1, repeat=5))
    finally:
        for process in busy:
            process.kill()
            process.wait()


# -- sinkhorn: POT makes the plan of the same cost, offsets off and scaled; ours also draws from it

REG = 0.2
COLUMN_ERROR = 1e-5  # of the plan, in sum


def _sinkhorn(instance: Instance, threads: int) -> Any:
    import torch

    from couplings.assigners.sinkhorn import assign

    return assign(torch.from_numpy(instance.cost), reg=REG, generator=torch.Generator().manual_seed(0))


def _pot_sinkhorn(method: str, instance: Instance, threads: int) -> Any:
    import ot
    import torch

    cost = torch.from_numpy(instance.cost)
    cost = cost - cost.mean(1, keepdim=True)
    cost -= cost.mean(0)
    cost /= cost.std()
    mass = torch.full((len(cost),), 1 / len(cost))
    options = {"numItermax": 2000, "stopThr": COLUMN_ERROR / len(cost) ** 0.5, "warn": False}
    return ot.sinkhorn(mass, mass, cost, REG, method=method, **options)


# -- the first calls of a process

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
FIRST = "print(first(64, torch.float32))"
WARMUP = "print(timed(warmup))"
LATER = """
warmup()
kinds = [(n, dtype) for n in (8, 64, 512) for dtype in (torch.float32, torch.float64, torch.float16)]
print(sum(first(*kind) - first(*kind) for kind in kinds))
"""


def fresh(code: str, instance: Instance | None = None, threads: int = 1, *, cached: bool = True) -> float:
    """Run code in a new process, with the compiled kernels that are cached or with none; it prints seconds."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({} if cached else {"NUMBA_CACHE_DIR": folder})
        command = [sys.executable, "-c", _TIMED + code]
        done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


_SOLVERS = [
    Contender(OURS, _couplings),
    Contender("couplings, 1 thread", lambda instance, threads: _couplings(instance, 1)),
    Contender("scipy", _scipy, "scipy"),
    Contender("lapjv", _lapjv, "lapjv"),
    *(Contender(f"lapx.{solver}", partial(_lapx, solver), "lapx") for solver in LAPX),
    *(Contender(f"fastlap.{algorithm}", partial(_fastlap, algorithm), "fastlap") for algorithm in FASTLAP),
    Contender("POT", _pot, "POT"),
    Contender("greedy", _greedy, exact=False),
    Contender("GEMM", _gemm, crops_only=True),
]

TASKS: dict[str, list[Contender]] = {
    "solve": _SOLVERS,
    "metric": [Contender(name, partial(_metric, name)) for name in ("dot", "sqeuclidean", "l2", "l1", "cosine")],
    "small": [
        Contender(OURS, _couple),
        Contender("GEMM", _gemm),
        Contender("GEMM + scipy", _product_scipy, "scipy"),
    ],
    "couple": [
        Contender(OURS, _couple),
        Contender("TorchCFM", partial(_torchcfm, None), "torchcfm"),
        Contender("TorchCFM, to the optimum", partial(_torchcfm, 10**9), "torchcfm"),
        Contender("cdist + scipy", partial(_trainer, 1), "scipy"),
        Contender("squared cdist + scipy", partial(_trainer, 2), "scipy"),
        Contender("TorchEBM", _torchebm, "torchebm"),
    ],
    "classes": [
        Contender("no classes", _couple),
        Contender("10 classes", partial(_couple, classes=10)),
        Contender("1000 classes", partial(_couple, classes=1000), smallest=4096),
    ],
    "crowded": [
        Contender("idle", partial(_beside, 0)),
        Contender("every core busy", partial(_beside, 1)),
    ],
    "sinkhorn": [
        Contender(OURS, _sinkhorn, "POT", exact=False),
        *(
            Contender(f"POT {method}", partial(_pot_sinkhorn, method), "POT", exact=False)
            for method in ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
        ),
    ],
    "start": [
        Contender("first call", partial(fresh, FIRST)),
        Contender("warmup, nothing cached", partial(fresh, WARMUP, cached=False)),
        Contender("compiling after warmup", partial(fresh, LATER, cached=False)),
    ],
    "l1": [Contender(OURS, _l1), Contender("torch.cdist", _cdist_l1)],
    "threads": [
        Contender("one solve", partial(_solves, 1, 1)),
        Contender("two solves in turn", partial(_solves, 2, 1)),
        Contender("two solves in two threads", partial(_solves, 2, 2)),
    ],
    "memory": [
        Contender("empty", lambda instance, threads: None),
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
