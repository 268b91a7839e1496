"""See what coupling does: ``python -m integrations.demo``.

Trains flow matching and DDIM on scikit-learn's handwritten digits, each twice with the same seeds:
with independent noise and with coupled noise. Then compares Frechet distances over the number of
sampling steps, as a table, a picture and JSON. About three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from . import config

PICTURED = (1, 2, 5, 50)
DIGITS = 6


@dataclass(frozen=True)
class Arm:
    """One training run: a recipe, in a folder of its own."""

    name: str
    title: str
    recipe: config.Recipe


@dataclass
class Result:
    """What one arm gave."""

    frechet: dict[int, float] = field(default_factory=dict)
    samples: dict[int, Any] = field(default_factory=dict)


PREDICTIONS = {"v_prediction": "v prediction", "epsilon": "epsilon prediction", "sample": "image prediction"}


def arms(output: Path, prediction: str, further: list[str]) -> list[Arm]:
    """Return the four runs, with ``further`` overrides of their recipes."""
    flow = ("flow-matching", "Flow matching", [])
    ddim = ("ddim", f"DDIM, {PREDICTIONS[prediction]}", ["--objective.prediction", prediction])
    found = []
    for objective, title, overrides in (flow, ddim):
        for method in ("independent", "auction"):
            name = f"{objective}-{method}"
            options = ["--coupling.method", method, "--train.tracker", "null", "--output", str(output / name)]
            found.append(Arm(name, title, config.load([f"{objective}-digits", *overrides, *options, *further])))
    return found


def run_arm(arm: Arm, classifier: Path) -> Result:
    """Train, and measure the Frechet distance at every number of sampling steps of the recipe.

    In a process and on a thread of its own: two side by side are faster than one on two threads.
    """
    import torch

    torch.set_num_threads(1)
    from . import measure
    from .features import Classifier
    from .loop import train

    trained, result = measure.load_trained(train(arm.recipe, progress=False)), Result()
    scores = measure.Scores(Classifier.load(classifier), trained.source, trained.device)
    for steps in arm.recipe.evaluate.steps:
        samples = torch.cat(list(measure.draw(trained, arm.recipe.evaluate.samples, steps)))
        result.frechet[steps] = scores([samples])["fid"]
        result.samples[steps] = samples[:DIGITS].clone()
    return result


def run(chosen: list[Arm], output: Path, console: Console) -> tuple[dict[str, Result], float]:
    """Train and evaluate all arms, two at a time; return the results and the classifier's accuracy."""
    for arm in chosen:
        shutil.rmtree(arm.recipe.output, ignore_errors=True)
    columns = TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    # Spawned, not forked: a forked child inherits the locks of PyTorch's threads.
    pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
    with Progress(*columns, console=console) as bars, _ended_with_us(pool):
        classifier = output / "classifier.safetensors"
        classified = bars.add_task("Classifier for the features", total=1, status="")
        accuracy = train_features(chosen[0], classifier)
        bars.update(classified, completed=1, status=f"{100 * accuracy:.1f}% right on held-out data")
        futures, lines = {}, {}
        for arm in chosen:
            futures[arm.name] = pool.submit(run_arm, arm, classifier)
            kind = "independent" if arm.recipe.coupling.method == "independent" else "coupled"
            label = f"{arm.title.split(',')[0]}, {kind}"
            lines[arm.name] = bars.add_task(label, total=arm.recipe.train.steps, status="")
        measured = bars.add_task("Samples and distances", total=len(chosen), status="")
        done: list[Result] = []
        while len(done) < len(chosen):
            time.sleep(0.3)
            done = [future.result() for future in futures.values() if future.done()]  # or raise what it raised
            bars.update(measured, completed=len(done))
            for arm in chosen:
                _show(bars, lines[arm.name], _metrics(arm))
        return {name: future.result() for name, future in futures.items()}, accuracy


@contextmanager
def _ended_with_us(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Leave no worker behind, however this process ends."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except BaseException:
        for worker in list(pool._processes.values()):
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, previous)


def train_features(arm: Arm, path: Path) -> float:
    """Train the classifier whose features the distances are measured in; return its accuracy."""
    import torch

    torch.set_num_threads(1)
    from .data import load_source
    from .features import train_classifier

    network, accuracy = train_classifier(load_source(arm.recipe.data))
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save(path, accuracy)
    return accuracy


def _metrics(arm: Arm) -> list[dict[str, float]]:
    path = arm.recipe.output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _show(bars: Progress, line: Any, records: list[dict[str, float]]) -> None:
    if records:
        last = records[-1]
        status = f"loss {last['loss']:.2f}, coupling {last['coupling_ms']:.1f} of {last['step_ms']:.0f} ms"
        bars.update(line, completed=last["step"], status=status)


def summary(chosen: list[Arm], results: dict[str, Result]) -> list[dict[str, Any]]:
    """Return one record per arm, as the JSON file holds them."""
    records = []
    for arm in chosen:
        metrics, recipe = _metrics(arm), arm.recipe
        # The first line holds the start-up.
        settled = metrics[1:] or metrics
        step_ms, coupling_ms = (fmean(line[key] for line in settled) for key in ("step_ms", "coupling_ms"))
        records.append(
            {
                "arm": arm.name,
                "title": arm.title,
                "objective": recipe.objective.name,
                "prediction": getattr(recipe.objective, "prediction", "velocity"),
                "coupling": recipe.coupling.method,
                "train_steps": recipe.train.steps,
                "batch_size": recipe.train.batch_size_per_device,
                "samples": recipe.evaluate.samples,
                "frechet": {str(steps): value for steps, value in results[arm.name].frechet.items()},
                "final_loss": fmean(line["loss"] for line in metrics[-10:]),
                "reduction": fmean(line["reduction"] for line in settled),
                "coupling_ms": coupling_ms,
                "step_ms": step_ms,
                "coupling_share": coupling_ms / step_ms,
            }
        )
    return records


def distances(records: list[dict[str, Any]]) -> Table:
    """Lay out the distances: a row per number of sampling steps, a loss as plain as a win."""
    pairs = list(zip(records[::2], records[1::2], strict=True))
    out = Table(title="Frechet distance to the data, lower is better", title_justify="left")
    out.add_column("steps", justify="right")
    for independent, _ in pairs:
        out.add_column(f"{independent['title']}\nindependent", justify="right", min_width=11)
        out.add_column("\n\ncoupled", justify="right")
        out.add_column("\n\nchange", justify="right")
    for steps in pairs[0][0]["frechet"]:
        cells = [steps]
        for independent, coupled in pairs:
            a, b = independent["frechet"][steps], coupled["frechet"][steps]
            color = "green" if b < a else "bold red"
            cells += [f"{a:.1f}", f"{b:.1f}", f"[{color}]{100 * (b / a - 1):+.0f}%[/]"]
        out.add_row(*cells)
    return out


def costs(records: list[dict[str, Any]]) -> Table:
    """Lay out what the coupling did to training and what it took."""
    out = Table(title="Training", title_justify="left")
    for column in ("", "final\nloss", "distance\ncut", "coupling,\nms/step", "share of\nthe step"):
        out.add_column(column, justify="right" if column else "left")
    for record in records:
        out.add_row(
            f"{record['title']}: {'independent' if record['coupling'] == 'independent' else 'coupled'}",
            f"{record['final_loss']:.3f}",
            f"{100 * record['reduction']:.1f}%",
            f"{record['coupling_ms']:.2f}",
            f"{100 * record['coupling_share']:.1f}%",
        )
    return out


COLORS = {False: "#8a8f98", True: "#d1495b"}
NAMES = {False: "independent noise", True: "coupled noise"}


def picture(records: list[dict[str, Any]], results: dict[str, Result], path: Path) -> None:
    """Draw the curves and, below them, samples of every arm from the same noise."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 7.1), dpi=150, facecolor="white")
        halves = figure.add_gridspec(
            2, 2, height_ratios=(1.5, 1), hspace=0.28, wspace=0.2, left=0.065, right=0.985, top=0.89, bottom=0.02
        )
        for column, pair in enumerate(zip(records[::2], records[1::2], strict=True)):
            _curves(figure.add_subplot(halves[0, column]), pair)
            below = halves[1, column].subgridspec(1, 2, wspace=0.05)
            for i, record in enumerate(pair):
                _samples(figure.add_subplot(below[i]), results[record["arm"]].samples, bool(i))
        figure.text(
            0.065, 0.955, "Same network, seeds and training steps; only the pairing of noise and data differs",
            fontsize=12, color="#444a52",
        )  # fmt: skip
        figure.savefig(path)


def _curves(axes: Any, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    steps = [int(step) for step in pair[0]["frechet"]]
    for i, record in enumerate(pair):
        values, others = list(record["frechet"].values()), list(pair[1 - i]["frechet"].values())
        axes.plot(steps, values, "o-", color=COLORS[bool(i)], lw=2.4, ms=6, label=NAMES[bool(i)], clip_on=False)
        for step, value, other in zip(steps, values, others, strict=True):
            axes.annotate(
                f"{value:.0f}" if value >= 9.95 else f"{value:.1f}",
                (step, value),
                xytext=(3, 8) if value >= other else (-2, -17),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=COLORS[bool(i)],
            )
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Frechet distance to the data")
    axes.set_title(pair[0]["title"], loc="left", fontsize=14, fontweight="bold")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.margins(x=0.05, y=0.14)
    axes.grid(axis="y", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper right")


def _samples(axes: Any, samples: dict[int, Any], coupled: bool) -> None:
    import torch

    from .pictures import grid

    pictured = [steps for steps in PICTURED if steps in samples]
    digits = torch.cat([samples[steps] for steps in pictured])
    canvas = grid(-digits, DIGITS)  # black on white
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(NAMES[coupled], fontsize=11, color=COLORS[coupled], fontweight="bold", pad=6)
    side = digits.shape[-1]
    centres = [line * (side + 1) + (side - 1) / 2 for line in range(len(pictured))]
    axes.set_xticks([])
    axes.set_yticks([] if coupled else centres, [] if coupled else [f"{k} step{'s' * (k > 1)}" for k in pictured])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.demo",
        description=__doc__,
        epilog="Other fields of the two recipes can be overridden too: --train.steps 300, --train.seed 1, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the results (default: runs/demo)"
    )
    parser.add_argument(
        "--objective.prediction",
        dest="prediction",
        choices=sorted(PREDICTIONS),
        default="v_prediction",
        help="what the DDIM network predicts (default: v_prediction)",
    )
    arguments, further = parser.parse_known_args(argv)
    console, began = Console(), time.perf_counter()
    try:
        chosen = arms(arguments.output, arguments.prediction, further)
    except config.RecipeError as error:
        parser.error(str(error))
    results, accuracy = run(chosen, arguments.output, console)
    records = summary(chosen, results)
    console.print(distances(records))
    console.print(costs(records))
    console.print(
        f"Features of a classifier that is right on {100 * accuracy:.1f}% of held-out digits; "
        f"{records[0]['samples']} samples against all digits; {records[0]['train_steps']} training steps of "
        f"{records[0]['batch_size']} rows."
    )
    seconds = time.perf_counter() - began
    path = arguments.output / "demo.png"
    picture(records, results, path)
    machine = {"platform": platform.platform(), "torch": version("torch"), "diffusers": version("diffusers")}
    document = {"arms": records, "classifier_accuracy": accuracy, "seconds": seconds, "machine": machine}
    (arguments.output / "demo.json").write_text(json.dumps(document, indent=1))
    console.print(f"{seconds:.0f} s. Picture: {path}  Numbers: {path.with_suffix('.json')}")


if __name__ == "__main__":
    main()
