"""Networks for small images: an MLP and a ConvNeXt, whose blocks the time embedding modulates.

A copy of this file travels with an exported pipeline: it imports nothing of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Embeds the time, and the class of a class-conditional network, for the blocks' modulation."""

    def __init__(self, width: int, classes: int | None) -> None:
        super().__init__()
        self.frequencies = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, width)
        self.label = None if classes is None else nn.Embedding(classes, width)

    def forward(self, sample: Tensor, timestep: Tensor | float, labels: Tensor | None) -> Tensor:
        """Return ``(n, width)`` for a batch of n samples at one time, or at one each."""
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time(self.frequencies(timestep).to(sample.dtype))
        if self.label is not None:
            if labels is None:
                msg = "class_labels: got None, expected the classes of a class-conditional network"
                raise ValueError(msg)
            embedding = embedding + self.label(labels)
        return F.silu(embedding)


class MlpBlock(nn.Module):
    """MLP, shifted, scaled and gated by the time embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        # Zero gates: the block starts as the identity (arXiv 2212.09748).
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``(n, width)`` tokens and time embeddings to ``(n, width)``."""
        shift, scale, gate = self.modulation(time).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class MlpModel(ModelMixin, ConfigMixin):
    """A residual MLP on flattened pixels.

    Parameters
    ----------
    sample_size : int
        Side of the images in pixels.
    in_channels, out_channels : int
        Channels of input and output.
    width, depth : int
        See the recipe section.
    num_class_embeds : int, optional
        Classes of a class-conditional network.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 256,
        depth: int = 3,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_time = TimeEmbedding(width, num_class_embeds)
        self.embed = nn.Linear(in_channels * sample_size**2, width)
        self.blocks = nn.ModuleList(MlpBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels * sample_size**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Denoise ``(n, c, h, w)`` at times in [0, 1000], one for all rows or one each."""
        time = self.embed_time(sample, timestep, class_labels)
        x = self.embed(sample.flatten(1))
        for block in self.blocks:
            x = block(x, time)
        out = self.out(self.norm(x)).unflatten(1, (-1, *sample.shape[2:]))
        return UNet2DOutput(sample=out) if return_dict else (out,)


class ConvNextBlock(nn.Module):
    """Depthwise convolution and MLP, shifted, scaled and gated by the time embedding."""

    def __init__(self, width: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))
        # Zero gates: the block starts as the identity (arXiv 2212.09748).
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``(n, width, h, w)`` patches and ``(n, width)`` time embeddings to ``(n, width, h, w)``."""
        shift, scale, gate = self.modulation(time)[:, None, None].chunk(3, dim=-1)
        h = self.norm(self.spatial(x).permute(0, 2, 3, 1)) * (1 + scale) + shift
        return x + (gate * self.mlp(h)).permute(0, 3, 1, 2)


class ConvNextModel(ModelMixin, ConfigMixin):
    """A ConvNeXt-like denoiser on patches (arXiv 2201.03545), a tenth of a U-Net's cost at small sizes.

    Parameters
    ----------
    sample_size : int
        Side of the images in pixels; a multiple of ``patch_size``.
    in_channels, out_channels : int
        Channels of input and output.
    patch_size, width, depth, expansion, kernel_size : int
        See the recipe section.
    num_class_embeds : int, optional
        Classes of a class-conditional network.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        patch_size: int = 4,
        width: int = 128,
        depth: int = 4,
        expansion: int = 3,
        kernel_size: int = 5,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        side = sample_size // patch_size
        self.embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, side, side))
        self.embed_time = TimeEmbedding(width, num_class_embeds)
        self.blocks = nn.ModuleList(ConvNextBlock(width, expansion, kernel_size) for _ in range(depth))
        self.norm = nn.GroupNorm(1, width)
        self.out = nn.ConvTranspose2d(width, out_channels, patch_size, stride=patch_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Denoise ``(n, c, h, w)`` at times in [0, 1000], one for all rows or one each."""
        time = self.embed_time(sample, timestep, class_labels)
        x = self.embed(sample) + self.position
        # The blocks' MLPs see the channels last anyway, and depthwise convolutions on a CPU are twice as fast so.
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, time)
        out = self.out(self.norm(x))
        return UNet2DOutput(sample=out) if return_dict else (out,)
