"""What a training objective says: how noise is mixed into data, what the network regresses and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .data import Piece, Source, Text
from .randomness import Draws

Told = Tensor | list[str]
"""What rows are told: ``(n,)`` numbers of their classes, -1 for none, or their captions, empty for none."""

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

    Parameters
    ----------
    config : dataclass
        The recipe's section.
    shape : tuple of int
        Shape of a row of data, as the noise is drawn.
    classes : int, optional
        Classes that the network can be told; None for an unconditional one.
    """

    pipeline_name: ClassVar[str]
    """Class of the exported pipeline."""

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int | None = None) -> None:
        super().__init__()
        self.config, self.shape, self.classes = config, shape, classes
        self.tells = None if classes is None else "class"
        """What the network is told: nothing, the ``class``, or ``column:NAME``, a text of the data."""
        self.dropout: float = getattr(config, "class_dropout", 0.0)
        """Share of the rows that are told nothing."""

    def encode(self, images: Tensor, draws: Draws) -> Tensor:
        """Turn images in [-1, 1] into data as noise is mixed into it."""
        return images

    def told(self, labels: Tensor, texts: dict[str, list[Text]], draws: Draws | None = None) -> Told:
        """Choose what the network is told of rows of data.

        In training, with ``draws``, it is one of a row's captions at random, and nothing for some rows; else the first.
        """
        if self.tells in (None, "class"):
            told = labels if self.tells else torch.full_like(labels, -1)
            if draws is None or not self.dropout:
                return told
            silent = torch.rand(len(told), generator=draws.generator("caption"), device=told.device)
            return torch.where(silent < self.dropout, -1, told)
        column = texts[self.tells.removeprefix("column:")]
        choices = [[text] if isinstance(text, str) else text or [""] for text in column]
        if draws is None:
            return [of_row[0] for of_row in choices]
        silent, place = torch.rand(2, len(choices), generator=draws.generator("caption", torch.device("cpu"))).tolist()
        return [
            "" if nothing < self.dropout else of_row[int(where * len(of_row))]
            for of_row, nothing, where in zip(choices, silent, place, strict=True)
        ]

    def choose(self, source: Source, count: int, seed: int, choices: Sequence[int | str] = ()) -> Told | None:
        """Choose what ``count`` samples are told: the choices in turn, or what rows of the data are told.

        Sample ``i`` is told what is told of row ``i`` in an order of the data that ``seed`` decides: so classes and
        captions come in the proportions of the data.
        """
        if self.tells is None:
            return None
        if choices:
            told = [choices[i % len(choices)] for i in range(count)]
            return told if isinstance(told[0], str) else torch.tensor(told)
        size, pieces = len(source), []
        for epoch in range(-(-count // size)):
            last = min(size, count - epoch * size)
            pieces += [Piece(epoch, first, min(first + 256, last)) for first in range(0, last, 256)]
        batches = list(source.blocks(pieces, seed))
        texts = {name: list(chain(*(batch.texts[name] for batch in batches))) for name in source.texts}
        return self.told(torch.cat([batch.labels for batch in batches]), texts)

    def tell(self, told: Told) -> dict[str, Tensor]:
        """Return the arguments by which the network is told."""
        if self.classes is None:
            return {}
        # The class after the last one is none of them: it is there if some rows are told nothing in training.
        return {"class_labels": torch.where(told < 0, self.classes, told)}

    @abstractmethod
    def loss(self, model: nn.Module, data: Tensor, noise: Tensor, draws: Draws, **context: Tensor) -> Tensor:
        """Return the ``(n,)`` losses of a block, in float32; the network takes ``context`` too."""

    def attach(self, model: nn.Module) -> None:
        """Meet the network before training: an objective that needs a copy of it takes one here."""

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that belong in a checkpoint beside the trained one."""
        return {}

    def after_step(self, model: nn.Module, steps: int) -> None:
        """Follow the network after ``steps`` optimizer steps."""

    @abstractmethod
    def sample(
        self, model: nn.Module, noise: Tensor, steps: int, generator: Generators = None, told: Told | None = None
    ) -> Tensor:
        """Turn ``(n, *shape)`` noise into images in [-1, 1] with ``steps`` evaluations of the network.

        ``told`` is what it is told of each row; None is nothing.
        """

    def guided(self, model: nn.Module, noise: Tensor, told: Told | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the network as a sampler asks it, at one time for all rows of ``noise``.

        It is told ``told``, and its answer is taken away from the one that it gives told nothing, if the recipe says so
        (classifier-free guidance, arXiv 2207.12598).
        """
        if told is None and self.classes is not None and not self.dropout:
            msg = "told: got None, expected classes: with objective.class_dropout = 0 the network must be told one"
            raise ValueError(msg)
        nothing = torch.full((len(noise),), -1, device=noise.device)
        if isinstance(told, Tensor):
            told = told.to(noise.device)
        context, scale = self.tell(nothing if told is None else told), getattr(self.config, "guidance_scale", 1.0)
        if scale == 1 or told is None:
            return lambda x, t: model(x, t, **context).sample
        context = {name: torch.cat([silent, context[name]]) for name, silent in self.tell(nothing).items()}

        def ask(x: Tensor, t: Tensor) -> Tensor:
            without, towards = model(torch.cat([x, x]), t, **context).sample.chunk(2)
            return without + scale * (towards - without)

        return ask

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a diffusers pipeline that samples with ``model``."""


class Regression(Objective):
    """An objective that regresses a target at one noise level per row, by squared error."""

    @abstractmethod
    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Mixed:
        """Mix ``noise`` into ``data`` and state the regression target."""

    def loss(self, model: nn.Module, data: Tensor, noise: Tensor, draws: Draws, **context: Tensor) -> Tensor:
        """Return the ``(n,)`` losses of a block."""
        mixed = self.mix(data, noise, draws)
        prediction = model(mixed.inputs, mixed.timesteps, **context).sample
        error = (prediction.float() - mixed.target.float()).square().flatten(1).mean(1)
        return error if mixed.weight is None else error * mixed.weight
