"""What is trained on the pairs, and how it is sampled: several objectives at once, on the same pairs."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from couplings import couple
from integrations import config
from integrations.build import build_objective
from integrations.consistency import ConsistencyObjective, Levels, target_decay
from integrations.data import Source
from integrations.flow_matching import TIME_SCALE
from integrations.randomness import Draws

from ..training import RECIPES
from .networks import Stack, tensors

Pair = tuple[Tensor, Tensor]


def _overrides(**fields: str) -> tuple[str, ...]:
    """Return the overrides that set fields of the objective."""
    return tuple(text for name, value in fields.items() for text in (f"--objective.{name}", value))


class Study(ABC):
    """Objectives, each trained on every seed: networks 0 to S - 1 of a stack are those of the first objective.

    Parameters
    ----------
    source : Source
        The data.
    pairing : str
        How noise is paired, which may decide what is trained.
    further : sequence of str
        Overrides of the recipes.

    Attributes
    ----------
    pairings : dict
        The ways of pairing, to the objectives that are trained with them.
    recipes, objectives : dict
        By the names of the objectives. What is not of the objective is the same in all recipes.
    target : (R, W) Tensor or None
        The weights that follow those of the networks, where the objective has such.
    """

    name: str
    variants: dict[str, tuple[str, ...]]
    pairings: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    training: tuple[str, ...] = ()
    target: Tensor | None = None

    def __init__(self, source: Source, pairing: str, further: Sequence[str] = ()) -> None:
        self.recipes = {}
        for name in self.pairings.get(pairing, self.variants):
            recipe, *overrides = self.variants[name]
            self.recipes[name] = config.load([str(RECIPES / recipe), *self.training, *overrides, *further])
        for recipe in self.recipes.values():
            if hasattr(recipe.objective, "total_steps"):
                recipe.objective.total_steps = recipe.train.steps
        self.objectives = {name: build_objective(recipe, source) for name, recipe in self.recipes.items()}

    def to(self, device: torch.device) -> None:
        """Move what objectives hold."""
        for objective in self.objectives.values():
            objective.to(device)

    def mixed(self, data: Tensor, noise: Tensor, draws: Draws) -> Any:
        """Let every objective mix the same pairs, a batch for each seed, and concatenate what they give."""
        parts = [objective.mix(data, noise, draws) for objective in self.objectives.values()]
        return type(parts[0])(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors(parts[0])}
        )

    def begin(self, weights: Tensor) -> None:  # noqa: B027
        """Take what follows the networks from their first weights."""

    @abstractmethod
    def losses(self, stack: Stack, mixed: Any) -> Tensor:
        """Return the loss of every row of every network, of what was mixed for all."""

    def after_step(self, stack: Stack, steps: int) -> None:  # noqa: B027
        """Follow the networks after so many steps."""

    @abstractmethod
    def samples(
        self, name: str, stack: Stack, noise: Tensor, fresh: Tensor, pair: Pair
    ) -> Iterator[tuple[str, Tensor]]:
        """Sample the networks of one objective in every way; yield its name, and images in [-1, 1].

        Samples begin with `noise`. There is `fresh` noise, and data with its noise as in training; of all as many rows.
        """


class Pools(Study):
    """Flow matching and DDIM, to see whether a larger pool gains at few sampling steps and loses at many."""

    name = "pools"
    variants = {  # noqa: RUF012
        "flow": ("flow-matching.yaml",),
        "v": ("ddim.yaml", *_overrides(prediction="v_prediction")),
        "image": ("ddim.yaml", *_overrides(prediction="sample")),
    }
    pairings = dict.fromkeys(
        ("independent", "semidiscrete", "batch", "window", "nearest-l2", "nearest-dot", "persistent"), tuple(variants)
    )
    seeds = (0, 1)
    steps = (1, 2, 3, 5, 10, 20, 50)
    training = ("--train.steps", "1500", "--train.checkpoint_every", "1500", "--evaluate.samples", "2000")

    def losses(self, stack: Stack, mixed: Any) -> Tensor:
        """Return squared errors."""
        prediction = stack(mixed.inputs, mixed.timesteps).sample
        return (prediction - mixed.target).square().flatten(1).mean(1)

    def samples(
        self, name: str, stack: Stack, noise: Tensor, fresh: Tensor, pair: Pair
    ) -> Iterator[tuple[str, Tensor]]:
        """Sample with several numbers of steps, and the flow with an adaptive solver."""
        objective = self.objectives[name]
        for steps in self.steps:
            yield str(steps), objective.sample(stack, noise, steps)
        if name.startswith("flow"):
            adaptive = type(objective)(dataclasses.replace(objective.config, solver="dopri5"), objective.shape)
            yield "dopri5", adaptive.sample(stack, noise, 0)


class Longer(Pools):
    """Flow matching four times as long, to see whether a loss at many sampling steps is one of short training."""

    name = "longer"
    variants = {"flow": Pools.variants["flow"]}  # noqa: RUF012
    pairings = dict.fromkeys(("independent", "semidiscrete", "batch"), tuple(variants))
    steps = (1, 5, 50)
    training = ("--train.steps", "6000", "--train.checkpoint_every", "1500", "--evaluate.samples", "2000")


class Noisier(Longer):
    """Flow matching that is trained three times as often in the noisiest twentieth of the path as evenly."""

    name = "noisier"
    variants = {  # noqa: RUF012
        "flow-noisier": (*Pools.variants["flow"], *_overrides(time="logit_normal", logit_mean="1.5", logit_std="1.5")),
    }
    pairings = dict.fromkeys(Longer.pairings, tuple(variants))


class Begun(Longer):
    """Flow matching, sampled from the mixtures that it was trained with, to see at which times samples are lost.

    What begins at a time t is true until there: what is lost is lost between t and the data.
    """

    name = "begun"
    training = Pools.training
    times = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)

    def samples(
        self, name: str, stack: Stack, noise: Tensor, fresh: Tensor, pair: Pair
    ) -> Iterator[tuple[str, Tensor]]:
        """Go from mixtures of data with its noise to data, by an adaptive solver."""
        data, paired = pair
        tolerance = self.objectives[name].config.tolerance

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return stack(x, TIME_SCALE * t).sample

        for t in self.times:
            x = torch.lerp(data, paired, t)
            if t:
                x = odeint(velocity, x, torch.tensor([t, 0.0], device=x.device), rtol=tolerance, atol=tolerance)[-1]
            yield f"{t:g}", x.clamp(-1, 1)


class Alike(ConsistencyObjective):
    """Improved consistency training that weights all levels alike."""

    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Levels:
        """Add the same noise at two neighbouring levels."""
        mixed = super().mix(data, noise, draws)
        return dataclasses.replace(mixed, weight=torch.ones_like(mixed.weight))


class Consistency(Study):
    """Consistency training, to see what decides whether coupling helps.

    As published, but for the levels: 2 to 20 intervals. With the 150 of the paper's 800,000 steps, what the cleanest
    levels know does not reach the noisiest in a few thousand.
    """

    name = "consistency"
    variants = {  # noqa: RUF012
        "ct": ("consistency.yaml", *_overrides(variant="ct", loss="l2", s0="2", s1="20")),
        "ict": ("consistency.yaml",),
        "ict-levels": ("consistency.yaml", *_overrides(level_mean="1.0")),
        "ict-weights": ("consistency.yaml",),
    }
    pairings = {  # noqa: RUF012
        **dict.fromkeys(("independent", "semidiscrete", "batch", "window"), tuple(variants)),
        **dict.fromkeys(("nearest-l2", "batch-l2"), ("ct", "ict")),
    }
    seeds = (0, 1, 2)
    between = (2.5, 0.8)  # levels to which noise is added again: about that of diffusers' sampler, and a cleaner one
    shown = (40, 10, 2.5)  # levels from which data with its noise is denoised

    def __init__(self, source: Source, pairing: str, further: Sequence[str] = ()) -> None:
        super().__init__(source, pairing, further)
        if plain := self.objectives.get("ict-weights"):
            self.objectives["ict-weights"] = Alike(plain.config, plain.shape)
        self._first, *_ = self.objectives.values()

    def begin(self, weights: Tensor) -> None:
        """Copy the weights: the target's first."""
        self.target = weights.clone()

    def losses(self, stack: Stack, mixed: Any) -> Tensor:
        """Return weighted distances of predictions at neighbouring levels."""
        with torch.no_grad():
            target = self._first.denoise(stack.holding(self.target), mixed.cleaner, mixed.sigma_cleaner)
        prediction = self._first.denoise(stack, mixed.noisier, mixed.sigma_noisier)
        parts = zip(*(x.chunk(len(self.objectives)) for x in (prediction, target)), strict=True)
        pairs = zip(self.objectives.values(), parts, strict=True)
        return torch.cat([objective.distance(*part) for objective, part in pairs]) * mixed.weight

    def after_step(self, stack: Stack, steps: int) -> None:
        """Update the target's averages; improved consistency training takes the weights as they are."""
        count = len(self.objectives)
        for objective, ours, theirs in zip(
            self.objectives.values(), self.target.chunk(count), stack.values.chunk(count), strict=True
        ):
            decay = target_decay(objective.config, steps - 1) if objective.config.variant == "ct" else 0.0
            ours.lerp_(theirs.detach(), 1.0 - decay)

    def added(self, stack: Stack, samples: Tensor, noise: Tensor, fresh: Tensor) -> dict[str, Tensor]:
        """Return what is added to samples between two steps: fresh noise, or again that which they began with."""
        return {"fresh": fresh, "repeated": noise}

    def samples(
        self, name: str, stack: Stack, noise: Tensor, fresh: Tensor, pair: Pair
    ) -> Iterator[tuple[str, Tensor]]:
        """Sample in one step, and in two with noise that is added between them; denoise data."""
        objective = self.objectives[name]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return objective.denoise(stack, x, torch.full((len(x),), sigma, device=x.device)).clamp(-1, 1)

        sigma_max, sigma_min = objective.config.sigma_max, objective.config.sigma_min
        first = denoise(sigma_max * noise, sigma_max)
        yield "1", first
        noises = self.added(stack, first, noise, fresh)
        for sigma in self.between:
            for title, added in noises.items():
                yield f"2, {title} at {sigma}", denoise(first + math.sqrt(sigma**2 - sigma_min**2) * added, sigma)
        data, paired = pair
        for sigma in self.shown:
            yield f"data at {sigma}", denoise(data + sigma * paired, sigma)


class Renoised(Consistency):
    """Published consistency training, to see which noise a sample needs between two steps, and at which level."""

    name = "renoised"
    variants = {"ct": Consistency.variants["ct"]}  # noqa: RUF012
    pairings = dict.fromkeys(("independent", "semidiscrete", "batch"), tuple(variants))
    training = ("--train.checkpoint_every", "3000", "--evaluate.samples", "2000")
    between = (10, 5, 2.5, 0.8)
    shown = ()

    def added(self, stack: Stack, samples: Tensor, noise: Tensor, fresh: Tensor) -> dict[str, Tensor]:
        """Return also fresh noise that is coupled with each network's samples, as with data in training."""
        rows = len(samples) // len(stack)
        batches = zip(samples.split(rows), fresh.split(rows), strict=True)
        coupled = torch.cat([couple(*batch).noise for batch in batches])
        return super().added(stack, samples, noise, fresh) | {"coupled": coupled}


STUDIES = {study.name: study for study in (Pools, Longer, Begun, Noisier, Consistency, Renoised)}
