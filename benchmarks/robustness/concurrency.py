"""Many callers at once: threads, processes, an interpreter that ends, a cache that two fill, and Ctrl-C."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..record import ROOT
from .children import Child, ended, started
from .trial import Outcome, sized

__all__ = ["PARTS", "after_a_start", "at_once", "ends_in_time", "in_one_cache", "interrupted"]

METHODS = ("auction", "greedy", "stable", "sinkhorn", "sliced", "nearest", "hungarian", "independent")
KINDS = ("fork", "spawn", "forkserver")
IN_TIME = 60.0  # seconds for a process to end: most of it are imports
LATE = 5.0  # seconds from Ctrl-C to its exception: a call of a kernel, on a busy machine


# Threads


def answer(number: int, couplings: dict[str, Any]) -> list[int]:
    """Couple a batch that depends on the number, by one of some couplings."""
    import torch

    rng = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    rows, width = rng.choice([3, 17, 64, 150, 400]), rng.choice([1, 5, 32])
    data = torch.randn(rows, width, generator=generator)
    name = rng.choice(sorted(couplings))
    noise = torch.randn(rows * (2 if name == "nearest" else 1), width, generator=generator)
    return couplings[name](data, noise, generator=torch.Generator().manual_seed(0)).index.tolist()


def at_once(ask: Callable[[int], Any], numbers: Sequence[int], threads: int = 8) -> list[str]:
    """Ask from one thread, then from several at once; return where the answers differ."""
    import torch

    torch_threads = torch.get_num_threads()
    expected = [ask(number) for number in numbers]
    barrier = threading.Barrier(threads)

    def work(own: Sequence[int]) -> list[Any]:
        barrier.wait(60)
        return [ask(number) for number in own]

    with ThreadPoolExecutor(threads) as pool:
        # Every thread asks all, each in an order of its own.
        orders = [random.Random(thread).sample(range(len(numbers)), len(numbers)) for thread in range(threads)]
        found = list(pool.map(work, [[numbers[i] for i in order] for order in orders]))
    lost = [
        f"thread {thread}, seed {numbers[i]}: another answer than in one thread"
        for thread, (order, answers) in enumerate(zip(orders, found, strict=True))
        for i, told in zip(order, answers, strict=True)
        if told != expected[i]
    ]
    if torch.get_num_threads() != torch_threads:
        lost.append(f"torch had {torch_threads} threads, and has {torch.get_num_threads()}")
    return lost


def threads(share: float) -> Outcome:
    """Let eight threads use the same couplings, at different sizes."""
    from couplings import Coupling

    shared = {name: Coupling(name) for name in METHODS}
    numbers = range(sized(400, share, 8))
    return Outcome.of(8 * len(numbers), at_once(lambda number: answer(number, shared), numbers))


# Processes


def couple_once(folder: Path) -> None:
    """Couple a batch, and keep the answer."""
    import torch

    from couplings import couple

    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(1000, 64, generator=generator) for _ in range(2))
    index = couple(data, noise).index.tolist()
    (folder / f"{os.getpid()}.json").write_text(json.dumps(index))


def use_then_start(work: Callable[[Path], object], kind: str, folder: Path) -> None:
    """Do some work on two threads, then start a process that does it."""
    import torch

    torch.set_num_threads(2)
    work(folder)
    process = multiprocessing.get_context(kind).Process(target=work, args=(folder,))
    process.start()
    process.join(IN_TIME)
    code = process.exitcode
    process.kill()
    if code != 0:
        sys.stderr.write(f"{'it hung' if code is None else f'exit code {code}'} when started by {kind}\n")
        raise SystemExit(1)


def after_a_start(work: Callable[[Path], object], kind: str) -> str | None:
    """Start a process from one that has done some work, and compare what the two did."""
    with tempfile.TemporaryDirectory() as name:
        end = ended(use_then_start, work, kind, Path(name))
        answers = [path.read_text() for path in Path(name).glob("*.json")]
    if end.code != 0:
        return end.in_short
    return None if len(answers) == 2 and answers[0] == answers[1] else "another answer in the process that was started"


def processes(share: float) -> Outcome:
    """Fork and start processes from one that has coupled."""
    each = sized(10, share)
    told = [(kind, after_a_start(couple_once, kind)) for kind in KINDS for _ in range(each)]
    return Outcome.of(len(told), [f"{kind}: {what}" for kind, what in told if what])


# The end of the interpreter

BEGIN = """
import sys, threading, time
import torch
from couplings import Coupling, lookahead, semidiscrete
torch.set_num_threads(1)
data, noise = (torch.randn(1500, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
wait = float(sys.argv[1])
"""
ENDS = {
    "submit": "pending = Coupling().submit(data, noise); time.sleep(wait)",
    "submitted and dropped": "Coupling().submit(data, noise); Coupling().submit(data, noise); time.sleep(wait)",
    "lookahead": "loop = iter(lookahead([data] * 4, Coupling(), window=1)); next(loop); time.sleep(wait)",
    "lookahead, kept by the module": (
        "loop = iter(lookahead([data] * 4, Coupling(), window=1)); sys.modules['kept'] = loop; next(loop)"
    ),
    "a fit in a thread": (
        "threading.Thread(target=lambda: semidiscrete.fit(data, steps=20, tolerance=10.0)).start(); time.sleep(wait)"
    ),
    "sys.exit": "pending = Coupling().submit(data, noise); time.sleep(wait); sys.exit(0)",
}


def ends_in_time(program: str, wait: float) -> str | None:
    """Run a program that ends with work in flight: it must exit with 0, in time, and say nothing."""
    began = time.monotonic()
    try:
        done = _run(program, str(wait))
    except subprocess.TimeoutExpired:
        return "it hung"
    said = done.stderr.strip().splitlines()
    if done.returncode or said:
        return f"exit code {done.returncode} after {time.monotonic() - began:.1f} s, {said[-1:]}"
    return None


def _run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    place = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=place, cwd=ROOT, capture_output=True, text=True, check=False, timeout=5 * IN_TIME
    )


def interpreter_ends(share: float) -> Outcome:
    """End the interpreter with work in flight."""
    lost, each = [], sized(10, share)
    for name, program in ENDS.items():
        for seed in range(each):
            wait = 0.3 * random.Random(seed).random()
            what = ends_in_time(BEGIN + program, wait)
            if what is not None:
                lost.append(f"{name}, after {wait:.3f} s: {what}")
    return Outcome.of(len(ENDS) * each, lost)


# The cache of compiled kernels

COMPILE = """
import torch
from couplings import couple
torch.set_num_threads(1)
data, noise = (torch.randn(80, 6, generator=torch.Generator().manual_seed(i)) for i in range(2))
for method in ("auction", "greedy", "stable"):
    print(couple(data, noise, method).index.tolist())
"""


def in_one_cache(program: str, several: int = 2) -> str | None:
    """Run a program several times at once with one empty cache of kernels, and once more with what they left."""
    with tempfile.TemporaryDirectory() as folder:

        def run(_: int) -> subprocess.CompletedProcess[str]:
            return _run(program, NUMBA_CACHE_DIR=folder)

        with ThreadPoolExecutor(several) as pool:
            done = [*pool.map(run, range(several)), run(0)]
    for each in done:
        if each.returncode or each.stderr.strip():
            return f"exit code {each.returncode}, {each.stderr.strip().splitlines()[-1:]}"
    return None if len({each.stdout for each in done}) == 1 else "the answers differ"


def cache(share: float) -> Outcome:
    """Let two processes compile into one empty cache."""
    tried = sized(5, share)
    told = [in_one_cache(COMPILE) for _ in range(tried)]
    return Outcome.of(tried, [what for what in told if what])


# Ctrl-C


def solve_until_interrupted(folder: Path, method: str) -> None:
    """Couple large batches until interrupted, then once more."""
    import torch

    from couplings import couple

    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(2500, 16, generator=generator) for _ in range(2))
    expected = couple(data[:100], noise[:100], method).index
    couple(data, noise, method)  # compiled: llvmlite drops a Ctrl-C that comes while it compiles
    try:
        (folder / "begun").touch()
        while True:
            couple(data, noise, method)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
    again = couple(data[:100], noise[:100], method).index
    if not torch.equal(again, expected):
        sys.stderr.write("another answer after the interrupt\n")
        raise SystemExit(1)


def interrupted(work: Callable[[Path, str], object], method: str, seed: int, late: float = LATE) -> str | None:
    """Send Ctrl-C at a random moment: its exception is raised before long, and the next answer is right."""
    with tempfile.TemporaryDirectory() as name, started(work, Path(name), method) as child:
        folder = Path(name)
        if not child.until((folder / "begun").exists):
            return f"did not begin: {child.end(1.0).in_short}"
        time.sleep(1.5 * random.Random(seed).random())
        os.kill(child.pid, signal.SIGINT)
        seconds = _seconds_until(child, folder / "interrupted", late)
        end = child.end(60.0 if seconds is not None else 0.0)
    if seconds is None:
        return f"no KeyboardInterrupt within {late:.0f} s: {end.in_short}"
    return None if end.code == 0 else f"does not work on: {end.in_short}"


def _seconds_until(child: Child, mark: Path, late: float) -> float | None:
    began = time.monotonic()
    while not mark.exists():
        if time.monotonic() - began > late or not child.alive:
            return None
        time.sleep(0.01)
    return time.monotonic() - began


def interrupts(share: float) -> Outcome:
    """Interrupt solves."""
    methods, each = ("auction", "greedy", "stable", "sinkhorn", "sliced"), sized(10, share)
    told = {
        (method, seed): interrupted(solve_until_interrupted, method, seed) for method in methods for seed in range(each)
    }
    return Outcome.of(len(told), [f"{method}, seed {seed}: {what}" for (method, seed), what in told.items() if what])


PARTS: dict[str, Callable[[float], Outcome]] = {
    "threads": threads,
    "processes": processes,
    "interpreter-ends": interpreter_ends,
    "one-cache": cache,
    "interrupts": interrupts,
}
