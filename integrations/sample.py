"""Draw samples from a trained checkpoint: ``python -m integrations.sample CHECKPOINT``."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .config import RecipeError, closest

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
    options.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="K",
        help="numbers of sampling steps, each evaluated in turn (default: the recipe's evaluate.steps)",
    )
    options.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="images for each number of steps (default: the recipe's evaluate.samples)",
    )
    options.add_argument(
        "--seed", type=int, metavar="N", help="seed of the noise (default: the recipe's evaluate.seed)"
    )
    options.add_argument(
        "--guidance", type=float, metavar="W", help="classifier-free guidance (default: objective.guidance_scale)"
    )
    return options


def overrides(arguments: argparse.Namespace, further: list[str]) -> list[str]:
    """Turn the options into overrides of the recipe's ``evaluate`` section."""
    found = []
    if arguments.steps is not None:
        found += ["--evaluate.steps", str(arguments.steps)]
    for name in ("samples", "seed"):
        if getattr(arguments, name) is not None:
            found += [f"--evaluate.{name}", str(getattr(arguments, name))]
    if arguments.guidance is not None:
        found += ["--objective.guidance_scale", str(arguments.guidance)]
    return found + further


def choose(arguments: argparse.Namespace, objective: Objective, source: Source) -> list[int] | list[str]:
    """Return the numbers of the classes, or the captions, that samples are told in turn; empty are those of the data.

    Raises
    ------
    RecipeError
        For a class that the data does not have, or if the network is not told such a thing.
    """
    classes, prompts, tells = arguments.classes, arguments.prompt, objective.tells
    told = {None: "nothing: it is unconditional", "class": "classes"}.get(tells, "captions")
    if classes and tells != "class":
        msg = f"--class: got {classes}, but the network of this run is told {told}"
        raise RecipeError(msg)
    # A network of ``classes`` is told numbers; the names of classes are captions.
    if prompts and (tells is None or objective.classes is not None):
        msg = f"--prompt: got {prompts}, but the network of this run is told {told}"
        raise RecipeError(msg)
    return prompts or [_number(word, source.classes) for word in classes]


def _number(word: str, names: list[str]) -> int:
    """Find a class by its name or number."""
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    known = ", ".join(names if len(names) <= 20 else [*names[:20], "..."])
    msg = f"--class: got {word!r}, expected a number below {len(names)} or one of {known}{closest(word, names)}"
    raise RecipeError(msg)


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
    from PIL import Image
    from rich.console import Console
    from rich.progress import track

    from . import measure, pictures
    from .checkpoint import CheckpointError
    from .data import DataError, to_uint8

    try:
        trained = measure.load_trained(arguments.checkpoint, overrides(arguments, further))
        choices = choose(arguments, trained.objective, trained.source)
    except (RecipeError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    section = trained.recipe.evaluate
    output = arguments.output or trained.recipe.output / "samples" / f"step-{trained.step}"
    output.mkdir(parents=True, exist_ok=True)
    for steps in section.steps:
        batches = measure.draw(trained, section.samples, steps, choices)
        count = -(-section.samples // section.batch_size)
        folder = output / f"steps-{steps}"
        first, kept, number = [], [], itertools.count()
        for images in track(batches, f"{steps} steps", total=count, console=Console(stderr=True)):
            if sum(map(len, first)) < GRID:
                first.append(images)
            pixels = to_uint8(images.cpu()).permute(0, 2, 3, 1).numpy()
            if arguments.images == "npz":
                kept.append(pixels)
            elif arguments.images == "folder":
                folder.mkdir(exist_ok=True)
                for image in pixels:
                    array = image[..., 0] if image.shape[2] == 1 else image
                    Image.fromarray(array).save(folder / f"{next(number):05}.png")
        pictures.grid(torch.cat(first)[:GRID], pictures.columns(choices)).save(output / f"steps-{steps}.png")
        if kept:
            np.savez_compressed(output / f"steps-{steps}.npz", np.concatenate(kept))
    print(output)


if __name__ == "__main__":
    main()
