"""Sample trained checkpoints and measure the samples, in one process or in several that a launcher started."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, convert_outputs_to_fp32, gather_object
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from . import config
from .averages import group
from .build import build_objective, check_joined, launched
from .checkpoint import find
from .config import Recipe, expect
from .data import Source, load_source, to_signed, to_uint8
from .features import Classifier, Inception, train_classifier
from .models import build_model
from .objective import Objective
from .randomness import address

log = logging.getLogger(__name__)

KID_IMAGES = 10_000
"""Features are kept for the kernel distance, unlike for the Frechet distance: of so many images at most."""
_REFERENCE = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


@dataclass
class Trained:
    """A checkpoint, ready to sample: its recipe, step, data and averaged network."""

    recipe: Recipe
    step: int
    source: Source
    objective: Objective
    model: nn.Module
    device: torch.device

    @property
    def decay(self) -> float:
        """Decay of the average that the weights are."""
        decay = self.recipe.evaluate.ema_decay
        return self.recipe.train.ema_decay if decay is None else decay


def join() -> PartialState:
    """Join the processes that a launcher started, or be the only one.

    Raises
    ------
    TrainingError
        If the processes do not know of each other.
    """
    processes = launched()
    check_joined(processes, _joined().num_processes)
    return _joined()


def _joined() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def share(count: int) -> range:
    """Return which of ``count`` rows this process works on: neighbouring ones, ranks in order."""
    rank, processes = _joined().process_index, _joined().num_processes
    return range(rank * count // processes, (rank + 1) * count // processes)


def load_trained(path: Path, overrides: list[str] | None = None, device: torch.device | None = None) -> Trained:
    """Load a checkpoint for sampling, with its recipe's fields overridden as on the command line.

    Without a ``device``, that of the only process.

    Raises
    ------
    RecipeError
        For an override that cannot be, and without a device under a launcher: its processes would all write the same.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    expect(processes == 1 or device is not None, "WORLD_SIZE", processes, "one process: start it without a launcher")
    found = find(path)
    recipe = config.load([str(found.folder / "recipe.yaml"), *(overrides or [])])
    recipe.output = found.folder.parent.parent  # wherever the run has been moved since
    recipe.name = recipe.output.name
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = _precision(recipe, device)
    source = load_source(recipe.data)
    objective = build_objective(recipe, source)
    model = build_model(recipe.model, objective)
    average = group(recipe.train, recipe.evaluate.ema_decay)
    model.load_state_dict({**found.tensors("model"), **found.tensors(average)})
    objective.to(device)
    model.eval().requires_grad_(False).to(device)
    if precision is not None:  # of the network alone, as accelerate trains it: a sampler's own arithmetic is float32
        model.forward = convert_outputs_to_fp32(torch.autocast(device.type, precision)(model.forward))
    return Trained(recipe, found.step, source, objective, model, device)


def _precision(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    asked, on_cpu = recipe.evaluate.mixed_precision, device.type == "cpu"
    expect(not (on_cpu and asked == "fp16"), "evaluate.mixed_precision", asked, "'bf16' or 'no' on a CPU")
    half = None if on_cpu else torch.float16
    return {"no": None, "fp16": half, "bf16": torch.bfloat16}[asked or recipe.train.mixed_precision]


def draw(trained: Trained, count: int, steps: int, choices: Sequence[int | str] = ()) -> Iterator[Tensor]:
    """Yield this process's `share` of ``count`` samples in batches of ``evaluate.batch_size``: images in [-1, 1].

    Every sample has a random stream of its own, so the i-th sample of a seed is the same in any batch and process. A
    model that is told classes or captions is told ``choices`` in turn or, if there are none, those of the data, in
    their proportions.
    """
    section, rows = trained.recipe.evaluate, share(count)
    told = trained.objective.choose(trained.source, count, section.seed, choices)
    for first in range(rows.start, rows.stop, section.batch_size):
        numbers = range(first, min(first + section.batch_size, rows.stop))
        generators = [torch.Generator().manual_seed(address(section.seed, 0, i, 1, "sample")) for i in numbers]
        noise = torch.stack([torch.randn(trained.objective.shape, generator=generator) for generator in generators])
        own = None if told is None else told[numbers.start : numbers.stop]
        with torch.no_grad(), _rounding(trained.recipe.train.tf32):
            images = trained.objective.sample(trained.model, noise.to(trained.device), steps, generators, own)
        yield images


@contextmanager
def _rounding(tf32: bool | None) -> Iterator[None]:
    """Round products as training does, within: features are computed alike for all runs."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value if tf32 is None else tf32
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def draw_all(trained: Trained, steps: int, choices: Sequence[int | str] = ()) -> Iterable[Tensor]:
    """Draw ``evaluate.samples`` samples as `draw` does; the first process shows how far it is, on standard error."""
    section = trained.recipe.evaluate
    total = -(-len(share(section.samples)) // section.batch_size)
    bar = {"total": total, "console": Console(stderr=True), "disable": not _joined().is_main_process}
    return track(draw(trained, section.samples, steps, choices), f"{steps} steps", **bar)


def feature_network(name: str, source: Source, folder: Path) -> nn.Module:
    """Open the feature network that a recipe names; ``folder`` keeps a classifier that is trained here.

    Raises
    ------
    ValueError
        If the data has no labels to train on, the named file does not exist, or ``inception`` cannot be had.
    """
    if name == "inception":
        return Inception()
    path = folder / "classifier.safetensors" if name == "classifier" else Path(name)
    if name == "classifier" and not path.is_file():
        network, accuracy = train_classifier(source)
        folder.mkdir(parents=True, exist_ok=True)
        network.save(path, accuracy)
    try:
        network = Classifier.load(path)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        expected = "expected classifier, inception or the path of a classifier.safetensors"
        msg = f"evaluate.features: got {name!r}, {expected} ({type(error).__name__}: {error})"
        raise ValueError(msg) from None
    takes, channels = network.body[0].in_channels, source.shape[0]
    expect(takes == channels, "evaluate.features", name, f"a network for images of {channels} channels, not {takes}")
    return network


class Scores:
    """Distances of samples to a data source, in the features of a network.

    Several processes share the work: each makes one of these, and calls it with its own samples.

    Parameters
    ----------
    network : Module
        Maps images in [-1, 1] to ``(n, num_features)`` float64 features.
    source : Source
        The reference: all of its images.
    device : torch.device
        Where features are computed.
    kid : bool
        Measure the kernel distance too, on at most 10,000 images of either side.
    workers : int
        Processes that load the reference.
    cache : Path, optional
        Folder that keeps statistics of the reference: they are computed once for the same images and network.
    """

    def __init__(
        self,
        network: nn.Module,
        source: Source,
        device: torch.device,
        *,
        kid: bool = False,
        workers: int = 0,
        cache: Path | None = None,
    ) -> None:
        self.network, self.device = network.to(device).eval(), device
        stand_in = nn.Identity()  # features are computed here, once for both
        stand_in.num_features = network.num_features
        self.fid = FrechetInceptionDistance(feature=stand_in, reset_real_features=False).to(device)
        self.kid, stride = None, 1
        if kid:
            stride = -(-len(source) // KID_IMAGES)  # spread over the whole source, which may be sorted by class
            size = min(500, -(-len(source) // stride))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
                self.kid = KernelInceptionDistance(feature=stand_in, subset_size=size, reset_real_features=False)
            self.kid.to(device)
        path = None if cache is None else _reference_path(cache, network, source, kid)
        if path is None or not self._read(path):
            rows = share(len(source))
            first = rows.start
            for batch in source.scan(500, workers, rows):
                self._update(batch.images, real=True, kept=slice(-first % stride, None, stride))
                first += len(batch.images)
            if path is not None:
                self._write(path)

    def _update(self, pixels: Tensor, real: bool, kept: slice) -> None:
        with torch.no_grad():
            features = self.network(to_signed(pixels.to(self.device)))
        self.fid.update(features, real=real)
        if self.kid is not None:
            self.kid.update(features[kept], real=real)

    def _read(self, path: Path) -> bool:
        """Take the reference from a file, if the first process has it: it then holds all of it, the others nothing."""
        found = None
        if _joined().is_main_process and path.is_file():
            try:
                found = {name: value.to(self.device) for name, value in load_file(path).items()}
            except SafetensorError as error:
                log.warning("%s: damaged statistics of the data (%s); they are computed again", path, error)
        if not broadcast_object_list([found is not None])[0]:
            return False
        if found is not None:
            for name in _REFERENCE:
                setattr(self.fid, name, found[name])
        if self.kid is not None:
            kept = torch.empty(0, self.network.num_features, device=self.device) if found is None else found["kept"]
            self.kid.real_features = [kept.double()]
        return True

    def _write(self, path: Path) -> None:
        """Keep the reference in a file; collective."""
        _join_lists(self.kid)
        with self.fid.sync_context():
            tensors = {name: getattr(self.fid, name).clone() for name in _REFERENCE}
        if self.kid is not None:
            with self.kid.sync_context():
                tensors["kept"] = torch.cat(self.kid.real_features).float()  # as the networks compute them
        if not _joined().is_main_process:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file(tensors, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            log.warning("cannot keep statistics of the data in %s: %s", path, error)

    def __call__(self, batches: Iterable[Tensor], first: int = 0) -> dict[str, float]:
        """Return ``fid`` and, if asked for, ``kid`` and ``kid_std`` of all images in ``batches``.

        ``first`` is the number of the first one among the images of all processes.

        Raises
        ------
        FloatingPointError
            If a sample is not finite.
        """
        count = 0
        for images in batches:
            if not images.isfinite().all():
                msg = "a sample is not finite"
                raise FloatingPointError(msg)
            # Rounded to 8 bits, as the reference images are.
            self._update(to_uint8(images), real=False, kept=slice(max(0, KID_IMAGES - first - count)))
            count += len(images)
        scores = {"fid": self.fid.compute().item()}
        self.fid.reset()
        if self.kid is not None:
            _join_lists(self.kid)
            self.kid.subset_size = min(self.kid.subset_size, sum(gather_object([count])))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # its subsets come from the global generator
                mean, deviation = self.kid.compute()
            scores |= {"kid": mean.item(), "kid_std": deviation.item()}
            self.kid.reset()
        return scores


def cache_folder() -> Path:
    """Return the user's folder for what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "couplings"


def _reference_path(cache: Path, network: nn.Module, source: Source, kid: bool) -> Path | None:
    """Return the file of a source's statistics; None if nobody knows when its images change."""
    images = source.fingerprint()
    if images is None:
        return None
    digest = hashlib.sha256(repr((images, source.shape, len(source), kid, KID_IMAGES)).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return cache / f"reference-{digest.hexdigest()[:32]}.safetensors"


def _join_lists(kid: KernelInceptionDistance | None) -> None:
    # Processes exchange lists entry by entry, and must have as many.
    if kid is not None:
        kid.real_features, kid.fake_features = (
            [torch.cat(own)] if own else [] for own in (kid.real_features, kid.fake_features)
        )
