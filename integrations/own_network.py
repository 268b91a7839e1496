"""A network of the user's own, in the form that diffusers saves and opens.

A copy of this file travels with an exported pipeline, beside the network's own: it imports nothing of this package.
"""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


def built(kind: type, given: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Build a class with its options, and with what it takes of what is given to every such class."""
    takes = inspect.signature(kind).parameters
    rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    everything = rest and kind.__init__ is not nn.Module.__init__
    return kind(**{name: value for name, value in given.items() if name in takes or everything}, **options)


class OwnModel(ModelMixin, ConfigMixin):
    """A network that is called as ``network(x, timesteps)`` and returns a tensor, or something with a ``sample``.

    Parameters
    ----------
    class_path : str
        Where its class is imported from.
    init_args : dict
        Arguments of its constructor; a dictionary with a ``class_path`` stands for an object.
    sample_size, in_channels, out_channels : int
        Side of the images and channels of input and output: the constructor gets what it takes of these.
    num_class_embeds, cross_attention_dim : int, optional
        Classes that it is told, and width of the captions that it is told: given likewise, unless None.
    time_cond_proj_dim : None
        diffusers' pipeline of Stable Diffusion asks for it: the network is not told the scale of the guidance.
    network : Module, optional
        The network; built here by default.
    """

    ignore_for_config: ClassVar[list[str]] = ["network"]
    kind: ClassVar[type | None] = None
    """The network's class, where its file lies beside this one."""
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        class_path: str,
        init_args: dict[str, Any],
        sample_size: int,
        in_channels: int,
        out_channels: int,
        num_class_embeds: int | None = None,
        cross_attention_dim: int | None = None,
        time_cond_proj_dim: None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if network is None:
            sizes = {"sample_size": sample_size, "in_channels": in_channels, "out_channels": out_channels}
            told = {"num_class_embeds": num_class_embeds, "cross_attention_dim": cross_attention_dim}
            given = sizes | {name: value for name, value in told.items() if value is not None}
            options = {name: _object(value) for name, value in init_args.items()}
            network = built(self.kind or pydoc.locate(class_path), given, options)
        self.network = network

    def enable_gradient_checkpointing(self, *options: Any) -> None:
        """Leave it to the network."""
        self.network.enable_gradient_checkpointing(*options)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True, **told: Any
    ) -> UNet2DOutput | tuple[Tensor]:
        """Ask the network for rows of images at ``(n,)`` times, told whatever is not None."""
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        out = self.network(sample, timesteps, **{name: value for name, value in told.items() if value is not None})
        out = getattr(out, "sample", out)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def _object(value: Any) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return pydoc.locate(value["class_path"])(**value.get("init_args", {}))
    return value
