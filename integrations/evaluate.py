"""Measure a trained checkpoint: ``python -m integrations.evaluate CHECKPOINT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .config import RecipeError
from .sample import overrides, parser


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser(
        "evaluate",
        "Frechet (fid) and kernel (kid) distance of a checkpoint's samples to its training data, for each number of\n"
        "sampling steps. Distances in different features are not comparable.",
    )
    options.add_argument(
        "--features",
        metavar="NAME",
        help="classifier (trained on the recipe's data and kept in the run's folder), the path of such a "
        "classifier.safetensors, or inception (default: the recipe's evaluate.features)",
    )
    options.add_argument(
        "--output", type=Path, help="JSONL file to append to (default: evaluation.jsonl in the run's folder)"
    )
    arguments, further = options.parse_known_args(argv)
    if arguments.features is not None:
        further += ["--evaluate.features", arguments.features]

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from . import measure
    from .checkpoint import CheckpointError
    from .data import DataError

    try:
        trained = measure.load_trained(arguments.checkpoint, overrides(arguments, further))
        section = trained.recipe.evaluate
        if section.samples < 2:
            msg = f"evaluate.samples: got {section.samples}, expected at least 2: a distribution has a variance"
            raise RecipeError(msg)
        network = measure.feature_network(section.features, trained.source, trained.recipe.output)
    except (RecipeError, DataError, CheckpointError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    workers = trained.recipe.data.workers
    scores = measure.Scores(network, trained.source, trained.device, kid=True, workers=workers)
    output = arguments.output or trained.recipe.output / "evaluation.jsonl"
    table = Table(title=f"{trained.recipe.name}, training step {trained.step}, {section.samples} samples")
    for column in ("sampling steps", "fid", "kid"):
        table.add_column(column, justify="right")
    for steps in track(section.steps, "evaluating", console=Console(stderr=True)):
        found = scores(measure.draw(trained, section.samples, steps))
        record = {
            "step": trained.step,
            "sampling_steps": steps,
            "samples": section.samples,
            "features": section.features,
            "seed": section.seed,
            "coupling": trained.recipe.coupling.method,
            **found,
        }
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        table.add_row(str(steps), f"{found['fid']:.2f}", f"{found['kid']:.4f} ± {found['kid_std']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
