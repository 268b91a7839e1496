"""Networks, built from a recipe's ``model`` section."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from . import checkpoint, own
from .config import RecipeError
from .ncsnpp import NcsnppModel
from .network_sections import Adm, ConditionUnet, ConvNext, Mlp, Ncsnpp, OwnNetwork, Unet
from .objective import Objective
from .own_network import OwnModel
from .small_networks import ConvNextModel, MlpModel

VERSION_1 = (
    *(f"CompVis/stable-diffusion-v1-{minor}" for minor in range(1, 5)),
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Pipelines of Stable Diffusion 1.x: the default sizes of diffusers' networks are theirs."""


DDPM = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
"""What makes diffusers' U-Net the published one of DDPM (google/ddpm-cifar10-32)."""
ADM = {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"}
"""What makes it that of ADM."""


def build_model(config: Any, objective: Objective, *, blank: bool = False) -> ModelMixin:
    """Build the network that a recipe names, for the data of ``objective``.

    ``blank`` reads the sizes of a pretrained one only, where its weights do not matter.

    Raises
    ------
    RecipeError
        If there is no such network for this data.
    """
    channels, side, _ = objective.shape
    # One more for no class, if some rows are told none.
    classes = None if config.classes is None else config.classes + (objective.dropout > 0)
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels, "num_class_embeds": classes}
    if isinstance(config, OwnNetwork):
        return _own_network(config, objective, sizes)
    config.check_side(side)
    try:
        if isinstance(config, ConditionUnet):
            return _condition_unet(config, sizes, objective.caption_width, blank)
        return _unet(config, sizes) if isinstance(config, Unet | Adm) else _network_of_ours(config, sizes)
    except RecipeError:
        raise
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        msg = f"model: {config.name} cannot be built for images of {channels} x {side} x {side}: {error}"
        raise RecipeError(" ".join(msg.split())) from error


def _network_of_ours(config: Mlp | ConvNext | Ncsnpp, sizes: dict[str, int | None]) -> ModelMixin:
    kinds = {"mlp": MlpModel, "convnext": ConvNextModel, "ncsnpp": NcsnppModel}
    options = dataclasses.asdict(config)
    for name in ("name", "parameters", "classes"):  # which are no sizes of the network
        del options[name]
    return kinds[config.name](**sizes, **options)


def _unet(config: Unet | Adm, sizes: dict[str, int | None]) -> UNet2DModel:
    adm = isinstance(config, Adm)
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if adm else ("DownBlock2D", "UpBlock2D")
    network = UNet2DModel(
        **sizes,
        **(ADM if adm else DDPM),
        block_out_channels=tuple(config.channels),
        down_block_types=tuple("AttnDownBlock2D" if attends else down for attends in config.attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else up for attends in config.attention[::-1]),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.head_channels,
        norm_num_groups=config.norm_groups,
        # Without it the middle attention of ADM would have no normalisation.
        attn_norm_num_groups=config.norm_groups,
        dropout=config.dropout,
    )
    return start_at_zero(network)


def _own_network(config: OwnNetwork, objective: Objective, sizes: dict[str, int | None]) -> ModelMixin:
    """Build a network for the data of an objective: one of diffusers as it is, any other as an `OwnModel`."""
    given = sizes | {"cross_attention_dim": getattr(objective, "caption_width", None)}
    given = {name: value for name, value in given.items() if value is not None}
    model = own.construct("model", config, nn.Module, **given)
    if not type(model).__module__.startswith("diffusers."):
        model = OwnModel(config.class_path, config.init_args, **given, network=model)
    rows, told = torch.zeros(2, *objective.shape), {}
    if "num_class_embeds" in given:
        told["class_labels"] = torch.zeros(2, dtype=torch.int64)
    if "cross_attention_dim" in given:
        told["encoder_hidden_states"] = torch.zeros(2, 77, given["cross_attention_dim"])
    called = f"{config.class_path} called as network(x, timesteps{''.join(f', {name}=' for name in told)})"
    if rows.device.type != "meta":  # where only its sizes matter
        with torch.no_grad(), own.told(f"model.class_path: {called}"):
            found = model.eval()(rows, torch.full((2,), 500.0), **told).sample.shape
        if found != rows.shape:
            msg = f"model.class_path: {called} gives {tuple(found)} for x of {tuple(rows.shape)}, expected that shape"
            raise RecipeError(msg)
    return model.train()


def start_at_zero(network: UNet2DModel) -> UNet2DModel:
    """Start every residual branch and the output at zero, as the published trainings do, and return the network."""
    ends = [network.conv_out]
    ends += [module.conv2 for module in network.modules() if isinstance(module, ResnetBlock2D)]
    ends += [module.to_out[0] for module in network.modules() if isinstance(module, Attention)]
    for layer in ends:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


def _condition_unet(
    config: ConditionUnet, sizes: dict[str, int | None], caption_width: int, blank: bool
) -> UNet2DConditionModel:
    if config.pretrained is None:
        attending = len(config.channels) - 1
        return UNet2DConditionModel(
            **sizes,
            block_out_channels=tuple(config.channels),
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=caption_width,
            attention_head_dim=config.head_channels,
            norm_num_groups=config.norm_groups,
        )
    name = config.pretrained
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
    found, expected = (
        (network.config.in_channels, network.config.cross_attention_dim),
        (sizes["in_channels"], caption_width),
    )
    if found != expected:
        what = f"(in_channels, cross_attention_dim) = {found}, expected {expected} of objective.pretrained"
        msg = f"model.pretrained: {name} has {what}"
        raise RecipeError(msg)
    return network


def begin_from(path: str, model: nn.Module) -> None:
    """Begin with the weights that a recipe names.

    Raises
    ------
    RecipeError
        If there are none, or they are another network's.
    """
    try:
        given = checkpoint.weights(Path(path))
    except checkpoint.CheckpointError as error:
        msg = f"train.init_from: {error}"
        raise RecipeError(msg) from error
    if isinstance(model, OwnModel) and not model.state_dict().keys() & given.keys():
        # Of the network without what wraps it.
        given = {f"network.{name}": value for name, value in given.items()}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:  # tells the names and the shapes that differ
        _, _, wrong = str(error).partition("\n")
        msg = f"train.init_from: {path} does not fit the network: {textwrap.shorten(wrong, 400, placeholder=' ...')}"
        raise RecipeError(msg) from None


def recompute(model: nn.Module) -> None:
    """Recompute activations in the backward pass.

    Raises
    ------
    RecipeError
        If the network cannot.
    """
    try:
        model.enable_gradient_checkpointing()
    except (AttributeError, ValueError):
        name = getattr(model.config, "class_path", type(model).__name__)
        msg = f"train.gradient_checkpointing: got True, expected false: {name} has no gradient checkpointing"
        raise RecipeError(msg) from None


def align(network: nn.Module) -> nn.Module:
    """Copy the weights of a loaded network into memory of its own, and return the network.

    ``from_pretrained`` maps them at odd addresses, where kernels round differently from run to run.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network
