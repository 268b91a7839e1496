"""Train a generative model with coupled noise: ``python -m integrations.train RECIPE.yaml``."""

from __future__ import annotations

import logging
import os
import shlex
import sys

from . import config, places

PROG = "python -m integrations.train"
USAGE = f"""usage: {PROG} RECIPE.yaml [--section.field VALUE ...] [--output FOLDER] [--resume auto]
       {PROG} RECIPE.yaml [...] --plan

Trains what the recipe describes and writes to its output folder (default runs/<recipe name>):
recipe.yaml, metrics.jsonl, checkpoints/step-<N>/, samples/ and, at the end, pipeline/.

  RECIPE.yaml --help     every field of that recipe, with its meaning, type and default
  --resume auto          continue from the newest intact checkpoint, or start if there is none
  --overlay smoke        in small, to try the machinery on a CPU; nearest: of several noises for each row, in the place
                         of an assignment; or a file of fields of your own
  --plan                 print sizes, memory, cost and the launch line of the recipe's machines, and do not train

RECIPE.yaml is a file or one of the bundled recipes: """


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + ", ".join(config.bundled()))
        raise SystemExit(0 if argv else 2)
    try:
        recipe = config.load(argv, prog=PROG)
        places.check(recipe)
    except config.RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")

    # Only now the heavy imports: a mistake in the recipe has been reported already.
    from .checkpoint import CheckpointError
    from .data import DataError
    from .loop import TrainingError, train
    from .plan import plan

    try:
        if recipe.plan:
            print(plan(recipe, argv))
        else:
            train(recipe)
            _tell_how_to_go_on(recipe, argv)
    except (config.RecipeError, DataError, TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _tell_how_to_go_on(recipe: config.Recipe, argv: list[str]) -> None:
    """Print where a run that was asked to end was saved, and the line that continues it.

    Raises
    ------
    CheckpointError
        If it was saved and is gone.
    """
    from . import checkpoint

    found = checkpoint.steps(recipe.output / "checkpoints")
    if not found:
        msg = f"{recipe.output / 'checkpoints'}: was emptied or removed while the run was in it: nothing is saved"
        raise checkpoint.CheckpointError(msg)
    step, steps = found[-1], recipe.train.steps
    if step >= steps or os.environ.get("RANK", "0") != "0":
        return
    further = [] if recipe.resume else ["--resume", "auto"]
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    saved = f"{recipe.output}/checkpoints/step-{step}"
    before = "Launch as before, with" if launched else "Go on with"
    line = shlex.join([*(["-m"] if launched else ["python", "-m"]), "integrations.train", *argv, *further])
    print(f"Ended by SIGTERM at step {step} of {steps}, saved in {saved}. {before}\n  {line}")


if __name__ == "__main__":
    main()
