"""Tell the network of a pipeline the classes of its images; a copy of this file travels in exported folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput


@contextmanager
def told(
    unet: torch.nn.Module, class_labels: torch.Tensor | list[int] | None, guidance_scale: float, classes: int | None
) -> Iterator[None]:
    """Within, a pipeline that calls its network with images and a time tells it their classes, and is guided.

    Parameters
    ----------
    unet : ModelMixin
        The network.
    class_labels : (n,) int Tensor or list
        The class of each image; None for an unconditional network.
    guidance_scale : float
        Classifier-free guidance towards the class; 1 is none.
    classes : int, optional
        Classes that the network can be told; None for an unconditional one.

    Raises
    ------
    ValueError
        For classes that the network does not know, or guidance that it has not learned.
    """
    if classes is None and class_labels is None and guidance_scale == 1:
        yield
        return
    if classes is None:
        found = f"class_labels {class_labels} and guidance_scale {guidance_scale}"
        msg = f"got {found}, expected None and 1: this network is unconditional"
        raise ValueError(msg)
    labels = torch.as_tensor([] if class_labels is None else class_labels, dtype=torch.int64, device=unet.device)
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        msg = f"class_labels: got {class_labels}, expected for each image a number of at least 0, below {classes}"
        raise ValueError(msg)
    guided = guidance_scale != 1
    if guided and unet.config.num_class_embeds == classes:
        msg = f"guidance_scale: got {guidance_scale}, expected 1: this network was told the class of every image"
        raise ValueError(msg)
    if guided:
        # The class after the last one is none of them.
        labels = torch.cat([torch.full_like(labels, classes), labels])

    def ask(_: torch.nn.Module, arguments: tuple, further: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        sample, timestep = arguments
        return (torch.cat([sample, sample]) if guided else sample, timestep), {**further, "class_labels": labels}

    def guide(_: torch.nn.Module, arguments: tuple, output: Any) -> Any:
        without, towards = output[0].chunk(2)
        return UNet2DOutput(sample=without + guidance_scale * (towards - without))

    hooks = [unet.register_forward_pre_hook(ask, with_kwargs=True)]
    if guided:
        hooks.append(unet.register_forward_hook(guide))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
