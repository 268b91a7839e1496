"""Rounding the operands of the cost to a narrow type, without overflow.

Pairing needs far less precision than training: rounding `data` and `noise` before their distances are computed
changes few pairs and, where the hardware multiplies the narrow type faster, saves time. Only the cost sees rounded
values; the noise that is returned never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from couplings._names import unknown
from couplings._products import row_products

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


@dataclass(frozen=True, eq=False)
class Operand:
    """One side of the cost: its rows and, when quantized, the narrow codes that stand for them.

    Attributes
    ----------
    rows : (..., n, d) Tensor
        float32 or float64, or codes of a quantizer.
    scale : 0-d Tensor or None
        ``values == rows * scale``, in the precision of the cost; None where the rows are the values.
    """

    rows: Tensor
    scale: Tensor | None = None

    @cached_property
    def values(self) -> Tensor:
        """(..., n, d) Tensor: float32 or float64, rounded if quantized."""
        return self.rows if self.scale is None else self.rows.to(self.scale.dtype).mul_(self.scale)

    def __getitem__(self, index: Tensor) -> Operand:
        return Operand(self.rows[index], self.scale)


def largest_magnitude(values: Tensor) -> Tensor:
    """Largest magnitude, a 0-d tensor; NaN if there is one. Does not wait for the device."""
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


def quantized(values: Tensor, name: str | None, *, largest: Tensor | None = None) -> Operand:
    """Round `values` to the named type after a scale that keeps every finite value finite.

    Parameters
    ----------
    values : (n, d) Tensor
        float32 or float64, finite.
    name : str or None
        One of `quantizers()`; None rounds nothing.
    largest : 0-d Tensor, optional
        Largest magnitude of the tensor that `values` are some rows of; by default, that of `values`.

    Returns
    -------
    Operand
    """
    if name is None:
        return Operand(values)
    dtype, limit = _TYPES[name]
    if limit is None:
        # The largest float32 values round up to infinity in bfloat16; its largest finite value is the answer.
        top = torch.finfo(dtype).max
        finite = values.clamp(-top, top)
        return Operand(torch.where(values.isinf(), values, finite).to(dtype), values.new_ones(()))
    if largest is None:
        largest = largest_magnitude(values)
    # A peak of a few denormals would give a scale of zero and the division below infinity. NaN stays: codes have none.
    scale = torch.where(largest == 0, 1.0, (largest / limit).clamp_min(torch.finfo(values.dtype).tiny))
    scaled = (values / scale).clamp_(-limit, limit)
    return Operand((scaled.round_() if dtype is torch.int8 else scaled).to(dtype), scale)


def inner_products(x: Operand, y: Operand, *, factor: float = 1.0) -> Tensor:
    """``factor * x @ y.T`` with one matrix product, in the narrow type where the device multiplies it natively.

    Parameters
    ----------
    x, y : Operand
        ``(n, d)`` and ``(m, d)``, or batches ``(b, n, d)`` and ``(b, m, d)`` of such.
    factor : float
        Multiplies the product at no extra cost.

    Returns
    -------
    (..., n, m) Tensor
        float32, or float64 for float64 values.

    Notes
    -----
    int8 is exact on every device: sums of products of int8 values are integers, accumulated exactly. The other types
    agree between devices up to the order of accumulation.
    """
    if x.scale is not None and y.scale is not None:
        product = None
        if x.rows.dtype is torch.int8:
            product = _int8_product(x.rows, y.rows)
        elif x.rows.is_cuda:
            product = _native_product(x.rows, y.rows)
        if product is not None:
            return product.to(x.scale.dtype).mul_(x.scale * y.scale * factor)
    return row_products(x.values, y.values, factor=factor)


def _native_product(x: Tensor, y: Tensor) -> Tensor | None:
    """Product of codes on a CUDA device, accumulated and returned in float32; None where it has no such kernel."""
    if x.dim() != 2:
        return None
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
    depth = x.shape[-1]
    exact = torch.int32 if depth * 127 * 127 < 2**31 else torch.float64
    if x.is_cuda and x.dim() == 2 and exact is torch.int32 and len(x) > 16 and depth % 8 == 0 and len(y) % 8 == 0:
        return torch._int_mm(x, y.T)
    total = torch.zeros(*x.shape[:-1], y.shape[-2], dtype=exact, device=x.device)
    for start in range(0, depth, _EXACT_INT8_TERMS):
        part = slice(start, start + _EXACT_INT8_TERMS)
        total += row_products(x[..., part].float(), y[..., part].float()).to(exact)
    return total
