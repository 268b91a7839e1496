"""The LPIPS distance of images (arXiv 1801.03924) in plain PyTorch.

The usual packages need torchvision, which has to match the installed PyTorch; the distance itself is thirteen
convolutions. As in the released consistency trainings, images are scaled to 224 pixels. Of these, the one in JAX
(CIFAR-10) keeps VGG's max pooling and the one in PyTorch (64 pixels) replaces it by average pooling.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from .config import RecipeError

VGG = "vgg16-397923af.pth"
"""torchvision's weights of VGG-16, looked for in ``torch.hub.get_dir()/checkpoints``."""

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def weights_path() -> Path:
    """Return where the weights of VGG-16 are looked for."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG


def check_weights() -> None:
    """Check that they are there.

    Raises
    ------
    RecipeError
        With the line to type.
    """
    path = weights_path()
    if not path.is_file():
        line = f"curl -L --create-dirs -o {path} https://download.pytorch.org/models/{VGG}"
        msg = f"objective.loss: lpips needs {path}: {line}, or use l2"
        raise RecipeError(msg)


class Lpips(nn.Module):
    """LPIPS with VGG-16; `pretrained` gives it weights.

    Parameters
    ----------
    pooling : {"max", "average"}
        Pooling between the stages of VGG-16.
    """

    side = 224
    """Images of less than 256 pixels are scaled to this side."""

    def __init__(self, pooling: str = "max") -> None:
        super().__init__()
        self.pool = {"max": F.max_pool2d, "average": F.avg_pool2d}[pooling]
        self.stages, width = nn.ModuleList(), 3
        for stage in _STAGES:
            layers: list[nn.Module] = []
            for following in stage:
                layers += [nn.Conv2d(width, following, 3, padding=1), nn.ReLU()]
                width = following
            self.stages.append(nn.Sequential(*layers))
        self.linear = nn.ParameterList(torch.zeros(1, stage[-1], 1, 1) for stage in _STAGES)
        # ImageNet's mean and deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    @classmethod
    def pretrained(cls, pooling: str = "max") -> Lpips:
        """Load VGG-16 from PyTorch's hub folder and the learned channel weights that torchmetrics ships.

        Raises
        ------
        RecipeError
            Naming the file to put there.
        """
        check_weights()
        vgg = torch.load(weights_path(), map_location="cpu", weights_only=True)
        learned = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
        linear = torch.load(learned, map_location="cpu", weights_only=True)
        network = cls(pooling)
        # torchvision numbers all layers, the convolutions among them: features.0, 2, 5, 7, 10, ...
        keys = [key for key in vgg if key.startswith("features.") and key.endswith(".weight")]
        numbers = sorted(int(key.split(".")[1]) for key in keys)
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        for number, convolution in zip(numbers, convolutions, strict=True):
            convolution.load_state_dict({key: vgg[f"features.{number}.{key}"] for key in ("weight", "bias")})
        for i, weight in enumerate(network.linear):
            weight.copy_(linear[f"lin{i}.model.1.weight"])
        return network

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the activations of the five stages, each of unit length over its channels."""
        x = images.float().expand(-1, 3, -1, -1)
        if x.shape[-1] < 256:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        x = (x - self.shift) / self.scale
        found = []
        for i, stage in enumerate(self.stages):
            x = stage(self.pool(x, 2) if i else x)
            activations = x.float()  # squares overflow in half precision
            found.append(activations / (activations.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the ``(n,)`` distances of images ``(n, 1 or 3, h, w)`` in [-1, 1]."""
        distance = torch.zeros(len(first), device=first.device)
        for a, b, weight in zip(self.features(first), self.features(second), self.linear, strict=True):
            distance = distance + ((a - b).square() * weight).sum(1).mean((1, 2))
        return distance
