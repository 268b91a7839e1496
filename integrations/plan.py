"""What a run would be and need, without training, a GPU, the data or the network: ``--plan``.

Parameters are counted on networks without memory; the memory of a device is arithmetic on them.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import statistics
import timeit
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from . import lpips
from .build import build_coupling, build_objective, build_optimizer, candidates
from .config import Recipe, RecipeError
from .data import load_source
from .features import inception_path
from .models import build_model
from .objective import Objective
from .places import divide, launch_file
from .sections import HUB, Consistency, Data, OwnOptimizer, StableDiffusion

# Rows and classes by the data sets' cards.
KNOWN = {
    "cifar10": ({"train": 50_000, "test": 10_000}, 10),
    "celeba": ({"train": 162_770, "valid": 19_867, "test": 19_962}, 1),
    "tiny-imagenet": ({"train": 100_000, "valid": 10_000}, 200),
    "imagenet": ({"train": 1_281_167, "validation": 50_000}, 1000),
}


@dataclasses.dataclass
class Expected:
    """What is known of a data source without opening it; ``rows`` is None where nothing is."""

    shape: tuple[int, int, int]
    classes: list[str]
    rows: int | None
    place: str


def plan(recipe: Recipe, argv: list[str]) -> str:
    """Return the plan of a recipe as text.

    Parameters
    ----------
    recipe : Recipe
        What would be trained.
    argv : list of str
        How it was asked for: recipe and overrides, as the launch line repeats them.

    Raises
    ------
    RecipeError
        If it cannot run as its launch configuration says.
    """
    launcher, machine = launch(recipe)
    train, section, processes = recipe.train, recipe.coupling, machine["num_processes"]
    batch, rows, accumulation = train.global_batch_size, train.batch_size_per_device, divide(recipe, processes)[1]
    source = expect(recipe)
    if source.rows is not None and source.rows < batch:
        msg = f"train.global_batch_size: got {batch}, but {recipe.data.source} has {source.rows:,} rows"
        raise RecipeError(msg)
    with torch.device("meta"):
        objective = build_objective(recipe, source, blank=True)
        model = build_model(recipe.model, objective, blank=True)
    pieces = memory(recipe, objective, model, processes)
    total = f"{sum(size or 0 for size in pieces.values()) / 2**30:.1f} GiB per device"
    top = "activations, which grow with the rows at once, come on top"
    if pieces["optimizer"] is None:
        top += f", and what {recipe.optimizer.name} keeps"
    rounded = f", operands rounded to {section.quantize}" if section.quantize else ""
    epochs = "epochs unknown, as is the number of rows"
    if source.rows is not None:
        epochs = f"{train.steps / (source.rows // batch):,.1f} epochs of {source.rows // batch:,} steps"
    told = {
        "recipe": f"{recipe.name}: {recipe.objective.name} with {recipe.model.name}, {_shape(source.shape)} images",
        "parameters": _parameters(recipe, objective, model),
        "global batch": f"{batch} rows a step",
        "device batch": f"{rows} rows at once: {batch} = {rows} x {processes} x {accumulation} "
        "(rows at once x processes x accumulated)",
        "OT batch": "the whole dataset, by a plan that is read or fitted when the run begins"
        if section.method == "semidiscrete"
        else f"{coupled_rows(recipe)} rows coupled together ({section.scope}) by {section.method}, "
        f"{section.metric}{rounded}",
        "steps": f"{train.steps:,} = {epochs}",
        "coupling": _coupling(recipe, objective.shape, accumulation),
        "memory": f"{total}, an estimate; {top}",
        **{f"  {name}": "not known" if size is None else f"{size / 2**20:8,.1f} MiB" for name, size in pieces.items()},
        "data": source.place,
        **{f"  {name}": place for name, place in _weights(recipe).items()},
        "output": str(recipe.output),
        "launch": _launch_line(launcher, machine, argv),
    }
    return "\n".join(f"{name:14} {text}" for name, text in told.items())


# Machines


def launch(recipe: Recipe) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the content of the recipe's launch configuration.

    Raises
    ------
    RecipeError
        If there is none of that name.
    """
    path = launch_file(recipe.launch.config)
    if path is None:
        return None, {"num_machines": 1, "num_processes": 1}
    return path, yaml.safe_load(path.read_text())


def _launch_line(launcher: Path | None, machine: dict[str, Any], argv: list[str]) -> str:
    program = ["-m", "integrations.train", *(word for word in argv if word != "--plan")]
    if launcher is None:
        return shlex.join(["python", *program])
    near = os.path.relpath(launcher)
    line = shlex.join(["accelerate", "launch", "--config_file", str(launcher) if near.startswith("..") else near])
    if machine["num_machines"] > 1:
        # The shell refuses to start without them; accelerate would wait for ever.
        line += ' --machine_rank "${NODE_RANK:?}" --main_process_ip "${MASTER_ADDR:?}"'
        line += ' --main_process_port "${MASTER_PORT:-29500}"'
    return f"{line} {shlex.join(program)}"


# Data and weights


def expect(recipe: Recipe) -> Expected:
    """Tell what a recipe's data is, opening nothing that is not on this machine for certain."""
    data = recipe.data
    kind, _, place = data.source.partition(":")
    if kind in ("digits", "photo-crops", "idx") or data.class_path is not None:
        source = load_source(data)
        where = f"folder {place}" if kind == "idx" else "ships with scikit-learn and scikit-image"
        where = where if data.class_path is None else "a class"
        return Expected(source.shape, source.classes, len(source), f"{data.source}: {len(source):,} rows, {where}")
    name, side, _ = HUB.get(kind, (place, None, None))
    side = data.resolution or side
    if side is None:
        msg = f"data.resolution: got null, expected a number of pixels to plan {data.source} without opening it"
        raise RecipeError(msg)
    splits, classes = KNOWN.get(kind, ({}, getattr(recipe.model, "classes", None) or 2))
    rows = splits.get(data.split, data.rows)
    if kind in ("folder", "hub") and Path(place).is_dir():
        rows, classes = _counted(data, kind, Path(place)) or (rows, classes)
    if rows is not None and data.subset_fraction < 1:
        rows = max(1, round(data.subset_fraction * rows))
    local = kind == "folder" or Path(name).exists()
    where = (
        f"folder {name}" if local else f"https://huggingface.co/datasets/{name} split {data.split}{_at(data.revision)}"
    )
    count = "a number of rows that is not known here" if rows is None else f"{rows:,} rows"
    if data.subset_fraction < 1:
        count += f" ({data.subset_fraction:.0%}, drawn with seed {data.subset_seed})"
    shape = (1 if data.mode == "L" else 3, side, side)
    return Expected(shape, [str(i) for i in range(classes)], rows, f"{data.source}: {count}, {where}")


def _counted(data: Data, kind: str, place: Path) -> tuple[int, int] | None:
    """Count the images in a folder and their classes, or the rows of a data set that was saved there, opening none."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if kind == "hub":
        if not any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return None
        table = datasets.load_from_disk(place)
        return len(table[data.split] if isinstance(table, datasets.DatasetDict) else table), 2
    files = datasets.load_dataset_builder("imagefolder", data_dir=str(place)).config.data_files["train"]
    images = [Path(file) for file in files if Path(file).suffix.lower() in ImageFolder.EXTENSIONS]
    return len(images), len({image.parent for image in images})


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision}"


def _weights(recipe: Recipe) -> dict[str, str]:
    """Return what a run loads besides its data, and whether it is missing here."""
    pretrained = getattr(recipe.model, "pretrained", None)
    found, files = {"network": f"random, from train.seed {recipe.train.seed}"}, {}
    if pretrained:
        found["network"] = f"{pretrained}{_at(recipe.model.revision)}"
    elif recipe.train.init_from:
        found["network"] = recipe.train.init_from
    if isinstance(recipe.objective, StableDiffusion):
        name = f"{recipe.objective.pretrained}{_at(recipe.objective.revision)}"
        found["pretrained"] = f"{name}: autoencoder, text encoder and tokenizer"
    if getattr(recipe.objective, "loss", None) == "lpips":
        files["LPIPS"] = lpips.weights_path()
    if recipe.evaluate.features == "inception":
        files["evaluation"] = inception_path()
    return found | {name: f"{path}{'' if path.is_file() else ' (missing)'}" for name, path in files.items()}


# Numbers


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def count(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def _parameters(recipe: Recipe, objective: Objective, model: nn.Module) -> str:
    text = _stated(count(model), recipe.model.parameters)
    if isinstance(recipe.objective, StableDiffusion):
        stated = _stated(count(objective.vae), recipe.objective.autoencoder_parameters)
        text += f"; frozen: autoencoder {stated}, text encoder {count(objective.text_encoder):,}"
    return text


def _stated(found: int, stated: int | None) -> str:
    if stated is None:
        return f"{found:,}"
    return f"{found:,} ({'as stated' if found == stated else f'the recipe states {stated:,}'})"


def coupled_rows(recipe: Recipe) -> int:
    """Return how many rows are coupled together: the OT batch."""
    train, section = recipe.train, recipe.coupling
    return section.window * (train.global_batch_size if section.scope == "global" else train.batch_size_per_device)


def _coupling(recipe: Recipe, shape: tuple[int, ...], accumulation: int, repeats: int = 5) -> str:
    """Measure the coupling of one step on this machine's processor."""
    if recipe.coupling.method == "semidiscrete":
        return "nothing in a step: the pairs of an epoch are made at its beginning"
    pooled, rows = recipe.coupling.scope == "global", coupled_rows(recipe)
    alone = dataclasses.replace(recipe, coupling=dataclasses.replace(recipe.coupling, scope="local"))
    coupling, generator = build_coupling(alone), torch.Generator().manual_seed(0)
    data = torch.rand(rows, *shape, generator=generator) * 2 - 1
    noise = torch.randn(rows * candidates(coupling), *shape, generator=generator)
    seconds = timeit.repeat(lambda: coupling(data, noise), number=1, repeat=repeats + 1)
    times = 1 if pooled else accumulation
    window = recipe.coupling.window
    milliseconds = 1000 * statistics.median(seconds[1:]) * times / window
    every = f", every {window} steps" if window > 1 else ""
    told = "the exchange between processes not counted" if pooled else "the matrix product is faster on a GPU"
    return (
        f"{milliseconds:.1f} ms a step: {times} of {rows} rows of {_shape(shape)}{every}, median of {repeats} on this "
        f"processor with {torch.get_num_threads()} threads; {told}"
    )


def optimizer_state(config: OwnOptimizer, model: nn.Module) -> int | None:
    """Return the bytes that an optimizer keeps, after a step on a weight of each shape; None if it cannot step."""
    shapes, kept = Counter(weight.shape for weight in model.parameters() if weight.requires_grad), 0
    for shape, times in shapes.items():
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.zeros(shape)
        optimizer = build_optimizer(config, nn.ParameterList([weight]))
        try:
            optimizer.step()
        except Exception:  # of code that is not ours: it may want a GPU, or the loss
            return None
        kept += times * sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, Tensor))
    return kept


def memory(recipe: Recipe, objective: Objective, model: nn.Module, processes: int) -> dict[str, int | None]:
    """Return the bytes that a device holds in a step, activations aside."""
    whole, trained = _size(model), sum(p.nbytes for p in model.parameters() if p.requires_grad)
    averages, rows, values = 1 + len(recipe.train.further_ema_decays), coupled_rows(recipe), prod(objective.shape)
    noises, own = rows * candidates(build_coupling(recipe)), isinstance(recipe.optimizer, OwnOptimizer)
    pieces = {
        "weights": whole,
        "gradients": trained,
        "optimizer": optimizer_state(recipe.optimizer, model) if own else 2 * trained,
        f"averages ({averages})": whole * averages,
        "batch, costs": 4 * (2 * (rows + noises) * values + rows * noises),  # of the present and the next window
    }
    if processes > 1 and not recipe.train.ddp.get("gradient_as_bucket_view", True):  # else gradients are views of them
        pieces["DDP buckets"] = trained
    if isinstance(recipe.objective, Consistency) and recipe.objective.variant == "ct":
        pieces["target"] = whole
    if isinstance(recipe.objective, Consistency) and recipe.objective.loss == "lpips":
        with torch.device("meta"):
            pieces["VGG-16"] = _size(lpips.Lpips())
    if isinstance(recipe.objective, StableDiffusion):
        pieces["frozen"] = _size(objective)
    return pieces


def _size(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
