"""Where a recipe runs: the files, folders and processes that it counts on, looked for before PyTorch loads."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from .config import LAUNCH, Recipe, RecipeError, closest, expect


def check(recipe: Recipe) -> None:
    """Refuse a recipe whose files and folders are missing.

    Raises
    ------
    RecipeError
        With the field that names what is missing, or an output folder that is taken.
    """
    for section, part in (("objective", "vae"), ("model", "unet")):
        name = getattr(getattr(recipe, section), "pretrained", None)
        local = name is not None and (Path(name).is_dir() or _is_path(name))
        missing = local and not (Path(name) / part / "config.json").is_file()
        expected = f"a pipeline's folder, with {part}/config.json, or a name on the hub"
        expect(not missing, f"{section}.pretrained", name, expected)
    launch_file(recipe.launch.config)
    if recipe.plan:  # which needs no more
        return
    kind, _, place = (recipe.data.source or "").partition(":")
    folder = kind in ("idx", "folder") or (kind == "hub" and _is_path(place))
    expect(not folder or Path(place).is_dir(), "data.source", recipe.data.source, "a folder that exists")
    features = recipe.evaluate.features
    known = features in ("classifier", "inception") or Path(features).is_file()
    expect(known, "evaluate.features", features, "classifier, inception or the path of a classifier.safetensors")
    tracker = recipe.train.tracker
    packages = {None: ("torch",), "tensorboard": ("tensorboard", "tensorboardX")}.get(tracker, (tracker,))
    installed = any(find_spec(package) for package in packages)
    expect(installed, "train.tracker", tracker, f"null, or what is installed: pip install {tracker}")
    check_output(recipe)
    begins = not has_checkpoints(recipe.output)
    given, potentials = recipe.train.init_from, recipe.coupling.options.get("potentials")
    expect(not begins or not given or Path(given).exists(), "train.init_from", given, "a file or a folder that exists")
    planned = recipe.coupling.method == "semidiscrete" and potentials is not None and begins
    exists = not planned or Path(str(potentials)).is_file()
    expect(exists, "coupling.options.potentials", potentials, "a file that `couplings fit` wrote")
    divide(recipe, int(os.environ.get("WORLD_SIZE", "1")))


def _is_path(name: str) -> bool:
    """Whether a name is no hub name, which has one slash at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def has_checkpoints(output: Path) -> bool:
    """Whether a run's folder holds checkpoints."""
    return any((output / "checkpoints").glob("step-*"))


def check_output(recipe: Recipe) -> None:
    """Refuse to begin where another run has been.

    Raises
    ------
    RecipeError
        If there are checkpoints, or the output is no folder.
    """
    output = recipe.output
    there = next((place for place in (output, *output.parents) if place.exists()), None)
    expect(there is None or there.is_dir(), "output", str(output), f"a folder, or a new one's name: {there} is a file")
    if not recipe.resume and has_checkpoints(output):
        msg = f"{output} already holds checkpoints: continue with --resume auto, or choose another --output"
        raise RecipeError(msg)


def launch_file(name: str | None) -> Path | None:
    """Return the path of the accelerate configuration that ``launch.config`` names.

    Raises
    ------
    RecipeError
        If there is none of that name.
    """
    places = [] if name is None else [Path(name), LAUNCH / name, LAUNCH / f"{name}.yaml"]
    path = next(filter(Path.is_file, places), None)
    known = sorted(each.stem for each in LAUNCH.glob("*.yaml"))
    expected = f"an accelerate configuration file or one of {', '.join(known)}{closest(str(name), known)}"
    expect(name is None or path is not None, "launch.config", name, expected)
    return path


def divide(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Return the blocks of a step and how many of them each process accumulates.

    Raises
    ------
    RecipeError
        With the arithmetic, if the blocks do not divide among the processes.
    """
    train = recipe.train
    blocks = train.global_batch_size // train.batch_size_per_device
    if blocks % processes:
        msg = (
            f"train.global_batch_size {train.global_batch_size} = {blocks} blocks of train.batch_size_per_device "
            f"{train.batch_size_per_device}, which do not divide among {processes} processes ({blocks} / {processes} = "
            f"{blocks / processes:.2f}): choose a train.batch_size_per_device that gives a multiple of {processes}"
        )
        raise RecipeError(msg)
    return blocks, blocks // processes
