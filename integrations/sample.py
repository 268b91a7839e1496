"""Draw samples from a trained checkpoint: ``python -m integrations.sample CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .config import RecipeError, closest, expect

if TYPE_CHECKING:
    from .data import Source
    from .objective import Objective

GRID = 64
"""Images in a grid."""


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the options that sampling and evaluation share."""
    options = argparse.ArgumentParser(
        prog=f"python -m integrations.{program}",
        description=description,
        epilog="Any field of the checkpoint's recipe can be overridden too, as --evaluate.batch_size 100:\n"
        "python -m integrations.train CHECKPOINT/recipe.yaml --help lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "checkpoint",
        type=Path,
        help="a run's folder (its newest checkpoint is taken) or one of its checkpoints/step-<N>",
    )
    fields = (
        ("--steps", "evaluate.steps", int, "K", "numbers of sampling steps, each evaluated in turn"),
        ("--samples", "evaluate.samples", int, "N", "images for each number of steps"),
        ("--seed", "evaluate.seed", int, "N", "seed of the noise"),
        ("--guidance", "objective.guidance_scale", float, "W", "classifier-free guidance"),
    )
    for flag, field, kind, letter, text in fields:
        count = "+" if flag == "--steps" else None
        text = f"{text} (default: the recipe's {field})"
        options.add_argument(flag, dest=field, type=kind, nargs=count, metavar=letter, help=text)
    return options


def overrides(arguments: argparse.Namespace, further: list[str]) -> list[str]:
    """Turn the options that stand for fields of the recipe into overrides of it."""
    given = {name: value for name, value in vars(arguments).items() if "." in name and value is not None}
    return [*(word for name, value in given.items() for word in (f"--{name}", str(value))), *further]


def choose(arguments: argparse.Namespace, objective: Objective, source: Source) -> list[int] | list[str]:
    """Return the numbers of the classes, or the captions, that samples are told in turn; empty are those of the data.

    Raises
    ------
    RecipeError
        For a class that the data does not have, or if the network is not told such a thing.
    """
    classes, prompts, tells = arguments.classes, arguments.prompt, objective.tells
    told = {None: "nothing: it is unconditional", "class": "classes"}.get(tells, "captions")
    none = f"none: the network of this run is told {told}"
    expect(not classes or tells == "class", "--class", classes, none)
    # A network of ``classes`` is told numbers; the names of classes are captions.
    expect(not prompts or (tells is not None and objective.classes is None), "--prompt", prompts, none)
    return prompts or [_number(word, source.classes) for word in classes]


def _number(word: str, names: list[str]) -> int:
    """Find a class by its name or number."""
    if word in names:
        return names.index(word)
    known = ", ".join(names if len(names) <= 20 else [*names[:20], "..."])
    expected = f"a number below {len(names)} or one of {known}{closest(word, names)}"
    expect(word.isdecimal() and int(word) < len(names), "--class", word, expected)
    return int(word)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser(
        "sample", "Draw samples with the averaged weights of a checkpoint: a grid for each number of sampling steps."
    )
    options.add_argument(
        "--images",
        choices=("folder", "npz"),
        help="write every image too: as steps-<k>/<number>.png, or as steps-<k>.npz (arr_0: (n, h, w, c) uint8)",
    )
    options.add_argument(
        "--output", type=Path, help="folder of the results (default: samples/step-<N> in the run's folder)"
    )
    told = options.add_mutually_exclusive_group()
    told.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or numbers of classes to draw in turn (default: as they come in the data)",
    )
    told.add_argument(
        "--prompt",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="captions to draw in turn (default: as they come in the data)",
    )
    arguments, further = options.parse_known_args(argv)

    import numpy as np
    import torch
    from accelerate.utils import gather_object

    from . import measure, pictures
    from .build import TrainingError
    from .checkpoint import CheckpointError
    from .data import DataError, to_signed, to_uint8

    try:
        processes = measure.join()
        trained = measure.load_trained(arguments.checkpoint, overrides(arguments, further), processes.device)
        choices = choose(arguments, trained.objective, trained.source)
    except (RecipeError, DataError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    output = arguments.output or trained.recipe.output / "samples" / f"step-{trained.step}"
    for steps in trained.recipe.evaluate.steps:
        folder = output / f"steps-{steps}"
        (folder if arguments.images == "folder" else output).mkdir(parents=True, exist_ok=True)
        number, kept = measure.share(trained.recipe.evaluate.samples).start, []
        for images in measure.draw_all(trained, steps, choices):
            pixels = to_uint8(images.cpu())
            if arguments.images == "npz" or number < GRID:
                kept.append(pixels)
            if arguments.images == "folder":
                for i, image in enumerate(pixels, number):
                    pictures.image(image).save(folder / f"{i:05}.png")
            number += len(pixels)
        kept = gather_object(kept)  # of all processes, in their order
        if processes.is_main_process:
            pixels = torch.cat(kept)
            pictures.grid(to_signed(pixels[:GRID]), pictures.columns(choices)).save(output / f"steps-{steps}.png")
            if arguments.images == "npz":
                np.savez_compressed(output / f"steps-{steps}.npz", pixels.permute(0, 2, 3, 1).numpy())
    if processes.is_main_process:
        print(output)


if __name__ == "__main__":
    main()
    from accelerate import PartialState

    PartialState().destroy_process_group()
