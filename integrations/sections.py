"""Sections of a recipe: dataclasses that refuse values that cannot run.

Those of networks and of the coupling: see `network_sections` and `coupling_section`.

Nothing is imported here that loads PyTorch. Classes of the user's own are only named: see `own`.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints


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


def closest(word: str, known: Iterable[str]) -> str:
    """Return a question with the known word that is most like ``word``, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_importable(name: str, path: str, form: str) -> None:
    """Refuse a path that names no module here, or is not of the form ``form``; nothing is imported."""
    top, *rest = re.split("[.:]", path)
    expect(all([top, *rest]) and bool(rest), name, path, form)
    found = top in sys.modules or find_spec(top) is not None
    expect(found, name, path, f"{form}: there is no module {top!r} here or among the installed ones")


@dataclass
class Section:
    """A section of a recipe."""

    section: ClassVar[str]
    """Its name in a recipe."""

    def __post_init__(self) -> None:
        """Refuse what a field's type does not hold, and null; what fields ask of each other, sections add."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value, described = getattr(self, name), get_origin(hint) is Annotated
            kind, expected, holds = get_args(hint) if described else (hint, "a value, not null", None)
            if value is None:  # jsonargparse takes it in a file
                self.expect(type(None) in get_args(kind), name, expected)
            elif described:
                self.expect(holds(value), name, expected)

    def expect(self, holds: bool, name: str, expected: str) -> None:
        """Refuse the value of the field ``name`` unless ``holds``."""
        expect(holds, f"{self.section}.{name}", getattr(self, name), expected)


# Types of fields: what is expected, and whether a value is so. Within a section such a function knows built-ins only.
Count = Annotated[int, "at least 1", lambda value: value >= 1]
CountOrNull = Annotated[int | None, "at least 1, or null", lambda value: value >= 1]
Whole = Annotated[int, "at least 0", lambda value: value >= 0]
Positive = Annotated[float, "a positive number", lambda value: value > 0]
Caption = Annotated[str, "empty, class or column:NAME", lambda name: bool(re.fullmatch("empty|class|column:.+", name))]
Scale = Annotated[float, "at least 1", lambda value: value >= 1]
Steps = Annotated[list[int], "positive numbers of sampling steps", lambda steps: min(steps, default=0) >= 1]

Arguments = dict[str, bool | int | float | str | list | dict | None]


@dataclass
class Own(Section):
    """A class of your own, that is given ``init_args`` beside what every class of its section is given."""

    class_path: str = ""
    """Where the class is imported from, as ``package.module.Class``; the current directory is looked in too."""
    init_args: Arguments = field(default_factory=dict)
    """Arguments of its constructor, as ``--model.init_args.width 64``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_importable(f"{self.section}.class_path", self.class_path, "package.module.Class")

    @property
    def name(self) -> str:
        """What the section is called in messages."""
        return self.class_path


# Objectives


@dataclass
class ClassConditional(Section):
    """What an objective does with a network that is told classes: one with ``model.classes``."""

    section: ClassVar[str] = "objective"
    name: str = ""
    class_dropout: Annotated[float, "a share of at least 0, below 1", lambda share: 0 <= share < 1] = 0.0
    """Share of the rows whose class is not told to the network, for guidance when sampling: 0.1 is usual."""
    guidance_scale: Scale = 1.0
    """Classifier-free guidance towards the class when sampling (arXiv 2207.12598); 1 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        learned = "1 with objective.class_dropout = 0: away from no class, which the network has not learned"
        self.expect(self.guidance_scale == 1 or self.class_dropout > 0, "guidance_scale", learned)


@dataclass
class Ddim(ClassConditional):
    """Denoising diffusion on pixels, sampled deterministically (arXiv 2006.11239, 2010.02502)."""

    name: Literal["ddim"] = "ddim"
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network regresses: the noise, the velocity or the clean image."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule: linear betas, or the squared cosine of arXiv 2102.09672."""
    diffusion_steps: Count = 1000
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
    total_steps: Count = 800_000
    """K of the schedules N(k) and mu(k), in optimizer steps. It stays when train.steps is less."""
    s0: Count = 2
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
    noise that the sample began with, which has given better samples (benchmarks/results/pools.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(self.s1 >= self.s0, "s1", f"at least objective.s0 = {self.s0}")


@dataclass
class StableDiffusion(Section):
    """Diffusion in the latents of a frozen autoencoder, told a caption (arXiv 2112.10752)."""

    section: ClassVar[str] = "objective"
    name: Literal["stable_diffusion"] = "stable_diffusion"
    pretrained: str = "CompVis/stable-diffusion-v1-4"
    """Folder or hub name of a Stable Diffusion pipeline whose autoencoder, text encoder and tokenizer are used, frozen.
    ``tiny-random`` makes small random ones, for trying things out."""
    revision: str | None = None
    """Commit, tag or branch of a pipeline of the hub; null is its newest, which may change."""
    frozen_precision: Literal["fp32", "fp16"] = "fp32"
    """Number format of the frozen networks."""
    caption: Caption = "empty"
    """What the network is told: nothing (``empty``), the name of the image's ``class``, or the text in a column of the
    data, as ``column:text``. Of several texts of an image one is drawn in every step; none is the empty caption."""
    caption_dropout: Annotated[float, "a share between 0 and 1", lambda share: 0 <= share <= 1] = 0.0
    """Share of the captions replaced by the empty one, for guidance when sampling."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network regresses: the noise, the velocity or the clean latents."""
    min_snr_gamma: float | None = None
    """Clamp of the min-SNR loss weight (arXiv 2303.09556); null leaves the loss unweighted."""
    noise_offset: float = 0.0
    """Standard deviation of a shift added to each channel of the noise, after the coupling."""
    sampler: Literal["ddim", "pndm"] = "ddim"
    """Sampling scheme."""
    guidance_scale: Scale = 1.0
    """Classifier-free guidance when sampling; 1 is none."""
    autoencoder_parameters: int | None = None
    """How many parameters the autoencoder has, for readers; ``--plan`` compares it with the count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.sampler == "ddim" or self.prediction != "sample"
        self.expect(fits, "sampler", "ddim for objective.prediction = sample")


@dataclass
class OwnObjective(Own):
    """A subclass of `integrations.objective.Objective`."""

    section: ClassVar[str] = "objective"


# Data

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
class Data(Section):
    """Where the images come from."""

    section: ClassVar[str] = "data"
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
    shuffle_buffer: Count = 5000
    """Rows of a stream among which the next one is drawn; held in memory as encoded images."""
    rows: CountOrNull = None
    """Number of rows of a stream; null takes what the data set says."""
    resolution: CountOrNull = None
    """Side of the square images in pixels: the largest centred square (or ``crop``) is resized to it. Null keeps the
    images of ``digits``, ``photo-crops``, ``idx`` and square data sets as they are."""
    crop: CountOrNull = None
    """Side of the centred square to keep before resizing, in pixels; null keeps the largest."""
    interpolation: Literal["lanczos", "bilinear"] = "lanczos"
    """Filter of that resizing."""
    class_names: str | None = None
    """File with a name for each class, one a line, in the order of the labels; null takes the data set's own."""
    mode: Literal["RGB", "L"] = "RGB"
    """Colour or grey images, for ``folder`` and hub data sets."""
    subset_fraction: Annotated[float, "a share above 0, at most 1", lambda share: 0 < share <= 1] = 1.0
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
    workers: Whole = 0
    """Processes that load images, threads that decode a stream; 0 loads in the training process itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = self.source or self.class_path or "digits"
        own, pinned = self.class_path is not None, self.revision is not None
        kind, _, place = self.source.partition(":")
        if own:
            check_importable("data.class_path", self.class_path, "package.module.Class")
        self.expect(not own or self.source == self.class_path, "source", "null with data.class_path")
        self.expect(own or not self.init_args, "init_args", "data.class_path too, which takes them")
        known = [*PLAIN_SOURCES, *(f"{name}:..." for name in PLACED_SOURCES)]
        expected = " or ".join(known) + closest(kind, [*PLAIN_SOURCES, *PLACED_SOURCES])
        self.expect(own or kind in (PLACED_SOURCES if place else PLAIN_SOURCES), "source", expected)
        held = own or kind in ("digits", "photo-crops", "idx")
        self.expect(not (pinned and (held or kind == "folder")), "revision", f"null for {self.source}")
        self.expect(not (held and self.streaming), "streaming", f"false for data.source = {self.source}")
        if self.streaming:
            self.expect(self.subset_fraction == 1, "streaming", "false for a subset of the rows")
            self.expect(self.latents is None, "latents", "null for data.streaming, which has no rows by number")

    @property
    def side(self) -> int | None:
        """Side of the images in pixels, where it is known without opening them."""
        usual = {"digits": 8, "photo-crops": 32} | {name: side for name, (_, side, _) in HUB.items()}
        return self.resolution or usual.get(self.source)


# The optimizer


@dataclass
class Schedule(Section):
    """The learning rate over training."""

    section: ClassVar[str] = "optimizer"
    lr: Positive = 2e-4
    """Learning rate after warm-up."""
    warmup_steps: Whole = 0
    """Optimizer steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What happens after warm-up, until ``train.steps``."""
    clip: Annotated[float | None, "a positive number or null", lambda clip: clip > 0] = 1.0
    """Largest gradient norm; null does not clip."""


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

    def options(self) -> dict[str, object]:
        """Return its arguments, the learning rate aside."""
        return {"betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}


@dataclass
class OwnOptimizer(Own, Schedule):
    """A ``torch.optim.Optimizer`` that is no short name, of PyTorch, of a package or of your own, and its schedule."""


# The loop and what is measured


@dataclass
class Train(Section):
    """The loop."""

    section: ClassVar[str] = "train"
    steps: Count = 1000
    """Optimizer steps."""
    global_batch_size: Count = 128
    """Rows per optimizer step, over all processes."""
    batch_size_per_device: Count = 128
    """Rows coupled together and passed through the network at once. Gradient accumulation is derived:
    global_batch_size / (batch_size_per_device * processes)."""
    seed: Whole = 0
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
    ema_decay: Annotated[float, "at least 0 and below 1", lambda decay: 0 <= decay < 1] = 0.9999
    """Decay per step of the averaged weights that are sampled from."""
    further_ema_decays: list[float] = field(default_factory=list)
    """Decays of further averages, kept beside the first one; ``evaluate.ema_decay`` samples from them."""
    ema_ramp: bool = True
    """Start the decay small: min(ema_decay, (1 + n) / (10 + n)) at step n."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    compile: bool = False
    """Compile the network with torch.compile."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted."""
    sample_every: Whole = 0
    """Steps between sample grids; 0 draws one at the end only."""
    tracker: Literal["tensorboard", "wandb"] | None = "tensorboard"
    """Experiment tracker of accelerate; null for none."""
    tracker_project: str = "couplings"
    """Project of Weights & Biases. The run is named after the output folder, which keeps its id: a resumed run goes on
    in the same one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, device = self.global_batch_size, self.batch_size_per_device
        multiple = f"a multiple of train.batch_size_per_device = {device} ({rows} / {device} = {rows / device:.2f})"
        self.expect(rows % device == 0, "global_batch_size", multiple)
        repeats = not (self.deterministic and self.cudnn_benchmark)
        self.expect(repeats, "cudnn_benchmark", "false with train.deterministic: the fastest algorithm varies")
        decays = [self.ema_decay, *self.further_ema_decays]
        distinct = len(set(decays)) == len(decays) and all(0 <= decay < 1 for decay in decays)
        expected = f"numbers at least 0 and below 1, each once, and not train.ema_decay = {self.ema_decay}"
        self.expect(distinct, "further_ema_decays", expected)


@dataclass
class Evaluate(Section):
    """What is drawn and measured."""

    section: ClassVar[str] = "evaluate"
    steps: Steps = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    """Numbers of sampling steps, each evaluated."""
    samples: Count = 2000
    """Images drawn for each."""
    batch_size: Count = 500
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


@dataclass
class Launch(Section):
    """The machines a recipe is meant for; decides what ``--plan`` tells, and nothing else."""

    section: ClassVar[str] = "launch"
    config: str | None = None
    """Path of an accelerate configuration, or the name of one in ``integrations/launch``; null is one process without a
    launcher."""


OBJECTIVES: dict[str, type] = {kind.name: kind for kind in (Ddim, Consistency, StableDiffusion, FlowMatching)}
OPTIMIZERS: dict[str, type] = dict.fromkeys(("adam", "adamw", "radam"), Optimizer)
