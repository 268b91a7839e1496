"""Recipes: YAML read into typed sections, every field overridable on the command line.

Nothing heavier than PyYAML and jsonargparse is imported here, so a mistake in a recipe is reported
before PyTorch loads. Which objective and which network a recipe names decides which fields exist:
the file is read once for those two names and then parsed for exactly that pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser

RECIPES = Path(__file__).parent / "recipes"
LAUNCH = Path(__file__).parent / "launch"


@dataclass
class Ddim:
    """Denoising diffusion on pixels, sampled deterministically (arXiv 2006.11239, 2010.02502).

    Parameters
    ----------
    name :
        The objective.
    prediction :
        What the network regresses: the noise, the velocity or the clean image.
    schedule :
        Noise schedule: linear betas, or the squared cosine of arXiv 2102.09672.
    diffusion_steps :
        Number of noise levels trained.
    beta_start :
        First beta of the linear schedule.
    beta_end :
        Last beta of the linear schedule.
    min_snr_gamma :
        Clamp of the min-SNR loss weight (arXiv 2303.09556); null leaves the loss unweighted.
    spacing :
        Where the sampling steps lie. ``trailing`` starts at the noisiest level, which one or two
        steps need; ``leading`` is the evenly spaced 0, k, 2k, ... of the DDIM paper.
    clip_sample :
        Clip the predicted clean image to [-1, 1] at every sampling step.
    eta :
        Noise put back while sampling: 0 is DDIM, 1 is ancestral sampling.
    """

    name: Literal["ddim"] = "ddim"
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    min_snr_gamma: float | None = None
    spacing: Literal["leading", "trailing"] = "leading"
    clip_sample: bool = True
    eta: float = 0.0


@dataclass
class FlowMatching:
    """Rectified flow: a straight path from data to noise, the velocity as target (arXiv 2209.03003).

    Parameters
    ----------
    name :
        The objective.
    time :
        Distribution of the training times in [0, 1]: uniform, or the logit-normal of arXiv 2403.03206.
    logit_mean :
        Mean of the logit-normal; positive values favour noisy times.
    logit_std :
        Standard deviation of the logit-normal.
    solver :
        How the flow is integrated when sampling: fixed Euler steps, or adaptive ``dopri5``
        (torchdiffeq), which chooses its own number of steps.
    tolerance :
        Relative and absolute tolerance of ``dopri5``.
    """

    name: Literal["flow_matching"] = "flow_matching"
    time: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    solver: Literal["euler", "dopri5"] = "euler"
    tolerance: float = 1e-5


@dataclass
class Consistency:
    """Consistency training: no teacher, samples in one step (arXiv 2303.01469, 2310.14189).

    Parameters
    ----------
    name :
        The objective.
    variant :
        ``ct`` as first published; ``ict`` the improved one: lognormal noise levels, weights
        1 / (step between levels), doubling discretisation, no average for the target.
    total_steps :
        K of the schedules N(k) and mu(k), in optimizer steps. It stays when train.steps is less.
    s0 :
        Intervals between noise levels at the start.
    s1 :
        Intervals between noise levels at the end.
    mu0 :
        Decay of the target network's average at the start (``ct``).
    loss :
        Distance between the two predictions: LPIPS at 224 pixels (needs the weights of VGG-16),
        mean squared error, or the pseudo-Huber metric of ``ict`` with c = 0.00054 sqrt(d).
    sigma_min :
        Standard deviation of the noise at the cleanest level.
    sigma_max :
        Standard deviation of the noise at the noisiest level.
    sigma_data :
        Standard deviation of the data, for the skip scaling.
    rho :
        Curvature of the grid of levels.
    level_mean :
        Mean of ln(sigma) over training (``ict``).
    level_std :
        Standard deviation of ln(sigma) over training (``ict``).
    """

    name: Literal["consistency"] = "consistency"
    variant: Literal["ct", "ict"] = "ct"
    total_steps: int = 800_000
    s0: int = 2
    s1: int = 150
    mu0: float = 0.9
    loss: Literal["lpips", "l2", "pseudo_huber"] = "l2"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    level_mean: float = -1.1
    level_std: float = 2.0


@dataclass
class StableDiffusion:
    """Diffusion in the latents of a frozen autoencoder, told a caption (arXiv 2112.10752).

    Parameters
    ----------
    name :
        The objective.
    pretrained :
        Folder or hub name of a Stable Diffusion pipeline whose autoencoder, text encoder and
        tokenizer are used, frozen. ``tiny-random`` makes small random ones, for trying things out.
    frozen_precision :
        Number format of the frozen networks.
    caption :
        What the network is told: nothing, or the name of the image's class.
    caption_dropout :
        Share of the captions replaced by the empty one, for guidance when sampling.
    prediction :
        What the network regresses: the noise, the velocity or the clean latents.
    min_snr_gamma :
        Clamp of the min-SNR loss weight (arXiv 2303.09556); null leaves the loss unweighted.
    noise_offset :
        Standard deviation of a shift added to each channel of the noise, after the coupling.
    sampler :
        Sampling scheme.
    guidance_scale :
        Classifier-free guidance when sampling; 1 is none.
    autoencoder_parameters :
        How many parameters the autoencoder has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["stable_diffusion"] = "stable_diffusion"
    pretrained: str = "CompVis/stable-diffusion-v1-4"
    frozen_precision: Literal["fp32", "fp16"] = "fp32"
    caption: Literal["empty", "class"] = "empty"
    caption_dropout: float = 0.0
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    sampler: Literal["ddim", "pndm"] = "ddim"
    guidance_scale: float = 1.0
    autoencoder_parameters: int | None = None


@dataclass
class ConditionUnet:
    """The U-Net of Stable Diffusion (diffusers' UNet2DConditionModel).

    Parameters
    ----------
    name :
        The network.
    pretrained :
        Folder or hub name of a pipeline to start from; its sizes then replace those given here.
        Null starts from random weights.
    channels :
        Channels of each resolution level; all levels but the last attend to the caption.
    layers_per_block :
        Residual blocks per level.
    head_channels :
        diffusers' attention_head_dim.
    norm_groups :
        Groups of the group normalisations; must divide every number of channels.
    parameters :
        How many parameters the network has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["condition_unet"] = "condition_unet"
    pretrained: str | None = None
    channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    layers_per_block: int = 2
    head_channels: int = 8
    norm_groups: int = 32
    parameters: int | None = None


@dataclass
class Mlp:
    """A residual MLP on the flattened pixels: for images of a few hundred values.

    Parameters
    ----------
    name :
        The network.
    width :
        Channels of the residual stream.
    depth :
        Number of blocks.
    parameters :
        How many parameters the network has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["mlp"] = "mlp"
    width: int = 256
    depth: int = 3
    parameters: int | None = None


@dataclass
class ConvNext:
    """A small ConvNeXt-like network on patches: trains on CPU cores.

    Parameters
    ----------
    name :
        The network.
    patch_size :
        Side of a patch in pixels; the blocks see one token per patch.
    width :
        Channels of a token.
    depth :
        Number of blocks.
    expansion :
        Hidden channels of a block's MLP, in multiples of the width.
    kernel_size :
        Side of the depthwise convolution, in patches.
    parameters :
        How many parameters the network has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["convnext"] = "convnext"
    patch_size: int = 4
    width: int = 128
    depth: int = 4
    expansion: int = 3
    kernel_size: int = 5
    parameters: int | None = None


@dataclass
class Unet:
    """The U-Net of DDPM (diffusers' UNet2DModel).

    Parameters
    ----------
    name :
        The network.
    channels :
        Channels of each resolution level, from full resolution down.
    attention :
        Whether each level has self-attention.
    layers_per_block :
        Residual blocks per level.
    dropout :
        Dropout probability.
    norm_groups :
        Groups of the group normalisations; must divide every number of channels.
    head_channels :
        Channels per attention head; null is a single head.
    parameters :
        How many parameters the network has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["unet"] = "unet"
    channels: list[int] = field(default_factory=lambda: [128, 256, 256, 256])
    attention: list[bool] = field(default_factory=lambda: [False, True, False, False])
    layers_per_block: int = 2
    dropout: float = 0.1
    norm_groups: int = 32
    head_channels: int | None = None
    parameters: int | None = None


@dataclass
class Ncsnpp:
    """NCSN++ with residual input pyramid, as of consistency models on CIFAR-10 (arXiv 2011.13456).

    Parameters
    ----------
    name :
        The network.
    channels :
        Channels at full resolution before the multipliers.
    multipliers :
        Channels of each resolution level, in multiples of ``channels``.
    attention :
        Whether each level has self-attention.
    layers_per_block :
        Residual blocks per level on the way down; one more on the way up.
    fourier_scale :
        Standard deviation of the frequencies of the time embedding.
    dropout :
        Dropout probability.
    norm_groups :
        Groups of the group normalisations; must divide every number of channels.
    classes :
        Classes that the network can be told, for ``consistency``; null is an unconditional network.
    parameters :
        How many parameters the network has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["ncsnpp"] = "ncsnpp"
    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [2, 2, 2])
    attention: list[bool] = field(default_factory=lambda: [False, True, False])
    layers_per_block: int = 4
    fourier_scale: float = 16.0
    dropout: float = 0.0
    norm_groups: int = 32
    classes: int | None = None
    parameters: int | None = None


@dataclass
class Adm:
    """The U-Net of ADM and of consistency models at 64x64 (arXiv 2105.05233), as diffusers' UNet2DModel.

    Parameters
    ----------
    name :
        The network.
    channels :
        Channels of each resolution level, from full resolution down.
    attention :
        Whether each level has self-attention.
    layers_per_block :
        Residual blocks per level.
    head_channels :
        Channels per attention head.
    dropout :
        Dropout probability.
    norm_groups :
        Groups of the group normalisations; must divide every number of channels.
    classes :
        Classes that the network can be told, for ``consistency``; null is an unconditional network.
    parameters :
        How many parameters the network has, for readers; ``--plan`` holds it against the count.
    """

    name: Literal["adm"] = "adm"
    channels: list[int] = field(default_factory=lambda: [192, 384, 576, 768])
    attention: list[bool] = field(default_factory=lambda: [False, True, True, True])
    layers_per_block: int = 3
    head_channels: int = 64
    dropout: float = 0.0
    norm_groups: int = 32
    classes: int | None = None
    parameters: int | None = None


@dataclass
class Data:
    """Where the images come from.

    Parameters
    ----------
    source :
        ``digits``: the 8x8 handwritten digits of scikit-learn. ``photo-crops``: 32x32 crops of the
        photographs that scikit-learn and scikit-image ship. ``idx:FOLDER``: the MNIST family's
        train-images-idx3-ubyte and train-labels-idx1-ubyte, gzipped or not. ``folder:FOLDER``: image files,
        one folder per class. ``hub:NAME``: a data set of the Hugging Face hub, or a local copy of one.
        ``cifar10``, ``celeba``, ``tiny-imagenet`` and ``imagenet`` are hub data sets by short names.
    split :
        Split of a hub data set.
    streaming :
        Read a ``folder`` or hub data set from beginning to end, without storing it first. Every process
        reads all of it; resuming passes over the rows that the epoch has had.
    shuffle_buffer :
        Neighbouring rows of a stream that are shuffled together and held in memory, as encoded images.
    rows :
        Number of rows of a stream; null takes what the data set says, and counts the rows of a local one.
    resolution :
        Side of the square images in pixels: the largest centred square (or ``crop``) is resized to it.
        Null keeps the images of ``digits``, ``photo-crops``, ``idx`` and square data sets as they are.
    crop :
        Side of the centred square to keep before resizing, in pixels; null keeps the largest.
    mode :
        Colour or grey images, for ``folder`` and hub data sets.
    subset_fraction :
        Share of the rows to use, drawn with ``subset_seed``.
    subset_seed :
        Seed of that draw.
    flip :
        Mirror half of the images left to right, at random.
    on_unreadable :
        What a damaged image file does: its row is replaced by the next readable one and the file is
        named in a warning, or the run ends.
    workers :
        Processes that load images, threads for a stream; 0 loads in the training process itself.
    """

    source: str = "digits"
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 5000
    rows: int | None = None
    resolution: int | None = None
    crop: int | None = None
    mode: Literal["RGB", "L"] = "RGB"
    subset_fraction: float = 1.0
    subset_seed: int = 0
    flip: bool = False
    on_unreadable: Literal["replace", "raise"] = "replace"
    workers: int = 0


@dataclass
class Optimizer:
    """The optimizer and its schedule.

    Parameters
    ----------
    name :
        Update rule.
    lr :
        Learning rate after warm-up.
    betas :
        Decay rates of the two moment estimates.
    eps :
        Added to the denominator of the update.
    weight_decay :
        Decoupled for ``adamw``, added to the gradient otherwise.
    warmup_steps :
        Optimizer steps of linear warm-up from 0.
    schedule :
        What happens after warm-up, until ``train.steps``.
    clip :
        Largest gradient norm; null does not clip.
    """

    name: Literal["adam", "adamw", "radam"] = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    clip: float | None = 1.0


@dataclass
class CouplingSection:
    """Which noise each data row gets (see ``couplings methods``).

    Parameters
    ----------
    method :
        Name of the pairing method; ``independent`` is the baseline.
    metric :
        Distance that the pairing minimises.
    quantize :
        Number format the operands of the cost are rounded to; null does not round.
    scope :
        ``local`` couples each device's batch; ``global`` couples the whole global batch over all
        processes and accumulated batches.
    condition :
        ``class`` couples within each class only, so that the noise given the class stays Gaussian.
    options :
        Options of the method, as ``--coupling.options.reg 0.2``.
    """

    method: str = "auction"
    metric: str = "sqeuclidean"
    quantize: str | None = None
    scope: Literal["local", "global"] = "local"
    condition: Literal["class"] | None = None
    options: dict[str, bool | int | float | str | None] = field(default_factory=dict)


@dataclass
class Train:
    """The loop.

    Parameters
    ----------
    steps :
        Optimizer steps.
    global_batch_size :
        Rows per optimizer step, over all processes.
    batch_size_per_device :
        Rows coupled together and passed through the network at once. Gradient accumulation is
        derived: global_batch_size / (batch_size_per_device * processes).
    seed :
        Decides initial weights, data order, noise, times and augmentation.
    mixed_precision :
        Arithmetic of the network.
    ema_decay :
        Decay per step of the averaged weights that are sampled from.
    further_ema_decays :
        Decays of further averages, kept beside the first one; ``evaluate.ema_decay`` samples from them.
    ema_ramp :
        Start the decay small: min(ema_decay, (1 + n) / (10 + n)) at step n.
    gradient_checkpointing :
        Recompute activations in the backward pass, to save memory.
    compile :
        Compile the network with torch.compile.
    log_every :
        Steps between lines of metrics.jsonl.
    checkpoint_every :
        Steps between checkpoints; one is always written at the end.
    keep_last :
        Checkpoints kept; older ones are deleted.
    sample_every :
        Steps between sample grids; 0 draws one at the end only.
    tracker :
        Experiment tracker of accelerate; null for none.
    """

    steps: int = 1000
    global_batch_size: int = 128
    batch_size_per_device: int = 128
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float = 0.9999
    further_ema_decays: list[float] = field(default_factory=list)
    ema_ramp: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_last: int = 2
    sample_every: int = 0
    tracker: Literal["tensorboard", "wandb"] | None = "tensorboard"


@dataclass
class Evaluate:
    """What is drawn and measured.

    Parameters
    ----------
    steps :
        Numbers of sampling steps, each evaluated.
    samples :
        Images drawn for each.
    batch_size :
        Images drawn at once.
    features :
        ``classifier`` trains a small network on the recipe's own labelled data and compares its
        features; the path of a ``classifier.safetensors`` takes one that was trained before;
        ``inception`` is the network of the published FID (torch-fidelity).
    seed :
        Seed of the sampling noise.
    ema_decay :
        Which of the averaged weights to sample from; null is ``train.ema_decay``.
    """

    steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    samples: int = 2000
    batch_size: int = 500
    features: str = "classifier"
    seed: int = 0
    ema_decay: float | None = None


@dataclass
class Launch:
    """The machines a recipe is meant for; decides what ``--plan`` tells, and nothing else.

    Parameters
    ----------
    config :
        Path of an accelerate configuration, or the name of one in ``integrations/launch``; null is one
        process without a launcher.
    """

    config: str | None = None


PLAIN_SOURCES = ("digits", "photo-crops", "cifar10", "celeba", "tiny-imagenet", "imagenet")
PLACED_SOURCES = ("idx", "folder", "hub")
OBJECTIVES: dict[str, type] = {
    "ddim": Ddim,
    "consistency": Consistency,
    "stable_diffusion": StableDiffusion,
    "flow_matching": FlowMatching,
}
MODELS: dict[str, type] = {
    "mlp": Mlp,
    "convnext": ConvNext,
    "unet": Unet,
    "ncsnpp": Ncsnpp,
    "adm": Adm,
    "condition_unet": ConditionUnet,
}


@dataclass
class Recipe:
    """A complete experiment: ``name`` is the recipe file's stem, ``output`` the run's folder."""

    name: str
    objective: Any
    data: Data
    model: Any
    optimizer: Optimizer
    coupling: CouplingSection
    train: Train
    evaluate: Evaluate
    launch: Launch
    output: Path
    resume: bool = False
    plan: bool = False

    def sections(self) -> dict[str, Any]:
        """Return the recipe as plain nested values, as ``recipe.yaml`` holds them."""
        values = dataclasses.asdict(self)
        values["output"] = str(self.output)
        values["optimizer"]["betas"] = list(self.optimizer.betas)
        del values["name"], values["resume"], values["plan"]
        return values

    def text(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.sections(), sort_keys=False)


class RecipeError(ValueError):
    """A recipe that cannot be run: names the file, the field, its value and what was expected."""


def recipe_path(name: str) -> Path:
    """Find a recipe by path, or by the bare name of a bundled one."""
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = bundled()
    msg = f"{name}: no such recipe file, and none of the bundled recipes: {', '.join(known)}{_closest(name, known)}"
    raise RecipeError(msg)


def bundled() -> list[str]:
    """Return the names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(argv: list[str], *, prog: str = "python -m integrations.train") -> Recipe:
    """Read the recipe named by ``argv[0]`` with the overrides in ``argv[1:]``.

    Raises
    ------
    RecipeError
        For an unknown field, a value of the wrong type or an impossible combination.
    """
    path = recipe_path(argv[0])
    parser = _parser(path, prog)
    overlaid, overrides = _overlay(argv[1:], parser)
    try:
        parsed = parser.parse_args(["--recipe", str(path), *overlaid, *overrides])
    except ArgumentError as error:
        message = str(error).strip()
        msg = f"{path}: {message}{_suggestion(message, parser)}"
        raise RecipeError(msg) from None
    values = parser.instantiate(parsed)
    recipe = Recipe(
        name=path.stem,
        output=Path(values.output or f"runs/{path.stem}"),
        resume=values.resume == "auto",
        plan=values.plan,
        **{section: values[section] for section in SECTIONS},
    )
    try:
        check(recipe)
    except RecipeError as error:
        msg = f"{path}: {error}"
        raise RecipeError(msg) from None
    return recipe


SECTIONS = ("objective", "data", "model", "optimizer", "coupling", "train", "evaluate", "launch")
KINDS: dict[str, list[type]] = {
    "objective": list(OBJECTIVES.values()),
    "data": [Data],
    "model": list(MODELS.values()),
    "optimizer": [Optimizer],
    "coupling": [CouplingSection],
    "train": [Train],
    "evaluate": [Evaluate],
    "launch": [Launch],
}


def _parser(path: Path, prog: str) -> ArgumentParser:
    raw = _read(path)

    def named(section: str, known: dict[str, type]) -> type:
        value = raw.get(section)
        name = value.get("name") if isinstance(value, dict) else value
        if name not in known:
            msg = f"{path}: {section}.name: got {name!r}, expected one of {', '.join(known)}"
            raise RecipeError(msg + _closest(str(name), known))
        return known[name]

    parser = ArgumentParser(prog=f"{prog} {path}", exit_on_error=False, description="Every field of the recipe.")
    parser.add_argument("--recipe", action="config", help="the recipe file")
    types = {
        "objective": named("objective", OBJECTIVES),
        "data": Data,
        "model": named("model", MODELS),
        "optimizer": Optimizer,
        "coupling": CouplingSection,
        "train": Train,
        "evaluate": Evaluate,
        "launch": Launch,
    }
    for section, kind in types.items():
        parser.add_argument(f"--{section}", type=kind, default=kind())
    parser.add_argument("--output", type=str | None, default=None, help="the run's folder; null is runs/<recipe name>")
    parser.add_argument(
        "--resume",
        type=Literal["auto"] | None,
        default=None,
        help="auto: continue from the newest intact checkpoint in the output folder, or start if there is none",
    )
    parser.add_argument(
        "--overlay", type=str | None, default=None, help="a file of overrides, or the name of a bundled one"
    )
    parser.add_argument("--plan", action="store_true", help="say what a run would be and need, and do not train")
    return parser


def _overlay(argv: list[str], parser: ArgumentParser) -> tuple[list[str], list[str]]:
    """Return the overrides of the overlay that ``argv`` names, and the rest of ``argv``.

    In an overlay the values of ``objective`` and ``model`` stand under the names of those they are for:
    one file fits every recipe.
    """
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--overlay")
    named, rest = option.parse_known_args(argv)
    if named.overlay is None:
        return [], rest
    places = (Path(named.overlay), RECIPES / "overlays" / f"{named.overlay}.yaml")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted(place.stem for place in (RECIPES / "overlays").glob("*.yaml"))
        msg = f"--overlay: got {named.overlay!r}, expected a file or one of {', '.join(known)}"
        raise RecipeError(msg)
    overrides = []
    for section, values in _read(path).items():
        if section in ("objective", "model"):
            values = values.get(parser.get_defaults()[section].name, {})
        if not isinstance(values, dict):
            msg = f"{path}: {section}: got {values!r}, expected fields and their values"
            raise RecipeError(msg)
        for field_name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            overrides.append(f"--{section}.{field_name}={text}")
    return overrides, rest


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        msg = f"{path}: not valid YAML: {error}"
        raise RecipeError(msg) from None
    if not isinstance(raw, dict):
        msg = f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(raw).__name__}"
        raise RecipeError(msg)
    return raw


def check(recipe: Recipe) -> None:
    """Refuse values that parse but cannot run.

    Raises
    ------
    RecipeError
        Naming the field, its value and what was expected.
    """
    train, model = recipe.train, recipe.model

    def expect(holds: bool, name: str, value: object, expected: str) -> None:
        if not holds:
            msg = f"{name}: got {value!r}, expected {expected}"
            raise RecipeError(msg)

    counts = {
        "train": ("steps", "global_batch_size", "batch_size_per_device", "log_every", "checkpoint_every", "keep_last"),
        "evaluate": ("samples", "batch_size"),
    }
    for section, names in counts.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            expect(value >= 1, f"{section}.{name}", value, "at least 1")
    expect(
        train.global_batch_size % train.batch_size_per_device == 0,
        "train.global_batch_size",
        train.global_batch_size,
        f"a multiple of train.batch_size_per_device = {train.batch_size_per_device} ({train.global_batch_size} / "
        f"{train.batch_size_per_device} = {train.global_batch_size / max(1, train.batch_size_per_device):.2f})",
    )
    expect(train.seed >= 0, "train.seed", train.seed, "at least 0")
    expect(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "at least 0 and below 1")
    decays = [train.ema_decay, *train.further_ema_decays]
    expect(
        len(set(decays)) == len(decays) and all(0 <= decay < 1 for decay in decays),
        "train.further_ema_decays",
        train.further_ema_decays,
        f"numbers at least 0 and below 1, each once, and not train.ema_decay = {train.ema_decay}",
    )
    kept = [None, *decays]
    expect(recipe.evaluate.ema_decay in kept, "evaluate.ema_decay", recipe.evaluate.ema_decay, f"one of {kept}")
    expect(recipe.optimizer.lr > 0, "optimizer.lr", recipe.optimizer.lr, "a positive number")
    clip = recipe.optimizer.clip
    expect(clip is None or clip > 0, "optimizer.clip", clip, "a positive number or null")
    data = recipe.data
    kind, _, place = data.source.partition(":")
    expect(
        kind in PLAIN_SOURCES if not place else kind in PLACED_SOURCES,
        "data.source",
        data.source,
        " or ".join([*PLAIN_SOURCES, *(f"{name}:..." for name in PLACED_SOURCES)])
        + _closest(kind, [*PLAIN_SOURCES, *PLACED_SOURCES]),
    )
    expect(0 < data.subset_fraction <= 1, "data.subset_fraction", data.subset_fraction, "a share above 0, at most 1")
    for name in ("resolution", "crop"):
        value = getattr(data, name)
        expect(value is None or value >= 1, f"data.{name}", value, "a number of pixels or null")
    expect(data.workers >= 0, "data.workers", data.workers, "at least 0")
    held = kind in ("digits", "photo-crops", "idx")
    expect(not (held and data.streaming), "data.streaming", True, f"false for data.source = {data.source}")
    expect(data.shuffle_buffer >= 1, "data.shuffle_buffer", data.shuffle_buffer, "at least 1")
    expect(data.rows is None or data.rows >= 1, "data.rows", data.rows, "at least 1 or null")
    steps = recipe.evaluate.steps
    expect(bool(steps) and min(steps) >= 1, "evaluate.steps", steps, "positive numbers of sampling steps")
    levels = getattr(recipe.objective, "diffusion_steps", None)
    expect(
        levels is None or max(steps) <= levels, "evaluate.steps", steps, f"at most objective.diffusion_steps = {levels}"
    )
    captioned = isinstance(recipe.objective, StableDiffusion)
    fitting = [name for name, kind in MODELS.items() if (kind is ConditionUnet) == captioned]
    expect(model.name in fitting, "model.name", model.name, f"{' or '.join(fitting)} for {recipe.objective.name}")
    if train.gradient_checkpointing:
        able = isinstance(model, Unet | Adm | ConditionUnet)
        expect(able, "train.gradient_checkpointing", True, f"false for model.name = {model.name}")
    if isinstance(recipe.objective, StableDiffusion):
        dropout, scale = recipe.objective.caption_dropout, recipe.objective.guidance_scale
        expect(0 <= dropout <= 1, "objective.caption_dropout", dropout, "a share between 0 and 1")
        expect(scale >= 1, "objective.guidance_scale", scale, "at least 1")
        fits = recipe.objective.sampler == "ddim" or recipe.objective.prediction != "sample"
        expect(fits, "objective.sampler", "pndm", "ddim for objective.prediction = sample")
    if isinstance(recipe.objective, Consistency):
        s0, s1 = recipe.objective.s0, recipe.objective.s1
        expect(s0 >= 1, "objective.s0", s0, "at least 1")
        expect(s1 >= s0, "objective.s1", s1, f"at least objective.s0 = {s0}")
        expect(recipe.objective.total_steps >= 1, "objective.total_steps", recipe.objective.total_steps, "at least 1")
        most = max(recipe.evaluate.steps)
        expect(most <= s1 + 1, "evaluate.steps", recipe.evaluate.steps, f"at most objective.s1 + 1 = {s1 + 1}")
    if isinstance(model, Ncsnpp | Adm) and model.classes is not None:
        expect(model.classes >= 2, "model.classes", model.classes, "at least 2, or null")
        tells = isinstance(recipe.objective, Consistency)
        expect(tells, "model.classes", model.classes, f"null for {recipe.objective.name}")
    if isinstance(model, Unet | Adm | Ncsnpp):
        levels = model.multipliers if isinstance(model, Ncsnpp) else model.channels
        expect(
            len(model.attention) == len(levels),
            "model.attention",
            model.attention,
            f"{len(levels)} values, one a level",
        )


def describe(section: str, kind: type) -> str:
    """Return the help of a section: every field with its meaning, type and default."""
    parsed = docstring_parser.parse(kind.__doc__ or "")
    texts = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in parsed.params}
    lines = [f"{section}: {parsed.short_description}"]
    for entry in dataclasses.fields(kind):
        made = entry.default_factory() if callable(entry.default_factory) else entry.default
        default = (
            yaml.safe_dump(made, default_flow_style=True).split("\n")[0] if not isinstance(made, tuple) else list(made)
        )
        text = f"{texts[entry.name]} (type: {entry.type}, default: {default})"
        lines += [
            f"  --{section}.{entry.name}",
            *textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 8),
        ]
    return "\n".join(lines)


def _closest(word: str, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _suggestion(message: str, parser: ArgumentParser) -> str:
    """Offer the field that a mistyped one resembles."""
    unknown = re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'", message)
    if unknown:
        word = f"{unknown['group']}.{unknown['option']}"
    else:
        unknown = re.search(r"(?:Option '|arguments: --)(?P<option>[\w.]+)", message)
        if not unknown:
            return ""
        word = unknown["option"]
    known = [action.dest for action in parser._actions if action.dest not in ("help", "recipe")]
    return _closest(word, known)


def load_or_exit(argv: list[str], prog: str) -> Recipe:
    """Load a recipe for a program: a mistake ends it with one line and exit status 2."""
    try:
        return load(argv, prog=prog)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
