"""Averages of the weights over training: what is sampled from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .sections import Train


def group(train: Train, decay: float | None) -> str:
    """Return the name that a checkpoint keeps an average under; None is the first one."""
    return "ema" if decay in (None, train.ema_decay) else f"ema-{decay}"


class Averages:
    """Exponential moving averages of a network, one for each decay of a recipe.

    Parameters
    ----------
    train : Train
        The recipe's section.
    model : Module
        The network.
    """

    def __init__(self, train: Train, model: nn.Module) -> None:
        self.model, self.compiled = model, train.compile
        self.weights = list(model.parameters())
        self.of = {
            group(train, decay): EMAModel(
                model.parameters(),
                decay=decay,
                min_decay=0.0 if train.ema_ramp else decay,
                update_after_step=-1,  # the ramp then starts at 2/11
            )
            for decay in (train.ema_decay, *train.further_ema_decays)
        }

    def to(self, device: torch.device) -> None:
        """Move them."""
        for average in self.of.values():
            average.to(device)

    def follow(self) -> None:
        """Take in the network's weights; once per optimizer step."""
        with torch.no_grad():
            for average in self.of.values():
                average.optimization_step += 1
                # What EMAModel.step does weight by weight, to the last bit; its own `foreach` rounds otherwise.
                changes = torch._foreach_sub(average.shadow_params, self.weights)
                torch._foreach_mul_(changes, 1 - average.get_decay(average.optimization_step))
                torch._foreach_sub_(average.shadow_params, changes)

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """Lend the network with the first average for weights, in evaluation mode; not compiled for it."""
        first = self.of["ema"]
        first.store(self.model.parameters())
        first.copy_to(self.model.parameters())
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                yield self.model
        finally:
            first.restore(self.model.parameters())
            self.model.train()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages by their names and the weights' names, as a checkpoint keeps them."""
        names = [name for name, _ in self.model.named_parameters()]
        return {key: dict(zip(names, average.shadow_params, strict=True)) for key, average in self.of.items()}

    @property
    def steps(self) -> int:
        """Number of steps taken in."""
        return self.of["ema"].optimization_step

    def restore(self, tensors: dict[str, Iterable[Any]], steps: int) -> None:
        """Undo `tensors`. Copied into place: the memory that the kernels see stays as it was."""
        for key, average in self.tensors().items():
            for name, shadow in average.items():
                shadow.copy_(tensors[key][name])
            self.of[key].optimization_step = steps
