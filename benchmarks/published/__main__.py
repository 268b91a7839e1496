"""Measure published tables again: ``python -m benchmarks.published NAME``.

The networks of all seeds of a cell train side by side. A run can be ended at any time: called again it goes on where it
was, and leaves out what is on record. Processes with other cells or seeds may run beside it. ``python -m
benchmarks.tables`` makes the page of the records. On a machine with a GPU and many cores:
``python -m benchmarks.published c2ot-toy --device cuda --together 8 --workers 2``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..record import PACKAGES, RESULTS, Record, append, environment, read
from . import FILE, TABLES
from .ensemble import Place
from .measures import verdict
from .table import Settings, Table

VERSIONS = (*PACKAGES[:5], "torchdiffeq", "scikit-learn")
SOURCES = ("couplings", "benchmarks/published")


def on_record(path: Path, table: Table, cell: str, settings: Settings) -> dict[int, Record]:
    """Return the records of a cell at some settings, by seed."""
    key = {"table": table.name, "cell": cell, "settings": settings}
    return {record["seed"]: record for record in read(path) if key.items() <= record.items()}


def measure(table: Table, cell: str, settings: Settings, arguments: argparse.Namespace) -> None:
    """Run a cell on the seeds that are not on record, put them there, and say how it compares."""
    path = arguments.output / FILE
    known = on_record(path, table, cell, settings)
    missing = [seed for seed in arguments.seeds or table.seeds if seed not in known]
    if missing:
        label = "-".join([table.name, cell, *["quick"] * arguments.quick, *map(str, missing)])
        checkpoint = arguments.runs / f"{label}.pt"
        place = Place(torch.device(arguments.device), arguments.workers, checkpoint)
        began = time.perf_counter()
        values = table.run(cell, missing, settings, place)
        seconds = time.perf_counter() - began
        device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu"
        for seed, measured in zip(missing, values, strict=True):
            append(
                path,
                {
                    "table": table.name,
                    "cell": cell,
                    "seed": seed,
                    "settings": settings,
                    "measured": measured,
                    "published": {
                        name: {"mean": value.mean, "deviation": value.deviation}
                        for name, value in table.cells[cell].items()
                    },
                    "source": table.source,
                    "departures": list(table.departures),
                    "beside": missing,
                    "seconds": round(seconds, 1),
                    "device": device,
                    "environment": environment(
                        torch.get_num_threads(), None, VERSIONS, ("couplings", "benchmarks/published")
                    ),
                },
            )
        checkpoint.unlink(missing_ok=True)
    records = list(on_record(path, table, cell, settings).values())
    for name in records[0]["measured"]:
        ours = [record["measured"][name] for record in records]
        spread = f" +- {statistics.stdev(ours):.3f}" if len(ours) > 1 else ""
        line = f"{table.name}, {cell}, {name}: {statistics.mean(ours):.3f}{spread} ({len(ours)} seeds)"
        value = table.cells[cell].get(name)
        if value is not None:
            spread = "" if value.deviation is None else f" +- {value.deviation:.3f}"
            line += f"; published {value.mean:.3f}{spread}: {verdict(ours, value)}"
        print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure what is not on record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=TABLES, help="the table")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="some of its cells (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: as many as were published)")
    parser.add_argument("--device", default="cpu", help="to train on: cpu (default) or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that couple ahead, a cell (default: none)")
    parser.add_argument("--together", type=int, default=1, help="cells to run at once, in processes (default: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that the program runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/published"), help="folder of the checkpoints")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    arguments = parser.parse_args(argv)
    table = TABLES[arguments.name]
    cells = arguments.cells or list(table.cells)
    if unknown := set(cells) - set(table.cells):
        parser.error(f"--cells: unknown {', '.join(sorted(unknown))}; there are {', '.join(table.cells)}")
    torch.set_num_threads(1)
    settings = table.quick if arguments.quick else table.settings
    if arguments.together > 1:
        given = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "benchmarks.published", *given, "--together", "1", "--cells"]
        with ThreadPoolExecutor(arguments.together) as pool:
            done = pool.map(lambda cell: subprocess.run([*command, cell], check=False).returncode, cells)
            if any(list(done)):
                sys.exit("a cell failed: see above")
        return
    for cell in cells:
        measure(table, cell, settings, arguments)


if __name__ == "__main__":
    main()
