"""The NCSN++ network of consistency models on CIFAR-10, from the building blocks of diffusers.

As configured in openai/consistency_models_cifar10: BigGAN residual blocks with FIR resampling, attention,
an input pyramid added to the residuals, sums scaled by 1 / sqrt(2) (arXiv 2011.13456). diffusers'
UNet2DModel has no such input pyramid, and its Fourier time embedding cannot take the negative
timesteps of consistency models.

A copy of this file travels with an exported pipeline: it imports nothing of this package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

_SCALE = math.sqrt(2)


class NcsnppModel(ModelMixin, ConfigMixin):
    """NCSN++ with residual input pyramid.

    Parameters
    ----------
    sample_size : int
        Side of the images in pixels.
    in_channels, out_channels : int
        Channels of input and output.
    channels : int
        Channels at full resolution before the multipliers.
    multipliers : tuple of int
        Channels of each level, in multiples of ``channels``.
    layers_per_block : int
        Residual blocks per level on the way down; one more on the way up.
    attention : tuple of bool
        Whether each level has attention.
    fourier_scale : float
        Standard deviation of the frequencies of the time embedding.
    dropout : float
        Dropout probability.
    norm_groups : int
        Groups of the group normalisations.
    num_class_embeds : int, optional
        Classes of a class-conditional network.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 128,
        multipliers: tuple[int, ...] = (2, 2, 2),
        layers_per_block: int = 4,
        attention: tuple[bool, ...] = (False, True, False),
        fourier_scale: float = 16.0,
        dropout: float = 0.0,
        norm_groups: int = 32,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        embedding = 4 * channels
        widths = [channels * multiplier for multiplier in multipliers]
        self.frequencies = nn.Parameter(fourier_scale * torch.randn(channels), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(2 * channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embedding)

        def residual(width_in: int, width_out: int, **resample: bool) -> ResnetBlock2D:
            return ResnetBlock2D(
                in_channels=width_in,
                out_channels=width_out,
                temb_channels=embedding,
                groups=norm_groups,
                eps=1e-6,
                dropout=dropout,
                kernel="fir",
                output_scale_factor=_SCALE,
                use_in_shortcut=bool(resample) or width_in != width_out,
                **resample,
            )

        def attend(width: int) -> Attention:
            return Attention(
                width,
                heads=1,
                dim_head=width,
                norm_num_groups=norm_groups,
                eps=1e-6,
                bias=True,
                residual_connection=True,
                rescale_output_factor=_SCALE,
                _from_deprecated_attn_block=True,
            )

        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.down_attention, self.shrink, self.pyramid = (nn.ModuleList() for _ in range(4))
        skips, width, pyramid = [channels], channels, in_channels
        for level, target in enumerate(widths):
            for _ in range(layers_per_block):
                self.down.append(residual(width, target))
                self.down_attention.append(attend(target) if attention[level] else nn.Identity())
                width = target
                skips.append(width)
            if level < len(widths) - 1:
                self.shrink.append(residual(width, width, down=True))
                self.pyramid.append(FirDownsample2D(pyramid, width, use_conv=True))
                pyramid = width
                skips.append(width)
        self.mid = nn.ModuleList([residual(width, width), attend(width), residual(width, width)])
        self.up, self.up_attention, self.grow = (nn.ModuleList() for _ in range(3))
        for level, target in reversed(list(enumerate(widths))):
            for _ in range(layers_per_block + 1):
                self.up.append(residual(width + skips.pop(), target))
                width = target
            self.up_attention.append(attend(width) if attention[level] else nn.Identity())
            if level > 0:
                self.grow.append(residual(width, width, up=True))
        self.norm_out = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Every residual branch and the network itself start at zero.
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.to_out[0].weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Denoise ``(n, c, h, w)`` at timesteps ``250 ln(sigma)``, one for all rows or one each."""
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        angles = (timestep / 1000).to(sample.dtype)[:, None] * self.frequencies * (2 * math.pi)
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.label is not None:
            if class_labels is None:
                msg = "class_labels: got None, expected the classes of a class-conditional network"
                raise ValueError(msg)
            embedding = embedding + self.label(class_labels)

        layers, levels = self.config.layers_per_block, len(self.config.multipliers)
        x, pyramid = self.conv_in(sample), sample
        skips = [x]
        for level in range(levels):
            for i in range(level * layers, (level + 1) * layers):
                x = self.down_attention[i](self.down[i](x, embedding))
                skips.append(x)
            if level < levels - 1:
                pyramid = (self.pyramid[level](pyramid) + self.shrink[level](x, embedding)) / _SCALE
                x = pyramid
                skips.append(x)
        x = self.mid[2](self.mid[1](self.mid[0](x, embedding)), embedding)
        for level in range(levels):
            for i in range(level * (layers + 1), (level + 1) * (layers + 1)):
                x = self.up[i](torch.cat([x, skips.pop()], dim=1), embedding)
            x = self.up_attention[level](x)
            if level < levels - 1:
                x = self.grow[level](x, embedding)
        out = self.conv_out(F.silu(self.norm_out(x)))
        return UNet2DOutput(sample=out) if return_dict else (out,)
