"""Sample trained checkpoints and measure the samples."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from . import checkpoint, config
from .averages import group
from .build import build_objective
from .config import Recipe, RecipeError
from .data import Source, load_source, to_signed, to_uint8
from .features import Classifier, Inception, train_classifier
from .models import build_model
from .objective import Objective
from .randomness import address

KID_IMAGES = 10_000
"""Features are kept for the kernel distance, unlike for the Frechet distance: of so many images at most."""


@dataclass
class Trained:
    """A checkpoint, ready to sample: its recipe, step, data and averaged network."""

    recipe: Recipe
    step: int
    source: Source
    objective: Objective
    model: nn.Module
    device: torch.device


def find(path: Path) -> checkpoint.Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run's folder.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged.
    """
    if (path / "state.json").is_file():
        return checkpoint.read(path)
    found = checkpoint.newest(path / "checkpoints")
    if found is None:
        msg = f"{path}: no checkpoint; expected a run's folder or one of its checkpoints/step-<N>"
        raise checkpoint.CheckpointError(msg)
    return found


def load_trained(path: Path, overrides: list[str] | None = None) -> Trained:
    """Load a checkpoint for sampling, with its recipe's fields overridden as on the command line.

    Raises
    ------
    RecipeError
        For an override that cannot be, and under a launcher: its processes would all write the same results.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        msg = f"got WORLD_SIZE {processes}, expected one process: sample and evaluate without a launcher"
        raise RecipeError(msg)
    found = find(path)
    recipe = config.load([str(found.folder / "recipe.yaml"), *(overrides or [])])
    recipe.output = found.folder.parent.parent  # wherever the run has been moved since
    recipe.name = recipe.output.name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = load_source(recipe.data)
    objective = build_objective(recipe, source)
    model = build_model(recipe.model, objective)
    average = group(recipe.train, recipe.evaluate.ema_decay)
    model.load_state_dict({**found.tensors("model"), **found.tensors(average)})
    objective.to(device)
    return Trained(recipe, found.step, source, objective, model.eval().requires_grad_(False).to(device), device)


def draw(trained: Trained, count: int, steps: int, choices: Sequence[int | str] = ()) -> Iterator[Tensor]:
    """Yield ``count`` samples in batches of ``evaluate.batch_size``: images in [-1, 1].

    Every sample has a random stream of its own, so the i-th sample of a seed is the same in any batch. A model that is
    told classes or captions is told ``choices`` in turn or, if there are none, those of the data, in their proportions.
    """
    section = trained.recipe.evaluate
    told = trained.objective.choose(trained.source, count, section.seed, choices)
    for first in range(0, count, section.batch_size):
        numbers = range(first, min(first + section.batch_size, count))
        generators = [torch.Generator().manual_seed(address(section.seed, 0, i, 1, "sample")) for i in numbers]
        noise = torch.stack([torch.randn(trained.objective.shape, generator=generator) for generator in generators])
        with torch.no_grad():
            own = None if told is None else told[numbers.start : numbers.stop]
            yield trained.objective.sample(trained.model, noise.to(trained.device), steps, generators, own)


def feature_network(name: str, source: Source, folder: Path) -> nn.Module:
    """Open the feature network that a recipe names; ``folder`` keeps a classifier that is trained here.

    Raises
    ------
    ValueError
        If the data has no labels to train on, or the named file does not exist.
    ImportError
        If ``inception`` is asked for without torch-fidelity.
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
    if network.body[0].in_channels != source.shape[0]:
        msg = (
            f"evaluate.features: {path} takes images of {network.body[0].in_channels} channels, "
            f"the data has {source.shape[0]}"
        )
        raise ValueError(msg)
    return network


class _Features(nn.Identity):
    """Stands in for the feature network where features are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class Scores:
    """Distances of samples to a data source, in the features of a network.

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
    """

    def __init__(
        self, network: nn.Module, source: Source, device: torch.device, *, kid: bool = False, workers: int = 0
    ) -> None:
        self.network, self.device = network.to(device).eval(), device
        stand_in = _Features(network.num_features)
        self.fid = FrechetInceptionDistance(feature=stand_in, reset_real_features=False).to(device)
        self.kid = None
        if kid:
            size = min(500, len(source))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
                self.kid = KernelInceptionDistance(feature=stand_in, subset_size=size, reset_real_features=False)
            self.kid.to(device)
        # Spread over the whole source, which may be sorted by class.
        stride = -(-len(source) // KID_IMAGES)
        for batch in source.scan(500, workers):
            self._update(batch.images, real=True, kept=slice(None, None, stride))

    def _update(self, pixels: Tensor, real: bool, kept: slice) -> None:
        with torch.no_grad():
            features = self.network(to_signed(pixels.to(self.device)))
        self.fid.update(features, real=real)
        if self.kid is not None and len(features[kept]):
            self.kid.update(features[kept], real=real)

    def __call__(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return ``fid`` and, if asked for, ``kid`` and ``kid_std`` of all images in ``batches``.

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
            self._update(to_uint8(images), real=False, kept=slice(max(0, KID_IMAGES - count)))
            count += len(images)
        scores = {"fid": self.fid.compute().item()}
        self.fid.reset()
        if self.kid is not None:
            self.kid.subset_size = min(self.kid.subset_size, count)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # its subsets come from the global generator
                mean, deviation = self.kid.compute()
            scores |= {"kid": mean.item(), "kid_std": deviation.item()}
            self.kid.reset()
        return scores
