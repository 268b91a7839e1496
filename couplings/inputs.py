"""Checking what the user passed, before anything is computed: every error says what arrived and what to do."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from couplings._transfer import to_device
from couplings.conditions import Conditions

Array = Tensor | np.ndarray[Any, Any]


def as_tensor(value: Array, name: str) -> Tensor:
    """View a NumPy array as a tensor (copying only what torch cannot view), and refuse everything else.

    Raises
    ------
    TypeError
        If it is neither, or of a type that is not floating.
    ValueError
        If it has no values to couple.
    """
    if isinstance(value, np.ndarray):
        return _array_as_tensor(value, name)
    if not isinstance(value, Tensor):
        msg = f"{name} must be a torch tensor or a NumPy array, got {type(value).__name__}."
        raise TypeError(msg)
    if not value.is_floating_point():
        raise TypeError(_not_floating(name, value.dtype, complex_=value.is_complex()))
    if value.is_nested:
        msg = f"{name} is a nested tensor. Couple one shape at a time, or pad it: t.to_padded_tensor(0.0)."
        raise TypeError(msg)
    if value.layout is not torch.strided:
        msg = f"{name} must be a dense tensor, got layout {value.layout}. Call .to_dense() first."
        raise TypeError(msg)
    if value.device.type == "meta":
        msg = f"{name} is on the meta device and has no values to couple."
        raise ValueError(msg)
    return value


def _array_as_tensor(value: np.ndarray[Any, Any], name: str) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(_masked(name))
    if not np.issubdtype(value.dtype, np.floating):
        raise TypeError(_not_floating(name, value.dtype, complex_=value.dtype.kind == "c"))
    if value.dtype.itemsize > 8:
        msg = f"{name} must be float16, float32 or float64, got {value.dtype}. Type: {name}.astype(numpy.float64)"
        raise TypeError(msg)
    native = value.astype(value.dtype.newbyteorder("="), copy=False)
    if not native.flags.writeable or any(stride < 0 for stride in native.strides):
        native = native.copy()
    return torch.from_numpy(native)


def _masked(name: str) -> str:
    return f"{name} is a masked array, whose mask would be lost. Fill it first: {name}.filled(...)."


def _not_floating(name: str, dtype: object, *, complex_: bool) -> str:
    text = str(dtype)
    if complex_:
        mend = f"Couple real and imaginary parts as one row: torch.view_as_real({name})."
    elif "bool" in text:
        mend = f"Type: {name}.float()"
    elif text.endswith("int64"):
        mend = "Token ids have no distance: couple their embeddings. Scale images first, x.float() / 127.5 - 1."
    else:
        mend = "Scale images first, for example images.float() / 127.5 - 1."
    return f"{name} must be floating (float16, bfloat16, float32 or float64), got {dtype}. {mend}"


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
        raise ValueError(_other_shape(x, y))
    if x.numel() == 0 or y.numel() == 0:
        msg = f"the batch is empty: data has shape {tuple(x.shape)}, noise {tuple(y.shape)}. Skip empty batches."
        raise ValueError(msg)
    if len(y) < len(x):
        msg = f"every data row needs a noise row: got {len(x)} rows of data and {len(y)} of noise."
        raise ValueError(msg)
    return x, y


def _other_shape(x: Tensor, y: Tensor) -> str:
    msg = (
        f"data and noise must agree in all axes but the first, got {tuple(x.shape)} and {tuple(y.shape)}."
        f" Expected noise of shape ({len(x)}, {', '.join(map(str, x.shape[1:]))})."
    )
    if y.dim() == x.dim() + 1 and y.shape[0] == x.shape[0] and y.shape[2:] == x.shape[1:]:
        msg += " The k candidates of a row are k rows of noise: noise.flatten(0, 1)."
    return msg


def flat(value: Tensor) -> Tensor:
    """Flatten to ``(rows, d)`` in the precision of the cost: the input itself where it already is.

    Returns
    -------
    (rows, d) Tensor
        float64 for float64 input, float32 otherwise.
    """
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    dtype = torch.float64 if value.dtype is torch.float64 else torch.float32
    return value.detach().reshape(len(value), -1).to(dtype)


def report_not_finite(data: Tensor, noise: Tensor, metric: object) -> NoReturn:
    """Raise the error for costs that are not finite, with the reason.

    Parameters
    ----------
    data, noise : (n, d), (m, d) Tensor
    metric : str or callable

    Raises
    ------
    ValueError
        Always.
    """
    for name, values in (("data", data), ("noise", noise)):
        bad = (~torch.isfinite(values)).any(1).nonzero().flatten()
        if len(bad):
            msg = (
                f"{name} contains NaN or infinity in {len(bad)} of {len(values)} rows (first: row {int(bad[0])}). "
                "Coupling them would hide it; find where it comes from."
            )
            raise ValueError(msg)
    what = getattr(metric, "__name__", metric)
    msg = (
        f"the cost {what} is not finite everywhere (it is computed in {data.dtype}). "
        "Scale the inputs (or the condition), pass float64, or mend the metric."
    )
    raise ValueError(msg)


def check_conditions(
    condition: object, noise_condition: object, data: Tensor, noise: Tensor, *, rows_apart: bool
) -> Conditions | None:
    """Check ``condition=`` and ``noise_condition=``.

    Parameters
    ----------
    condition, noise_condition : object
        As they were passed.
    data, noise : (n, ...), (m, ...) Tensor
    rows_apart : bool
        Whether the method looks at each row by itself, so that no condition changes its answer.

    Returns
    -------
    Conditions or None
        None without conditions, or where they change nothing.

    Raises
    ------
    TypeError, ValueError
        If one is neither integer nor floating, not finite, of another shape, or not of the kind of the other.
    """
    if condition is None:
        if noise_condition is not None:
            msg = "noise_condition= needs condition=, the conditions of the data."
            raise ValueError(msg)
        return None
    n, m, device = len(data), len(noise), data.device
    classes, features = _one_side(condition, "condition", n, device)
    if rows_apart:
        return None
    if noise_condition is None:
        if m != n:
            msg = f"condition= needs as many noise rows as data rows, each tagged with its condition, got {m} and {n}."
            raise ValueError(msg)
        return Conditions(classes, features, classes, features)
    noise_classes, noise_features = _one_side(noise_condition, "noise_condition", m, device)
    if (classes is None, features is None) != (noise_classes is None, noise_features is None):
        msg = "noise_condition= must be of the kind of condition=: integer classes, floating features, or both."
        raise ValueError(msg)
    if features is not None and noise_features is not None and features.shape[1] != noise_features.shape[1]:
        msg = f"condition= has {features.shape[1]} features a row and noise_condition= {noise_features.shape[1]}."
        raise ValueError(msg)
    return Conditions(classes, features, noise_classes, noise_features)


def _one_side(condition: object, name: str, n: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(condition, tuple):
        parts = [_condition(part, name, n, device) for part in condition]
        if len(parts) != 2 or parts[0].is_floating_point() or not parts[1].is_floating_point():
            msg = f"{name}= as a tuple takes (classes, features): an (n,) integer and an (n, c) floating tensor."
            raise ValueError(msg)
        return parts[0], parts[1]
    checked = _condition(condition, name, n, device)
    return (None, checked) if checked.is_floating_point() else (checked, None)


def _condition(condition: object, name: str, n: int, device: torch.device) -> Tensor:
    if isinstance(condition, np.ma.MaskedArray):
        raise TypeError(_masked(name))
    if isinstance(condition, np.ndarray):
        if condition.dtype.kind not in "fiub" or condition.dtype.itemsize > 8:
            msg = f"{name}= must be integer or floating, got {condition.dtype}."
            raise TypeError(msg)
        condition = torch.from_numpy(condition.astype(condition.dtype.newbyteorder("=")))
    if not isinstance(condition, Tensor):
        msg = f"{name}= takes a tensor or a NumPy array, got {_kind(condition)}."
        raise TypeError(msg)
    if condition.is_complex():
        msg = f"{name}= must be integer or floating, got {condition.dtype}."
        raise TypeError(msg)
    floating = condition.is_floating_point()
    if condition.dim() != (2 if floating else 1) or len(condition) != n:
        kind, expected = ("a floating", f"({n}, c)") if floating else ("an integer", f"({n},)")
        msg = (
            f"{kind} {name}= must have shape {expected}, a row per {'noise' if name[0] == 'n' else 'data'} row, "
            f"got {tuple(condition.shape)}.{_mend_condition(condition)}"
        )
        raise ValueError(msg)
    condition = condition.detach()
    if not floating:
        return condition.long()  # torch sorts no unsigned integers but bytes
    # On a device it would have to be waited for: there the cost, which is checked, is not finite either.
    if condition.device.type == "cpu" and not bool(torch.isfinite(condition).all()):
        msg = f"{name}= contains NaN or infinity."
        raise ValueError(msg)
    return to_device(condition, device)


def _mend_condition(condition: Tensor) -> str:
    if condition.dim() == 1:
        return " Use .unsqueeze(1) for one number per row, .long() for class labels."
    if condition.dim() == 2 and not condition.is_floating_point():
        return " Use .squeeze(1)." if condition.shape[1] == 1 else " Of one-hot rows use .argmax(1)."
    return ""


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
