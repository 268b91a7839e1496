"""Networks, built from a recipe's ``model`` section."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from . import checkpoint, own
from .config import Adm, ConditionUnet, ConvNext, Mlp, Ncsnpp, OwnNetwork, RecipeError, Unet
from .ncsnpp import NcsnppModel
from .objective import Objective
from .own_network import OwnModel
from .small_networks import ConvNextModel, MlpModel

VERSION_1 = (
    *(f"CompVis/stable-diffusion-v1-{minor}" for minor in range(1, 5)),
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Pipelines of Stable Diffusion 1.x: the default sizes of diffusers' networks are theirs."""


def build_model(config: Any, objective: Objective, *, blank: bool = False) -> ModelMixin:
    """Build the network that a recipe names, for the data of ``objective``.

    ``blank`` reads the sizes of a pretrained one only, where its weights do not matter.

    Raises
    ------
    RecipeError
        If there is no such network for this data.
    """
    channels, side, _ = objective.shape
    if isinstance(config, OwnNetwork):
        return _own_network(config, objective)
    config.check_side(side)
    try:
        return _build(config, objective, blank)
    except RecipeError:
        raise
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        msg = f"model: {config.name} cannot be built for images of {channels} x {side} x {side}: {error}"
        raise RecipeError(" ".join(msg.split())) from error


def _build(config: Any, objective: Objective, blank: bool) -> ModelMixin:
    channels, side, _ = objective.shape
    options = dataclasses.asdict(config)
    del options["name"], options["parameters"]
    # One more for no class, if some rows are told none.
    classes = options.pop("classes")
    told = None if classes is None else classes + (objective.dropout > 0)
    if isinstance(config, ConditionUnet):
        return _condition_unet(config, channels, side, objective.caption_width, blank)
    if isinstance(config, Mlp | ConvNext):
        kind = MlpModel if isinstance(config, Mlp) else ConvNextModel
        return kind(sample_size=side, in_channels=channels, out_channels=channels, num_class_embeds=told, **options)
    if isinstance(config, Ncsnpp):
        return NcsnppModel(
            sample_size=side, in_channels=channels, out_channels=channels, num_class_embeds=told, **options
        )
    common = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": config.layers_per_block,
        "block_out_channels": tuple(config.channels),
        "norm_num_groups": config.norm_groups,
        "attention_head_dim": config.head_channels,
        "dropout": config.dropout,
        "num_class_embeds": told,
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


def _own_network(config: OwnNetwork, objective: Objective) -> ModelMixin:
    """Build a network for the data of an objective: one of diffusers as it is, any other as an `OwnModel`."""
    channels, side, _ = objective.shape
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
    classes = None if config.classes is None else config.classes + (objective.dropout > 0)
    told = {"num_class_embeds": classes, "cross_attention_dim": getattr(objective, "caption_width", None)}
    given = sizes | {name: value for name, value in told.items() if value is not None}
    model = own.construct("model", config, nn.Module, **given)
    if not type(model).__module__.startswith("diffusers."):
        model = OwnModel(config.class_path, config.init_args, **given, network=model)
    rows = torch.zeros(2, *objective.shape)
    told = {} if config.classes is None else {"class_labels": torch.zeros(2, dtype=torch.int64)}
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
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if isinstance(model, OwnModel) and not expected.keys() & given.keys():  # of the network without what wraps it
        given = {f"network.{name}": value for name, value in given.items()}
    found = {name: tuple(value.shape) for name, value in given.items()}
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"there is no {name} in the network" for name in found.keys() - expected.keys()]
    both = expected.keys() & found.keys()
    wrong += [f"{name} is {found[name]}, not {expected[name]}" for name in both if expected[name] != found[name]]
    if wrong:
        further = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        msg = f"train.init_from: {path} does not fit the network: {'; '.join(sorted(wrong)[:3])}{further}"
        raise RecipeError(msg)
    model.load_state_dict(given)


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
