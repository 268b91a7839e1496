"""Coupling over ranks: what it gains and costs on this machine, and what a cost model says of GPU clusters.

``python -m benchmarks.distributed`` measures gloo ranks over the loopback interface into ``results/distributed.jsonl``
and writes ``results/distributed.md`` from that; ``--report`` only does the latter.

The model adds up the phases of `couplings.distributed` from a few rates. With the rates of this machine it is held
against the measurements; with published rates of GPUs and links it projects. No GPU was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from couplings import Coupling
from couplings.kernels.auction import solve

from .instances import photo_crops
from .record import environment

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4)
ROWS = (64, 128, 256)
WIDTH = 3 * 32 * 32
POOLS = (64, 128, 256, 512, 1024, 2048, 4096)
REPEATS = 11
TIMEOUT = timedelta(seconds=120)

Record = dict[str, Any]

CONTENDERS: dict[str, dict[str, Any]] = {
    "local": {"scope": "local"},
    "global": {"scope": "global"},
    "global, fp16 on the wire": {"scope": "global", "wire": "fp16"},
    "global, groups of 2": {"scope": "global"},
    "global sliced": {"scope": "global", "method": "sliced"},
}


# -- measuring


def _progress(doing: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {doing}", file=sys.stderr, flush=True)


def _clock(call: Callable[[], Any], ranks: int, repeats: int = REPEATS) -> list[float]:
    """Seconds of each call on the slowest rank, all starting together; the first call is not counted."""
    seconds = []
    for repeat in range(repeats + 1):
        if ranks > 1:
            dist.barrier()
        start = time.perf_counter()
        call()
        taken = torch.tensor(time.perf_counter() - start)
        if ranks > 1:
            dist.all_reduce(taken, dist.ReduceOp.MAX)
        if repeat:
            seconds.append(taken.item())
    return seconds


def _spread(seconds: list[float]) -> Record:
    quartiles = list(np.quantile(seconds, (0.25, 0.75)))
    return {"seconds": statistics.median(seconds), "quartiles": quartiles, "fastest": min(seconds)}


def _batch(rank: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng((rank, rows))
    data = torch.from_numpy(photo_crops(rows, rng))
    return data, torch.from_numpy(rng.standard_normal(data.shape, np.float32))


def _rank(rank: int, ranks: int, meeting: str, out: str) -> None:
    """Everything that needs this many ranks, on one of them."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)] if ranks > 2 else []
    records: list[Record] = []
    for rows in ROWS:
        if rank == 0:
            _progress(f"{ranks} ranks, {rows} rows each")
        data, noise = _batch(rank, rows)
        for name, options in CONTENDERS.items():
            if ranks == 1 and name != "local":
                continue
            if name == "global, groups of 2":
                if ranks <= 2:
                    continue
                options = {**options, "group": pairs[rank // 2]}
            records.append(_couple(rank, ranks, rows, name, Coupling(**options), data, noise))
        if ranks > 1:
            records += _wire(ranks, rows, noise)
    if ranks > 1:
        dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(records))


def _couple(
    rank: int, ranks: int, rows: int, name: str, coupling: Coupling, data: torch.Tensor, noise: torch.Tensor
) -> Record:
    results = []
    seconds = _clock(lambda: results.append(coupling(data, noise)), ranks)
    traces = [result.trace for result in results[1:] if result.trace is not None]
    phases = {
        phase.name: {
            "seconds": statistics.median(trace.phases[position].seconds for trace in traces),
            "received": phase.received,
        }
        for position, phase in enumerate(traces[0].phases if traces else ())
    }
    told = {
        "cost": float(results[0].cost),
        "cost_before": float(results[0].cost_before),
        "phases": phases,
        "received": traces[0].received if traces else 0,
    }
    heard = [told]
    if ranks > 1:
        heard = [{} for _ in range(ranks)]
        dist.all_gather_object(heard, told)
    cost, before = (statistics.fmean(one[key] for one in heard) for key in ("cost", "cost_before"))
    return {
        "task": "couple",
        "contender": name,
        "ranks": ranks,
        "rows": rows,
        **_spread(seconds),
        "reduction": 1 - cost / before,
        "received": [one["received"] for one in heard],
        "phases": heard[0]["phases"],
    }


def _wire(ranks: int, rows: int, noise: torch.Tensor) -> list[Record]:
    """Move the noise of the other ranks, and draw it anew instead, as noise that is addressed by its seed allows."""
    gathered = [torch.empty_like(noise) for _ in range(ranks)]
    tiny = [torch.empty(16) for _ in range(ranks)]
    generator = torch.Generator()

    def draw() -> None:
        for rank in range(1, ranks):
            torch.randn(noise.shape, generator=generator.manual_seed(rank))

    calls = {
        "all-gather": lambda: dist.all_gather(gathered, noise),
        "all-gather of 64 bytes": lambda: dist.all_gather(tiny, torch.zeros(16)),
        "draw anew": draw,
    }
    return [
        {"task": "noise", "contender": name, "ranks": ranks, "rows": rows, **_spread(_clock(call, ranks))}
        for name, call in calls.items()
    ]


def _pools() -> list[Record]:
    """One process with batches of growing size: what more rows gain, and the time to solve."""
    records = []
    for rows in POOLS:
        _progress(f"pool of {rows} rows")
        data, noise = _batch(0, rows)
        x, y = data.flatten(1), noise.flatten(1)
        cost = (x @ y.T).mul_(-2)
        repeats = REPEATS if rows <= 1024 else 3
        for name, call in (
            ("cost (GEMM)", lambda x=x, y=y: x @ y.T),
            ("solve", lambda cost=cost: solve(cost.numpy(), threads=1)),
        ):
            records.append({"task": "pool", "contender": name, "rows": rows, **_spread(_clock(call, 1, repeats))})
        for method in ("auction", "sliced"):
            reduction = float(Coupling(method)(data, noise).reduction)
            records.append({"task": "reduction", "contender": method, "rows": rows, "reduction": reduction})
    return records


def measure() -> list[Record]:
    """Run everything; ranks in processes of their own."""
    torch.set_num_threads(1)
    place = environment(1, None)  # first: what this program does is not the load of others
    records = _pools()
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "records.json"
            mp.start_processes(
                _rank, (ranks, str(Path(folder) / "store"), str(out)), nprocs=ranks, start_method="spawn"
            )
            records += json.loads(out.read_text())
    return [{**record, "environment": place} for record in records]


# -- the model


@dataclass(frozen=True)
class Cluster:
    """Rates that a coupling over ranks depends on.

    Attributes
    ----------
    name : str
    flops : float
        float32 products of matrices, per second and rank.
    link : float
        Bytes per second into one rank from others of its node.
    network : float
        Bytes per second into one node.
    adapter : float
        Bytes per second from other nodes into one rank.
    host : float
        Bytes per second from the device to the processor that solves; infinite where they are one.
    per_node : int
        Ranks of a node.
    latency : float
        Seconds of a collective beyond its bytes, per doubling of the ranks.
    source : str
    """

    name: str
    flops: float
    link: float
    network: float
    adapter: float
    host: float
    per_node: int
    latency: float
    source: str


# Published peaks in one direction; a coupling is given `EFFICIENCY` of them.
EFFICIENCY = 0.7
CLUSTERS = (
    Cluster(
        name="A6000, PCIe, 1 x HDR",
        flops=38.7e12,
        link=32e9,
        network=25e9,
        adapter=25e9,
        host=32e9,
        per_node=8,
        latency=2e-5,
        source="RTX A6000 data sheet: 38.7 TFLOPS, PCIe 4.0 x16; InfiniBand HDR 200 Gb/s",
    ),
    Cluster(
        name="A800, NVLink, 8 x HDR",
        flops=19.5e12,
        link=200e9,
        network=200e9,
        adapter=25e9,
        host=32e9,
        per_node=8,
        latency=2e-5,
        source="A800 data sheet: 19.5 TFLOPS, NVLink 400 GB/s both ways, PCIe 4.0 x16; InfiniBand HDR 200 Gb/s",
    ),
    Cluster(
        name="H100, NVLink, 8 x NDR",
        flops=67e12,
        link=450e9,
        network=400e9,
        adapter=50e9,
        host=64e9,
        per_node=8,
        latency=2e-5,
        source="H100 SXM data sheet: 67 TFLOPS, NVLink 900 GB/s both ways, PCIe 5.0 x16; InfiniBand NDR 400 Gb/s",
    ),
)
GPUS = (8, 16, 64, 1024)
GPU_ROWS = 128
STEP = 0.5  # seconds of a training step, assumed
SHARE = 0.05  # of it that a coupling may take


def predict(
    cluster: Cluster, ranks: int, rows: int, solve: Callable[[int], float], efficiency: float = 1.0
) -> dict[str, float]:
    """Seconds of each phase of an exact coupling of float32 rows over ranks.

    Parameters
    ----------
    cluster : Cluster
    ranks, rows : int
        Rows are those of one rank.
    solve : callable
        Seconds of a solve by its size.
    efficiency : float
        Share of the rates that is reached.
    """
    total = ranks * rows
    abroad = max(0, total - cluster.per_node * rows)  # rows from other nodes
    message = cluster.latency * (ranks - 1).bit_length()

    def receive(row_bytes: int, from_abroad: float) -> float:
        return message + row_bytes * ((total - rows) / cluster.link + abroad / from_abroad) / efficiency

    return {
        "header": message,
        "noise": receive(4 * WIDTH, cluster.network),
        "cost": 2 * rows * total * WIDTH / (cluster.flops * efficiency),
        "costs": receive(4 * total, cluster.adapter),  # into the first rank alone
        "to the host": 4 * total * total / (cluster.host * efficiency),
        "solve": solve(total),
        "index": receive(8, cluster.network),
        "report": message,
    }


def _of(records: list[Record], task: str, contender: str) -> list[Record]:
    return [record for record in records if (record["task"], record["contender"]) == (task, contender)]


def fitted_solve(records: list[Record]) -> tuple[Callable[[int], float], float]:
    """Return seconds of a solve by size, and the exponent beyond the sizes that were measured."""
    found = sorted(_of(records, "pool", "solve"), key=lambda record: record["rows"])
    sizes, seconds = (np.log([record[key] for record in found]) for key in ("rows", "fastest"))
    exponent = float(np.polyfit(sizes[-4:], seconds[-4:], 1)[0])

    def solve(n: int) -> float:
        beyond = max(0.0, np.log(n) - sizes[-1])
        return float(np.exp(np.interp(np.log(n), sizes, seconds) + exponent * beyond))

    return solve, exponent


def this_machine(records: list[Record], ranks: int) -> Cluster:
    """Rates of this machine when that many ranks share its cores; links are calibrated on two ranks only."""
    sharing = max(1.0, ranks / records[0]["environment"]["hardware"]["cores"])
    gemm = max(2 * r["rows"] ** 2 * WIDTH / r["fastest"] for r in _of(records, "pool", "cost (GEMM)"))
    rows = max(ROWS)
    latency, whole = (
        next(r["fastest"] for r in _of(records, "noise", name) if (r["ranks"], r["rows"]) == (2, rows))
        for name in ("all-gather of 64 bytes", "all-gather")
    )
    link = 4 * WIDTH * rows / (whole - latency) / sharing
    return Cluster(
        name="this machine",
        flops=gemm / sharing,
        link=link,
        network=link,
        adapter=link,
        host=float("inf"),
        per_node=ranks,
        latency=latency * sharing,
        source="measured",
    )


# -- the report


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def report(records: list[Record]) -> str:
    """Markdown page, from the records alone."""
    place = records[0]["environment"]
    solve, exponent = fitted_solve(records)
    parts = [
        "# Coupling over ranks",
        f"Measured {place['date'][:10]} on {place['hardware']['cpu']}, {place['hardware']['cores']} cores "
        f"(load {place['hardware']['load']}), torch {place['versions']['torch']}, library at {place['kernels']}: gloo "
        "over the loopback interface, one thread per rank, crops of photographs 3x32x32 against Gaussian noise, "
        f"float32, median of {REPEATS}.{_busy(place['hardware'])} "
        "Made by `python -m benchmarks.distributed` from [distributed.jsonl](distributed.jsonl).",
        "## Local against global",
        "Time of a call on the slowest rank, reduction of the mean squared distance over all ranks, and bytes received "
        "by the first and by the last rank. Four ranks share two cores.",
        _measured(records),
        "## Where the time of a global coupling goes",
        "Milliseconds on the first rank, which gathers and solves.",
        _phases(records),
        "## Send noise, or draw it anew?",
        "Noise that is addressed by its seed could be drawn by every rank instead of sent: milliseconds for the noise "
        "of all other ranks. The library sends: drawing does not win clearly, and would ask that all noise be a "
        "function of seeds that the library knows.",
        _noise(records),
        "## The model against the measurements",
        "Rates from one and two ranks (matrix product, solve, all-gather; the fastest runs); the sum of the phases "
        "beside the fastest and the median call. Four ranks are extrapolated.",
        _checked(records, solve),
        "## What a larger pool gains",
        _gains(records),
        "## Projections",
        f"From published peak rates at {EFFICIENCY:.0%} of the peak, {GPU_ROWS} rows of 3x32x32 per GPU, exact solve "
        f"on one core of this machine's kind (measured up to n = {max(POOLS)}, beyond that as n^{exponent:.2f}). Not "
        f"measured on GPUs. Milliseconds; what to use is what gains most in at most {SHARE:.0%} of a training step of "
        f"{1e3 * STEP:.0f} ms, the gain being that measured above for a pool of that size (or the largest). The "
        "sorting of `sliced` is not in its time. A solve that runs beside the training step, a batch ahead, may take "
        "as long as the step.",
        _projections(records, solve),
        "Rates: " + "; ".join(f"{c.name} ({c.source}; {c.per_node} GPUs per node)" for c in CLUSTERS) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _busy(hardware: Record) -> str:
    if hardware["load"] < hardware["cores"] / 2:
        return ""
    return (
        " **Other programs were using the machine: every exchange waited for ranks to be scheduled, so that the times "
        "are upper bounds and the model, which knows nothing of that, predicts less. Run it again on an idle machine.**"
    )


def _measured(records: list[Record]) -> str:
    rows = []
    for record in (r for r in records if r["task"] == "couple"):
        low, high = record["quartiles"]
        rows.append([
            str(record["ranks"]), str(record["rows"]), record["contender"],
            f"{_ms(record['seconds'])} ± {_ms((high - low) / 2)}", f"{100 * record['reduction']:.2f}%",
            _bytes(record["received"][0]), _bytes(record["received"][-1]),
        ])  # fmt: skip
    return _table(["ranks", "rows each", "", "ms", "reduction", "first rank", "last rank"], rows)


def _phases(records: list[Record]) -> str:
    found = [r for r in records if r["task"] == "couple" and r["contender"] == "global" and r["ranks"] > 1]
    names = list(found[0]["phases"])
    rows = [[str(r["ranks"]), str(r["rows"]), *(_ms(r["phases"][name]["seconds"]) for name in names)] for r in found]
    return _table(["ranks", "rows each", *names], rows)


def _noise(records: list[Record]) -> str:
    found = {(r["ranks"], r["rows"], r["contender"]): r["seconds"] for r in records if r["task"] == "noise"}
    cells = sorted({key[:2] for key in found})
    return _table(
        ["ranks", "rows each", "all-gather", "draw anew"],
        [[str(k), str(n), _ms(found[k, n, "all-gather"]), _ms(found[k, n, "draw anew"])] for k, n in cells],
    )


def _checked(records: list[Record], solve: Callable[[int], float]) -> str:
    rows = []
    for record in _of(records, "couple", "global"):
        ranks, each = record["ranks"], record["rows"]
        told = sum(predict(this_machine(records, ranks), ranks, each, solve).values())
        ratio = told / record["fastest"]
        rows.append([str(ranks), str(each), _ms(told), _ms(record["fastest"]), _ms(record["seconds"]), f"{ratio:.2f}"])
    return _table(["ranks", "rows each", "predicted ms", "fastest", "median", "predicted / fastest"], rows)


def _gains(records: list[Record]) -> str:
    found = {(r["contender"], r["rows"]): r["reduction"] for r in records if r["task"] == "reduction"}
    return _table(
        ["reduction of the squared distance", *(f"n = {n}" for n in POOLS)],
        [[method, *(f"{100 * found[method, n]:.2f}%" for n in POOLS)] for method in ("auction", "sliced")],
    )


def _projections(records: list[Record], solve: Callable[[int], float]) -> str:
    gains = {(r["contender"], r["rows"]): r["reduction"] for r in records if r["task"] == "reduction"}

    def gain(method: str, n: int) -> float:
        """Return what a pool of n rows gained, or the largest that was measured."""
        return gains[method, min(n, max(POOLS))]

    rows = []
    for cluster in CLUSTERS:
        node = sum(predict(cluster, cluster.per_node, GPU_ROWS, solve, EFFICIENCY).values())
        for ranks in GPUS:
            phases = predict(cluster, ranks, GPU_ROWS, solve, EFFICIENCY)
            total, n = sum(phases.values()), ranks * GPU_ROWS
            wire = sum(phases[name] for name in ("header", "noise", "costs", "index", "report"))
            # It gathers points, as many as there is noise, where the exact methods gather costs.
            sliced = sum(phases[name] for name in ("header", "noise", "noise", "index", "report"))
            choices = [
                ("global", total, gain("auction", n)),
                ("per node", node, gain("auction", cluster.per_node * GPU_ROWS)),
                ("local", solve(GPU_ROWS), gain("auction", GPU_ROWS)),
                ("global, `sliced`", sliced, gain("sliced", n)),
                ("`independent`", 0.0, 0.0),
            ]
            within = [choice for choice in choices if choice[1] <= SHARE * STEP]
            name, seconds, reduction = max(within, key=lambda choice: choice[2])
            times = (wire, phases["cost"], phases["to the host"], phases["solve"], total, sliced)
            advice = f"{name}: {_ms(seconds)} ms, {100 * reduction:.2f}%"
            rows.append([cluster.name, str(ranks), f"{n:,}", _bytes(4.0 * n * n), *map(_ms, times), advice])
    head = ["", "GPUs", "pool", "matrix on the first rank", "wire", "cost", "to the host", "solve", "total"]
    return _table([*head, "wire of `sliced`", "what to use"], rows)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="write the page from the records there are")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    path = arguments.results / "distributed.jsonl"
    if not arguments.report:
        arguments.results.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in measure()))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    page = arguments.results / "distributed.md"
    page.write_text(report(records))
    print(f"wrote {path} and {page}")


if __name__ == "__main__":
    main()
