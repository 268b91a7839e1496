"""Copies between a device and the host: the host waits once for many of them, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device", "to_host"]


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors to the host; it waits once, for all of them.

    Parameters
    ----------
    *tensors : Tensor
        On the same device, or on the host already: these come back as they are. From CUDA they are copied through
        pinned memory, which torch keeps and uses again.

    Returns
    -------
    list of Tensor
    """
    copies, device = [], None
    for tensor in tensors:
        if tensor.is_cuda:
            device = tensor.device
            staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.append(staging.copy_(tensor, non_blocking=True))
        else:
            copies.append(tensor.cpu())
    if device is not None:
        torch.cuda.current_stream(device).synchronize()
    return copies


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, in the order of its stream; the host does not wait."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor).to(
        device, non_blocking=True
    )
