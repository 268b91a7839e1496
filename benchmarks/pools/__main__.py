"""What the size of the pool does that noise is coupled in: ``python -m benchmarks.pools``.

Study "pools": flow matching and DDIM, trained with noise that is paired within the batch, over several batches or with
the whole dataset, and sampled with few and many steps. Studies "longer", "noisier" and "begun": where flow matching
loses. Study "consistency": consistency training, published and improved; "renoised": which noise its samples need
between two steps. Each way of pairing is a process; all objectives and seeds of it are trained at once, on the same
pairs. What is on record is skipped, and a process that was ended goes on.
``python -m benchmarks.tables`` makes tables and plots.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from ..record import RESULTS
from .pairs import PAIRINGS
from .studies import STUDIES
from .train import Task, prepare, run


def main(argv: list[str] | None = None) -> None:
    """Measure what is not on record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pools",
        description=__doc__,
        epilog="Fields of the recipes can be overridden: --train.steps 800, --evaluate.samples 500, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", choices=STUDIES, nargs="+", default=list(STUDIES), help="(default: all)")
    parser.add_argument("--pairings", choices=PAIRINGS, nargs="+", metavar="NAME", help="(default: the study's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: the study's)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="end after these, with what is on record")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        default=os.environ.get("COUPLINGS_DATA"),
        help="folder with train-images-idx3-ubyte and its labels, gzipped or not, or another data.source of recipes "
        "(default: the variable COUPLINGS_DATA)",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/pools"), help="of classifier, plan, unfinished runs (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    arguments, further = parser.parse_known_args(argv)
    if arguments.data is None:
        parser.error("--data: say where the images are, or set COUPLINGS_DATA")
    data = f"idx:{arguments.data}" if Path(arguments.data).is_dir() else arguments.data
    began = time.time()
    deadline = None if arguments.time_limit is None else began + arguments.time_limit
    prepare(data, arguments.device, arguments.folder)
    tasks = [
        Task(
            *(study.name, pairing, tuple(arguments.seeds or study.seeds), data, arguments.device, arguments.folder),
            *(arguments.output / f"{study.name}.jsonl", deadline, tuple(further)),
        )
        for study in (STUDIES[name] for name in arguments.study)
        for pairing in arguments.pairings or study.pairings
    ]
    failed = False
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as workers:
        running = {workers.submit(run, task): task for task in tasks}
        for done in as_completed(running):
            task, error = running[done], done.exception()
            ended = done.result() if error is None else "".join(traceback.format_exception(error))
            print(f"{time.time() - began:4.0f} s  {task.study}, {task.pairing}: {ended}", flush=True)
            failed |= error is not None
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
