"""What coupling over ranks gains and costs on this machine: ``python -m benchmarks.distributed``.

Measures gloo ranks over the loopback interface into ``results/distributed.jsonl``: whole calls, their phases and bytes.
``python -m benchmarks.tables`` makes tables of the records.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .record import RESULTS, Record, environment, markdown, provenance, read

RANKS = (1, 2, 4)
ROWS = (64, 128, 256)
REPEATS = 21
TIMEOUT = timedelta(seconds=120)

CONTENDERS: dict[str, dict[str, Any]] = {
    "local": {"scope": "local"},
    "global": {"scope": "global"},
    "global, groups of 2": {"scope": "global"},
    "global sliced": {"scope": "global", "method": "sliced"},
}


# -- measuring; torch is imported where it is needed, so that tables are made without it


def _clock(call: Callable[[], Any], ranks: int, repeats: int = REPEATS) -> list[float]:
    """Seconds of each call on the slowest rank, all starting together; the first call is not counted."""
    import torch
    import torch.distributed as dist

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


def _batch(rank: int, rows: int) -> tuple[Any, Any]:
    import torch

    from .instances import photo_crops

    rng = np.random.default_rng((rank, rows))
    data = torch.from_numpy(photo_crops(rows, rng))
    return data, torch.from_numpy(rng.standard_normal(data.shape, np.float32))


def _rank(rank: int, ranks: int, meeting: str, out: str, every: tuple[int, ...], repeats: int) -> None:
    """Everything that needs this many ranks, on one of them."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    pairs: list[Any] = []
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=TIMEOUT)
        pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    records = []
    for rows in every:
        batch = _batch(rank, rows)
        for name, options in CONTENDERS.items():
            if name == "local" or (ranks > 2 if name == "global, groups of 2" else ranks > 1):
                group = {"group": pairs[rank // 2]} if name == "global, groups of 2" else {}
                records.append(_couple(ranks, name, {**options, **group}, batch, repeats))
    if ranks > 1:
        dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(records))


def _couple(ranks: int, name: str, options: dict[str, Any], batch: tuple[Any, Any], repeats: int) -> Record:
    import torch.distributed as dist

    from couplings import Coupling
    from couplings.stages import recorded

    coupling, calls = Coupling(**options), []

    def call() -> None:  # as in training, nothing that takes memory outlives the call
        with recorded() as record:
            coupled = coupling(*batch)
        calls.append((float(coupled.cost), float(coupled.cost_before), record))

    seconds = _clock(call, ranks, repeats)
    costs, (_, *stages) = calls[0][:2], [record for *_, record in calls]
    phases = {
        name: {
            "seconds": statistics.median(record.seconds.get(name, 0.0) for record in stages),
            "received": stages[0].received.get(name, 0),
        }
        for name, spent in stages[0].seconds.items()
        if spent
    }
    own = (*costs, sum(stages[0].received.values()))
    heard: list[Any] = [own]
    if ranks > 1:
        heard = [None] * ranks
        dist.all_gather_object(heard, own)
    return {
        "task": "couple",
        "contender": name,
        "ranks": ranks,
        "rows": len(batch[0]),
        "width": batch[0][0].numel(),
        "seconds": statistics.median(seconds),
        "quartiles": list(np.quantile(seconds, (0.25, 0.75))),
        "fastest": min(seconds),
        "reduction": 1 - sum(cost for cost, _, _ in heard) / sum(before for _, before, _ in heard),
        "received": [received for *_, received in heard],
        "phases": phases,
    }


def measure(ranks: tuple[int, ...] = RANKS, rows: tuple[int, ...] = ROWS, repeats: int = REPEATS) -> list[Record]:
    """Run everything; ranks in processes of their own."""
    import torch
    import torch.multiprocessing as mp

    torch.set_num_threads(1)
    place = environment(1, None)  # first: what this program does is not the load of others
    records = []
    for count in ranks:
        print(f"{time.strftime('%H:%M:%S')} {count} ranks", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "records.json"
            arguments = (count, str(Path(folder) / "store"), str(out), rows, repeats)
            mp.start_processes(_rank, arguments, nprocs=count, start_method="spawn")
            records += json.loads(out.read_text())
    return [{**record, "environment": place} for record in records]


# -- tables


@cache
def committed() -> list[Record]:
    """Return the records that are part of the repository."""
    return read(RESULTS / "distributed.jsonl")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def calls_table(records: list[Record]) -> str:
    """Local against global coupling."""
    rows = []
    for record in records:
        low, high = record["quartiles"]
        time = f"{_ms(record['seconds'])} ± {_ms((high - low) / 2)}"
        received = [f"{record['received'][rank] / 1e6:.2f}" for rank in (0, -1)]
        place = [str(record[key]) for key in ("ranks", "rows", "width")]
        rows.append([*place, record["contender"], time, f"{100 * record['reduction']:.2f}%", *received])
    head = ["ranks", "rows each", "values", "", "ms", "reduction", "MB to the first rank", "MB to the last"]
    return markdown(head, rows)


def phases_table(records: list[Record]) -> str:
    """Milliseconds of each phase of a global coupling on the first rank, and megabytes received where there are any."""
    found = [record for record in records if record["contender"] == "global"]
    names = [name for name in found[0]["phases"] if name != "beside"]
    rows = []
    for record in found:
        phases = [record["phases"][name] for name in names]
        cells = [
            f"{_ms(each['seconds'])} ({each['received'] / 1e6:.2f} MB)" if each["received"] else _ms(each["seconds"])
            for each in phases
        ]
        rows.append([*(str(record[key]) for key in ("ranks", "rows", "width")), *cells, _ms(record["seconds"])])
    return markdown(["ranks", "rows each", "values", *names, "whole call"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "ranks-place": lambda: provenance(committed()),
    "ranks-calls": lambda: calls_table(committed()),
    "ranks-phases": lambda: phases_table(committed()),
}


def main(argv: list[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "distributed.jsonl", metavar="FILE")
    arguments = parser.parse_args(argv)
    records = measure()
    arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
