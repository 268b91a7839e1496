"""Import denoising-diffusion-pytorch where torchvision cannot be installed: its models never use what it imports."""

import importlib
import sys
from types import ModuleType

import pytest

_ABSENT = {
    "torchvision": ("transforms", "utils"),
    "pytorch_fid": (),
    "pytorch_fid.fid_score": ("calculate_frechet_distance",),
    "pytorch_fid.inception": ("InceptionV3",),
}


def load(module="denoising_diffusion_pytorch"):
    """Return a module of the package, with empty modules in the place of those for pictures and FID."""
    for name in (
        "einops",
        "ema_pytorch",
        "accelerate",
    ):  # before the stand-ins, which others could mistake for packages
        pytest.importorskip(name)
    stands_in = [name for name in _ABSENT if name not in sys.modules and not _installed(name)]
    try:
        for name in stands_in:
            sys.modules[name] = ModuleType(name)
            for attribute in _ABSENT[name]:
                setattr(sys.modules[name], attribute, None)
        return pytest.importorskip(module, exc_type=ImportError)
    finally:
        for name in stands_in:
            del sys.modules[name]


def _installed(name):
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):  # a build for CUDA beside a torch for the CPU raises the latter
        return False
    return True
