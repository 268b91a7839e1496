"""What a dataset-level coupling takes, and what its pairs are: ``python -m benchmarks.fit DATA``.

The fit, with chi^2 along it; the pairs, beside those of minibatches; and `assign`, beside the one product that it
cannot do without. Records: ``results/fit.jsonl``; ``python -m benchmarks.tables`` makes a table of them.
"""

from __future__ import annotations

import argparse
import logging
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .record import RESULTS, Record, append, environment, markdown, read

TOLERANCE = 0.05
PAIRS = {
    "independent": "independent",
    **{f"minibatch_{n}": f"minibatches of {n} rows, exact" for n in (128, 1024, 2048)},
    "distance": "whole dataset",
}
VERSIONS = ("couplings", "torch", "numpy", "numba")


class _TimeUp(Exception):  # noqa: N818  # not an error
    pass


class _Curve(logging.Handler):
    """Keep the measurements that a fit logs; end the fit when its time is up."""

    def __init__(self, seconds: float) -> None:
        super().__init__(logging.DEBUG)
        self.points: list[dict[str, float]] = []
        self.seconds = seconds

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"step (\d+): chi\^2 (\S+) after (\S+) s", record.getMessage())
        if found:
            step, chi2, after = map(float, found.groups())
            self.points.append({"step": step, "chi2": chi2, "seconds": after})
            if after > self.seconds:
                raise _TimeUp


def measure(data: Any, seconds: float, drawn: int = 4096) -> Iterator[Record]:
    """Fit for so many seconds at most; measure the pairs, and `assign` of so many rows of noise.

    Parameters
    ----------
    data : (N, *shape) Tensor
    seconds : float
    drawn : int
    """
    import torch
    from torch.utils.benchmark.utils.timer import timer  # waits for the device

    from couplings import semidiscrete

    semidiscrete.fit(data[:2000], steps=3)
    curve, logger = _Curve(seconds), logging.getLogger("couplings.semidiscrete")
    level, spread = logger.level, logger.propagate
    logger.addHandler(curve)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    start, plan = timer(), None
    try:
        plan = semidiscrete.fit(data, tolerance=TOLERANCE)
    except _TimeUp:
        pass
    finally:
        logger.removeHandler(curve)
        logger.setLevel(level)
        logger.propagate = spread
    about = {"n": len(data), "values": data[0].numel(), "status": "ok" if plan else "cut"}
    spent = {"seconds": timer() - start, "curve": curve.points}
    yield {"task": "fit", "contender": "semidiscrete", **about, **spent, **(asdict(plan.quality()) if plan else {})}

    plan = plan or semidiscrete.fit(data, steps=5)
    noise = torch.randn(drawn, *data.shape[1:], device=data.device)
    flat, z = data.flatten(1), noise.flatten(1)
    half, narrow = flat.bfloat16(), z.bfloat16()
    contenders: dict[str, Callable[[], Any]] = {
        "assign": lambda: plan.assign(noise),
        "product, float32": lambda: z @ flat.T,
        "product, bfloat16": lambda: narrow @ half.T,
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(8):
        for name, call in contenders.items():
            begun = timer()
            call()
            if turn:
                taken[name].append(timer() - begun)
    for name, each in taken.items():
        found = {"median": statistics.median(each), "quartiles": np.quantile(each, (0.25, 0.75)).tolist()}
        yield {"task": "assign", "n": len(data), "rows": drawn, "contender": name, "status": "ok", **found}


def table(records: list[Record]) -> str:
    """Lay out chi^2 over time, the pairs, and what `assign` takes."""
    rows = []
    for record in records:
        if record["task"] == "fit":
            of = f"fit of {record['n']} rows"
            for at in record["curve"]:
                rows.append([of, f"{at['seconds']:.1f} s, {at['step']:.0f} steps", f"chi^2 {at['chi2']:.3f}"])
            for key, name in PAIRS.items() if "distance" in record else ():
                rows.append(["mean squared distance of the pairs", name, f"{record[key]:.1f}"])
        if record["task"] == "assign":
            took = f"{1e3 * record['median']:.3g} ms"
            rows.append([f"{record['rows']} rows of noise", record["contender"], took])
    return markdown(["", "", ""], rows)


TABLES = {"fit": lambda: table(read(RESULTS / "fit.jsonl"))}


def main(argv: list[str] | None = None) -> None:
    """Measure a dataset, and put it on record in the place of the one before."""
    import torch

    from couplings.ablation.files import read_dataset

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="as for `couplings fit`: a file of rows, or a folder with train-images-idx3-ubyte")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--seconds", type=float, default=1200.0, help="of the fit, at most (default: 1200)")
    parser.add_argument("--drawn", type=int, default=4096, metavar="ROWS", help="of noise (default: 4096)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    data = torch.as_tensor(read_dataset(arguments.data)).float().to(arguments.device)
    place = environment(torch.get_num_threads(), None, VERSIONS)
    path = arguments.output / "fit.jsonl"
    found = [record | {"environment": place} for record in measure(data, arguments.seconds, arguments.drawn)]
    path.unlink(missing_ok=True)
    for record in found:
        append(path, record)
    print(table(found))


if __name__ == "__main__":
    sys.exit(main())
