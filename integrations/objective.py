"""What a training objective says: how noise is mixed into data and what the network regresses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .randomness import Draws

Generators = torch.Generator | list[torch.Generator] | None
"""Randomness of a sampler: one stream for the batch, or one for each of its rows."""


@dataclass
class Mixed:
    """One block, ready for the network.

    Parameters
    ----------
    inputs : (n, *shape) Tensor
        What the network sees.
    timesteps : (n,) Tensor
        The time it is told.
    target : (n, *shape) Tensor
        What it should answer.
    weight : (n,) Tensor, optional
        Weight of each row's squared error.
    """

    inputs: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor | None = None


def rows(values: Tensor, like: Tensor) -> Tensor:
    """Shape ``(n,)`` values so that they multiply the rows of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


class Objective(nn.Module, ABC):
    """One training objective.

    The loop owns data, noise and coupling: it hands `loss` the data and the noise paired with it,
    and every random number in here comes from the block's `Draws`.
    """

    pipeline_name: ClassVar[str]
    """Class of the exported pipeline."""

    def __init__(self, config: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        """Shape of a row of data, as the noise is drawn."""

    def prepare(self, images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Any]]:
        """Turn images in [-1, 1] into data as noise is mixed into it, and what else the network is told."""
        return images, {}

    @abstractmethod
    def loss(self, model: nn.Module, data: Tensor, noise: Tensor, draws: Draws, **context: Any) -> Tensor:
        """Return the ``(n,)`` losses of a block, in float32."""

    def attach(self, model: nn.Module) -> None:
        """Meet the network before training: an objective that needs a copy of it takes one here."""

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that belong in a checkpoint beside the trained one."""
        return {}

    def after_step(self, model: nn.Module, steps: int) -> None:
        """Follow the network after ``steps`` optimizer steps."""

    @abstractmethod
    def sample(
        self, model: nn.Module, noise: Tensor, steps: int, generator: Generators = None, first: int = 0
    ) -> Tensor:
        """Turn ``(n, *shape)`` noise into images in [-1, 1] with ``steps`` evaluations of the network.

        ``first`` is the number of the first row among all samples drawn: a conditional model gives sample
        ``i`` the class ``i % classes``.
        """

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a diffusers pipeline that samples with ``model``."""


class Regression(Objective):
    """An objective that regresses a target at one noise level per row, by squared error."""

    @abstractmethod
    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Mixed:
        """Mix ``noise`` into ``data`` and state the regression target."""

    def loss(self, model: nn.Module, data: Tensor, noise: Tensor, draws: Draws, **context: Any) -> Tensor:
        """Return the ``(n,)`` losses of a block."""
        mixed = self.mix(data, noise, draws)
        prediction = self.predict(model, mixed.inputs, mixed.timesteps, context)
        error = (prediction.float() - mixed.target.float()).square().flatten(1).mean(1)
        return error if mixed.weight is None else error * mixed.weight

    def predict(self, model: nn.Module, inputs: Tensor, timesteps: Tensor, context: dict[str, Any]) -> Tensor:
        """Ask the network."""
        return model(inputs, timesteps).sample
