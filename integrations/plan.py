"""What a run would be and need, without training, a GPU, the data or the network: ``--plan``.

Parameters are counted on networks without memory; the memory of a device is arithmetic on them.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import statistics
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from . import lpips
from .build import build_coupling, build_objective, candidates, divide
from .config import LAUNCH, Consistency, Recipe, RecipeError, StableDiffusion
from .data import HUB, load_source
from .features import INCEPTION
from .models import build_model
from .objective import Objective

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
    _, accumulation = divide(recipe, machine["num_processes"])
    source = expect(recipe)
    if source.rows is not None and source.rows < recipe.train.global_batch_size:
        rows = f"{recipe.data.source} has {source.rows:,} rows"
        msg = f"train.global_batch_size: got {recipe.train.global_batch_size}, but {rows}"
        raise RecipeError(msg)
    with torch.device("meta"):
        objective = build_objective(recipe, source, blank=True)
        model = build_model(recipe.model, objective, blank=True)
    pieces = memory(recipe, objective, model, machine["num_processes"])
    lines = [
        ("recipe", f"{recipe.name}: {recipe.objective.name} with {recipe.model.name}, {_shape(source.shape)} images"),
        ("parameters", _parameters(recipe, objective, model)),
        ("global batch", f"{recipe.train.global_batch_size} rows a step"),
        ("device batch", _batch(recipe, machine["num_processes"], accumulation)),
        ("OT batch", _coupled_rows(recipe)),
        ("steps", _steps(recipe, source)),
        ("coupling", _coupling(recipe, objective.shape, accumulation)),
        ("memory", _memory(pieces)),
        *(("", f"{size / 2**20:10,.1f} MiB  {name}") for name, size in pieces.items()),
        ("data", source.place),
        *(("weights", text) for text in _weights(recipe)),
        ("output", str(recipe.output)),
        ("launch", _launch_line(launcher, machine, argv)),
    ]
    return "\n".join(f"{name:14}{text}" for name, text in lines)


# Machines


def launch(recipe: Recipe) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the content of the recipe's launch configuration.

    Raises
    ------
    RecipeError
        If there is none of that name.
    """
    name = recipe.launch.config
    if name is None:
        return None, {"num_machines": 1, "num_processes": 1}
    path = next((p for p in (Path(name), LAUNCH / f"{name}.yaml", LAUNCH / name) if p.is_file()), None)
    if path is None:
        known = sorted(p.stem for p in LAUNCH.glob("*.yaml"))
        msg = f"launch.config: got {name!r}, expected an accelerate configuration file or one of {', '.join(known)}"
        raise RecipeError(msg)
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
    if kind in ("digits", "photo-crops", "idx"):
        source = load_source(data)
        where = "ships with scikit-learn and scikit-image" if kind != "idx" else f"folder {place}"
        return Expected(source.shape, source.classes, len(source), f"{data.source}: {len(source):,} rows, {where}")
    name, side, _ = HUB.get(kind, (place, None, None))
    side = data.resolution or side
    if side is None:
        msg = f"data.resolution: got null, expected a number of pixels to plan {data.source} without opening it"
        raise RecipeError(msg)
    splits, classes = KNOWN.get(kind, ({}, getattr(recipe.model, "classes", None) or 2))
    rows = splits.get(data.split, data.rows)
    if rows is not None and data.subset_fraction < 1:
        rows = max(1, round(data.subset_fraction * rows))
    if kind == "folder" or Path(name).exists():
        where = f"folder {name}" + ("" if Path(name).is_dir() else " (not there yet)")
    else:
        cache = os.environ.get("HF_HOME", Path("~/.cache/huggingface").expanduser())
        where = f"https://huggingface.co/datasets/{name} split {data.split}, kept in {cache}"
    count = "a number of rows that is not known here" if rows is None else f"{rows:,} rows"
    if data.subset_fraction < 1:
        count += f" ({data.subset_fraction:.0%}, drawn with seed {data.subset_seed})"
    shape = (1 if data.mode == "L" else 3, side, side)
    return Expected(shape, [str(i) for i in range(classes)], rows, f"{data.source}: {count}, {where}")


def _weights(recipe: Recipe) -> list[str]:
    found = []
    if isinstance(recipe.objective, StableDiffusion):
        found.append(f"autoencoder, text encoder and tokenizer: {_hub(recipe.objective.pretrained)}")
    pretrained = getattr(recipe.model, "pretrained", None)
    found.append(f"network: {_hub(pretrained) if pretrained else f'random, from train.seed {recipe.train.seed}'}")
    if getattr(recipe.objective, "loss", None) == "lpips":
        source = f"https://download.pytorch.org/models/{lpips.VGG}"
        found.append(f"LPIPS: {lpips.weights_path()}{_presence(lpips.weights_path(), source)}")
    if recipe.evaluate.features == "inception":
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
        found.append(f"evaluation: {path}{_presence(path, 'torch-fidelity downloads it')}")
    return found


def _presence(path: Path, source: str) -> str:
    return "" if path.is_file() else f" (missing: {source})"


def _hub(name: str) -> str:
    if name == "tiny-random":
        return "random and small, made on the spot"
    if Path(name).is_dir():
        return f"folder {name}"
    cache = os.environ.get("HF_HOME", Path("~/.cache/huggingface").expanduser())
    return f"https://huggingface.co/{name}, kept in {cache}"


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


def _batch(recipe: Recipe, processes: int, accumulation: int) -> str:
    train = recipe.train
    return (
        f"{train.batch_size_per_device} rows at once: {train.global_batch_size} = {train.batch_size_per_device} x "
        f"{processes} x {accumulation} (rows at once x processes x accumulated)"
    )


def coupled_rows(recipe: Recipe) -> int:
    """Return how many rows are coupled together: the OT batch."""
    train = recipe.train
    return train.global_batch_size if recipe.coupling.scope == "global" else train.batch_size_per_device


def _coupled_rows(recipe: Recipe) -> str:
    section = recipe.coupling
    rounded = f", operands rounded to {section.quantize}" if section.quantize else ""
    return (
        f"{coupled_rows(recipe)} rows coupled together ({section.scope}) by {section.method}, {section.metric}{rounded}"
    )


def _steps(recipe: Recipe, source: Expected) -> str:
    steps = recipe.train.steps
    if source.rows is None:
        return f"{steps:,}; epochs unknown, as is the number of rows"
    per_epoch = source.rows // recipe.train.global_batch_size
    return f"{steps:,} = {steps / per_epoch:,.1f} epochs of {per_epoch:,} steps"


def _coupling(recipe: Recipe, shape: tuple[int, ...], accumulation: int, repeats: int = 5) -> str:
    """Measure the coupling of one step on this machine's processor."""
    pooled, rows = recipe.coupling.scope == "global", coupled_rows(recipe)
    alone = dataclasses.replace(recipe, coupling=dataclasses.replace(recipe.coupling, scope="local"))
    coupling, generator = build_coupling(alone), torch.Generator().manual_seed(0)
    data = torch.rand(rows, *shape, generator=generator) * 2 - 1
    noise = torch.randn(rows * candidates(coupling), *shape, generator=generator)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        coupling(data, noise)
        seconds.append(time.perf_counter() - start)
    times = 1 if pooled else accumulation
    milliseconds = 1000 * statistics.median(seconds[1:]) * times
    told = "the exchange between processes not counted" if pooled else "the matrix product is faster on a GPU"
    return (
        f"{milliseconds:.1f} ms a step: {times} of {rows} rows of {_shape(shape)}, median of {repeats} on this "
        f"processor with {torch.get_num_threads()} threads; {told}"
    )


def memory(recipe: Recipe, objective: Objective, model: nn.Module, processes: int) -> dict[str, int]:
    """Return the bytes that a device holds in a step, activations aside."""
    whole, trained = _size(model), sum(p.nbytes for p in model.parameters() if p.requires_grad)
    averages, rows, values = 1 + len(recipe.train.further_ema_decays), coupled_rows(recipe), prod(objective.shape)
    noises = rows * candidates(build_coupling(recipe))
    pieces = {
        "weights, float32": whole,
        "gradients": trained,
        f"moments of {recipe.optimizer.name}": 2 * trained,
        f"averages of the weights ({averages})": whole * averages,
        "data, noise and their costs": 4 * ((rows + noises) * values + rows * noises),
    }
    if processes > 1:
        pieces["buckets in which processes exchange gradients"] = trained
    if isinstance(recipe.objective, Consistency) and recipe.objective.variant == "ct":
        pieces["target network"] = whole
    if isinstance(recipe.objective, Consistency) and recipe.objective.loss == "lpips":
        with torch.device("meta"):
            pieces["VGG-16 of LPIPS"] = _size(lpips.Lpips())
    if isinstance(recipe.objective, StableDiffusion):
        pieces["frozen networks"] = _size(objective)
    return pieces


def _size(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def _memory(pieces: dict[str, int]) -> str:
    total = sum(pieces.values()) / 2**30
    return f"{total:.1f} GiB per device, an estimate; activations, which grow with the rows at once, come on top"
