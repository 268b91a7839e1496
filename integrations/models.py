"""Networks, built from a recipe's ``model`` section."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .config import Adm, ConditionUnet, ConvNext, Mlp, Ncsnpp, RecipeError, Unet
from .ncsnpp import NcsnppModel
from .objective import Objective
from .small_networks import ConvNextModel, MlpModel


def build_model(config: Any, objective: Objective) -> ModelMixin:
    """Build the network that a recipe names, for the data of ``objective``."""
    channels, side, _ = objective.shape
    options = dataclasses.asdict(config)
    del options["name"], options["parameters"]
    if isinstance(config, ConditionUnet):
        return _condition_unet(config, channels, side, objective.caption_width)
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
        return UNet2DModel(
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
    assert isinstance(config, Unet)
    return UNet2DModel(
        **common,
        down_block_types=_kinds(config.attention, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=_kinds(config.attention[::-1], "AttnUpBlock2D", "UpBlock2D"),
        # The rest is the DDPM network as published (google/ddpm-cifar10-32).
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def _kinds(attention: list[bool], attending: str, plain: str) -> tuple[str, ...]:
    return tuple(attending if here else plain for here in attention)


def _condition_unet(config: ConditionUnet, channels: int, side: int, caption_width: int) -> UNet2DConditionModel:
    if config.pretrained is not None:
        network = UNet2DConditionModel.from_pretrained(config.pretrained, subfolder="unet")
        found = (network.config.in_channels, network.config.cross_attention_dim)
        if found != (channels, caption_width):
            msg = (
                f"model.pretrained: {config.pretrained} has (in_channels, cross_attention_dim) = {found}, "
                f"expected {(channels, caption_width)} of objective.pretrained"
            )
            raise RecipeError(msg)
        return align(network).train()
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
