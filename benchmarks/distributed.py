"""Coupling over ranks: what it gains and costs on this machine, and what a cost model says of GPU clusters.

``python -m benchmarks.distributed`` measures gloo ranks over the loopback interface into ``results/distributed.jsonl``
and writes ``results/distributed.md`` from that; ``--report`` only does the latter.

The model adds up the phases of `couplings.distributed`: what a call on nothing takes, and the bytes, products, passes
over memory and solves that its rows add, each at a rate. With the rates of this machine, measured one by one with as
many ranks at work, it is held against the measurements phase by phase; with published rates of GPUs and links it
projects. No GPU was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from couplings import Coupling
from couplings.collectives import Ranks
from couplings.kernels.auction import solve

from .instances import photo_crops
from .record import environment

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4)
ROWS = (64, 128, 256)
WIDTH = 3 * 32 * 32
NARROW = 3 * 16 * 16  # a second width, to hold the model against
POOLS = (64, 128, 256, 512, 1024, 2048, 4096)
REPEATS = 21
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


def _amount(record: Record) -> float:
    """Bytes, or operations, that a second does."""
    return float(record["work"] / record["seconds"])


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
            records.append(_couple(rank, ranks, name, Coupling(**options), data, noise))
        if ranks > 1:
            narrow = (values[:, :, ::2, ::2].contiguous() for values in (data, noise))
            records.append(_couple(rank, ranks, "global", Coupling(scope="global"), *narrow))
            records += _wire(ranks, rows, noise)
    if ranks > 1:
        records += _rates(rank, ranks, data, noise)
        dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(records))


def _couple(rank: int, ranks: int, name: str, coupling: Coupling, data: torch.Tensor, noise: torch.Tensor) -> Record:
    costs, traces = [], []

    def call() -> None:  # as in training, nothing that takes memory outlives the call
        coupled = coupling(data, noise)
        costs.append((float(coupled.cost), float(coupled.cost_before)))
        traces.append(coupled.trace)

    seconds = _clock(call, ranks)
    seen = [trace for trace in traces[1:] if trace is not None]
    phases = {
        phase.name: {
            "seconds": statistics.median(trace.phases[position].seconds for trace in seen),
            "received": phase.received,
        }
        for position, phase in enumerate(seen[0].phases if seen else ())
    }
    if seen:
        beside = [whole - trace.seconds for whole, trace in zip(seconds, seen, strict=True)]
        phases["beside"] = {"seconds": statistics.median(beside), "received": 0}
    told = {
        "cost": costs[0][0],
        "cost_before": costs[0][1],
        "phases": phases,
        "received": seen[0].received if seen else 0,
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
        "rows": len(data),
        "width": data[0].numel(),
        **_spread(seconds),
        "reduction": 1 - cost / before,
        "received": [one["received"] for one in heard],
        "phases": heard[0]["phases"],
    }


def _rates(rank: int, ranks: int, data: torch.Tensor, noise: torch.Tensor) -> list[Record]:
    """Constants of the model, each by itself, while every rank does the same; and a call on next to nothing."""
    generator = torch.Generator().manual_seed(rank)
    nothing = (torch.randn(2, 3, generator=generator) for _ in range(2))
    empty = _couple(rank, ranks, "empty", Coupling(scope="global"), *nothing)
    group = Ranks(dist.group.WORLD)
    rows = len(noise)
    x, pool = data.flatten(1), torch.randn(ranks * rows, WIDTH)
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "received": ((ranks - 1) * noise.nbytes, lambda: group.all_gather_rows("noise", noise, [rows] * ranks)),
        "product": (2 * rows * len(pool) * WIDTH, lambda: x @ pool.T),
        "read": (noise.nbytes, noise.aminmax),
    }
    return [
        {**empty, "task": "empty"},
        *(
            {
                "task": "rate",
                "contender": name,
                "ranks": ranks,
                "rows": rows,
                "work": work,
                **_spread(_clock(call, ranks)),
            }
            for name, (work, call) in calls.items()
        ),
    ]


def _wire(ranks: int, rows: int, noise: torch.Tensor) -> list[Record]:
    """Move the noise of the other ranks, and draw it anew instead, as noise that is addressed by its seed allows."""
    gathered = [torch.empty_like(noise) for _ in range(ranks)]
    generator = torch.Generator()

    def draw() -> None:
        for rank in range(1, ranks):
            torch.randn(noise.shape, generator=generator.manual_seed(rank))

    calls = {
        "all-gather": lambda: dist.all_gather(gathered, noise),
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
    memory : float
        Bytes per second that one rank reads, or writes, where its data are.
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
    exchange, hop, far_hop : float
        Seconds of an exchange of nothing: of its own, and for each rank that it passes, on the same or another node.
    idle : mapping of str to float
        Seconds by phase of a call on nothing, beyond those exchanges: Python and the starting of each operation.
    source : str
    """

    name: str
    flops: float
    memory: float
    link: float
    network: float
    adapter: float
    host: float
    per_node: int
    exchange: float
    hop: float
    far_hop: float
    idle: Mapping[str, float]
    source: str

    def message(self, ranks: int) -> float:
        """Seconds of an exchange of nothing, around a ring."""
        nodes = ceil(ranks / self.per_node)
        return self.exchange + (ranks - nodes) * self.hop + (nodes - 1) * self.far_hop

    def receive(self, ranks: int, rows: int, row_bytes: int, from_abroad: float, efficiency: float) -> float:
        """Seconds until a rank has the rows of all others, those of other nodes at bytes per second `from_abroad`."""
        near, far = (ranks - 1) * rows, max(0, ranks - self.per_node) * rows
        return self.message(ranks) + row_bytes * (near / self.link + far / from_abroad) / efficiency


# Published peaks in one direction; a coupling is given `EFFICIENCY` of them.
EFFICIENCY = 0.7
# NCCL's own estimate for a ring of small messages (LL), src/graph/tuning.cc: 6.6 us, and for each rank that it passes
# 0.6 us over NVLink, 1 us over PCIe, 2.7 us over a network.
EXCHANGE, NVLINK_HOP, PCIE_HOP, FAR_HOP = 6.6e-6, 0.6e-6, 1e-6, 2.7e-6
LAUNCHES = 60 * 5e-6  # seconds, assumed: kernels and copies of a call, and what each takes to launch
_Servers = partial(Cluster, per_node=8, exchange=EXCHANGE, far_hop=FAR_HOP, idle={"launches": LAUNCHES})
CLUSTERS = (
    _Servers(
        name="A6000, PCIe, 1 x HDR",
        flops=38.7e12,
        memory=768e9,
        link=32e9,
        network=25e9,
        adapter=25e9,
        host=32e9,
        hop=PCIE_HOP,
        source="RTX A6000 data sheet: 38.7 TFLOPS, 768 GB/s, PCIe 4.0 x16; InfiniBand HDR 200 Gb/s",
    ),
    _Servers(
        name="A800, NVLink, 8 x HDR",
        flops=19.5e12,
        memory=2039e9,
        link=200e9,
        network=200e9,
        adapter=25e9,
        host=32e9,
        hop=NVLINK_HOP,
        source="A800 data sheet: 19.5 TFLOPS, 2039 GB/s, NVLink 400 GB/s both ways, PCIe 4.0 x16; "
        "InfiniBand HDR 200 Gb/s",
    ),
    _Servers(
        name="H100, NVLink, 8 x NDR",
        flops=67e12,
        memory=3350e9,
        link=450e9,
        network=400e9,
        adapter=50e9,
        host=64e9,
        hop=NVLINK_HOP,
        source="H100 SXM data sheet: 67 TFLOPS, 3350 GB/s, NVLink 900 GB/s both ways, PCIe 5.0 x16; "
        "InfiniBand NDR 400 Gb/s",
    ),
)
EXCHANGES = ("header", "noise", "costs", "index", "report")
GPUS = (8, 16, 64, 1024)
GPU_ROWS = 128
STEP = 0.5  # seconds of a training step, assumed
SHARE = 0.05  # of it that a coupling may take


def predict(
    cluster: Cluster,
    ranks: int,
    rows: int,
    solve: Callable[[int], float],
    *,
    width: int = WIDTH,
    efficiency: float = 1.0,
) -> dict[str, float]:
    """Seconds of each phase of an exact coupling of float32 rows over ranks.

    Parameters
    ----------
    cluster : Cluster
    ranks, rows : int
        Rows are those of one rank.
    solve : callable
        Seconds of a solve by its size.
    width : int
        Values of a row.
    efficiency : float
        Share of the rates that is reached.
    """
    total = ranks * rows
    message = cluster.message(ranks)

    def receive(row_bytes: int, from_abroad: float) -> float:
        return cluster.receive(ranks, rows, row_bytes, from_abroad, efficiency)

    def touch(batches: int) -> float:
        return batches * 4 * width * rows / (cluster.memory * efficiency)

    phases = {
        "check": touch(2),  # the largest values of data and noise
        "header": message,
        "noise": receive(4 * width, cluster.network),
        "cost": 2 * rows * total * width / (cluster.flops * efficiency),
        "costs": receive(4 * total, cluster.adapter),  # into the first rank alone
        "to the host": 4 * total * total / (cluster.host * efficiency),
        "solve": solve(total),
        "index": receive(8, cluster.network),
        "measure": touch(4),  # data and noise, before and after
        "report": message,
        "beside": touch(2),  # taking the rows that were given, from memory to memory
    }
    for name, seconds in cluster.idle.items():
        phases[name] = phases.get(name, 0.0) + seconds
    return phases


def _of(records: list[Record], task: str, contender: str) -> list[Record]:
    return [record for record in records if (record["task"], record["contender"]) == (task, contender)]


def fitted_solve(records: list[Record]) -> tuple[Callable[[int], float], float]:
    """Return seconds of a solve by size, and the exponent beyond the sizes that were measured."""
    found = sorted(_of(records, "pool", "solve"), key=lambda record: record["rows"])
    sizes, seconds = (np.log([record[key] for record in found]) for key in ("rows", "seconds"))
    exponent = float(np.polyfit(sizes[-4:], seconds[-4:], 1)[0])

    def solve(n: int) -> float:
        beyond = max(0.0, np.log(n) - sizes[-1])
        return float(np.exp(np.interp(np.log(n), sizes, seconds) + exponent * beyond))

    return solve, exponent


def idle(records: list[Record], ranks: int) -> dict[str, float]:
    """Seconds by phase of a call on next to nothing."""
    (empty,) = (record for record in records if record["task"] == "empty" and record["ranks"] == ranks)
    return {name: phase["seconds"] for name, phase in empty["phases"].items()}


def this_machine(records: list[Record], ranks: int) -> Cluster:
    """Rates of this machine while that many ranks share it: each was measured by itself, in no coupling."""
    rates = {record["contender"]: record for record in records if record["task"] == "rate" and record["ranks"] == ranks}
    nothing = idle(records, ranks)
    received = rates["received"]
    link = received["work"] / max(1e-9, received["seconds"] - nothing["noise"])
    return Cluster(
        name="this machine",
        flops=_amount(rates["product"]),
        memory=_amount(rates["read"]),
        link=link,
        network=link,
        adapter=link,
        host=float("inf"),
        per_node=ranks,
        exchange=0.0,
        hop=0.0,
        far_hop=0.0,
        idle=nothing,
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
        "## Send noise, or draw it anew?",
        "Noise that is addressed by its seed could be drawn by every rank instead of sent: milliseconds for the noise "
        "of all other ranks. The library sends: drawing does not win clearly, and would ask that all noise be a "
        "function of seeds that the library knows.",
        _noise(records),
        "## Where the time of a global coupling goes, and what the model says",
        "Milliseconds on the first rank, which gathers and solves; `beside` is what no phase counts, until the slowest "
        "rank is done. Above, what was measured (medians; the total is that of whole calls); below, what the model "
        "says of it.",
        _checked(records, solve),
        "The model adds to a call on next to nothing (two rows of three values on each rank) what the rows need: "
        "values that are read or copied, bytes that are received, the matrix product, the solve. Its constants are "
        "medians, each measured in the same run by itself, in no coupling of these sizes, while as many ranks do the "
        f"same with {max(ROWS)} rows of {WIDTH} values:",
        _constants(records),
        _verdict(records, solve),
        "## What a larger pool gains",
        _gains(records),
        "## Projections",
        f"From published peak rates at {EFFICIENCY:.0%} of the peak, {GPU_ROWS} rows of 3x32x32 per GPU, exact solve "
        f"on one core of this machine's kind (measured up to n = {max(POOLS)}, beyond that as n^{exponent:.2f}). Not "
        f"measured on GPUs. Milliseconds; what to use is what gains most in at most {SHARE:.0%} of a training step of "
        f"{1e3 * STEP:.0f} ms, the gain being that measured above for a pool of that size (or the largest). The "
        "sorting of `sliced` is not in its time. `processor` is the host's own work, which is Python: what a call on "
        f"nothing took here without its exchanges, and an assumed {_ms(LAUNCHES)} ms for the launch of kernels. "
        f"Exchanges also take NCCL's latency of a ring: {1e6 * EXCHANGE:.3g} us, and for each rank passed "
        f"{1e6 * NVLINK_HOP:.3g} us (NVLink), {1e6 * PCIE_HOP:.3g} us (PCIe) or {1e6 * FAR_HOP:.3g} us (network), the "
        "estimates in its src/graph/tuning.cc. A solve that runs beside the training step, a batch ahead, may take as "
        "long as the step.",
        _projections(records, solve),
        "Rates: " + "; ".join(f"{c.name} ({c.source}; {c.per_node} GPUs per node)" for c in CLUSTERS) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _busy(hardware: Record) -> str:
    if hardware["load"] < hardware["cores"] / 2:
        return ""
    return (
        " **Other programs were using the machine: every exchange waited for ranks to be scheduled, so that the times "
        "are upper bounds and the model, which knows little of that, is held against noise. Run it again on an idle "
        "machine.**"
    )


def _measured(records: list[Record]) -> str:
    rows = []
    for record in (r for r in records if r["task"] == "couple"):
        low, high = record["quartiles"]
        rows.append([
            str(record["ranks"]), str(record["rows"]), str(record["width"]), record["contender"],
            f"{_ms(record['seconds'])} ± {_ms((high - low) / 2)}", f"{100 * record['reduction']:.2f}%",
            _bytes(record["received"][0]), _bytes(record["received"][-1]),
        ])  # fmt: skip
    return _table(["ranks", "rows each", "values", "", "ms", "reduction", "first rank", "last rank"], rows)


def _noise(records: list[Record]) -> str:
    found = {(r["ranks"], r["rows"], r["contender"]): r["seconds"] for r in records if r["task"] == "noise"}
    cells = sorted({key[:2] for key in found})
    return _table(
        ["ranks", "rows each", "all-gather", "draw anew"],
        [[str(k), str(n), _ms(found[k, n, "all-gather"]), _ms(found[k, n, "draw anew"])] for k, n in cells],
    )


def _told(records: list[Record], record: Record, solve: Callable[[int], float]) -> dict[str, float]:
    """Return what the model says of the phases of a coupling that was measured."""
    machine = this_machine(records, record["ranks"])
    told = predict(machine, record["ranks"], record["rows"], solve, width=record["width"])
    return {name: told[name] for name in record["phases"]}


def _checked(records: list[Record], solve: Callable[[int], float]) -> str:
    found = _of(records, "couple", "global")
    names = list(found[0]["phases"])
    rows = []
    for record in found:
        told = _told(records, record, solve)
        total, seen = sum(told.values()), (_ms(record["phases"][name]["seconds"]) for name in names)
        ratios = [f"{total / record[key]:.2f}" for key in ("fastest", "seconds")]
        place = [str(record[key]) for key in ("ranks", "rows", "width")]
        rows.append([*place, "measured", *seen, _ms(record["seconds"]), _ms(record["fastest"]), "", ""])
        rows.append(["", "", "", "model", *(_ms(told[name]) for name in names), _ms(total), "", *ratios])
    head = ["ranks", "rows each", "values", "", *names, "total", "fastest"]
    return _table([*head, "model / fastest", "model / median"], rows)


def _constants(records: list[Record]) -> str:
    rows = []
    for ranks in sorted({record["ranks"] for record in records if record["task"] == "empty"}):
        machine = this_machine(records, ranks)
        between = sum(seconds for name, seconds in machine.idle.items() if name in EXCHANGES)
        rates = [f"{_bytes(machine.memory)}/s", f"{_bytes(machine.link)}/s", f"{machine.flops / 1e9:.3g} GFLOPS"]
        rows.append([str(ranks), _ms(between), _ms(sum(machine.idle.values()) - between), *rates])
    exchanges = f"ms of nothing: its {len(EXCHANGES)} exchanges"
    return _table(["ranks", exchanges, "the rest of it", "read", "received", "product"], rows)


def _verdict(records: list[Record], solve: Callable[[int], float], near: float = 0.3) -> str:
    """Return how near the model comes, and where it does not, in words."""
    found = _of(records, "couple", "global")
    told = [_told(records, record, solve) for record in found]
    lines = []
    for key, name in (("fastest", "fastest"), ("seconds", "median")):
        ratios = [sum(one.values()) / record[key] for one, record in zip(told, found, strict=True)]
        far = [
            f"{record['ranks']} ranks x {record['rows']} rows x {record['width']} values ({ratio:.2f})"
            for record, ratio in zip(found, ratios, strict=True)
            if abs(ratio - 1) > near
        ]
        lines.append(
            f"Of the {name} calls it predicts {min(ratios):.2f} to {max(ratios):.2f}, within {near:.0%} in "
            f"{len(found) - len(far)} of {len(found)}{': not for ' + ', '.join(far) if far else ''}."
        )
    cells = [
        (one[name], phase["seconds"])
        for one, record in zip(told, found, strict=True)
        for name, phase in record["phases"].items()
        if phase["seconds"] >= 1e-3
    ]
    good = sum(abs(said / seen - 1) <= near for said, seen in cells)
    lines.append(
        f"Of the phases that took a millisecond or more, {good} of {len(cells)} are predicted within {near:.0%}: where "
        "ranks outnumber cores, a phase is also charged for the ranks that hold the cores meanwhile."
    )
    return " ".join(lines)


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

    processor = sum(seconds for name, seconds in idle(records, 2).items() if name not in EXCHANGES)
    rows = []
    for cluster in CLUSTERS:
        hosted = replace(cluster, idle={**cluster.idle, "processor": processor})
        node = sum(predict(hosted, hosted.per_node, GPU_ROWS, solve, efficiency=EFFICIENCY).values())
        for ranks in GPUS:
            phases = predict(hosted, ranks, GPU_ROWS, solve, efficiency=EFFICIENCY)
            total, n = sum(phases.values()), ranks * GPU_ROWS
            wire = sum(phases[name] for name in EXCHANGES)
            busy = phases["processor"] + phases["launches"]
            device = sum(phases[name] for name in ("check", "cost", "measure", "beside"))
            # It gathers points into the first rank, where the exact methods gather costs.
            points = hosted.receive(ranks, GPU_ROWS, 4 * WIDTH, hosted.adapter, EFFICIENCY)
            sliced = busy + points + sum(phases[name] for name in ("header", "noise", "index", "report"))
            choices = [
                ("global", total, gain("auction", n)),
                ("per node", node, gain("auction", hosted.per_node * GPU_ROWS)),
                ("local", busy + solve(GPU_ROWS), gain("auction", GPU_ROWS)),
                ("global, `sliced`", sliced, gain("sliced", n)),
                ("`independent`", 0.0, 0.0),
            ]
            within = [choice for choice in choices if choice[1] <= SHARE * STEP]
            name, seconds, reduction = max(within, key=lambda choice: choice[2])
            times = (wire, busy, device, phases["to the host"], phases["solve"], total, sliced)
            advice = f"{name}: {_ms(seconds)} ms, {100 * reduction:.2f}%"
            rows.append([cluster.name, str(ranks), f"{n:,}", _bytes(4.0 * n * n), *map(_ms, times), advice])
    head = ["", "GPUs", "pool", "matrix on the first rank", "wire", "processor", "GPU", "to the host", "solve", "total"]
    return _table([*head, "`sliced`", "what to use"], rows)


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
