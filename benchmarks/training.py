"""When does coupling help training? ``python -m benchmarks.training --data DIR``, DIR in the format of MNIST's files.

Trains small DDIM and flow matching networks with independent and with coupled noise, same seeds, and measures the
Frechet distance of their samples along training for several numbers of sampling steps. One process on one thread. It
can be ended at any time: called again it goes on where it was, and skips what is on record.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import PACKAGES, environment

RECIPES = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parent / "results"
VERSIONS = (*PACKAGES[:5], "diffusers", "accelerate", "torchmetrics", "safetensors", "scikit-learn")

# Sampling with many steps takes longer than training: up to 10 at every checkpoint, the others at a few.
PARTS = ((10, None), (20, 4), (50, 2))


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe with its overrides.

    Parameters
    ----------
    recipe : str
        Name in `RECIPES`.
    title : str
        Objective, for tables.
    overrides : tuple of str
        As on the command line of ``integrations.train``.
    """

    recipe: str
    title: str
    overrides: tuple[str, ...] = ()


def _ddim(prediction: str, *overrides: str) -> Arm:
    title = {"v_prediction": "DDIM, v prediction", "epsilon": "DDIM, epsilon prediction"}
    title["sample"] = "DDIM, image prediction"
    return Arm("ddim", title[prediction], ("--objective.prediction", prediction, *overrides))


INDEPENDENT = ("--coupling.method", "independent")

ARMS = {
    "v-independent": _ddim("v_prediction", *INDEPENDENT),
    "v-coupled": _ddim("v_prediction"),
    "epsilon-independent": _ddim("epsilon", *INDEPENDENT),
    "epsilon-coupled": _ddim("epsilon"),
}


def steps_at(step: int, recipe: Any) -> list[int]:
    """Return the numbers of sampling steps to measure after ``step`` training steps."""
    return [
        steps
        for steps in recipe.evaluate.steps
        if (parts := next((parts for most, parts in PARTS if steps <= most), 1)) is None
        or step * parts % recipe.train.steps == 0
    ]


# -- records


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records, without a line that was cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record: a line, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def settings(recipe: Any) -> dict[str, Any]:
    """Return what decides a run's numbers: the recipe without its places."""
    values = recipe.sections()
    del values["output"], values["data"]["source"], values["train"]["keep_last"]
    return json.loads(json.dumps(values))  # as it will be read back


# -- running


def run_arm(name: str, seed: int, options: Options) -> None:
    """Train one arm on one seed and put a record of every checkpoint on file."""
    from integrations import config, loop
    from integrations.checkpoint import steps as checkpoints

    arm = ARMS[name]
    output = options.runs / f"{name}-{seed}"
    arguments = [str(RECIPES / f"{arm.recipe}.yaml"), *arm.overrides, *options.further, "--data.source", options.data]
    arguments += ["--train.seed", str(seed), "--output", str(output), "--resume", "auto"]
    recipe = config.load(arguments)
    cell = {"arm": name, "seed": seed, "settings": settings(recipe)}
    every, last = recipe.train.checkpoint_every, recipe.train.steps
    points = sorted({*range(every, last + 1, every), last})
    done = {
        record["step"]
        for record in read(options.records)
        if record["kind"] == "point" and all(record[key] == value for key, value in cell.items())
    }
    if done.issuperset(points):
        print(f"{name}, seed {seed}: on record", flush=True)
        return
    began = time.perf_counter()
    loop.train(recipe, progress=False)
    if last not in checkpoints(output / "checkpoints"):
        sys.exit(143)  # asked to end; the loop has saved
    print(f"{name}, seed {seed}: trained, {time.perf_counter() - began:.0f} s", flush=True)
    metrics = read(output / "metrics.jsonl")
    for step in points:
        if step in done:
            continue
        began = time.perf_counter()
        frechet = distances(output / "checkpoints" / f"step-{step}", steps_at(step, recipe), options)
        window = [line for line in metrics if step - every < line["step"] <= step] or metrics
        means = {key: sum(line[key] for line in window) / len(window) for key in MEANS}
        record = {"kind": "point", **cell, "step": step, "frechet": frechet, **means}
        append(options.records, record | {"environment": environment(1, None, VERSIONS)})
        shown = "  ".join(f"{steps}: {value:.1f}" for steps, value in frechet.items())
        print(f"{name}, seed {seed}, step {step}: {shown}  ({time.perf_counter() - began:.0f} s)", flush=True)


MEANS = ("loss", "reduction", "coupling_ms", "step_ms")


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    data: str
    runs: Path
    records: Path
    further: tuple[str, ...]


@functools.cache
def scores(options: Options) -> Any:
    """Return the measure that all arms share, with a classifier trained once and kept beside the runs."""
    import torch

    from integrations import measure
    from integrations.config import Data
    from integrations.data import load_source

    source = load_source(Data(source=options.data))
    network = measure.feature_network("classifier", source, options.runs)
    return measure.Scores(network, source, torch.device("cpu"))


def distances(checkpoint: Path, steps: Iterable[int], options: Options) -> dict[str, float]:
    """Return the Frechet distance for each number of sampling steps."""
    from integrations import measure

    trained = measure.load_trained(checkpoint, ["--data.source", options.data])
    count = trained.recipe.evaluate.samples
    return {str(n): scores(options)(measure.draw(trained, count, n))["fid"] for n in steps}


def source_name(given: str) -> str:
    """Read ``--data``: a source as recipes name it, or a folder with MNIST's files."""
    from integrations.config import PLACED_SOURCES, PLAIN_SOURCES

    known = given in PLAIN_SOURCES or given.partition(":")[0] in PLACED_SOURCES
    return given if known else f"idx:{given}"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        epilog="Fields of the recipes can be overridden for all arms: --train.steps 800, --evaluate.samples 500, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        default=os.environ.get("COUPLINGS_DATA"),
        metavar="DIR",
        help="folder with train-images-idx3-ubyte and its labels, gzipped or not, or another data.source of recipes "
        "(default: the variable COUPLINGS_DATA)",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/training"), help="folder of checkpoints (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    arguments, further = parser.parse_known_args(argv)
    if arguments.data is None:
        parser.error("--data: say where the images are, or set COUPLINGS_DATA")
    import torch

    torch.set_num_threads(1)
    options = Options(source_name(arguments.data), arguments.runs, arguments.output / "training.jsonl", tuple(further))
    for seed in arguments.seeds:
        for name in arguments.arms:
            run_arm(name, seed, options)


if __name__ == "__main__":
    main()
