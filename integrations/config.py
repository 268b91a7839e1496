"""Recipes: YAML read into dataclasses by jsonargparse, every field overridable on the command line.

Nothing heavier than PyYAML and jsonargparse is imported here, so a mistake in a recipe is reported before PyTorch
loads. Every section refuses values that cannot run; `Recipe` refuses sections that do not fit together.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

RECIPES = Path(__file__).parent / "recipes"
LAUNCH = Path(__file__).parent / "launch"

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the text below each field


class RecipeError(ValueError):
    """A recipe that cannot be run: names the field, its value and what was expected."""


def expect(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse the value of a field.

    Raises
    ------
    RecipeError
        Unless ``holds``.
    """
    if not holds:
        msg = f"{name}: got {value!r}, expected {expected}"
        raise RecipeError(msg)


def _at_least(least: int, section: str, values: object, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        expect(value >= least, f"{section}.{name}", value, f"at least {least}")


def closest(word: str, known: Iterable[str]) -> str:
    """Return a question with the known word that is most like ``word``, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


# Objectives


@dataclass
class Ddim:
    """Denoising diffusion on pixels, sampled deterministically (arXiv 2006.11239, 2010.02502)."""

    name: Literal["ddim"] = "ddim"
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network regresses: the noise, the velocity or the clean image."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule: linear betas, or the squared cosine of arXiv 2102.09672."""
    diffusion_steps: int = 1000
    """Number of noise levels trained."""
    beta_start: float = 1e-4
    """First beta of the linear schedule."""
    beta_end: float = 0.02
    """Last beta of the linear schedule."""
    min_snr_gamma: float | None = None
    """Clamp of the min-SNR loss weight (arXiv 2303.09556); null leaves the loss unweighted."""
    spacing: Literal["leading", "trailing"] = "leading"
    """Where the sampling steps lie. ``trailing`` starts at the noisiest level, which one or two steps need; ``leading``
    is the evenly spaced 0, k, 2k, ... of the DDIM paper."""
    clip_sample: bool = True
    """Clip the predicted clean image to [-1, 1] at every sampling step."""
    eta: float = 0.0
    """Noise put back while sampling: 0 is DDIM, 1 is ancestral sampling."""

    def __post_init__(self) -> None:
        _at_least(1, "objective", self, "diffusion_steps")


@dataclass
class FlowMatching:
    """Rectified flow: a straight path from data to noise, the velocity as target (arXiv 2209.03003)."""

    name: Literal["flow_matching"] = "flow_matching"
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times in [0, 1]: uniform, or the logit-normal of arXiv 2403.03206."""
    logit_mean: float = 0.0
    """Mean of the logit-normal; positive values favour noisy times."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal."""
    solver: Literal["euler", "dopri5"] = "euler"
    """How the flow is integrated when sampling: fixed Euler steps, or adaptive ``dopri5`` (torchdiffeq), which chooses
    its own number of steps."""
    tolerance: float = 1e-5
    """Relative and absolute tolerance of ``dopri5``."""


@dataclass
class Consistency:
    """Consistency training: no teacher, samples in one step (arXiv 2303.01469, 2310.14189)."""

    name: Literal["consistency"] = "consistency"
    variant: Literal["ct", "ict"] = "ct"
    """``ct`` as first published; ``ict`` the improved one: lognormal noise levels, weights 1 / (step between levels),
    doubling discretisation, no average for the target."""
    total_steps: int = 800_000
    """K of the schedules N(k) and mu(k), in optimizer steps. It stays when train.steps is less."""
    s0: int = 2
    """Intervals between noise levels at the start."""
    s1: int = 150
    """Intervals between noise levels at the end."""
    mu0: float = 0.9
    """Decay of the target network's average at the start (``ct``)."""
    loss: Literal["lpips", "l2", "pseudo_huber"] = "l2"
    """Distance between the two predictions: LPIPS at 224 pixels (needs the weights of VGG-16), mean squared error, or
    the pseudo-Huber metric of ``ict`` with c = 0.00054 sqrt(d)."""
    lpips_pooling: Literal["max", "average"] = "max"
    """Pooling of the VGG-16 in LPIPS: its own, or the average that some releases of consistency training put in."""
    sigma_min: float = 0.002
    """Standard deviation of the noise at the cleanest level."""
    sigma_max: float = 80.0
    """Standard deviation of the noise at the noisiest level."""
    sigma_data: float = 0.5
    """Standard deviation of the data, for the skip scaling."""
    rho: float = 7.0
    """Curvature of the grid of levels."""
    level_mean: float = -1.1
    """Mean of ln(sigma) over training (``ict``)."""
    level_std: float = 2.0
    """Standard deviation of ln(sigma) over training (``ict``)."""

    def __post_init__(self) -> None:
        _at_least(1, "objective", self, "s0", "total_steps")
        expect(self.s1 >= self.s0, "objective.s1", self.s1, f"at least objective.s0 = {self.s0}")


@dataclass
class StableDiffusion:
    """Diffusion in the latents of a frozen autoencoder, told a caption (arXiv 2112.10752)."""

    name: Literal["stable_diffusion"] = "stable_diffusion"
    pretrained: str = "CompVis/stable-diffusion-v1-4"
    """Folder or hub name of a Stable Diffusion pipeline whose autoencoder, text encoder and tokenizer are used, frozen.
    ``tiny-random`` makes small random ones, for trying things out."""
    revision: str | None = None
    """Commit, tag or branch of a pipeline of the hub; null is its newest, which may change."""
    frozen_precision: Literal["fp32", "fp16"] = "fp32"
    """Number format of the frozen networks."""
    caption: Literal["empty", "class"] = "empty"
    """What the network is told: nothing, or the name of the image's class."""
    caption_dropout: float = 0.0
    """Share of the captions replaced by the empty one, for guidance when sampling."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network regresses: the noise, the velocity or the clean latents."""
    min_snr_gamma: float | None = None
    """Clamp of the min-SNR loss weight (arXiv 2303.09556); null leaves the loss unweighted."""
    noise_offset: float = 0.0
    """Standard deviation of a shift added to each channel of the noise, after the coupling."""
    sampler: Literal["ddim", "pndm"] = "ddim"
    """Sampling scheme."""
    guidance_scale: float = 1.0
    """Classifier-free guidance when sampling; 1 is none."""
    autoencoder_parameters: int | None = None
    """How many parameters the autoencoder has, for readers; ``--plan`` compares it with the count."""

    def __post_init__(self) -> None:
        dropout, scale = self.caption_dropout, self.guidance_scale
        expect(0 <= dropout <= 1, "objective.caption_dropout", dropout, "a share between 0 and 1")
        expect(scale >= 1, "objective.guidance_scale", scale, "at least 1")
        fits = self.sampler == "ddim" or self.prediction != "sample"
        expect(fits, "objective.sampler", self.sampler, "ddim for objective.prediction = sample")


# Networks


@dataclass
class Network:
    """A network."""

    name: str = ""
    parameters: int | None = None
    """How many parameters the network has, for readers; ``--plan`` compares it with the count."""


@dataclass
class Mlp(Network):
    """A residual MLP on the flattened pixels: for images of a few hundred values."""

    name: Literal["mlp"] = "mlp"
    width: int = 256
    """Channels of the residual stream."""
    depth: int = 3
    """Number of blocks."""


@dataclass
class ConvNext(Network):
    """A small ConvNeXt-like network on patches: trains on CPU cores."""

    name: Literal["convnext"] = "convnext"
    patch_size: int = 4
    """Side of a patch in pixels; the blocks see one token per patch."""
    width: int = 128
    """Channels of a token."""
    depth: int = 4
    """Number of blocks."""
    expansion: int = 3
    """Hidden channels of a block's MLP, in multiples of the width."""
    kernel_size: int = 5
    """Side of the depthwise convolution, in patches."""


@dataclass
class Levels(Network):
    """A U-Net, of several levels of resolution."""

    attention: list[bool] = field(default_factory=list)
    """Whether each level has self-attention, from full resolution down."""
    layers_per_block: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    dropout: float = 0.0
    """Dropout probability."""
    norm_groups: int = 32
    """Groups of the group normalisations; must divide every number of channels."""

    def __post_init__(self) -> None:
        widths = self.widths()
        levels = f"{len(widths)} values, one a level"
        expect(len(self.attention) == len(widths), "model.attention", self.attention, levels)
        divides = all(width % self.norm_groups == 0 for width in widths)
        expect(divides, "model.norm_groups", self.norm_groups, f"a divisor of all numbers of channels, {widths}")
        classes = getattr(self, "classes", None)
        expect(classes is None or classes >= 2, "model.classes", classes, "at least 2, or null")

    def widths(self) -> list[int]:
        """Return the channels of each level."""
        return self.channels


@dataclass
class Unet(Levels):
    """The U-Net of DDPM (diffusers' UNet2DModel)."""

    name: Literal["unet"] = "unet"
    channels: list[int] = field(default_factory=lambda: [128, 256, 256, 256])
    """Channels of each resolution level, from full resolution down."""
    attention: list[bool] = field(default_factory=lambda: [False, True, False, False])
    dropout: float = 0.1
    head_channels: int | None = None
    """Channels per attention head; null is a single head."""


@dataclass
class Ncsnpp(Levels):
    """NCSN++ with residual input pyramid, as of consistency models on CIFAR-10 (arXiv 2011.13456)."""

    name: Literal["ncsnpp"] = "ncsnpp"
    channels: int = 128
    """Channels at full resolution before the multipliers."""
    multipliers: list[int] = field(default_factory=lambda: [2, 2, 2])
    """Channels of each resolution level, in multiples of ``channels``."""
    attention: list[bool] = field(default_factory=lambda: [False, True, False])
    layers_per_block: int = 4
    fourier_scale: float = 16.0
    """Standard deviation of the frequencies of the time embedding."""
    classes: int | None = None
    """Classes that the network can be told, for ``consistency``; null is an unconditional network."""

    def widths(self) -> list[int]:
        """Return the channels of each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]


@dataclass
class Adm(Levels):
    """The U-Net of ADM and of consistency models at 64x64 (arXiv 2105.05233), as diffusers' UNet2DModel."""

    name: Literal["adm"] = "adm"
    channels: list[int] = field(default_factory=lambda: [192, 384, 576, 768])
    """Channels of each resolution level, from full resolution down."""
    attention: list[bool] = field(default_factory=lambda: [False, True, True, True])
    layers_per_block: int = 3
    head_channels: int = 64
    """Channels per attention head."""
    classes: int | None = None
    """Classes that the network can be told, for ``consistency``; null is an unconditional network."""


@dataclass
class ConditionUnet(Network):
    """The U-Net of Stable Diffusion (diffusers' UNet2DConditionModel)."""

    name: Literal["condition_unet"] = "condition_unet"
    pretrained: str | None = None
    """Folder or hub name of a pipeline to start from; its sizes then replace those given here. Null starts from random
    weights."""
    revision: str | None = None
    """Commit, tag or branch of a pipeline of the hub; null is its newest, which may change."""
    channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    """Channels of each resolution level; all levels but the last attend to the caption."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    head_channels: int = 8
    """diffusers' attention_head_dim."""
    norm_groups: int = 32
    """Groups of the group normalisations; must divide every number of channels."""


# The other sections

PLAIN_SOURCES = ("digits", "photo-crops", "cifar10", "celeba", "tiny-imagenet", "imagenet")
PLACED_SOURCES = ("idx", "folder", "hub")


@dataclass
class Data:
    """Where the images come from."""

    source: str = "digits"
    """``digits``: the 8x8 handwritten digits of scikit-learn. ``photo-crops``: 32x32 crops of the photographs that
    scikit-learn and scikit-image ship. ``idx:FOLDER``: the MNIST family's train-images-idx3-ubyte and
    train-labels-idx1-ubyte, gzipped or not. ``folder:FOLDER``: image files, one folder per class. ``hub:NAME``: a data
    set of the Hugging Face hub, or a local copy of one. ``cifar10``, ``celeba``, ``tiny-imagenet`` and ``imagenet`` are
    hub data sets by short names."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; null is its newest, which may change."""
    streaming: bool = False
    """Read a ``folder`` or hub data set from beginning to end, without storing it first. Every process reads all of it
    and decodes its own rows; resuming passes over the rows that the epoch has had."""
    shuffle_buffer: int = 5000
    """Rows of a stream among which the next one is drawn; held in memory as encoded images."""
    rows: int | None = None
    """Number of rows of a stream; null takes what the data set says."""
    resolution: int | None = None
    """Side of the square images in pixels: the largest centred square (or ``crop``) is resized to it. Null keeps the
    images of ``digits``, ``photo-crops``, ``idx`` and square data sets as they are."""
    crop: int | None = None
    """Side of the centred square to keep before resizing, in pixels; null keeps the largest."""
    mode: Literal["RGB", "L"] = "RGB"
    """Colour or grey images, for ``folder`` and hub data sets."""
    subset_fraction: float = 1.0
    """Share of the rows to use, drawn with ``subset_seed``."""
    subset_seed: int = 0
    """Seed of that draw."""
    flip: bool = False
    """Mirror half of the images left to right, at random."""
    on_unreadable: Literal["replace", "raise"] = "replace"
    """What a damaged image file does: its row is replaced by the next readable one and the file is named in a warning,
    or the run ends."""
    workers: int = 0
    """Processes that load images, threads that decode a stream; 0 loads in the training process itself."""

    def __post_init__(self) -> None:
        kind, _, place = self.source.partition(":")
        known = [*PLAIN_SOURCES, *(f"{name}:..." for name in PLACED_SOURCES)]
        expected = " or ".join(known) + closest(kind, [*PLAIN_SOURCES, *PLACED_SOURCES])
        expect(kind in (PLACED_SOURCES if place else PLAIN_SOURCES), "data.source", self.source, expected)
        held = kind in ("digits", "photo-crops", "idx")
        pinned = self.revision is not None
        expect(not (pinned and (held or kind == "folder")), "data.revision", self.revision, f"null for {self.source}")
        expect(not (held and self.streaming), "data.streaming", True, f"false for data.source = {self.source}")
        share = self.subset_fraction
        expect(0 < share <= 1, "data.subset_fraction", share, "a share above 0, at most 1")
        expect(share == 1 or not self.streaming, "data.streaming", True, "false for a subset of the rows")
        for name in ("resolution", "crop", "rows"):
            value = getattr(self, name)
            expect(value is None or value >= 1, f"data.{name}", value, "at least 1, or null")
        _at_least(0, "data", self, "workers")
        _at_least(1, "data", self, "shuffle_buffer")


@dataclass
class Optimizer:
    """The optimizer and its schedule."""

    name: Literal["adam", "adamw", "radam"] = "adam"
    """Update rule."""
    lr: float = 2e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moment estimates."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.0
    """Decoupled for ``adamw``, added to the gradient otherwise."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What happens after warm-up, until ``train.steps``."""
    clip: float | None = 1.0
    """Largest gradient norm; null does not clip."""

    def __post_init__(self) -> None:
        expect(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        expect(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "a positive number or null")
        _at_least(0, "optimizer", self, "warmup_steps")


DATASET_METHODS = {
    "semidiscrete": {"potentials": "the path of a plan, or null", "tolerance": "a number above 0"},
    "persistent": {"seeds": "a whole number of at least 1"},
}
"""Methods that look beyond the batch, and what their options should be."""


@dataclass
class CouplingSection:
    """Which noise each data row gets (see ``couplings methods``)."""

    method: str = "auction"
    """Name of the pairing method; ``independent`` is the baseline. ``semidiscrete``: noise picks its row in the whole
    dataset, by the plan of ``coupling.options.potentials`` (what ``couplings fit`` writes) or one that is fitted when
    the run begins, to ``coupling.options.tolerance``. ``persistent``: noise of ``coupling.options.seeds`` seeds stays
    with each row, and is coupled again in every batch."""
    metric: str = "sqeuclidean"
    """Distance that the pairing minimises."""
    quantize: str | None = None
    """Number format the operands of the cost are rounded to; null does not round."""
    scope: Literal["local", "global"] = "local"
    """``local`` couples each device's batch; ``global`` couples the whole global batch over all processes and
    accumulated batches."""
    condition: Literal["class"] | None = None
    """``class`` couples within each class only, so that the noise given the class stays Gaussian."""
    window: int = 1
    """Optimizer steps whose blocks are coupled together, ahead of training: the optimal transport batch is that many
    times as large."""
    options: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Options of the method, as ``--coupling.options.reg 0.2``."""

    def __post_init__(self) -> None:
        _at_least(1, "coupling", self, "window")
        if self.method not in DATASET_METHODS:
            return
        known = DATASET_METHODS[self.method]
        for name, value in self.options.items():
            expect(
                isinstance(name, str) and name in known,
                f"coupling.options.{name}",
                value,
                f"only {' and '.join(known)} for {self.method}",
            )
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = {
                "potentials": value is None or isinstance(value, str),
                "tolerance": number and value > 0,
                "seeds": number and value >= 1 and value == int(value),
            }
            expect(fits[name], f"coupling.options.{name}", value, known[name])
        expect(self.scope == "local", "coupling.scope", self.scope, f"local for coupling.method = {self.method}")
        expect(self.window == 1, "coupling.window", self.window, f"1 for coupling.method = {self.method}")
        if self.method == "semidiscrete":  # its plans are for this distance
            expect(self.metric == "sqeuclidean", "coupling.metric", self.metric, "sqeuclidean for semidiscrete")
            expect(self.quantize is None, "coupling.quantize", self.quantize, "null for semidiscrete")


@dataclass
class Ddp:
    """How gradients are averaged over processes: options of ``torch.nn.parallel.DistributedDataParallel``."""

    bucket_cap_mb: int = 25
    """Size of the pieces in which gradients travel, in MiB."""
    gradient_as_bucket_view: bool = True
    """Keep gradients in these pieces, without a copy of their own."""
    broadcast_buffers: bool = True
    """Send the first process's buffers to all in every forward pass."""
    find_unused_parameters: bool = False
    """Look in every step for weights that the loss does not depend on."""
    static_graph: bool = False
    """Promise that every step uses the same weights, in the same order."""

    def __post_init__(self) -> None:
        _at_least(1, "train.ddp", self, "bucket_cap_mb")


@dataclass
class Train:
    """The loop."""

    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 128
    """Rows per optimizer step, over all processes."""
    batch_size_per_device: int = 128
    """Rows coupled together and passed through the network at once. Gradient accumulation is derived:
    global_batch_size / (batch_size_per_device * processes)."""
    seed: int = 0
    """Decides initial weights, data order, noise, times and augmentation."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Arithmetic of the network."""
    tf32: bool | None = None
    """Round the operands of float32 products to TF32 on a GPU that has it: several times faster. Null leaves PyTorch's
    defaults: rounded in convolutions, not in matrix products."""
    channels_last: bool = False
    """Keep images in memory with the channels last: faster convolutions on a GPU in half precision or TF32."""
    cudnn_benchmark: bool = False
    """Try the convolution algorithms of a GPU at first use, and take the fastest."""
    deterministic: bool = False
    """Give the same bits in every run on the same GPU, also when resumed; slower. CUBLAS_WORKSPACE_CONFIG is set to
    ``:4096:8`` unless CUDA has started already."""
    ddp: Ddp = field(default_factory=Ddp)
    """Training in several processes."""
    ema_decay: float = 0.9999
    """Decay per step of the averaged weights that are sampled from."""
    further_ema_decays: list[float] = field(default_factory=list)
    """Decays of further averages, kept beside the first one; ``evaluate.ema_decay`` samples from them."""
    ema_ramp: bool = True
    """Start the decay small: min(ema_decay, (1 + n) / (10 + n)) at step n."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    compile: bool = False
    """Compile the network with torch.compile."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    sample_every: int = 0
    """Steps between sample grids; 0 draws one at the end only."""
    tracker: Literal["tensorboard", "wandb"] | None = "tensorboard"
    """Experiment tracker of accelerate; null for none."""

    def __post_init__(self) -> None:
        counts = ("steps", "global_batch_size", "batch_size_per_device", "log_every", "checkpoint_every", "keep_last")
        _at_least(1, "train", self, *counts)
        _at_least(0, "train", self, "seed", "sample_every")
        rows, device = self.global_batch_size, self.batch_size_per_device
        multiple = f"a multiple of train.batch_size_per_device = {device} ({rows} / {device} = {rows / device:.2f})"
        expect(rows % device == 0, "train.global_batch_size", rows, multiple)
        repeats = not (self.deterministic and self.cudnn_benchmark)
        expect(repeats, "train.cudnn_benchmark", True, "false with train.deterministic: the fastest algorithm varies")
        expect(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "at least 0 and below 1")
        decays = [self.ema_decay, *self.further_ema_decays]
        distinct = len(set(decays)) == len(decays) and all(0 <= decay < 1 for decay in decays)
        expected = f"numbers at least 0 and below 1, each once, and not train.ema_decay = {self.ema_decay}"
        expect(distinct, "train.further_ema_decays", self.further_ema_decays, expected)


@dataclass
class Evaluate:
    """What is drawn and measured."""

    steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    """Numbers of sampling steps, each evaluated."""
    samples: int = 2000
    """Images drawn for each."""
    batch_size: int = 500
    """Images drawn at once."""
    features: str = "classifier"
    """``classifier`` trains a small network on the recipe's own labelled data and compares its features; the path of a
    ``classifier.safetensors`` takes one that was trained before; ``inception`` is the network of the published FID
    (torch-fidelity)."""
    seed: int = 0
    """Seed of the sampling noise."""
    ema_decay: float | None = None
    """Which of the averaged weights to sample from; null is ``train.ema_decay``."""

    def __post_init__(self) -> None:
        positive = bool(self.steps) and min(self.steps) >= 1
        expect(positive, "evaluate.steps", self.steps, "positive numbers of sampling steps")
        _at_least(1, "evaluate", self, "samples", "batch_size")


@dataclass
class Launch:
    """The machines a recipe is meant for; decides what ``--plan`` tells, and nothing else."""

    config: str | None = None
    """Path of an accelerate configuration, or the name of one in ``integrations/launch``; null is one process without a
    launcher."""


OBJECTIVES: dict[str, type] = {kind.name: kind for kind in (Ddim, Consistency, StableDiffusion, FlowMatching)}
MODELS: dict[str, type] = {kind.name: kind for kind in (Mlp, ConvNext, Unet, Ncsnpp, Adm, ConditionUnet)}
SECTIONS = ("objective", "data", "model", "optimizer", "coupling", "train", "evaluate", "launch")


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

    def __post_init__(self) -> None:
        objective, model, steps = self.objective, self.model, self.evaluate.steps
        captioned = isinstance(objective, StableDiffusion)
        fitting = [name for name, kind in MODELS.items() if (kind is ConditionUnet) == captioned]
        expect(model.name in fitting, "model.name", model.name, f"{' or '.join(fitting)} for {objective.name}")
        if isinstance(objective, Consistency):
            levels, limit = objective.s1 + 1, f"objective.s1 + 1 = {objective.s1 + 1}"
            expect(max(steps) <= levels, "evaluate.steps", steps, f"at most {limit}")
        elif isinstance(objective, Ddim):
            levels = objective.diffusion_steps
            expect(max(steps) <= levels, "evaluate.steps", steps, f"at most objective.diffusion_steps = {levels}")
        classes = getattr(model, "classes", None)
        told = classes is None or isinstance(objective, Consistency)
        expect(told, "model.classes", classes, f"null for {objective.name}")
        saves = not self.train.gradient_checkpointing or isinstance(model, Unet | Adm | ConditionUnet)
        expect(saves, "train.gradient_checkpointing", True, f"false for model.name = {model.name}")
        method = self.coupling.method
        numbered = method not in DATASET_METHODS or not self.data.streaming
        expect(numbered, "data.streaming", True, f"false for coupling.method = {method}, which needs rows by number")
        kept = [None, self.train.ema_decay, *self.train.further_ema_decays]
        expect(self.evaluate.ema_decay in kept, "evaluate.ema_decay", self.evaluate.ema_decay, f"one of {kept}")

    def sections(self) -> dict[str, Any]:
        """Return the recipe as plain nested values, as ``recipe.yaml`` holds them."""
        values = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        values["optimizer"]["betas"] = list(self.optimizer.betas)
        return values | {"output": str(self.output)}

    def text(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.sections(), sort_keys=False)


# Reading


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
    path = _find(argv[0], RECIPES, "recipe")
    kinds = _kinds(path)
    parser = _parser(kinds, f"{prog} {path}")
    try:
        parsed = parser.parse_args(["--recipe", str(path), *_overlay_first(argv[1:], kinds)])
        values = parser.instantiate(parsed)
        sections = {section: values[section] for section in SECTIONS}
        output = Path(values.output or f"runs/{path.stem}")
        return Recipe(path.stem, **sections, output=output, resume=values.resume == "auto", plan=values.plan)
    except (ArgumentError, RecipeError) as error:
        message = " ".join(str(error).split())
        msg = f"{path}: {message}{_suggestion(message, parser)}"
        raise RecipeError(msg) from None


def load_or_exit(argv: list[str], prog: str) -> Recipe:
    """Load a recipe for a program: a mistake ends it with one line and exit status 2."""
    try:
        return load(argv, prog=prog)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _find(name: str, folder: Path, what: str) -> Path:
    """Find a file by its path, or by the bare name of a bundled one."""
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    msg = f"{name}: no such {what} file, and none of the bundled ones: {', '.join(known)}{closest(name, known)}"
    raise RecipeError(msg)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, or no such date
        msg = f"{path}: not valid YAML: {' '.join(str(error).split())}"
        raise RecipeError(msg) from None
    if not isinstance(raw, dict):
        msg = f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(raw).__name__}"
        raise RecipeError(msg)
    return raw


def _kinds(path: Path) -> dict[str, type]:
    """Return the classes of a recipe's ``objective`` and ``model``: the fields depend on them."""
    raw, kinds = _read(path), {}
    for section, known in (("objective", OBJECTIVES), ("model", MODELS)):
        value = raw.get(section)
        name = value.get("name") if isinstance(value, dict) else value
        expected = f"one of {', '.join(known)}{closest(str(name), known)}"
        expect(isinstance(name, str) and name in known, f"{path}: {section}.name", name, expected)
        kinds[section] = known[name]
    return kinds


def _parser(kinds: dict[str, type], prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description="Every field of a recipe.")
    parser.add_argument("--recipe", action="config", help="a further file of fields, read after the recipe")
    types = {"data": Data, "optimizer": Optimizer, "coupling": CouplingSection, "train": Train, "evaluate": Evaluate}
    types = kinds | types | {"launch": Launch}
    for section in SECTIONS:
        parser.add_argument(f"--{section}", type=types[section], default=types[section]())
    parser.add_argument("--output", type=str | None, default=None, help="the run's folder; null is runs/<recipe name>")
    resume = "auto: continue from the newest intact checkpoint in the output folder, or start if there is none"
    parser.add_argument("--resume", type=Literal["auto"] | None, default=None, help=resume)
    overlay = "a file of fields, or the name of a bundled one: read after the recipe, before all other options"
    parser.add_argument("--overlay", type=str | None, default=None, help=overlay)
    parser.add_argument("--plan", action="store_true", help="say what a run would be and need, and do not train")
    return parser


def _overlay_first(argv: list[str], kinds: dict[str, type]) -> list[str]:
    """Replace ``--overlay NAME`` by its file's content, in front.

    Fields of ``objective`` and ``model`` may also stand under the name of the kind they are for, so that one file
    fits every recipe.
    """
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    option.add_argument("--overlay")
    named, rest = option.parse_known_args(argv)
    if named.overlay is None:
        return rest
    overlay = _read(_find(named.overlay, RECIPES / "overlays", "overlay"))
    for section, known in (("objective", OBJECTIVES), ("model", MODELS)):
        values = overlay.get(section)
        if isinstance(values, dict):
            common = {name: value for name, value in values.items() if name not in known}
            overlay[section] = common | values.get(kinds[section].name, {})
    return ["--recipe", yaml.safe_dump(overlay), *rest]


def _suggestion(message: str, parser: ArgumentParser) -> str:
    """Offer the field that a mistyped one resembles."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    option = re.search(r"(?:Option '|arguments: --)([\w.]+)", message)
    word = ".".join(group.groups()) if group else option[1] if option else ""
    return closest(word, (action.dest for action in parser._actions))
