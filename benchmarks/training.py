"""When does coupling help training? ``python -m benchmarks.training``.

Trains small networks with noise that is paired in several ways, same seeds, and measures the Frechet distance of their
samples along training for several numbers of sampling steps; then asks the trained networks why. One process on one
thread; it can be ended at any time: called again it goes on where it was, and skips what is on record. Processes with
other arms or seeds may run beside it. ``python -m benchmarks.tables`` makes tables and plots of the records.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from couplings.ablation.environment import plugin

from .record import PACKAGES, RESULTS, append, environment, read

RECIPES = Path(__file__).parent / "recipes"
VERSIONS = (*PACKAGES[:5], "diffusers", "accelerate", "torchmetrics", "safetensors", "scikit-learn")

# Sampling with many steps takes longer than training: up to 10 at every checkpoint, 20 at every second, more at every
# fourth.
SPARSE = ((10, 1), (20, 2))
SPARSEST = 4
CALLED = ("name", "method")  # what records say of a section in any case
MEANS = ("loss", "reduction", "coupling_ms", "step_ms")  # of the steps since the checkpoint before

# An arm is what is predicted, a dash, and how noise is paired: one of `PAIRINGS`, or a method with its options as
# everywhere, such as v-sinkhorn:reg=0.3 and v-package.module:function.
KINDS = {
    "v": ("--objective.prediction", "v_prediction"),
    "epsilon": ("--objective.prediction", "epsilon"),
    "image": ("--objective.prediction", "sample"),
    # Without a clamp to speak of, min-SNR weights a velocity's error by SNR / (SNR + 1): as the error of the noise
    # that it implies.
    "weighted": ("--objective.prediction", "v_prediction", "--objective.min_snr_gamma", "1e9"),
    "flow": (),
}


def _method(name: str, **options: str) -> tuple[str, ...]:
    """Return the overrides that choose a method and its options."""
    return ("--coupling.method", name, *(f"--coupling.options.{option}={value}" for option, value in options.items()))


PAIRINGS = {
    "independent": _method("independent"),
    "coupled": (),
    "whitened": _method("auction-whitened"),
    "of32": ("--train.batch_size_per_device", "32"),
    "l2": ("--coupling.metric", "l2"),
    "l1": ("--coupling.metric", "l1"),
    **{f"sinkhorn{reg}": _method("sinkhorn", reg=reg) for reg in ("0.2", "0.5", "1")},
    "greedy": _method("greedy"),
    "sliced": _method("sliced"),
    **{f"nearest_{score}": _method("nearest", k="4", score=score) for score in ("l2", "dot")},
}


def other_package(method: str) -> dict[str, str | None] | None:
    """Return the package and version of a method that is in none of the suites; None for theirs."""
    theirs = {arguments[1] for arguments in PAIRINGS.values() if "--coupling.method" in arguments}
    return None if method in theirs else plugin(method)


def overrides(pairing: str) -> tuple[str, ...]:
    """Return the overrides of a recipe that pair noise in one way.

    Raises
    ------
    ValueError, TypeError
        If it is no method with options that it takes.
    """
    if pairing in PAIRINGS:
        return PAIRINGS[pairing]
    from couplings import Coupling
    from couplings.ablation.grid import read_method

    name, options = read_method(pairing)
    Coupling(name, **options)
    return _method(name, **{option: json.dumps(value) for option, value in options.items()})


@dataclass(frozen=True)
class Suite:
    """What is trained on one data set.

    Attributes
    ----------
    records : str
        File in the folder of results.
    ddim, flow : str
        Recipes.
    data : str or None
        A recipe's ``data.source``; None where it has to be given.
    arms : dict
        What is predicted, to the ways of pairing.
    overrides : tuple of str
        Of both recipes.
    """

    records: str
    ddim: str
    flow: str
    data: str | None
    arms: dict[str, tuple[str, ...]]
    overrides: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All arms."""
        return [f"{kind}-{pairing}" for kind, pairings in self.arms.items() for pairing in pairings]


BOTH = ("independent", "coupled")
SUITES = {
    "fashion": Suite(
        "training.jsonl", str(RECIPES / "ddim.yaml"), str(RECIPES / "flow-matching.yaml"), None,
        {
            **dict.fromkeys(("v", "epsilon"), (*BOTH, "whitened", "of32")),
            **dict.fromkeys(("image", "weighted", "flow"), BOTH),
        },
    ),
    "digits": Suite(
        "training-digits.jsonl", "ddim-digits", "flow-matching-digits", "digits",
        {
            "v": tuple(name for name in PAIRINGS if name not in ("whitened", "of32")),
            "flow": (*BOTH, "nearest_dot"),
            "epsilon": BOTH,
        },
        (
            *("--train.steps", "500", "--train.checkpoint_every", "100", "--train.keep_last", "5"),
            *("--train.tracker", "null", "--evaluate.steps", "[1, 2, 5, 10, 20]"),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Session:
    """What the command line said.

    Parameters
    ----------
    suite : Suite
    data : str
        A recipe's ``data.source``.
    runs : Path
        Folder of the runs.
    records : Path
        File of the records.
    further : tuple of str
        Overrides of all recipes.
    """

    suite: Suite
    data: str
    runs: Path
    records: Path
    further: tuple[str, ...] = ()

    @functools.cache  # noqa: B019  # a session lasts as long as the process; parsing takes longer than small networks
    def recipe(self, name: str, seed: int) -> Any:
        """Return the recipe of one arm on one seed."""
        from integrations import config

        kind, _, pairing = name.partition("-")
        arguments = [self.suite.flow if kind == "flow" else self.suite.ddim, *self.suite.overrides]
        arguments += [*KINDS[kind], *overrides(pairing), *self.further]
        arguments += ["--data.source", self.data, "--train.seed", str(seed)]
        package = other_package(config.load(arguments).coupling.method)
        # A run of another version of a method is not gone on with.
        version = "" if package is None else f"-{package['version']}-{package['source']}"
        folder = self.runs / f"{name}-{seed}{version}"
        return config.load([*arguments, "--output", str(folder), "--resume", "auto"])

    @functools.cached_property
    def source(self) -> Any:
        """The images."""
        from integrations.data import load_source
        from integrations.sections import Data

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

    def trained(self, name: str, seed: int, step: int | None = None) -> Any:
        """Load a checkpoint, the last if no step is given."""
        from integrations import measure

        recipe = self.recipe(name, seed)
        path = recipe.output / "checkpoints" / f"step-{step or recipe.train.steps}"
        return measure.load_trained(path, ["--data.source", self.data])

    def frechet(self, trained: Any, steps: Iterable[int]) -> dict[str, float]:
        """Return the Frechet distance of a model's samples to the images, for each number of sampling steps."""
        from integrations import measure

        count = trained.recipe.evaluate.samples
        return {str(n): self.scores(measure.draw(trained, count, n))["fid"] for n in steps}

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there is a record with these fields."""
        return any(key.items() <= record.items() for record in read(self.records))

    def once(self, key: dict[str, Any], find: Callable[[], dict[str, Any]]) -> None:
        """Put what ``find`` returns on record under ``key``, unless something is."""
        if self.has(key):
            return
        began = time.perf_counter()
        record = key | find()
        append(self.records, record | {"environment": environment(1, None, VERSIONS)})
        shown = {name: value for name, value in record.items() if name not in ("settings", "png")}
        print(f"{time.perf_counter() - began:4.0f} s  {json.dumps(shown)}", flush=True)


def settings(recipe: Any) -> dict[str, Any]:
    """Return what decides the numbers of a checkpoint: what the recipe says, without its places and its length.

    What is as by default is left out, so that a field which recipes have one day leaves the records as they are. With a
    constant learning rate a longer run begins with the shorter one, so that it may be continued.
    """
    from integrations.config import SECTIONS

    values = {name: _said(getattr(recipe, name)) for name in SECTIONS}
    if (named := other_package(recipe.coupling.method)) is not None:
        values["coupling"]["plugin"] = named
    shorter = ["steps"] if recipe.optimizer.schedule == "constant" else []
    left_out = {
        "data": ["source"],
        "train": ["keep_last", "checkpoint_every", "log_every", *shorter],
        "evaluate": ["steps", "batch_size"],
    }
    for section, names in left_out.items():
        for name in names:
            values[section].pop(name, None)
    return json.loads(json.dumps(values))  # as it will be read back


def _said(section: Any) -> dict[str, Any]:
    """Return the fields that are not as by default, and what the section is called by."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(section)
    }
    values = dataclasses.asdict(section)
    return {name: value for name, value in values.items() if name in CALLED or value != defaults[name]}


def steps_at(step: int, recipe: Any) -> list[int]:
    """Return the numbers of sampling steps to measure after ``step`` training steps: all of them after the last."""
    number = step // recipe.train.checkpoint_every
    every = {n: next((every for most, every in SPARSE if n <= most), SPARSEST) for n in recipe.evaluate.steps}
    return [n for n in recipe.evaluate.steps if step == recipe.train.steps or number % every[n] == 0]


def run_arm(name: str, seed: int, session: Session) -> None:
    """Train one arm on one seed and put a record of every checkpoint on file."""
    from integrations import loop

    recipe = session.recipe(name, seed)
    every, last = recipe.train.checkpoint_every, recipe.train.steps
    keys = [
        {"kind": "point", "arm": name, "seed": seed, "settings": settings(recipe), "step": step}
        for step in sorted({*range(every, last, every), last})
    ]
    if all(map(session.has, keys)):
        print(f"{name}, seed {seed}: on record", flush=True)
        return
    loop.train(recipe, progress=False)
    if not (recipe.output / "checkpoints" / f"step-{last}").is_dir():
        sys.exit(143)  # asked to end; the loop has saved
    metrics = read(recipe.output / "metrics.jsonl")
    for key in keys:
        step = key["step"]
        window = [line for line in metrics if step - every < line["step"] <= step] or metrics

        def find(step: int = step, window: list[dict[str, float]] = window) -> dict[str, Any]:
            means = {name: sum(line[name] for line in window) / len(window) for name in MEANS}
            return {"frechet": session.frechet(session.trained(name, seed, step), steps_at(step, recipe)), **means}

        session.once(key, find)


def main(argv: list[str] | None = None) -> None:
    """Measure what is not on record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        epilog="Fields of the recipes can be overridden for all arms: --train.steps 800, --evaluate.samples 500, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, default="fashion", help="(default: fashion)")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="folder with train-images-idx3-ubyte and its labels, gzipped or not, or another data.source of recipes "
        "(default: digits for the digits, the variable COUPLINGS_DATA for fashion)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="some of the suite's (default: all), or others: v-sinkhorn:reg=0.3, flow-package.module:function:k=2",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--no-analysis", action="store_true", help="train and measure only")
    parser.add_argument("--runs", type=Path, help="folder of checkpoints (default: runs/training/SUITE)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    arguments, further = parser.parse_known_args(argv)
    suite = SUITES[arguments.suite]
    data = arguments.data or suite.data or os.environ.get("COUPLINGS_DATA")
    if data is None:
        parser.error("--data: say where the images are, or set COUPLINGS_DATA")
    arms = arguments.arms or suite.names
    for name in arms:
        kind, _, pairing = name.partition("-")
        try:
            overrides(pairing if kind in KINDS else "")
        except (ValueError, TypeError) as error:
            parser.error(f"--arms: unknown {name}; the suite's are {', '.join(suite.names)}. As a method: {error}")

    import torch

    from . import explained, whitening

    torch.set_num_threads(1)
    data = f"idx:{data}" if Path(data).is_dir() else data
    runs = arguments.runs or Path("runs/training") / arguments.suite
    session = Session(suite, data, runs, arguments.output / suite.records, tuple(further))
    whitening.prepare(session.source)
    for seed in arguments.seeds:
        for name in arms:
            run_arm(name, seed, session)
    if not arguments.no_analysis:
        explained.couplings_alone(session)
        for seed in arguments.seeds:
            explained.networks(session, seed, arms)


if __name__ == "__main__":
    main()
