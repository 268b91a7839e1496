"""Rounding the operands of the cost to a narrow type, without overflow.

Pairing needs far less precision than training: rounding `data` and `noise` before their distances are computed
changes few pairs and, where the hardware multiplies the narrow type faster, saves time. Only the cost sees rounded
values; the noise that is returned never does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from couplings._names import unknown

# The largest magnitude after scaling. None: the type has the range of float32 and needs no scale.
_TYPES: dict[str, tuple[torch.dtype, float | None]] = {
    "fp16": (torch.float16, 1.0),
    "bf16": (torch.bfloat16, None),
    "fp8_e4m3": (torch.float8_e4m3fn, 448.0),
    "fp8_e5m2": (torch.float8_e5m2, 57344.0),
    "int8": (torch.int8, 127.0),
}

# 127 * 127 * 1040 < 2**24: every partial sum of this many products of int8 values is exact in float32.
_EXACT_INT8_TERMS = 1040


def quantizers() -> list[str]:
    """Names that `quantize=` accepts.

    Returns
    -------
    list of str
    """
    return list(_TYPES)


def canonical_quantizer(name: str | None) -> str | None:
    """Lower-case a quantizer's name and check that it exists."""
    if name is None:
        return None
    if not isinstance(name, str):
        msg = f"quantize= takes a name or None, got {type(name).__name__}. Known: {', '.join(_TYPES)}."
        raise TypeError(msg)
    key = name.strip().lower()
    if key not in _TYPES:
        raise ValueError(unknown("quantizer", name, _TYPES))
    return key


def canonical_wire(wire: str | torch.dtype | None) -> str | None:
    """Name the type that noise travels in, given by a quantizer's name or by its dtype.

    Raises
    ------
    ValueError
        For a type that no quantizer rounds to.
    TypeError
        For anything that is neither.
    """
    if isinstance(wire, torch.dtype):
        names = {dtype: name for name, (dtype, _) in _TYPES.items()}
        if wire not in names:
            raise ValueError(unknown("wire type", wire, map(str, names)))
        return names[wire]
    if wire is not None and not isinstance(wire, str):
        msg = f"wire= takes a dtype such as torch.float16, a quantizer's name or None, got {type(wire).__name__}."
        raise TypeError(msg)
    return canonical_quantizer(wire)


def bytes_per_value(name: str) -> int:
    """Size of the type that a quantizer rounds to."""
    return _TYPES[name][0].itemsize


@dataclass(frozen=True, eq=False)
class Operand:
    """One side of the cost: values in working precision and, when quantized, the codes they came from.

    Attributes
    ----------
    values : (n, d) Tensor
        float32 or float64: the rounded values, scaled back.
    codes : (n, d) Tensor or None
        The same values before scaling back, in the narrow type.
    scale : 0-d Tensor or None
        ``values == codes * scale``.
    peak : float or None
        Largest magnitude before rounding, where it is known.
    """

    values: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    peak: float | None = None

    def __getitem__(self, rows: Tensor) -> Operand:
        codes = None if self.codes is None else self.codes[rows]
        return Operand(self.values[rows], codes, self.scale)


def largest(values: Tensor) -> float:
    """Largest magnitude, in one pass without a temporary; NaN if there is one. Waits for the device."""
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item())


def quantized(values: Tensor, name: str | None, *, peak: float | None = None) -> Operand:
    """Round `values` to the named type after a scale that keeps every finite value finite.

    Parameters
    ----------
    values : (n, d) Tensor
        float32 or float64, finite.
    name : str or None
        One of `quantizers()`; ``None`` rounds nothing.
    peak : float, optional
        Largest magnitude, where it is known: of `values`, or of the larger tensor that they are rows of.

    Returns
    -------
    Operand
    """
    if name is None:
        return Operand(values, peak=peak)
    dtype, limit = _TYPES[name]
    if limit is None:
        # The largest float32 values round up to infinity in bfloat16; its largest finite value is the answer.
        top = torch.finfo(dtype).max
        codes = values.clamp(-top, top).to(dtype)
        return Operand(codes.to(values.dtype), codes, values.new_ones(()), peak)
    largest = torch.linalg.vector_norm(values, ord=float("inf")) if peak is None else values.new_tensor(peak)
    # A peak of a few denormals would give a scale of zero and the division below infinity.
    scale = torch.where(largest > 0, (largest / limit).clamp_min(torch.finfo(values.dtype).tiny), 1.0)
    scaled = (values / scale).clamp_(-limit, limit)
    codes = (scaled.round_() if dtype is torch.int8 else scaled).to(dtype)
    return Operand(codes.to(values.dtype).mul_(scale), codes, scale, peak)


def inner_products(x: Operand, y: Operand, *, factor: float = 1.0) -> Tensor:
    """``factor * x @ y.T`` with one matrix product, in the narrow type where the device multiplies it natively.

    Parameters
    ----------
    x, y : Operand
        ``(n, d)`` and ``(m, d)``.
    factor : float
        Multiplies the product at no extra cost.

    Returns
    -------
    (n, m) Tensor
        float32, or float64 for float64 values.

    Notes
    -----
    int8 is exact on every device: sums of products of int8 values are integers, accumulated exactly. The other types
    agree between devices up to the order of accumulation.
    """
    if x.codes is not None and y.codes is not None and x.scale is not None and y.scale is not None:
        if x.codes.dtype is torch.int8:
            return _int8_product(x.codes, y.codes).to(x.values.dtype).mul_(x.scale * y.scale * factor)
        native = _native_product(x.codes, y.codes) if x.codes.is_cuda else None
        if native is not None:
            return native.to(x.values.dtype).mul_(x.scale * y.scale * factor)
    return torch.addmm(x.values.new_zeros(()), x.values, y.values.T, beta=0, alpha=factor)


def _native_product(x: Tensor, y: Tensor) -> Tensor | None:
    """Product of codes on a CUDA device, accumulated and returned in float32; None where it has no such kernel."""
    if x.dtype in (torch.float16, torch.bfloat16):
        # A half-precision result would overflow: d products of values up to 1 sum to d.
        return torch.mm(x, y.T, out_dtype=torch.float32)
    eight_bits = x.dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability(x.device) >= (8, 9)
    if eight_bits and x.shape[1] % 16 == 0 and y.shape[0] % 16 == 0:
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, y.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return None


def _int8_product(x: Tensor, y: Tensor) -> Tensor:
    """Exact product of int8 matrices: int32 where it cannot overflow, float64 beyond."""
    depth = x.shape[1]
    exact = torch.int32 if depth * 127 * 127 < 2**31 else torch.float64
    if x.is_cuda and exact is torch.int32 and x.shape[0] > 16 and depth % 8 == 0 and y.shape[0] % 8 == 0:
        return torch._int_mm(x, y.T)
    total = torch.zeros(x.shape[0], y.shape[0], dtype=exact, device=x.device)
    for start in range(0, depth, _EXACT_INT8_TERMS):
        part = slice(start, start + _EXACT_INT8_TERMS)
        total += (x[:, part].float() @ y[:, part].float().T).to(exact)
    return total
