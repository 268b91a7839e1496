"""When does coupling help training? ``python -m benchmarks.training --data DIR``, DIR in the format of MNIST's files.

Trains small DDIM and flow matching networks with independent and with coupled noise, same seeds, and measures the
Frechet distance of their samples along training for several numbers of sampling steps. Then asks the trained networks
why. One process on one thread; it can be ended at any time: called again it goes on where it was, and skips what is on
record. Processes with other arms or seeds may run beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import training_report
from .record import PACKAGES, environment

RECIPES = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parent / "results"
VERSIONS = (*PACKAGES[:5], "diffusers", "accelerate", "torchmetrics", "safetensors", "scikit-learn")

# Sampling with many steps takes longer than training: up to 10 at every checkpoint, 20 at every second, more at every
# fourth.
SPARSE = ((10, 1), (20, 2))
SPARSEST = 4


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe with its overrides.

    Parameters
    ----------
    recipe : str
        Name in `RECIPES`.
    overrides : tuple of str
        As on the command line of ``integrations.train``.
    """

    recipe: str
    overrides: tuple[str, ...] = ()


PREDICTIONS = {
    "v": ("--objective.prediction", "v_prediction"),
    "epsilon": ("--objective.prediction", "epsilon"),
    "image": ("--objective.prediction", "sample"),
    # Without a clamp to speak of, min-SNR weights a velocity's error by SNR / (SNR + 1): as the error of the noise
    # that it implies.
    "weighted": ("--objective.prediction", "v_prediction", "--objective.min_snr_gamma", "1e9"),
}
PAIRINGS = {
    "independent": ("--coupling.method", "independent"),
    "coupled": (),
    "whitened": ("--coupling.method", "auction-whitened"),
    "of32": ("--train.batch_size_per_device", "32"),
}
BOTH = ("independent", "coupled")


def _ddim(kind: str, pairing: str) -> Arm:
    return Arm("ddim", (*PREDICTIONS[kind], *PAIRINGS[pairing]))


# What is predicted stands before the dash, how noise is paired after it.
ARMS = {
    **{f"{kind}-{pairing}": _ddim(kind, pairing) for kind in ("v", "epsilon") for pairing in PAIRINGS},
    **{f"{kind}-{pairing}": _ddim(kind, pairing) for kind in ("image", "weighted") for pairing in BOTH},
    **{f"flow-{pairing}": Arm("flow-matching", PAIRINGS[pairing]) for pairing in BOTH},
}
MEANS = ("loss", "reduction", "coupling_ms", "step_ms")  # of the steps since the checkpoint before


@dataclass(frozen=True)
class Session:
    """What the command line said.

    Parameters
    ----------
    data : str
        A recipe's ``data.source``.
    runs : Path
        Folder of the runs.
    records : Path
        File of the records.
    further : tuple of str
        Overrides of all recipes.
    """

    data: str
    runs: Path
    records: Path
    further: tuple[str, ...] = ()

    @functools.cached_property
    def _recipes(self) -> dict[tuple[str, int], Any]:
        return {}

    def recipe(self, name: str, seed: int) -> Any:
        """Return the recipe of one arm on one seed; read once, for parsing takes longer than small networks."""
        if (name, seed) not in self._recipes:
            self._recipes[name, seed] = self._read(name, seed)
        return self._recipes[name, seed]

    def _read(self, name: str, seed: int) -> Any:
        from integrations import config

        arguments = [str(RECIPES / f"{ARMS[name].recipe}.yaml"), *ARMS[name].overrides, *self.further]
        arguments += ["--data.source", self.data, "--train.seed", str(seed)]
        return config.load([*arguments, "--output", str(self.runs / f"{name}-{seed}"), "--resume", "auto"])

    @functools.cached_property
    def source(self) -> Any:
        """The images."""
        from integrations.config import Data
        from integrations.data import load_source

        return load_source(Data(source=self.data))

    @functools.cached_property
    def scores(self) -> Any:
        """The measure that all arms share, in features of a classifier that is trained once and kept with the runs."""
        import torch

        from integrations import measure

        path = self.runs / "classifier.safetensors"
        if not path.is_file():
            # In a folder of its own first: another process may be doing the same, with the same result.
            own = self.runs / f"classifier-{os.getpid()}"
            measure.feature_network("classifier", self.source, own)
            (own / path.name).replace(path)
            own.rmdir()
        network = measure.feature_network(str(path), self.source, self.runs)
        return measure.Scores(network, self.source, torch.device("cpu"))

    def trained(self, name: str, seed: int, step: int | None = None, *overrides: str) -> Any:
        """Load a checkpoint, the last if no step is given."""
        from integrations import measure

        recipe = self.recipe(name, seed)
        path = recipe.output / "checkpoints" / f"step-{step or recipe.train.steps}"
        return measure.load_trained(path, ["--data.source", self.data, *overrides])

    def frechet(self, trained: Any, steps: Iterable[int]) -> dict[str, float]:
        """Return the Frechet distance of a model's samples to the images, for each number of sampling steps."""
        from integrations import measure

        count = trained.recipe.evaluate.samples
        return {str(n): self.scores(measure.draw(trained, count, n))["fid"] for n in steps}

    def once(self, key: dict[str, Any], find: Callable[[], dict[str, Any]]) -> None:
        """Put what ``find`` returns on record under ``key``, unless something is."""
        if any(all(record.get(name) == value for name, value in key.items()) for record in read(self.records)):
            return
        began = time.perf_counter()
        record = key | find()
        self.records.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record | {"environment": environment(1, None, VERSIONS)}, allow_nan=False)
        cut_short = self.records.exists() and not self.records.read_bytes().endswith(b"\n")
        # A line at a time, so that processes may share the file.
        with self.records.open("a") as file:
            file.write("\n" * cut_short + line + "\n")
        shown = {name: value for name, value in record.items() if name != "settings"}
        print(f"{time.perf_counter() - began:4.0f} s  {json.dumps(shown)}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, without a line that was cut short when a process was killed."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def committed() -> training_report.Results:
    """Return the results that are part of the repository."""
    return training_report.Results(read(RESULTS / "training.jsonl"))


def settings(recipe: Any) -> dict[str, Any]:
    """Return what decides the numbers of a checkpoint: the recipe without its places and without its length.

    With a constant learning rate a longer run begins with the shorter one, so that it may be continued.
    """
    values = recipe.sections()
    del values["output"], values["data"]["source"]
    for name in (
        "keep_last",
        "checkpoint_every",
        "log_every",
        *(["steps"] * (recipe.optimizer.schedule == "constant")),
    ):
        del values["train"][name]
    for name in ("steps", "batch_size"):
        del values["evaluate"][name]
    return json.loads(json.dumps(values))  # as it will be read back


def points(recipe: Any) -> list[int]:
    """Return the training steps at which there is a checkpoint."""
    every, last = recipe.train.checkpoint_every, recipe.train.steps
    return sorted({*range(every, last, every), last})


def steps_at(step: int, recipe: Any) -> list[int]:
    """Return the numbers of sampling steps to measure after ``step`` training steps."""
    number = step // recipe.train.checkpoint_every
    every = {n: next((every for most, every in SPARSE if n <= most), SPARSEST) for n in recipe.evaluate.steps}
    return [n for n in recipe.evaluate.steps if number % every[n] == 0]


def run_arm(name: str, seed: int, session: Session) -> None:
    """Train one arm on one seed and put a record of every checkpoint on file."""
    from integrations import loop
    from integrations.checkpoint import steps as checkpoints

    recipe = session.recipe(name, seed)
    keys = [
        {"kind": "point", "arm": name, "seed": seed, "settings": settings(recipe), "step": step}
        for step in points(recipe)
    ]
    recorded = read(session.records)
    if all(any(key.items() <= record.items() for record in recorded) for key in keys):
        print(f"{name}, seed {seed}: on record", flush=True)
        return
    loop.train(recipe, progress=False)
    if recipe.train.steps not in checkpoints(recipe.output / "checkpoints"):
        sys.exit(143)  # asked to end; the loop has saved
    metrics, every = read(recipe.output / "metrics.jsonl"), recipe.train.checkpoint_every
    for key in keys:
        step = key["step"]
        window = [line for line in metrics if step - every < line["step"] <= step] or metrics

        def find(step: int = step, window: list[dict[str, float]] = window) -> dict[str, Any]:
            means = {name: sum(line[name] for line in window) / len(window) for name in MEANS}
            return {"frechet": session.frechet(session.trained(name, seed, step), steps_at(step, recipe)), **means}

        session.once(key, find)


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
    names = list(ARMS)
    parser.add_argument(
        "--data",
        default=os.environ.get("COUPLINGS_DATA"),
        metavar="DIR",
        help="folder with train-images-idx3-ubyte and its labels, gzipped or not, or another data.source of recipes "
        "(default: the variable COUPLINGS_DATA)",
    )
    parser.add_argument("--arms", nargs="*", choices=names, default=names, metavar="ARM", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--no-analysis", action="store_true", help="train and measure only")
    parser.add_argument("--runs", type=Path, default=Path("runs/training"), help="folder of checkpoints (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of records and report")
    parser.add_argument("--report", action="store_true", help="only write the report, from the records")
    arguments, further = parser.parse_known_args(argv)
    records = arguments.output / "training.jsonl"
    if not arguments.report:
        if arguments.data is None:
            parser.error("--data: say where the images are, or set COUPLINGS_DATA")
        run(arguments, Session(source_name(arguments.data), arguments.runs, records, tuple(further)))
    elif further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")

    try:
        written = training_report.write(read(records), arguments.output)
    except ValueError as error:
        parser.error(f"{records}: {error}")
    for path in written:
        print(f"wrote {path}")


def run(arguments: argparse.Namespace, session: Session) -> None:
    """Measure what is not on record."""
    import torch

    from . import explained, whitening

    torch.set_num_threads(1)
    whitening.prepare(session.source)
    for seed in arguments.seeds:
        for name in arguments.arms:
            run_arm(name, seed, session)
    if not arguments.no_analysis:
        explained.couplings_alone(session)
        for seed in arguments.seeds:
            explained.networks(session, seed, arguments.arms)


if __name__ == "__main__":
    main()
