"""Checking what the user passed, before anything is computed: every error says what arrived and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from couplings.quantization import largest

Array = Tensor | np.ndarray[Any, Any]


def as_tensor(value: Array, name: str) -> Tensor:
    """View a NumPy array as a tensor (copying only what torch cannot view), and refuse everything else.

    Raises
    ------
    TypeError
        If it is neither, or of a type that is not floating.
    """
    if isinstance(value, np.ndarray):
        if not np.issubdtype(value.dtype, np.floating) or value.dtype.itemsize > 8:
            msg = f"{name} must be floating (float16, float32 or float64), got {value.dtype}. {_MEND_INTEGER}"
            raise TypeError(msg)
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        if not native.flags.writeable or any(stride < 0 for stride in native.strides):
            native = native.copy()
        return torch.from_numpy(native)
    if not isinstance(value, Tensor):
        msg = f"{name} must be a torch tensor or a NumPy array, got {type(value).__name__}."
        raise TypeError(msg)
    if not value.is_floating_point():
        msg = f"{name} must be floating, got {value.dtype}. {_MEND_INTEGER}"
        raise TypeError(msg)
    if value.layout is not torch.strided:
        msg = f"{name} must be a dense tensor, got layout {value.layout}. Call .to_dense() first."
        raise TypeError(msg)
    if value.device.type == "meta":
        msg = f"{name} is on the meta device and has no values to couple."
        raise ValueError(msg)
    return value.detach()


_MEND_INTEGER = "Scale images first, for example images.float() / 127.5 - 1."


def check_pair(data: Array, noise: Array) -> tuple[Tensor, Tensor]:
    """Check that data and noise can be coupled.

    Returns
    -------
    (n, *shape) Tensor, (m, *shape) Tensor

    Raises
    ------
    TypeError
        For integers, for a mix of NumPy and torch, or for a mix of dtypes.
    ValueError
        For a mix of devices, empty batches, or shapes that do not match.
    """
    if isinstance(data, np.ndarray) != isinstance(noise, np.ndarray):
        msg = f"data and noise must both be torch tensors or both NumPy arrays, got {_kind(data)} and {_kind(noise)}."
        raise TypeError(msg)
    if isinstance(data, Tensor) and isinstance(noise, Tensor) and data.device != noise.device:
        msg = f"data is on {data.device} and noise on {noise.device}. Move one: noise.to(data.device)."
        raise ValueError(msg)
    x, y = as_tensor(data, "data"), as_tensor(noise, "noise")
    if x.dtype != y.dtype:
        msg = f"data is {x.dtype} and noise {y.dtype}. Convert one: noise.to(data.dtype)."
        raise TypeError(msg)
    if x.dim() == 0 or y.dim() == 0:
        msg = f"data and noise need a batch axis, got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        raise ValueError(msg)
    if x.shape[1:] != y.shape[1:]:
        msg = (
            f"data and noise must agree in all axes but the first, got {tuple(x.shape)} and {tuple(y.shape)}."
            f" Expected noise of shape ({len(x)}, {', '.join(map(str, x.shape[1:]))})."
        )
        raise ValueError(msg)
    if x.numel() == 0 or y.numel() == 0:
        msg = f"the batch is empty: data has shape {tuple(x.shape)}, noise {tuple(y.shape)}. Skip empty batches."
        raise ValueError(msg)
    if len(y) < len(x):
        msg = f"every data row needs a noise row: got {len(x)} rows of data and {len(y)} of noise."
        raise ValueError(msg)
    return x, y


def working_copy(value: Tensor, name: str) -> tuple[Tensor, float]:
    """Flatten to ``(rows, d)`` in the precision of the cost, and check that every value is finite.

    Returns
    -------
    (rows, d) Tensor
        float64 for float64 input, float32 otherwise: the input itself where it already is.
    float
        The largest magnitude.

    Raises
    ------
    ValueError
        If any value is NaN or infinite, saying where.
    """
    dtype = torch.float64 if value.dtype is torch.float64 else torch.float32
    flat = value.reshape(len(value), -1).to(dtype)
    peak = largest(flat)
    if not peak < float("inf"):  # NaN compares false
        bad = (~torch.isfinite(flat)).any(1).nonzero().flatten()
        msg = (
            f"{name} contains NaN or infinity in {len(bad)} of {len(flat)} rows (first: row {int(bad[0])}). "
            "Coupling them would hide it; find where it comes from."
        )
        raise ValueError(msg)
    return flat, peak


def check_condition(condition: Array, n: int, device: torch.device) -> Tensor:
    """Check a condition and move it to the data's device.

    Returns
    -------
    (n,) integer Tensor or (n, c) floating Tensor

    Raises
    ------
    TypeError, ValueError
        If it is neither, or not finite.
    """
    if isinstance(condition, np.ndarray):
        if condition.dtype.kind not in "fiub" or condition.dtype.itemsize > 8:
            msg = f"condition= must be integer or floating, got {condition.dtype}."
            raise TypeError(msg)
        condition = torch.from_numpy(condition.astype(condition.dtype.newbyteorder("=")))
    if not isinstance(condition, Tensor):
        msg = f"condition= takes a tensor or a NumPy array, got {_kind(condition)}."
        raise TypeError(msg)
    if condition.is_complex():
        msg = f"condition= must be integer or floating, got {condition.dtype}."
        raise TypeError(msg)
    condition = condition.detach().to(device)
    if not condition.is_floating_point():
        condition = condition.long()  # torch sorts no unsigned integers but bytes
    expected = f"({n}, c)" if condition.is_floating_point() else f"({n},)"
    if condition.dim() != (2 if condition.is_floating_point() else 1) or len(condition) != n:
        kind = "a floating" if condition.is_floating_point() else "an integer"
        mend = " Use .unsqueeze(1) for one number per row, .long() for class labels." if condition.dim() == 1 else ""
        msg = f"{kind} condition= must have shape {expected}, a row per data row, got {tuple(condition.shape)}.{mend}"
        raise ValueError(msg)
    if condition.is_floating_point() and not bool(torch.isfinite(condition).all()):
        msg = "condition= contains NaN or infinity."
        raise ValueError(msg)
    return condition


def check_generator(generator: object) -> None:
    """Refuse anything but a `torch.Generator` or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        msg = (
            f"generator= takes a torch.Generator or None, got {_kind(generator)}. "
            "Type: torch.Generator().manual_seed(0)"
        )
        raise TypeError(msg)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
