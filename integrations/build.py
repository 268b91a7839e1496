"""What a recipe names, built: the processes, the coupling, the objective, the optimizer. Networks are in `models`."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import get_scheduler
from torch import nn
from torch.distributed import ProcessGroup

from couplings import Coupling

from . import own
from .config import Recipe, RecipeError
from .consistency import ConsistencyObjective
from .data import Source
from .ddim import DdimObjective
from .flow_matching import FlowMatchingObjective
from .objective import Objective
from .places import divide
from .sections import Optimizer, Own, OwnOptimizer, Train


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is intact."""


def launched() -> int:
    """Return how many processes a launcher started; 1 without a launcher.

    Raises
    ------
    TrainingError
        If they could not meet.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and "MASTER_ADDR" not in os.environ:
        msg = (
            f"WORLD_SIZE is {processes}, but MASTER_ADDR, where the processes meet, is not set: start them with "
            "accelerate launch or torchrun (integrations/launch/README.md), or unset WORLD_SIZE to work in one"
        )
        raise TrainingError(msg)
    return processes


def check_joined(processes: int, joined: int) -> None:
    """Refuse to work where fewer processes have joined than a launcher started.

    Raises
    ------
    TrainingError
        If so.
    """
    if joined != processes:
        msg = (
            f"the launcher started {processes} processes, but accelerate sees {joined}: "
            "each would work alone and write the same files. Use a configuration of integrations/launch."
        )
        raise TrainingError(msg)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Join the processes that a launcher started, or be the only one.

    Raises
    ------
    RecipeError
        For a tracker that is not installed, a precision that the device lacks, or blocks that do not divide.
    TrainingError
        If the processes do not know of each other.
    """
    train, processes = recipe.train, launched()
    if train.tracker and train.tracker not in map(str, get_available_trackers()):  # accelerate only warns
        msg = f"train.tracker: got {train.tracker!r}, which is not installed: pip install {train.tracker}, or null"
        raise RecipeError(msg)
    choose_arithmetic(train)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=train.mixed_precision,
        gradient_accumulation_steps=divide(recipe, processes)[1],
        log_with=train.tracker,
        project_dir=recipe.output,
        kwargs_handlers=[_ddp(train)],
    )
    check_joined(processes, accelerator.num_processes)
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        msg = "train.mixed_precision: got 'fp16', which accelerate ignores on a CPU: expected 'bf16' or 'no'"
        raise RecipeError(msg)
    return accelerator


def _ddp(train: Train) -> DistributedDataParallelKwargs:
    try:
        return DistributedDataParallelKwargs(**{"gradient_as_bucket_view": True, **train.ddp})
    except TypeError as error:
        msg = f"train.ddp: {str(error).rpartition('__init__() ')[2]}"
        raise RecipeError(msg) from None


REPEATABLE = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which matrix products give the same bits in every run."""


def choose_arithmetic(train: Train) -> None:
    """Choose how this process computes; before CUDA starts.

    Raises
    ------
    TrainingError
        If a choice comes too late.
    """
    if train.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.tf32
    if train.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if not train.deterministic:
        return
    name = "CUBLAS_WORKSPACE_CONFIG"
    if not torch.cuda.is_initialized():
        os.environ.setdefault(name, REPEATABLE[0])
    if os.environ.get(name) not in REPEATABLE and torch.cuda.is_available():
        late = "CUDA has started without it" if name not in os.environ else f"it is {os.environ[name]!r}"
        msg = f"train.deterministic: {late}: set {name}={REPEATABLE[0]} in front of the command (export {name}=...)"
        raise TrainingError(msg)
    torch.backends.cudnn.benchmark = False
    # Also chooses deterministic convolutions, and backward passes of attention that add up in a fixed order.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it


def build_coupling(recipe: Recipe, group: ProcessGroup | None = None) -> Coupling:
    """Build the coupling that a recipe names; ``group`` is the one it exchanges over, if not the default one.

    Raises
    ------
    RecipeError
        For an unknown name or option, or a value that an option cannot have.
    """
    section, over = recipe.coupling, {} if group is None else {"group": group}
    # What a batch is coupled by where the pairs are made from the whole dataset: see `dataset_pairs`.
    method, options = {"semidiscrete": ("independent", {}), "persistent": ("auction", {})}.get(
        section.method, (section.method, section.options)
    )
    try:
        coupling = Coupling(method, section.metric, section.quantize, section.scope, **options, **over)
        if options and section.condition is None:  # methods look at the values of their options when they are called
            noise = torch.eye(2 * candidates(coupling), 2) + 1
            Coupling(method, section.metric, **options)(torch.eye(2), noise)
        return coupling
    except (ValueError, TypeError) as error:
        msg = f"coupling: {error}"
        raise RecipeError(msg) from None


def candidates(coupling: Coupling) -> int:
    """Return the noise rows that each data row needs: `nearest` alone chooses from several."""
    if coupling.method != "nearest":
        return 1
    k = coupling.options.get("k")
    return k if isinstance(k, int) and k > 0 else 4  # nearest refuses what is no number of rows


def build_optimizer(config: Optimizer | OwnOptimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that a recipe names.

    Raises
    ------
    RecipeError
        For a class or an argument that there is not.
    """
    if isinstance(config, OwnOptimizer):
        return own.construct("optimizer", config, torch.optim.Optimizer, params=model.parameters(), lr=config.lr)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
    # One pass over the weights instead of ten; RAdam has no such form.
    fused = {} if config.name == "radam" else {"fused": True}
    return kinds[config.name](model.parameters(), lr=config.lr, **config.options(), **fused)


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, counted from 0, so that a checkpoint need not hold it."""
    section = recipe.optimizer
    name = {"constant": "constant_with_warmup"}.get(section.schedule, section.schedule)
    counts = {"num_warmup_steps": section.warmup_steps, "num_training_steps": recipe.train.steps}
    scheduler = get_scheduler(name, optimizer, **counts)
    return lambda step: section.lr * scheduler.lr_lambdas[0](step)


def build_objective(recipe: Recipe, source: Source, *, blank: bool = False) -> Objective:
    """Build the objective that a recipe names, for the images of ``source``.

    ``blank`` gives frozen networks weights of no meaning, where only their sizes matter.

    Raises
    ------
    RecipeError
        If the images do not fit it.
    """
    if recipe.objective.name == "stable_diffusion":
        from .stable_diffusion import StableDiffusionObjective  # transformers takes seconds to import

        return StableDiffusionObjective(recipe.objective, source, blank=blank)
    known, found = recipe.model.classes, len(source.classes)
    if known is not None and not 2 <= found <= known:
        msg = f"model.classes: got {known}, but {recipe.data.source} has {found} classes: expected no fewer, or null"
        raise RecipeError(msg)
    if isinstance(recipe.objective, Own):
        given = {"config": recipe.objective, "shape": source.shape, "classes": known}
        return own.construct("objective", recipe.objective, Objective, **given)
    kinds = {"ddim": DdimObjective, "flow_matching": FlowMatchingObjective, "consistency": ConsistencyObjective}
    return kinds[recipe.objective.name](recipe.objective, source.shape, known)
