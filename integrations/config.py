"""Recipes: YAML read into dataclasses by jsonargparse, every field overridable on the command line.

Nothing heavier than PyYAML and jsonargparse is imported here, so a mistake in a recipe is reported before PyTorch
loads. Every section refuses values that cannot run; `Recipe` refuses sections that do not fit together, and `places`
what is not on this machine. Classes of the user's own are only named here: see `own`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

RECIPES = Path(__file__).parent / "recipes"
LAUNCH = Path(__file__).parent / "launch"

# A section may have fields named class_path and init_args.
set_parsing_settings(subclasses_enabled=["is_pure_dataclass"])


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


# Classes of the user's own

Arguments = dict[str, bool | int | float | str | list | dict | None]


@dataclass
class Own:
    """A class of your own, that is given ``init_args`` beside what every class of its section is given."""

    class_path: str = ""
    """Where the class is imported from, as ``package.module.Class``; the current directory is looked in too."""
    init_args: Arguments = field(default_factory=dict)
    """Arguments of its constructor, as ``--model.init_args.width 64``."""

    @property
    def name(self) -> str:
        """What the section is called in messages."""
        return self.class_path


def _check_importable(name: str, path: str, form: str) -> None:
    top, *rest = re.split("[.:]", path)
    expect(all([top, *rest]) and bool(rest), name, path, form)
    found = top in sys.modules or find_spec(top) is not None
    expect(found, name, path, f"{form}: there is no module {top!r} here or among the installed ones")


# Objectives


@dataclass
class ClassConditional:
    """What an objective does with a network that is told classes: one with ``model.classes``."""

    name: str = ""
    class_dropout: float = 0.0
    """Share of the rows whose class is not told to the network, for guidance when sampling: 0.1 is usual."""
    guidance_scale: float = 1.0
    """Classifier-free guidance towards the class when sampling (arXiv 2207.12598); 1 is none."""

    def __post_init__(self) -> None:
        dropout, scale = self.class_dropout, self.guidance_scale
        expect(0 <= dropout < 1, "objective.class_dropout", dropout, "a share of at least 0, below 1")
        expect(scale >= 1, "objective.guidance_scale", scale, "at least 1")
        learned = "1 with objective.class_dropout = 0: away from no class, which the network has not learned"
        expect(scale == 1 or dropout > 0, "objective.guidance_scale", scale, learned)


@dataclass
class Ddim(ClassConditional):
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
        super().__post_init__()
        _at_least(1, "objective", self, "diffusion_steps")


@dataclass
class FlowMatching(ClassConditional):
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
class Consistency(ClassConditional):
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
    multistep_noise: Literal["fresh", "first"] = "fresh"
    """What is added between sampling steps: fresh noise, as published and as the exported pipeline does, or again the
    noise that the sample began with, which has lost less wherever it was measured (benchmarks/results/pools.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    caption: str = "empty"
    """What the network is told: nothing (``empty``), the name of the image's ``class``, or the text in a column of the
    data, as ``column:text``. Of several texts of an image one is drawn in every step; none is the empty caption."""
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
        known = self.caption in ("empty", "class") or re.fullmatch("column:.+", self.caption)
        expect(bool(known), "objective.caption", self.caption, "empty, class or column:NAME")
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
    classes: int | None = None
    """Classes that the network can be told; null is an unconditional network."""

    def __post_init__(self) -> None:
        expect(self.classes is None or self.classes >= 2, "model.classes", self.classes, "at least 2, or null")

    def check_side(self, side: int) -> None:
        """Refuse images of a side that the network cannot take."""


@dataclass
class OwnNetwork(Own):
    """A network of your own: any ``torch.nn.Module`` that is called as ``network(x, timesteps)``."""

    classes: int | None = None
    """Classes that the network is told, as ``class_labels=``; null is an unconditional network."""
    parameters: int | None = None
    """How many parameters the network has, for readers; ``--plan`` compares it with the count."""

    def check_side(self, side: int) -> None:
        """Leave it to the network."""


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

    def __post_init__(self) -> None:
        _at_least(1, "model", self, "patch_size")
        expect(self.kernel_size % 2 == 1, "model.kernel_size", self.kernel_size, "an odd number")

    def check_side(self, side: int) -> None:
        """Refuse images that patches do not fill."""
        divisor = f"a divisor of the images' {side} pixels"
        expect(side % self.patch_size == 0, "model.patch_size", self.patch_size, divisor)


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
        super().__post_init__()
        widths = self.widths()
        levels = f"{len(widths)} values, one a level"
        expect(len(self.attention) == len(widths), "model.attention", self.attention, levels)
        _check_groups(self.norm_groups, widths)
        head = getattr(self, "head_channels", None)
        # The last level is attended to between the way down and the way up.
        least = min(width for width, attends in zip(widths, [*self.attention[:-1], True], strict=True) if attends)
        fewer = f"at most {least}, the channels of a level with attention"
        expect(head is None or 1 <= head <= least, "model.head_channels", head, fewer)

    def widths(self) -> list[int]:
        """Return the channels of each level."""
        return self.channels

    def check_side(self, side: int) -> None:
        """Refuse images that cannot be halved once a level."""
        count = len(self.widths())
        factor = 2 ** (count - 1)
        halved = f"a multiple of {factor}: the network halves the images {count - 1} time{'s' * (count > 2)}"
        expect(side % factor == 0, "data.resolution", side, halved)


def _check_groups(groups: int, widths: list[int]) -> None:
    divides = groups >= 1 and all(width > 0 and width % groups == 0 for width in widths)
    expect(divides, "model.norm_groups", groups, f"a divisor of all numbers of channels, {widths}")


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

    def __post_init__(self) -> None:
        _check_groups(self.norm_groups, [self.channels, *self.widths()])
        super().__post_init__()

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

    def __post_init__(self) -> None:
        _check_groups(self.norm_groups, self.channels)
        least, heads = min(self.channels), self.head_channels
        expect(1 <= heads <= least, "model.head_channels", heads, f"at most {least}, the fewest channels")


# The other sections

HUB = {
    "cifar10": ("uoft-cs/cifar10", 32, None),
    "celeba": ("flwrlabs/celeba", 64, 140),
    "tiny-imagenet": ("zh-plus/tiny-imagenet", 64, None),
    "imagenet": ("ILSVRC/imagenet-1k", 256, None),
}
"""Names of hub data sets, and the centred square that is usual for them: CelebA's faces fill 140 of 178 x 218."""
PLAIN_SOURCES = ("digits", "photo-crops", *HUB)
PLACED_SOURCES = ("idx", "folder", "hub")


@dataclass
class Data:
    """Where the images come from."""

    source: str | None = None
    """Null is ``digits``, or ``class_path``. ``digits``: the 8x8 handwritten digits of scikit-learn. ``photo-crops``:
    32x32 crops of the photographs that scikit-learn and scikit-image ship. ``idx:FOLDER``: the MNIST family's
    train-images-idx3-ubyte and train-labels-idx1-ubyte, gzipped or not. ``folder:FOLDER``: image files, one folder per
    class. ``hub:NAME``: a data set of the Hugging Face hub, or a local copy of one. ``cifar10``, ``celeba``,
    ``tiny-imagenet`` and ``imagenet`` are hub data sets by short names."""
    class_path: str | None = None
    """A data set of your own in the place of ``source``, as ``package.module.Class``: a map-style data set of images,
    or of pairs of an image and a label, whose names are its attribute ``classes``."""
    init_args: Arguments = field(default_factory=dict)
    """Arguments of its constructor."""
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
    interpolation: Literal["lanczos", "bilinear"] = "lanczos"
    """Filter of that resizing."""
    class_names: str | None = None
    """File with a name for each class, one a line, in the order of the labels; null takes the data set's own."""
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
    latents: str | None = None
    """Encode all images once, before training, rather than those of each step in every step: ``cache`` keeps the
    latents in the run's folder, a path in a folder that runs may share. Their noise is drawn in every step."""
    workers: int = 0
    """Processes that load images, threads that decode a stream; 0 loads in the training process itself."""

    def __post_init__(self) -> None:
        self.source = self.source or self.class_path or "digits"
        own = self.class_path is not None
        expect(not own or self.source == self.class_path, "data.source", self.source, "null with data.class_path")
        expect(own or not self.init_args, "data.init_args", self.init_args, "data.class_path too, which takes them")
        kind, _, place = self.source.partition(":")
        known = [*PLAIN_SOURCES, *(f"{name}:..." for name in PLACED_SOURCES)]
        expected = " or ".join(known) + closest(kind, [*PLAIN_SOURCES, *PLACED_SOURCES])
        fits = own or kind in (PLACED_SOURCES if place else PLAIN_SOURCES)
        expect(fits, "data.source", self.source, expected)
        held = own or kind in ("digits", "photo-crops", "idx")
        pinned = self.revision is not None
        expect(not (pinned and (held or kind == "folder")), "data.revision", self.revision, f"null for {self.source}")
        expect(not (held and self.streaming), "data.streaming", True, f"false for data.source = {self.source}")
        share = self.subset_fraction
        expect(0 < share <= 1, "data.subset_fraction", share, "a share above 0, at most 1")
        expect(share == 1 or not self.streaming, "data.streaming", True, "false for a subset of the rows")
        numbered = self.latents is None or not self.streaming
        expect(numbered, "data.latents", self.latents, "null for data.streaming, which has no rows by number")
        for name in ("resolution", "crop", "rows"):
            value = getattr(self, name)
            expect(value is None or value >= 1, f"data.{name}", value, "at least 1, or null")
        _at_least(0, "data", self, "workers")
        _at_least(1, "data", self, "shuffle_buffer")

    @property
    def side(self) -> int | None:
        """Side of the images in pixels, where it is known without opening them."""
        usual = {"digits": 8, "photo-crops": 32} | {name: side for name, (_, side, _) in HUB.items()}
        return self.resolution or usual.get(self.source)


@dataclass
class Schedule:
    """The learning rate over training."""

    lr: float = 2e-4
    """Learning rate after warm-up."""
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


@dataclass
class Optimizer(Schedule):
    """The optimizer and its schedule."""

    name: Literal["adam", "adamw", "radam"] = "adam"
    """Update rule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moment estimates."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.0
    """Decoupled for ``adamw``, added to the gradient otherwise."""

    def options(self) -> dict[str, Any]:
        """Return its arguments, the learning rate aside."""
        return {"betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass
class OwnOptimizer(Own, Schedule):
    """A ``torch.optim.Optimizer`` that is no short name, of PyTorch, of a package or of your own, and its schedule."""


METHODS = (
    *("independent", "hungarian", "lapjv", "auction", "emd", "sinkhorn", "greedy", "stable", "sliced", "nearest"),
    *("exact", "jv", "none", "knn"),
)
"""Names of pairing methods that couplings knows: written out, because to ask it loads PyTorch."""
METRICS = ("sqeuclidean", "l2", "l1", "cosine", "dot")
QUANTIZERS = ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8")
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
    with each row, and is coupled again in every batch. ``nearest:k=4`` has its options with it."""
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
        told, (self.method, options) = self.method, split_method(self.method)
        for name in options:
            expect(name not in self.options, "coupling.method", told, f"{name} here or in coupling.options, once")
        self.options = {**self.options, **options}
        if self.method not in DATASET_METHODS:
            self._check_names()
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

    def _check_names(self) -> None:
        """Refuse names that couplings would; it may know those of other packages."""
        others = "couplings" in sys.modules or bool(entry_points(group="couplings.methods"))
        if ":" in self.method:
            _check_importable("coupling.method", self.method, "package.module:function")
            others = True
        known = (*METHODS[:10], *DATASET_METHODS)
        for name, value, names in (("metric", self.metric, METRICS), ("quantize", self.quantize, QUANTIZERS)):
            fits = value is None or value.strip().lower() in names
            expect(fits, f"coupling.{name}", value, f"one of {', '.join(names)}{closest(str(value), names)}")
        fits = others or self.method.strip().lower() in METHODS
        expected = f"one of {', '.join(known)}{closest(self.method, known)}"
        expect(fits, "coupling.method", self.method, expected)


def split_method(text: str) -> tuple[str, dict[str, bool | int | float | str | None]]:
    """Read ``name:option=value:option=value`` as couplings does, without PyTorch."""
    name, *words = re.split(r":(?=[^:]*=)", text)  # a name may hold a colon itself
    options: dict[str, Any] = {}
    for word in words:
        option, _, value = map(str.strip, word.partition("="))
        expect(bool(option) and option not in options, "coupling.method", text, "every option once, as name=value")
        options[option] = value
        constants = {"true": True, "false": False, "none": None, "null": None}
        for read in (int, float, constants.__getitem__):
            with suppress(ValueError, KeyError):
                options[option] = read(value.lower())
                break
    return name.strip(), options


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
    init_from: str | None = None
    """Weights to begin with: a run's folder or one of its checkpoints, whose averaged weights are taken, an exported
    pipeline, or a .safetensors file. Null begins with random ones."""
    deterministic: bool = False
    """Give the same bits in every run on the same GPU, also when resumed; slower. CUBLAS_WORKSPACE_CONFIG is set to
    ``:4096:8`` unless CUDA has started already."""
    ddp: dict[str, bool | int] = field(default_factory=dict)
    """How gradients are averaged over processes: options of accelerate's ``DistributedDataParallelKwargs``, as
    ``--train.ddp.bucket_cap_mb 50``; ``gradient_as_bucket_view`` is true."""
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
    tracker_project: str = "couplings"
    """Project of Weights & Biases. The run is named after the output folder, which keeps its id: a resumed run goes on
    in the same one."""

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
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Arithmetic of the network when sampling; null is ``train.mixed_precision``, but float32 for fp16 on a CPU."""
    prompts: list[str] = field(default_factory=list)
    """Captions of the sample grids that are drawn in training; none takes captions of the data."""
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
OPTIMIZERS: dict[str, type] = dict.fromkeys(("adam", "adamw", "radam"), Optimizer)
KINDS = {"objective": (OBJECTIVES, Own), "model": (MODELS, OwnNetwork), "optimizer": (OPTIMIZERS, OwnOptimizer)}
"""Sections whose fields depend on what they name: their short names, and what stands for a class of the user's."""
SECTIONS = ("objective", "data", "model", "optimizer", "coupling", "train", "evaluate", "launch")


@dataclass
class Recipe:
    """A complete experiment: ``name`` is the recipe file's stem, ``output`` the run's folder."""

    name: str
    objective: Any
    data: Data
    model: Any
    optimizer: Optimizer | OwnOptimizer
    coupling: CouplingSection
    train: Train
    evaluate: Evaluate
    launch: Launch
    output: Path
    resume: bool = False
    plan: bool = False

    def __post_init__(self) -> None:
        objective, model, steps = self.objective, self.model, self.evaluate.steps
        for section in ("objective", "data", "model", "optimizer"):
            path = getattr(getattr(self, section), "class_path", None)
            if path is not None:
                _check_importable(f"{section}.class_path", path, "package.module.Class")
        captioned = isinstance(objective, StableDiffusion)
        fitting = [name for name, kind in MODELS.items() if (kind is ConditionUnet) == captioned]
        fits = model.name in fitting or isinstance(model, Own) or isinstance(objective, Own)
        expect(fits, "model.name", model.name, f"{' or '.join(fitting)} for {objective.name}")
        if self.data.side is not None and not captioned and not isinstance(model, ConditionUnet):
            model.check_side(self.data.side)
        if isinstance(objective, Consistency):
            levels, limit = objective.s1 + 1, f"objective.s1 + 1 = {objective.s1 + 1}"
            expect(max(steps) <= levels, "evaluate.steps", steps, f"at most {limit}")
        elif isinstance(objective, Ddim):
            levels = objective.diffusion_steps
            expect(max(steps) <= levels, "evaluate.steps", steps, f"at most objective.diffusion_steps = {levels}")
        classes, dropout, prompts = model.classes, getattr(objective, "class_dropout", 0), self.evaluate.prompts
        expect(classes is None or not captioned, "model.classes", classes, "null: objective.caption tells classes")
        expect(classes is not None or not dropout, "objective.class_dropout", dropout, "0 for model.classes = null")
        captions = captioned and objective.caption != "empty"
        expect(captions or not prompts, "evaluate.prompts", prompts, "none: the network is told no captions")
        stored = self.data.latents is None or captioned
        expect(stored, "data.latents", self.data.latents, "null: only stable_diffusion has latents")
        saves = not self.train.gradient_checkpointing or isinstance(model, Unet | Adm | ConditionUnet | Own)
        expect(saves, "train.gradient_checkpointing", True, f"false for model.name = {model.name}")
        method = self.coupling.method
        numbered = method not in DATASET_METHODS or not self.data.streaming
        expect(numbered, "data.streaming", True, f"false for coupling.method = {method}, which needs rows by number")
        kept = [None, self.train.ema_decay, *self.train.further_ema_decays]
        expect(self.evaluate.ema_decay in kept, "evaluate.ema_decay", self.evaluate.ema_decay, f"one of {kept}")
        begun = self.train.init_from is None or getattr(model, "pretrained", None) is None
        expect(begun, "train.init_from", self.train.init_from, "null with model.pretrained, which says the same")

    def sections(self) -> dict[str, Any]:
        """Return the recipe as plain nested values, as ``recipe.yaml`` holds them."""
        values = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        if "betas" in values["optimizer"]:
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
    try:
        raw = _read(path)
        asked, overlays, rest = _asked(argv[1:])
        names, kinds = _choose(raw, asked)
        files = [raw, *(_overlay(overlay, names) for overlay in overlays)]
        for file in files:
            _give_way(file, asked)
        # Only --help shows the text below each field: reading it takes longer than all else.
        set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(rest))
        parser = _parser(kinds, f"{prog} {path}")
        _check_flags(rest, parser)
        read = [word for file in files for word in ("--recipe", yaml.safe_dump(file))]
        parsed = parser.parse_args([*read, *rest])
        values = parser.instantiate(parsed)
        sections = {section: values[section] for section in SECTIONS}
        output = Path(values.output or f"runs/{path.stem}")
        return Recipe(path.stem, **sections, output=output, resume=values.resume == "auto", plan=values.plan)
    except (ArgumentError, RecipeError) as error:
        message = " ".join(str(error).split())
        msg = f"{path}: {message}{_suggestion(message, parser) if isinstance(error, ArgumentError) else ''}"
        raise RecipeError(msg) from None


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
        msg = f"not valid YAML: {' '.join(str(error).split())}"
        raise RecipeError(msg) from None
    if not isinstance(raw, dict):
        msg = f"expected sections ({', '.join(SECTIONS)}), got {type(raw).__name__}"
        raise RecipeError(msg)
    return raw


def _asked(argv: list[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Return what is chosen in the place of something else, the overlays, and the words without these."""
    fields = [f"{section}.{name}" for section in KINDS for name in ("name", "class_path")]
    chosen, overlay = (argparse.ArgumentParser(add_help=False, allow_abbrev=False) for _ in range(2))
    for name in (*fields, *GIVE_WAY):
        chosen.add_argument(f"--{name}", nargs="?")
    overlay.add_argument("--overlay", nargs="?", const="", action="append", default=[])
    named, rest = overlay.parse_known_args(argv)
    asked = vars(chosen.parse_known_args(rest)[0])
    return {name: value for name, value in asked.items() if value is not None}, named.overlay, rest


def _choose(raw: dict[str, Any], asked: dict[str, str]) -> tuple[dict[str, str | None], dict[str, type]]:
    """Return the short names, None for a class of the user's, and the classes of the sections in `KINDS`.

    What is asked for otherwise than the recipe says takes the place of the recipe's, fields and all.
    """
    names, kinds = {}, {}
    for section, (known, own) in KINDS.items():
        said = raw.setdefault(section, {"name": "adam"} if section == "optimizer" else {})
        expect(isinstance(said, dict), section, said, "fields, such as name")
        said_path, said_name = said.get("class_path"), said.get("name", "adam" if section == "optimizer" else None)
        both = said_path is not None and "name" in said
        expect(not both, f"{section}.name", said_name, f"null with {section}.class_path, one of the two")
        path, name = asked.get(f"{section}.class_path"), asked.get(f"{section}.name")
        path, name = (said_path, said_name) if path is None and name is None else (path, name)
        expected = f"one of {', '.join(known)}{closest(str(name), known)}, or {section}.class_path"
        fits = path is not None or (isinstance(name, str) and name in known)
        expect(fits, f"{section}.name", name, expected)
        names[section], kinds[section] = (name, known[name]) if path is None else (None, own)
        if path != said_path or (path is None and kinds[section] is not known.get(said_name)):
            kept = {entry.name for entry in dataclasses.fields(Schedule)} if section == "optimizer" else ()
            raw[section] = {field: value for field, value in said.items() if field in kept}
    return names, kinds


GIVE_WAY = {
    "data.source": ("class_path", "init_args"),
    "data.class_path": ("source", "init_args"),
    "coupling.method": ("method", "options"),
}
"""Fields of a file that what is asked for on the command line takes the place of."""


def _give_way(file: dict[str, Any], asked: dict[str, str]) -> None:
    for name in GIVE_WAY.keys() & asked.keys():
        section = file.get(name.partition(".")[0])
        for dropped in GIVE_WAY[name] if isinstance(section, dict) else ():
            section.pop(dropped, None)


def _parser(kinds: dict[str, type], prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description="Every field of a recipe.")
    parser.add_argument("--recipe", action="config", help="a further file of fields, read after the recipe")
    types = {"data": Data, "coupling": CouplingSection, "train": Train, "evaluate": Evaluate, "launch": Launch}
    for section in SECTIONS:
        parser.add_class_arguments((kinds | types)[section], section)
    parser.add_argument("--output", type=str | None, default=None, help="the run's folder; null is runs/<recipe name>")
    resume = "auto: continue from the newest intact checkpoint in the output folder, or start if there is none"
    parser.add_argument("--resume", type=Literal["auto"] | None, default=None, help=resume)
    overlay = "a file of fields, or the name of a bundled one: read after the recipe, before all other options"
    parser.add_argument("--overlay", type=str | None, default=None, help=overlay)
    parser.add_argument("--plan", action="store_true", help="say what a run would be and need, and do not train")
    return parser


def _overlay(name: str, names: dict[str, str | None]) -> dict[str, Any]:
    """Read a file of fields.

    Those of the sections in `KINDS` may also stand under the short name that they are for, and those of ``coupling``
    under that of an objective, so that one file fits every recipe.
    """
    overlay = _read(_find(name, RECIPES / "overlays", "overlay"))
    for section, by in {**{section: section for section in KINDS}, "coupling": "objective"}.items():
        values, known = overlay.get(section), KINDS[by][0]
        if isinstance(values, dict):
            common = {name: value for name, value in values.items() if name not in known}
            overlay[section] = common | values.get(names[by], {})
    return overlay


def _check_flags(argv: list[str], parser: ArgumentParser) -> None:
    """Refuse flags that are no field: jsonargparse takes any that continues one, as ``--plan.x``."""
    known = {action.dest for action in parser._actions}
    free = tuple(f"{name}." for name in known if name.endswith((".init_args", ".options", ".ddp")))
    for word in argv:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name not in known and not name.startswith(free):
            msg = f"--{name}: no such option{_resembling(name, known)}"
            raise RecipeError(msg)


def _resembling(name: str, known: Iterable[str]) -> str:
    longer = sorted(each for each in known if each.startswith(name))
    return closest(name, longer) or closest(name, known)


def _suggestion(message: str, parser: ArgumentParser) -> str:
    """Offer the field that a mistyped one resembles."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    option = re.search(r"Option '([\w.]+)", message)
    word = ".".join(group.groups()) if group else option[1] if option else ""
    return _resembling(word, [action.dest for action in parser._actions]) if word else ""
