"""Small networks of several seeds, trained side by side: one batched product a layer for all of them.

Every seed draws its weights, its data and its noise from generators of its own, and no sum runs over seeds, so that a
network comes out as if it had been trained alone, up to rounding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from couplings._files import written_atomically

__all__ = ["Best", "Ensemble", "Linear", "Perceptron", "Place", "Residual", "error", "generator", "train"]

INIT, DATA, TRAIN, CHECK, TEST = range(5)  # streams of random numbers of a seed
SAVE_EVERY = 60.0  # seconds


def generator(*numbers: int) -> torch.Generator:
    """Make a generator from a seed and the numbers of its stream and of its place there."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


class Linear(nn.Module):
    """Linear layers, one a seed, with PyTorch's default weights.

    Parameters
    ----------
    inputs, outputs : int
    generators : sequence of torch.Generator
        One a seed.
    """

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        bound = inputs**-0.5
        for name, rows in (("weight", inputs), ("bias", 1)):
            drawn = [torch.empty(rows, outputs).uniform_(-bound, bound, generator=g) for g in generators]
            setattr(self, name, nn.Parameter(torch.stack(drawn)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (seeds, rows, inputs) to (seeds, rows, outputs)."""
        return torch.baddbmm(self.bias, x, self.weight)


class Ensemble(nn.Module):
    """Networks of several seeds: every parameter's first axis counts them."""

    def alone(self, number: int) -> Self:
        """Return the network of one seed, as an ensemble of one."""
        one = copy.deepcopy(self)
        for parameter in one.parameters():
            parameter.data = parameter.data[number : number + 1].clone()
        return one


class Perceptron(Ensemble):
    """Hidden layers of one width; time, if there is one, is an input before the others.

    Parameters
    ----------
    widths : sequence of int
        Of the input, the hidden layers and the output.
    activation : callable
    seeds : sequence of int
    """

    def __init__(self, widths: Sequence[int], activation: Callable[[Tensor], Tensor], seeds: Sequence[int]) -> None:
        super().__init__()
        generators = [generator(seed, INIT) for seed in seeds]
        self.activation = activation
        self.layers = nn.ModuleList(Linear(*pair, generators) for pair in pairwise(widths))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Map (seeds, rows, inputs) and times (seeds, rows, 1) to (seeds, rows, outputs)."""
        x = x if t is None else torch.cat([t, x], dim=2)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Residual(Ensemble):
    """Residual blocks ``x + W GELU(V x)`` on the sum of linear maps of the point, the time and the condition.

    Parameters
    ----------
    seeds : sequence of int
    conditioned : bool
    width, expansion, depth : int
    """

    def __init__(
        self, seeds: Sequence[int], *, conditioned: bool = False, width: int = 128, expansion: int = 4, depth: int = 3
    ) -> None:
        super().__init__()
        generators = [generator(seed, INIT) for seed in seeds]
        self.point = Linear(2, width, generators)
        self.condition = Linear(1, width, generators) if conditioned else None
        self.time = Linear(1, width, generators)
        hidden = expansion * width
        self.wide = nn.ModuleList(Linear(width, hidden, generators) for _ in range(depth))
        self.narrow = nn.ModuleList(Linear(hidden, width, generators) for _ in range(depth))
        self.out = Linear(width, 2, generators)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map points (seeds, rows, 2), times and conditions (seeds, rows, 1) to velocities (seeds, rows, 2)."""
        x = self.point(x) + self.time(t)
        if self.condition is not None:
            x = x + self.condition(condition)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(F.gelu(wide(x)))
        return self.out(x)


def error(network: nn.Module, target: Tensor, **inputs: Tensor) -> Tensor:
    """Mean squared error of each seed's network: (seeds,)."""
    return (network(**inputs) - target).square().mean((1, 2))


class Problem(Protocol):
    """What is trained on."""

    def draw(self, seed: int, number: int) -> dict[str, Tensor]:
        """Make a seed's block of rows, coupled, as a function of the seed and of the number of the block."""


@dataclass(frozen=True)
class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of all seeds, by number."""

    problem: Problem
    seeds: tuple[int, ...]

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        drawn = [self.problem.draw(seed, number) for seed in self.seeds]
        return {name: torch.stack([block[name] for block in drawn]) for name in drawn[0]}


@dataclass(frozen=True)
class Place:
    """Where to train.

    Attributes
    ----------
    device : torch.device
    workers : int
        Processes that draw and couple ahead; 0 does it in this one.
    checkpoint : Path or None
        File that the training goes on from, if there is one.
    """

    device: torch.device
    workers: int = 0
    checkpoint: Path | None = None


class Best:
    """The weights of each seed's network at its lowest error on other data.

    Parameters
    ----------
    network : Module
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.state: dict[str, Any] = {"errors": None, "weights": {}}

    def offer(self, errors: Tensor) -> None:
        """Keep the present weights of the seeds whose errors (seeds,) are the lowest so far."""
        weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        if self.state["errors"] is not None:
            lower = errors < self.state["errors"]
            errors = torch.where(lower, errors, self.state["errors"])
            kept = self.state["weights"]
            weights = {name: torch.where(lower[:, None, None], value, kept[name]) for name, value in weights.items()}
        self.state = {"errors": errors, "weights": weights}

    def restore(self) -> None:
        """Give the network the weights that were kept."""
        self.network.load_state_dict(self.state["weights"])


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    problem: Problem,
    seeds: Sequence[int],
    place: Place,
    *,
    blocks: int,
    batch: int,
    loss: Callable[..., Tensor] = error,
    best: Best | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train networks on blocks of rows, each cut into batches in its order.

    Parameters
    ----------
    network : Module
        On the device of `place`.
    optimizer : Optimizer
        That treats every weight by itself, as Adam does.
    problem : Problem
    seeds : sequence of int
    place : Place
    blocks : int
    batch : int
        Rows of a step.
    loss : callable
        ``loss(network, **block)`` gives each seed's loss, (seeds,).
    best : Best, optional
        Kept in the checkpoint.
    after : callable, optional
        Called with the number of blocks done.
    """
    first = 0
    if place.checkpoint is not None and place.checkpoint.exists():
        saved = torch.load(place.checkpoint, map_location=place.device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["blocks"]
        if best is not None:
            best.state = saved["best"]
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        Blocks(problem, tuple(seeds)),
        batch_size=None,
        sampler=range(first, blocks),  # type: ignore[arg-type]
        num_workers=place.workers,
        pin_memory=place.device.type == "cuda",
        prefetch_factor=8 if place.workers else None,
        multiprocessing_context="spawn" if place.workers else None,
    )
    saved_at = time.monotonic()
    for done, drawn in enumerate(loader, first + 1):
        block = {name: value.to(place.device, non_blocking=True) for name, value in drawn.items()}
        for start in range(0, next(iter(block.values())).shape[1], batch):
            optimizer.zero_grad(set_to_none=True)
            loss(network, **{name: value[:, start : start + batch] for name, value in block.items()}).sum().backward()
            optimizer.step()
        if after is not None:
            after(done)
        if place.checkpoint is not None and (time.monotonic() - saved_at > SAVE_EVERY or done == blocks):
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "blocks": done}
            place.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with written_atomically(place.checkpoint, force=True) as file:
                torch.save(state | {"best": best.state if best is not None else None}, file)
            saved_at = time.monotonic()
