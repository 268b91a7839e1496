"""Networks, built from a recipe's ``model`` section."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .config import Adm, ConditionUnet, ConvNext, Mlp, Ncsnpp, RecipeError, Unet
from .ncsnpp import NcsnppModel
from .objective import Objective
from .small_networks import ConvNextModel, MlpModel

VERSION_1 = (
    *(f"CompVis/stable-diffusion-v1-{minor}" for minor in range(1, 5)),
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Pipelines of Stable Diffusion 1.x: the default sizes of diffusers' networks are theirs."""


def build_model(config: Any, objective: Objective, *, blank: bool = False) -> ModelMixin:
    """Build the network that a recipe names, for the data of ``objective``.

    ``blank`` reads the sizes of a pretrained one only, where its weights do not matter.
    """
    channels, side, _ = objective.shape
    options = dataclasses.asdict(config)
    del options["name"], options["parameters"]
    if isinstance(config, ConditionUnet):
        return _condition_unet(config, channels, side, objective.caption_width, blank)
    if isinstance(config, Mlp | ConvNext):
        kind = MlpModel if isinstance(config, Mlp) else ConvNextModel
        return kind(sample_size=side, in_channels=channels, out_channels=channels, **options)
    if isinstance(config, Ncsnpp):
        options["num_class_embeds"] = options.pop("classes")
        return NcsnppModel(sample_size=side, in_channels=channels, out_channels=channels, **options)
    common = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": config.layers_per_block,
        "block_out_channels": tuple(config.channels),
        "norm_num_groups": config.norm_groups,
        "attention_head_dim": config.head_channels,
        "dropout": config.dropout,
    }
    if isinstance(config, Adm):
        network = UNet2DModel(
            **common,
            down_block_types=_kinds(config.attention, "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=_kinds(config.attention[::-1], "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
            # Without it the middle attention would have no normalisation.
            attn_norm_num_groups=config.norm_groups,
            num_class_embeds=config.classes,
        )
        return start_at_zero(network)
    assert isinstance(config, Unet)
    network = UNet2DModel(
        **common,
        down_block_types=_kinds(config.attention, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=_kinds(config.attention[::-1], "AttnUpBlock2D", "UpBlock2D"),
        # The rest is the DDPM network as published (google/ddpm-cifar10-32).
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return start_at_zero(network)


def start_at_zero(network: UNet2DModel) -> UNet2DModel:
    """Start every residual branch and the output at zero, as the published trainings do, and return the network."""
    ends = [network.conv_out]
    ends += [module.conv2 for module in network.modules() if isinstance(module, ResnetBlock2D)]
    ends += [module.to_out[0] for module in network.modules() if isinstance(module, Attention)]
    for layer in ends:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


def _kinds(attention: list[bool], attending: str, plain: str) -> tuple[str, ...]:
    return tuple(attending if here else plain for here in attention)


def _condition_unet(
    config: ConditionUnet, channels: int, side: int, caption_width: int, blank: bool
) -> UNet2DConditionModel:
    name = config.pretrained
    if name is not None:
        if not blank:
            options = {"subfolder": "unet", "revision": config.revision}
            network = align(UNet2DConditionModel.from_pretrained(name, **options)).train()
        elif name in VERSION_1:
            network = UNet2DConditionModel(cross_attention_dim=768)
        elif Path(name).is_dir():
            network = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(name, subfolder="unet"))
        else:
            expected = f"a local folder or one of {', '.join(VERSION_1)}"
            msg = f"model.pretrained: the sizes of {name!r} are not known here; expected {expected}"
            raise RecipeError(msg)
        found = (network.config.in_channels, network.config.cross_attention_dim)
        if found != (channels, caption_width):
            msg = (
                f"model.pretrained: {name} has (in_channels, cross_attention_dim) = {found}, expected "
                f"{(channels, caption_width)} of objective.pretrained"
            )
            raise RecipeError(msg)
        return network
    attending = len(config.channels) - 1
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.channels),
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=caption_width,
        attention_head_dim=config.head_channels,
        norm_num_groups=config.norm_groups,
    )


def align(network: nn.Module) -> nn.Module:
    """Copy the weights of a loaded network into memory of its own, and return the network.

    ``from_pretrained`` maps them at odd addresses, where kernels round differently from run to run.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network
