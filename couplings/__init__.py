"""Pair noise with data, in each minibatch, when training diffusion, consistency and flow models.

>>> import torch
>>> from couplings import couple
>>> images, noise = torch.rand(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
>>> noise = couple(images, noise).noise
"""

from importlib import import_module
from typing import Any

from couplings.ahead import lookahead
from couplings.assigners import MethodInfo, methods, register
from couplings.coupling import Coupled, Coupling, couple
from couplings.distances import metrics
from couplings.kernels import warmup
from couplings.quantization import quantizers

__version__ = "0.2.0"

__all__ = [
    "Coupled",
    "Coupling",
    "MethodInfo",
    "__version__",
    "couple",
    "lookahead",
    "methods",
    "metrics",
    "quantizers",
    "register",
    "warmup",
]

_SUBMODULES = ("diagnostics", "noise", "persistent", "semidiscrete", "testing")


def __getattr__(name: str) -> Any:
    """Import ``couplings.semidiscrete``, ``couplings.testing`` and the like when first named, not with the package."""
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
