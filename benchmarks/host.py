"""Why the solver takes the time that it takes on this machine's processor: ``python -m benchmarks.host``.

The same matrices are solved with more and fewer threads, with code compiled for other processors and vector widths, in
other states of the memory, and by SciPy; beside them stand what the processor does of clock, memory and page faults.
Everything runs in children, compiled side by side and measured one after the other; under a minute with 8 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .record import RESULTS, ROOT, Record, append, environment

SIZES = (1024, 4096)
THREADS = (1, 2, 4, 8, 16)
HEAP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}

# What a child is started with, beside what it is started with anyway. "{features}": those of this processor.
VARIANTS: dict[str, dict[str, str]] = {
    "as installed": {},
    "memory kept by the allocator": HEAP,
    "huge pages": {"NUMPY_MADVISE_HUGEPAGE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **HEAP},
    "512-bit vectors": {"NUMBA_CPU_NAME": "{name}", "NUMBA_CPU_FEATURES": "{features},-prefer-256-bit"},
    "256-bit vectors": {"NUMBA_CPU_NAME": "{name}", "NUMBA_CPU_FEATURES": "{features},+prefer-256-bit"},
    "no AVX-512": {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""},
    "no AVX": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}
# What a processor must have for code of another one to run on it.
NEEDS = {
    **dict.fromkeys(("512-bit vectors", "256-bit vectors"), "+avx512f"),
    "no AVX-512": "+avx2",
}


# -- in a child


def _phases() -> tuple[dict[str, float], Callable[[], None]]:
    """Clock the phases of `solve`, by wrapping them; a phase inside another is counted in both."""
    from couplings.kernels.assignment import search, solver

    seconds: dict[str, float] = {}
    undo: list[Callable[[], None]] = []

    def clocked(owner: Any, name: str) -> None:
        inner = getattr(owner, name, None)
        if inner is None:
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[name.strip("_")] = seconds.get(name.strip("_"), 0.0) + time.perf_counter() - start

        setattr(owner, name, call)
        undo.append(lambda: setattr(owner, name, inner))

    for owner, name in (
        *((solver, name) for name in ("normalise", "_certified")),
        *((search.Search, name) for name in ("auction_on_sketch", "make_lists", "auction_on_lists")),
        (search.Search, "shortest_augmenting_paths"),
    ):
        clocked(owner, name)
    return seconds, lambda: [one() for one in undo] and None


def _faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


IN_A_THREAD = "in a new thread"  # as what runs in the background is


def _states(cost: Any) -> dict[str, Callable[[], Any]]:
    """Return what happens before a solve; each returns the matrix to solve."""
    flush = np.ones(1 << 25, np.float64)  # 256 MiB

    def cold() -> Any:
        flush.__iadd__(1.0)
        return cost

    def idle() -> Any:
        time.sleep(0.05)
        return cost

    return {"hot": lambda: cost, "caches empty": cold, "after 50 ms of sleep": idle, "fresh copy": cost.copy}


def _child(folder: Path, n: int, threads: tuple[int, ...], seconds: float, torch_too: bool) -> dict[str, Any]:
    """Solve one matrix again and again within so many seconds for each way."""
    from couplings.kernels import solve

    cost = np.load(folder / f"{n}.npy", allow_pickle=False)
    begun = time.perf_counter()
    for _ in range(2):
        solve(cost, threads=1)
    ready = time.perf_counter() - begun
    states = _states(cost)
    ways = {("hot", count): (states["hot"], count) for count in threads}
    ways |= {(state, threads[0]): (prepare, threads[0]) for state, prepare in states.items()}
    if torch_too:
        import torch

        x = torch.rand(512, 3072)

        def after_torch() -> Any:
            torch.mm(x, x.T)
            return cost

        ways["after a product of torch", threads[0]] = (after_torch, threads[0])
        if torch.cuda.is_available():
            pinned = torch.from_numpy(cost).pin_memory().numpy()
            ways["in pinned memory", threads[0]] = (lambda: pinned, threads[0])
    ways[IN_A_THREAD, threads[0]] = (states["hot"], threads[0])
    taken: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    faults: dict[tuple[str, int], list[int]] = {way: [] for way in ways}
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or not all(map(len, taken.values())):
        for way, (prepare, count) in ways.items():
            matrix, before = prepare(), _faults()
            start = time.perf_counter()
            if way[0] == IN_A_THREAD:
                worker = threading.Thread(target=solve, args=(matrix,), kwargs={"threads": count})
                worker.start()
                worker.join()
            else:
                solution = solve(matrix, threads=count)
            taken[way].append(time.perf_counter() - start)
            faults[way].append(_faults() - before)
            if time.perf_counter() > end and all(map(len, taken.values())):
                break
    phases, stop = _phases()
    solve(cost, threads=threads[0])
    stop()
    return {
        "ready": ready,
        "bids": solution.bids,
        "phases": phases,
        "ways": [
            {
                **dict(zip(("state", "threads"), way, strict=True)),
                **{"median": float(np.median(each)), "fastest": min(each), "runs": len(each)},
                "faults": int(np.median(faults[way])),
            }
            for way, each in taken.items()
        ],
    }


def _scipy(folder: Path, n: int) -> dict[str, Any]:
    from scipy.optimize import linear_sum_assignment

    cost, taken = np.load(folder / f"{n}.npy", allow_pickle=False), []
    for _ in range(3):
        start = time.perf_counter()
        linear_sum_assignment(cost)
        taken.append(time.perf_counter() - start)
    return {
        "ways": [{"state": "hot", "threads": 1, "median": float(np.median(taken)), "fastest": min(taken), "runs": 3}]
    }


def _machine() -> dict[str, Any]:
    """Clock, memory and page faults, from loops that do nothing else."""
    import mmap

    import numba

    @numba.njit  # type: ignore[untyped-decorator]
    def mix(count: int) -> int:  # a shift, an exclusive or and a multiplication that wait for each other
        x = 1
        for _ in range(count):
            x = (x ^ (x >> 7)) * 6364136223846793005
        return x

    @numba.njit  # type: ignore[untyped-decorator]
    def chase(links: Any, count: int) -> int:
        at = 0
        for _ in range(count):
            at = links[at]
        return at

    @numba.njit  # type: ignore[untyped-decorator]
    def lowest(x: Any, p: Any, out: Any, repeats: int) -> None:  # what a bid does on the sketch
        for _ in range(repeats):
            for j in range(out.size):
                a, b = np.int16(x[j] + p[j]), np.int16(x[j + out.size] + p[j + out.size])
                out[j] = a if a < b else b

    def seconds(call: Callable[[], Any]) -> float:
        call()
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return min(taken)

    def latency(mib: int) -> float:
        order = np.random.default_rng(0).permutation(mib << 14)  # a link in each cache line
        links = np.zeros(mib << 17, np.int64)
        links[order * 8] = np.roll(order, -1) * 8
        return 1e9 * seconds(lambda: chase(links, 200_000)) / 200_000

    def touch() -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        np.frombuffer(mmap.mmap(-1, 1 << 26, private), np.uint8)[::4096] = 1

    source, target = np.ones(1 << 25), np.empty(1 << 25)
    x, p, out = np.ones(4096, np.int16), np.ones(4096, np.int16), np.empty(2048, np.int16)
    return {
        "GHz, if a shift, an exclusive or and a product take 5 cycles": 5e-2 / seconds(lambda: mix(10_000_000)),
        "GB/s of a copy by one thread": 2 * source.nbytes / 1e9 / seconds(lambda: np.copyto(target, source)),
        **{f"ns to a random line of {mib} MiB": latency(mib) for mib in (1, 8, 64, 256)},
        "ns to touch a new page of 4 KiB": 1e9 * seconds(touch) / (1 << 14),
        "int16 a ns, least of two sums": 4096 * 10_000 / 1e9 / seconds(lambda: lowest(x, p, out, 10_000)),
        "us to start and end a thread": 1e6 * seconds(_start_threads) / 100,
    }


def _start_threads() -> None:
    for _ in range(100):
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()


def _processor() -> dict[str, Any]:
    import llvmlite
    import llvmlite.binding as llvm
    import numba

    def text(path: str) -> str | None:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
        return None

    try:
        lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:
        lscpu = []
    wanted = (
        "Model name",
        "CPU family",
        "Model:",
        "Thread(s)",
        "Core(s)",
        "Socket",
        "L1d",
        "L2",
        "L3",
        "Hypervisor",
        "NUMA",
    )
    features = llvm.get_host_cpu_features()
    return {
        "lscpu": [" ".join(line.split()) for line in lscpu if line.strip().startswith(wanted)],
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "llvm": {"name": llvm.get_host_cpu_name(), "features": features.flatten()},
        "versions": {"numba": numba.__version__, "llvmlite": llvmlite.__version__, "llvm": str(llvm.llvm_version_info)},
        "huge pages": text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "huge pages, defrag": text("/sys/kernel/mm/transparent_hugepage/defrag"),
        "governor": text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "stat": (text("/proc/stat") or "").partition("\n")[0],
        "uname": " ".join(os.uname()),
    }


# -- the children, from outside


@contextlib.contextmanager
def _folder(sizes: tuple[int, ...]) -> Iterator[Path]:
    from .instances import CROPS, Instance

    with tempfile.TemporaryDirectory() as name:
        for n in sizes:
            np.save(Path(name) / f"{n}.npy", Instance.make(CROPS, n).cost)
        yield Path(name)


def _environment_of(variant: str, llvm: dict[str, str], folder: Path) -> dict[str, str]:
    own = {key: value.format(**llvm) for key, value in VARIANTS[variant].items()}
    if "NUMBA_CPU_NAME" in own:  # children that compile at once would write over each other's code
        own["NUMBA_CACHE_DIR"] = str(folder / variant)
    return {**os.environ, **own}


def _start(what: str, place: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.host", "--child", what, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _answer(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"status": "failed", "note": f"did not finish in {seconds:.0f} s"}
    if process.returncode:
        return {"status": "failed", "note": (err.strip().splitlines() or ["died"])[-1][:300]}
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return {"status": "ok", **answer}


def measure(
    sizes: tuple[int, ...] = SIZES,
    seconds: float = 0.25,
    limit: float = 60.0,
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> list[Record]:
    """Run everything.

    Parameters
    ----------
    sizes : tuple of int
        Rows of the matrices.
    seconds : float
        For each way to solve one.
    limit : float
        Seconds for everything: what has not begun by then is left out.
    variants : tuple of str
        Of `VARIANTS`.
    """
    place = environment(os.cpu_count() or 1, None)
    end = time.perf_counter() + limit
    processor = _answer(_start("processor", dict(os.environ)), limit)
    llvm = processor.get("llvm", {"name": "generic", "features": ""})
    usable = [name for name in variants if NEEDS.get(name, "") in llvm["features"]]
    records: list[Record] = [{"task": "host-processor", "n": 0, "contender": "", **processor}]
    with _folder(sizes) as folder:
        compiling = [name for name in usable if "NUMBA_CPU_NAME" in VARIANTS[name] or not VARIANTS[name]]
        started = {
            name: _start("ready", _environment_of(name, llvm, folder), str(folder), str(min(sizes)))
            for name in compiling
        }
        for name, process in started.items():
            answer = _answer(process, end - time.perf_counter())
            if answer["status"] != "ok":
                usable.remove(name)
                records.append({"task": "host-solve", "n": min(sizes), "contender": name, **answer})
        records.append(
            {"task": "host-machine", "n": 0, "contender": "", **_answer(_start("machine", dict(os.environ)), limit)}
        )
        for n in sizes:
            for name in usable:
                if time.perf_counter() > end:
                    break
                whole = name == "as installed"
                threads = [count for count in THREADS if count <= (os.cpu_count() or 1)] if whole else [1]
                arguments = [str(folder), str(n), ",".join(map(str, threads)), str(seconds), str(int(whole))]
                answer = _answer(
                    _start("solve", _environment_of(name, llvm, folder), *arguments), end - time.perf_counter()
                )
                records.append({"task": "host-solve", "n": n, "contender": name, **answer})
        answer = _answer(_start("scipy", dict(os.environ), str(folder), str(min(sizes))), end - time.perf_counter())
        records.append({"task": "host-solve", "n": min(sizes), "contender": "scipy", **answer})
    return [{**record, "environment": place} for record in records]


def _serve(what: str, arguments: list[str]) -> dict[str, Any]:
    if what == "processor":
        return _processor()
    if what == "machine":
        return _machine()
    folder, n = Path(arguments[0]), int(arguments[1])
    if what == "scipy":
        return _scipy(folder, n)
    if what == "ready":
        return _child(folder, n, (1,), 0.0, torch_too=False)
    threads = tuple(map(int, arguments[2].split(",")))
    return _child(folder, n, threads, float(arguments[3]), torch_too=arguments[4] == "1")


def lines(records: list[Record]) -> Iterator[str]:
    """Yield what was found, for a terminal."""
    for record in records:
        if record.get("status") != "ok":
            yield f"{record['task']} {record['contender']} n = {record['n']}: {record.get('note')}"
        elif record["task"] == "host-processor":
            shown = (key for key in record if key not in ("task", "n", "contender", "environment", "gpu", "status"))
            yield from (f"{key}: {record[key]}" for key in shown)
        elif record["task"] == "host-machine":
            yield from (f"{value:10.2f} {name}" for name, value in record.items() if isinstance(value, float))
        else:
            for way in record["ways"]:
                times = f"{1e3 * way['median']:9.2f} ms (fastest {1e3 * way['fastest']:.2f}, {way['runs']} runs"
                what = f"{record['contender']}, {way['state']}, threads {way['threads']}"
                yield f"{times}, {way.get('faults', 0)} faults) n = {record['n']}, {what}"
            phases = ", ".join(f"{name} {1e3 * taken:.2f}" for name, taken in record.get("phases", {}).items())
            if phases:
                yield f"          ms by phase: {phases}; {record['bids']} bids"


def main(argv: list[str] | None = None) -> None:
    """Measure and print; with ``--output`` keep the records too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), metavar="N")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each way to solve a matrix")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for everything")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"such as {RESULTS / 'host.jsonl'}")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(_serve(arguments.child[0], arguments.child[1:])))
        return
    records = measure(tuple(arguments.sizes), arguments.seconds, arguments.limit, tuple(arguments.variants))
    for line in lines(records):
        print(line)
    for record in records if arguments.output else ():
        append(arguments.output, record)


if __name__ == "__main__":
    main()
