"""Feature networks for Frechet distances."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Recipe, RecipeError, expect
from .data import Images, Source, to_signed, to_uint8


class Classifier(nn.Module):
    """A small convolutional classifier; its penultimate layer gives the features.

    Parameters
    ----------
    channels : int
        Channels of the images.
    classes : int
        Number of classes.
    num_features : int
        Features per image.
    """

    def __init__(self, channels: int, classes: int, num_features: int = 64) -> None:
        super().__init__()
        self.num_features = num_features
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, num_features),
        )
        self.head = nn.Linear(num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(n, num_features)`` float64 features of ``(n, c, h, w)`` images in [-1, 1].

        In float64 because torchmetrics casts its result to the features' type.
        """
        return self.body(images.float()).double()

    def train(self, mode: bool = True) -> Classifier:
        """Stay in evaluation mode: torchmetrics switches its feature network with itself."""
        return super().train(False)

    def logits(self, images: Tensor) -> Tensor:
        """Return class scores."""
        return self.head(F.relu(self.body(images)))

    def save(self, path: Path, accuracy: float) -> None:
        """Write weights and sizes as safetensors."""
        sizes = [self.body[0].in_channels, self.head.out_features, self.num_features]
        save_file(self.state_dict(), path, {"sizes": json.dumps(sizes), "accuracy": json.dumps(accuracy)})

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            network = cls(*json.loads(file.metadata()["sizes"]))
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return network.requires_grad_(False)


INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's weights, looked for in ``torch.hub.get_dir()/checkpoints`` and downloaded otherwise."""
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


def inception_path() -> Path:
    """Return where the weights of `Inception` are looked for."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION


class Inception(nn.Module):
    """The network of the published FID: torch-fidelity's port of the 2015 Inception graph."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        kind = _extractor()
        try:
            extractor = kind("inception-v3-compat", ["2048"])
        except OSError as error:
            raise RecipeError(_no_weights()) from error
        self.extractor = extractor.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(n, 2048)`` float64 features of ``(n, 1 or 3, h, w)`` images in [-1, 1]."""
        pixels = to_uint8(images).expand(-1, 3, -1, -1)
        return self.extractor(pixels)[0].double()


def _extractor() -> type[nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that does not fit PyTorch
        needs = "torch-fidelity, and a torchvision that fits PyTorch: pip install 'couplings[fid]'"
        msg = f"evaluate.features: inception needs {needs} ({error})"
        raise RecipeError(msg) from error
    return FeatureExtractorInceptionV3


def _no_weights() -> str:
    path = inception_path()
    return f"evaluate.features: inception needs {path}: curl -L --create-dirs -o {path} {INCEPTION_URL}"


def check(recipe: Recipe) -> None:
    """Check, before a training, that what measures it at its end is here; labels for a classifier are not asked for.

    Raises
    ------
    RecipeError
        With the line to type.
    """
    name = recipe.evaluate.features
    try:
        if name == "inception":
            _extractor()
            if not inception_path().is_file():
                raise RecipeError(_no_weights())
        elif name != "classifier":
            expect(Path(name).is_file(), "evaluate.features", name, "classifier, inception or an existing file")
    except RecipeError as error:
        msg = f"{error}. To train without it: --evaluate.features classifier"
        raise RecipeError(msg) from error.__cause__


def train_classifier(source: Source, steps: int = 300) -> tuple[Classifier, float]:
    """Train on four fifths of ``source``; return the network and its accuracy on the rest.

    Parameters
    ----------
    source : Source
        Labelled images, not streamed.
    steps : int
        Optimizer steps, of 128 images.

    Raises
    ------
    ValueError
        If the source has no labels, or is a stream.
    """
    if not isinstance(source, Images):
        msg = "features: classifier needs rows at random: set --data.streaming false, or give the path of a trained one"
        raise ValueError(msg)
    if len(source.classes) < 2:
        msg = "features: classifier needs labelled data with at least two classes; give the path of a trained one"
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(source.shape[0], len(source.classes))
    order = torch.randperm(len(source), generator=generator)
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        rows = training[torch.randint(len(training), (128,), generator=generator)]
        batch = source[rows.tolist()]
        loss = F.cross_entropy(network.logits(to_signed(batch.images)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.requires_grad_(False)
    right = 0
    for rows in held_out.split(500):
        batch = source[rows.tolist()]
        right += int((network.logits(to_signed(batch.images)).argmax(1) == batch.labels).sum())
    return network, right / len(held_out)
