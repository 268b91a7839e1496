"""Products of rows with rows, by whichever of PyTorch's two libraries multiplies faster on this processor.

PyTorch multiplies float32 on CPUs by MKL, which leaves AVX-512 unused on processors that are not Intel's; oneDNN, which
PyTorch brings along for its layers, does not.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["row_products"]

_WORTH_IT = 1 << 22  # multiplications; below, what a call of oneDNN takes by itself is more


def row_products(x: Tensor, y: Tensor, bias: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
    """Compute ``bias + factor * x @ y.T``.

    Parameters
    ----------
    x, y : Tensor
        ``(n, d)`` and ``(m, d)``, or batches ``(b, n, d)`` and ``(b, m, d)`` of such.
    bias : (m,) Tensor, optional
    factor : float

    Returns
    -------
    (..., n, m) Tensor
    """
    if _large(x, y) and _onednn_is_faster():
        if x.dim() == 3:
            return torch.stack([row_products(*pair, bias, factor=factor) for pair in zip(x, y, strict=True)])
        if factor != 1.0 and bias is not None:
            return row_products(x, y, factor=factor).add_(bias)
        with torch.no_grad():
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
        return product if factor == 1.0 else product.mul_(factor)
    multiply = torch.addmm if x.dim() == 2 else torch.baddbmm
    return multiply(x.new_zeros(()) if bias is None else bias, x, y.mT, beta=0 if bias is None else 1, alpha=factor)


def _large(x: Tensor, y: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype is y.dtype is torch.float32
    return plain and x.shape[-2] * y.shape[-2] * x.shape[-1] >= _WORTH_IT


@lru_cache(maxsize=1)
def _onednn_is_faster() -> bool:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # PyTorch was built without oneDNN
        return False
    from llvmlite import binding

    return str(binding.get_host_cpu_name()).startswith("znver") and torch.backends.cpu.get_cpu_capability() == "AVX512"
