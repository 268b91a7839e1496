"""Export a checkpoint as a diffusers pipeline: ``python -m integrations.export RUN -o FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .config import RecipeError


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = argparse.ArgumentParser(
        prog="python -m integrations.export",
        description="Write a pipeline folder, whose README.md says how to open it, from a checkpoint of a run.",
        allow_abbrev=False,
    )
    options.add_argument("run", type=Path, help="a run's folder")
    options.add_argument("--checkpoint", metavar="step-N", help="one of its checkpoints (default: the newest)")
    options.add_argument(
        "--average",
        metavar="DECAY",
        help="which of the averaged weights: train.ema_decay or one of train.further_ema_decays of the run's "
        "recipe.yaml (default: its evaluate.ema_decay)",
    )
    options.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")
    arguments = options.parse_args(argv)

    from . import checkpoint, measure
    from .data import DataError
    from .pipelines import say_whose

    try:
        if arguments.output.exists():
            msg = f"{arguments.output} exists: choose another --output"
            raise RecipeError(msg)
        place = arguments.run
        if arguments.checkpoint is not None:
            place = arguments.run / "checkpoints" / arguments.checkpoint
            if not place.is_dir():
                kept = ", ".join(f"step-{step}" for step in checkpoint.steps(place.parent)) or "none"
                msg = f"--checkpoint: got {arguments.checkpoint!r}, expected one of {place.parent}: {kept}"
                raise checkpoint.CheckpointError(msg)
        average = [] if arguments.average is None else ["--evaluate.ema_decay", arguments.average]
        trained = measure.load_trained(place, average)
    except (RecipeError, DataError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    trained.objective.export(trained.model, arguments.output)
    say_whose(arguments.output, trained.recipe.name, trained.step, trained.decay)
    print(arguments.output)


if __name__ == "__main__":
    main()
