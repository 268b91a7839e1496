"""The LPIPS distance of images (arXiv 1801.03924) in plain PyTorch.

The usual packages need torchvision, which has to match the installed PyTorch; the distance itself is
thirteen convolutions. As in the released consistency training, images are scaled to 224 pixels and
VGG's max pooling is replaced by average pooling.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

VGG = "vgg16-397923af.pth"
"""torchvision's weights of VGG-16, looked for in ``torch.hub.get_dir()/checkpoints``."""

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def weights_path() -> Path:
    """Return where the weights of VGG-16 are looked for."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG


class Lpips(nn.Module):
    """LPIPS with VGG-16.

    Parameters
    ----------
    vgg : dict of Tensor
        Weights by torchvision's names (``features.0.weight``, ...); the classifier's are not needed.
    linear : sequence of Tensor
        The five learned channel weights, each ``(1, c, 1, 1)``.
    side : int
        Images of less than 256 pixels are scaled to this side in pixels.
    """

    def __init__(self, vgg: dict[str, Tensor], linear: list[Tensor], side: int = 224) -> None:
        super().__init__()
        self.side = side
        self.stages = nn.ModuleList()
        width, number = 3, 0
        for stage in _STAGES:
            layers: list[nn.Module] = []
            for following in stage:
                conv = nn.Conv2d(width, following, 3, padding=1)
                conv.load_state_dict({key: vgg[f"features.{number}.{key}"] for key in ("weight", "bias")})
                layers += [conv, nn.ReLU()]
                width, number = following, number + 2
            self.stages.append(nn.Sequential(*layers))
            number += 1  # the pooling
        self.linear = nn.ParameterList([nn.Parameter(weight.clone()) for weight in linear])
        # ImageNet's mean and deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    @classmethod
    def pretrained(cls) -> Lpips:
        """Load VGG-16 from PyTorch's hub folder and the learned weights that torchmetrics ships.

        Raises
        ------
        FileNotFoundError
            Naming the file to put there.
        """
        path = weights_path()
        if not path.is_file():
            msg = f"objective.loss: lpips needs {path}: get https://download.pytorch.org/models/{VGG}, or use l2"
            raise FileNotFoundError(msg)
        vgg = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        learned = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
        linear = torch.load(learned, map_location="cpu", weights_only=True)
        return cls(vgg, [linear[f"lin{i}.model.1.weight"] for i in range(len(_STAGES))])

    @classmethod
    def blank(cls) -> Lpips:
        """Make one with weights of zeros: to see how much memory it takes."""
        vgg, width, number = {}, 3, 0
        for stage in _STAGES:
            for following in stage:
                vgg[f"features.{number}.weight"] = torch.zeros(following, width, 3, 3)
                vgg[f"features.{number}.bias"] = torch.zeros(following)
                width, number = following, number + 2
            number += 1  # the pooling
        return cls(vgg, [torch.zeros(1, stage[-1], 1, 1) for stage in _STAGES])

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the activations of the five stages, each of unit length over its channels."""
        x = images.float().expand(-1, 3, -1, -1)
        if x.shape[-1] < 256:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        x = (x - self.shift) / self.scale
        found = []
        for i, stage in enumerate(self.stages):
            x = stage(F.avg_pool2d(x, 2) if i else x)
            activations = x.float()  # squares overflow in half precision
            found.append(activations / (activations.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the ``(n,)`` distances of images ``(n, 1 or 3, h, w)`` in [-1, 1]."""
        distance = torch.zeros(len(first), device=first.device)
        for a, b, weight in zip(self.features(first), self.features(second), self.linear, strict=True):
            distance = distance + ((a - b).square() * weight).sum(1).mean((1, 2))
        return distance
