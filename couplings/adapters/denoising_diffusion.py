"""Couple the noise of a ``GaussianDiffusion`` of denoising-diffusion-pytorch.

Its own ``immiscible=True`` permutes the noise that is mixed in and keeps the unpermuted noise as the target. Here one
noise is drawn, coupled, and handed to ``p_losses``, which mixes it in and makes the target of it::

    diffusion = GaussianDiffusion(model, image_size=32)
    couple_noise(diffusion)
    loss = diffusion(images)
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from couplings.coupling import Coupling

_DIFFUSIONS = "GaussianDiffusion and its variants, whose p_losses takes noise="


def couple_noise(
    diffusion: nn.Module, coupling: Coupling | None = None, *, condition: str | None = None
) -> RemovableHandle:
    """Couple the noise of every training call ``diffusion(images)``, also inside the library's own ``Trainer``.

    Parameters
    ----------
    diffusion : Module
        A ``GaussianDiffusion``, or a variant of it such as ``GaussianDiffusion1D`` and
        ``ContinuousTimeGaussianDiffusion``.
    coupling : Coupling, optional
        By default the exact coupling on squared distances.
    condition : str, optional
        Name of the keyword argument of the training call whose values to couple within: ``"classes"`` for
        ``classifier_free_guidance``.

    Returns
    -------
    RemovableHandle
        ``handle.remove()`` makes the noise independent again.

    Raises
    ------
    TypeError
        If the module's ``p_losses`` takes no noise.
    ValueError
        If it was made with ``immiscible=True``; also at a call, if it was switched on later.

    Notes
    -----
    The noise is drawn by ``torch.randn_like``, as the library does, unless the call passes ``noise=``. Sampling is left
    as it is. Offset noise is added by the library after the coupling.
    """
    losses = getattr(diffusion, "p_losses", None)
    if not isinstance(diffusion, nn.Module) or losses is None or "noise" not in inspect.signature(losses).parameters:
        msg = f"couple_noise() takes {_DIFFUSIONS}, got {type(diffusion).__name__}."
        raise TypeError(msg)
    _check(diffusion)
    return diffusion.register_forward_pre_hook(_Noise(coupling or Coupling(), condition), with_kwargs=True)


@dataclass(frozen=True)
class _Noise:
    """The hook: puts coupled noise among the arguments of the call."""

    coupling: Coupling
    condition: str | None

    def __call__(
        self, diffusion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _check(diffusion)
        rest = dict(kwargs)
        images = args[0] if args else rest["img"]
        noise = args[1] if len(args) > 1 else rest.get("noise")
        if noise is None:
            noise = torch.randn_like(images)
        classes = None
        if self.condition is not None:
            classes = rest.get(self.condition)
            if classes is None:
                msg = f"condition={self.condition!r} couples within classes: pass {self.condition}= to the call."
                raise ValueError(msg)
        normalize = getattr(diffusion, "normalize", lambda images: 2 * images - 1)
        rest["noise"] = self.coupling(normalize(images), noise, condition=classes).noise
        return (*args[:1], *args[2:]), rest


def _check(diffusion: nn.Module) -> None:
    if getattr(diffusion, "immiscible", False):
        msg = (
            "immiscible=True permutes the noise a second time, and only where it is mixed in: most rows would be "
            "regressed on another noise. Make the diffusion with immiscible=False."
        )
        raise ValueError(msg)
