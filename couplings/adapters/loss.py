"""Couple the noise of a loss function that is given it: ``loss(model, x, noise, sigma)``.

So are the losses of k-diffusion (``model.loss(input, noise, sigma)``), of OpenAI's consistency models
(``diffusion.consistency_losses(model, x_start, num_scales, noise=None)``) and many that follow EDM.

>>> import torch
>>> from couplings.adapters.loss import coupled_loss
>>> def loss(model, x, noise, sigma):
...     return (model(x + sigma * noise, sigma) - x).square().mean()
>>> loss = coupled_loss(loss)
>>> float(loss(lambda noisy, sigma: noisy, torch.zeros(4, 2), torch.ones(4, 2), 1.0))
1.0
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from couplings._names import unknown
from couplings.coupling import Coupling


def coupled_loss(
    loss: Callable[..., Any],
    coupling: Coupling | None = None,
    *,
    data: str | None = None,
    noise: str = "noise",
    condition: str | None = None,
) -> Callable[..., Any]:
    """Wrap a loss so that the noise it is given is coupled with the data first.

    Parameters
    ----------
    loss : callable
        Has a parameter for the data and one for standard normal noise, not yet scaled by sigma. It mixes the noise in
        and makes its target of it.
    coupling : Coupling, optional
        By default the exact coupling on squared distances.
    data : str, optional
        Name of the parameter with the data; by default the one before the noise.
    noise : str
        Name of the parameter with the noise. Where it may be left out (None), ``torch.randn_like`` draws it.
    condition : str, optional
        Name of the argument whose values to couple within, such as ``"labels"`` or ``"class_cond"``.

    Returns
    -------
    callable
        The same signature.

    Raises
    ------
    ValueError
        If the loss has no such parameter, or a call has no such condition.
    """
    coupling = coupling or Coupling()
    signature = inspect.signature(loss)
    names = list(signature.parameters)
    for name in (noise, *([] if data is None else [data])):
        if name not in names:
            raise ValueError(unknown("parameter of the loss", name, names))
    if data is None:
        if names[0] == noise:
            msg = f"no parameter stands before {noise!r}: name the data's, data=. Parameters: {', '.join(names)}."
            raise ValueError(msg)
        data = names[names.index(noise) - 1]

    @wraps(loss)
    def with_coupling(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = {**call.arguments, **kwargs}
        x, drawn = given[data], given.get(noise)
        classes = None if condition is None else given.get(condition)
        if condition is not None and classes is None:
            msg = f"condition={condition!r} couples within classes: pass {condition}= to the loss."
            raise ValueError(msg)
        drawn = torch.randn_like(x) if drawn is None else drawn
        call.arguments[noise] = coupling(x, drawn, condition=classes).noise
        return loss(*call.args, **call.kwargs)

    return with_coupling
