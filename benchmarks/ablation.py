"""What each coupling does to training: ``python -m benchmarks.ablation``.

Trains the small recipes once for every coupling and seed and measures Frechet distances along training and over the
number of sampling steps: scikit-learn's digits by default, or the MNIST family from a folder (``--data idx:FOLDER``, or
the environment variable COUPLINGS_DATA). All arms of a seed see the same weights, batches, noise and times; only the
pairing differs. A run that was stopped continues where it was; finished arms are not trained again.

``couplings report benchmarks/results/ablation-training.jsonl -o report.html`` makes tables and plots of the records.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from couplings import Coupling
from couplings.ablation.records import Log
from couplings.diagnostics import distance_reduction, one_step_prediction
from integrations import config

from .record import environment

RESULTS = Path(__file__).parent / "results"
PART = "training"
_TERMINATED = 143  # the exit status after SIGTERM
PICTURED = 24  # predictions in a picture
EQUAL = (("hungarian", "lapjv", "auction", "emd"), ("greedy", "stable"))
PICTURES = ("independent", "auction")

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A recipe with the overrides that make it, and the arms that are trained on it by default (None: all)."""

    overrides: tuple[str, ...]
    arms: tuple[str, ...] | None = None


OBJECTIVES = {
    "DDIM, v prediction": Task(
        ("ddim-digits", "--objective.prediction", "v_prediction"),
        (
            *("independent", "auction", "auction, l2", "auction, l1", "sinkhorn, reg 0.2", "sinkhorn, reg 0.5"),
            *("sinkhorn, reg 1", "greedy", "sliced", "nearest, k = 4, l2", "nearest, k = 4, dot"),
        ),
    ),
    "Flow matching": Task(("flow-matching-digits",), ("independent", "auction", "nearest, k = 4, dot")),
    # The two that show where coupling does not help.
    "DDIM, epsilon prediction": Task(("ddim-digits", "--objective.prediction", "epsilon"), ("independent", "auction")),
}

ARMS: dict[str, dict[str, Any]] = {
    "independent": {"method": "independent"},
    "auction": {"method": "auction"},
    "auction, l2": {"method": "auction", "metric": "l2"},
    "auction, l1": {"method": "auction", "metric": "l1"},
    "sinkhorn, reg 0.2": {"method": "sinkhorn", "options": {"reg": 0.2}},
    "sinkhorn, reg 0.5": {"method": "sinkhorn", "options": {"reg": 0.5}},
    "sinkhorn, reg 1": {"method": "sinkhorn", "options": {"reg": 1.0}},
    "greedy": {"method": "greedy"},
    "sliced": {"method": "sliced"},
    "nearest, k = 4, l2": {"method": "nearest", "options": {"k": 4, "score": "l2"}},
    "nearest, k = 4, dot": {"method": "nearest", "options": {"k": 4, "score": "dot"}},
    "auction within classes": {"method": "auction", "condition": "class"},
}


@dataclass(frozen=True)
class Arm:
    """One training run.

    Attributes
    ----------
    objective, name : str
        Keys of `OBJECTIVES` and `ARMS`.
    seed : int
    further : tuple of str
        Overrides of the recipe, for every arm alike.
    work : Path
        Holds a folder for each run.
    """

    objective: str
    name: str
    seed: int
    further: tuple[str, ...]
    work: Path

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        words = f"{self.objective} {self.name} {self.seed} {self.identity}"
        return self.work / "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())

    @property
    def overrides(self) -> list[str]:
        """Command line of the trainer."""
        arm = ARMS[self.name]
        found = [*OBJECTIVES[self.objective].overrides, "--coupling.method", arm["method"]]
        for field in ("metric", "condition"):
            if field in arm:
                found += [f"--coupling.{field}", arm[field]]
        for option, value in arm.get("options", {}).items():
            found += [f"--coupling.options.{option}", str(value)]
        return [*found, *self.further, "--train.seed", str(self.seed), "--train.tracker", "null"]

    def recipe(self, *further: str) -> config.Recipe:
        """Read the recipe."""
        return config.load([*self.overrides, *further])

    @property
    def identity(self) -> str:
        """Digest of everything that decides the result."""
        sections = self.recipe().sections()
        del sections["output"]
        return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:12]


def train(arm: Arm) -> None:
    """Train, or go on training; a folder that holds nothing to continue from is begun again.

    Raises
    ------
    SystemExit
        If the loop was asked to end before its last step: it keeps a checkpoint then, and returns.
    """
    from integrations import loop

    output = ("--output", str(arm.folder))
    checkpoints = arm.folder / "checkpoints"
    if not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        shutil.rmtree(arm.folder, ignore_errors=True)
        loop.train(arm.recipe(*output), progress=False)
    else:
        loop.train(arm.recipe(*output, "--resume", "auto"), progress=False)
    if not (checkpoints / f"step-{arm.recipe().train.steps}").is_dir():
        raise SystemExit(_TERMINATED)


def measure(arm: Arm, scores: Any, along: list[int]) -> Record:
    """Distances of every checkpoint at the sampling steps of `along`, and of the last at all of the recipe's."""
    from integrations import measure as measuring

    recipe = arm.recipe()
    frechet = []
    checkpoints = sorted((arm.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    for folder in checkpoints:
        trained = measuring.load_trained(folder)
        for nfe in recipe.evaluate.steps if folder == checkpoints[-1] else along:
            samples = measuring.draw(trained, recipe.evaluate.samples, nfe)
            frechet.append({"step": trained.step, "nfe": nfe, "frechet": scores(samples)["fid"]})
    lines = [json.loads(line) for line in (arm.folder / "metrics.jsonl").read_text().splitlines()]
    settled = lines[1:] or lines  # the first holds the start-up
    return {
        "steps": recipe.train.steps,
        "rows": recipe.train.batch_size_per_device,
        "samples": recipe.evaluate.samples,
        "frechet": frechet,
        "loss": fmean(line["loss"] for line in lines[-5:]),
        "reduction": fmean(line["reduction"] for line in settled),
        "coupling_ms": fmean(line["coupling_ms"] for line in settled),
        "step_ms": fmean(line["step_ms"] for line in settled),
    }


def picture(arm: Arm) -> Record:
    """Draw what the trained network makes of pure noise, and measure how much of it depends on the noise.

    ``spread`` is the standard deviation of a pixel over the predictions, that over the data being 1: 0 for a network
    that answers all noise with one image.
    """
    from integrations import measure as measuring
    from integrations.data import to_signed
    from integrations.pictures import grid

    trained = measuring.load_trained(arm.folder)
    noise = torch.randn(512, *trained.objective.shape, generator=torch.Generator().manual_seed(0))
    scheduler = getattr(trained.objective, "scheduler", None)
    if scheduler is None:
        prediction, alpha, sigma, time = "flow", 0.0, 1.0, 1000.0
    else:
        time = scheduler.config.num_train_timesteps - 1
        signal = float(scheduler.alphas_cumprod[time])
        prediction, alpha, sigma = scheduler.config.prediction_type, signal**0.5, (1 - signal) ** 0.5
    times = torch.full((len(noise),), time)
    predicted = one_step_prediction(
        lambda x: trained.model(x, times).sample, noise, prediction=prediction, alpha=alpha, sigma=sigma
    )
    data = to_signed(trained.source[list(range(len(trained.source)))].images)
    file = io.BytesIO()
    grid(predicted[:PICTURED], columns=8).save(file, "png", optimize=True)
    return {
        "spread": float(predicted.std(0).square().mean().sqrt() / data.std(0).square().mean().sqrt()),
        "images": PICTURED,
        "png": base64.b64encode(file.getvalue()).decode(),
    }


def equality(arm: Arm, methods: tuple[str, ...], steps: int) -> Record:
    """How far apart the costs of methods are on the batches that training couples."""
    from integrations.loop import Run

    run = Run(arm.recipe("--output", str(arm.work / "unused")))
    batches = run.batches()
    costs: dict[str, list[float]] = {name: [] for name in methods}
    same: list[float] = []
    for step in range(steps):
        run.step = step
        block = run.load(next(batches), 0)
        coupled = {name: Coupling(name)(block.data, block.noise) for name in methods}
        for name, answer in coupled.items():
            costs[name].append(distance_reduction(block.data, block.noise, answer.noise).after)
        first = coupled[methods[0]].index
        same.append(min(float((answer.index == first).double().mean()) for answer in coupled.values()))
    differences = [(max(values) - min(values)) / min(values) for values in zip(*costs.values(), strict=True)]
    return {"of": list(methods), "batches": steps, "largest_difference": max(differences), "same_pairs": min(same)}


def held(log: Log, key: Record) -> bool:
    """Whether there is a record with these fields."""
    return any(all(record.get(name) == value for name, value in key.items()) for record in log.records)


def run(arguments: argparse.Namespace, further: list[str], console: Console) -> None:
    """Train and measure what is not on record."""
    torch.set_num_threads(arguments.threads)
    with Log(arguments.output) as log:
        _run(arguments, (*_data(arguments.data), *further), console, log)


def _run(arguments: argparse.Namespace, overrides: tuple[str, ...], console: Console, log: Log) -> None:
    from integrations import measure as measuring
    from integrations.data import load_source

    arms = [
        Arm(objective, name, seed, overrides, arguments.work)
        for seed in arguments.seeds
        for objective in arguments.objectives
        for name in arguments.arms or OBJECTIVES[objective].arms or ARMS
    ]
    recipes = [arm.recipe() for arm in arms]  # mistakes show before anything is trained
    source = load_source(recipes[0].data)
    arguments.work.mkdir(parents=True, exist_ok=True)
    network = measuring.feature_network(recipes[0].evaluate.features, source, arguments.work / recipes[0].data.source)
    scores = measuring.Scores(network, source, torch.device("cpu"))
    here = environment(arguments.threads, None) | {"command": _command(arguments)}
    kind, _, place = recipes[0].data.source.partition(":")
    common = {"data": f"{kind}:{Path(place).name}" if place else kind, "part": PART}

    def key(arm: Arm, task: str) -> Record:
        return {
            **common, "task": task, "objective": arm.objective, "arm": arm.name, "seed": arm.seed,
            "identity": arm.identity,
        }  # fmt: skip

    # The time left is a mean over arms: those of a seed take about the same.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        line = bars.add_task("", total=len(arms))
        for number, arm in enumerate(arms, 1):
            bars.update(line, description=f"{arm.objective}: {arm.name}, seed {arm.seed}")
            if not held(log, key(arm, "training")):
                train(arm)
                record = key(arm, "training") | {"coupling": ARMS[arm.name]} | measure(arm, scores, arguments.along)
                log.add(record | {"environment": here})
                if not console.is_terminal:
                    console.print(f"{number} of {len(arms)}: {arm.objective}, {arm.name}, seed {arm.seed}")
            pictured = arm.name in PICTURES and arm.seed == arguments.seeds[0]
            if pictured and not held(log, key(arm, "one step")):
                log.add(key(arm, "one step") | picture(arm))
            if not arguments.keep:
                shutil.rmtree(arm.folder, ignore_errors=True)
            bars.advance(line)
        for methods in EQUAL:
            arm = next((arm for arm in arms if arm.name in methods), None)
            if arm is not None and not held(log, key(arm, "equality") | {"of": list(methods)}):
                log.add(key(arm, "equality") | equality(arm, methods, arguments.equality_steps))


def _command(arguments: argparse.Namespace) -> str:
    """Say how to do it again, wherever the files are kept."""
    told = ["python", "-m", "benchmarks.ablation", "--data", arguments.data, "--seeds", *map(str, arguments.seeds)]
    if arguments.objectives != list(OBJECTIVES):
        told += ["--objectives", *arguments.objectives]
    if arguments.arms:
        told += ["--arms", *arguments.arms]
    return shlex.join([*told, *arguments.further])


def _data(source: str) -> list[str]:
    return [] if source == "digits" else ["--data.source", source]


@contextmanager
def _quick_end() -> Iterator[None]:
    """Let SIGTERM end the program as an interrupt would, outside of training, which handles it itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        epilog="Other fields of the recipes can be overridden for all arms: --train.steps 300, --model.width 64, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = "digits, or idx:FOLDER with train-images-idx3-ubyte and its labels (default: COUPLINGS_DATA, or digits)"
    parser.add_argument("--data", default=os.environ.get("COUPLINGS_DATA", "digits"), help=known)
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        default=list(OBJECTIVES),
        metavar="NAME",
        help=f"some of {'; '.join(OBJECTIVES)}",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="NAME", help=f"some of {'; '.join(ARMS)}")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of the runs (default: 0 1 2)"
    )
    parser.add_argument(
        "--along", nargs="+", type=int, default=[1, 10], metavar="NFE",
        help="sampling steps at which checkpoints before the last are measured (default: 1 10)",
    )  # fmt: skip
    parser.add_argument("--equality-steps", type=int, default=50, metavar="N", help="batches to compare costs on")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--keep", action="store_true", help="keep the runs' checkpoints")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "ablation-training.jsonl", help="JSONL file to add records to"
    )
    arguments, further = parser.parse_known_args(argv)
    arguments.further = further
    # Shorter than the recipes; five checkpoints, all of them kept until they are measured.
    shorter = ["--train.steps", "500", "--train.checkpoint_every", "100", "--train.keep_last", "5"]
    further = [*shorter, "--evaluate.steps", "[1, 2, 5, 10, 20]", *further]
    if ":" not in arguments.data and arguments.data != "digits":
        arguments.data = f"idx:{arguments.data}"
    try:
        with _quick_end():
            run(arguments, further, Console(stderr=True))
    except config.RecipeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
