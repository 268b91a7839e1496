"""Consistency training (arXiv 2303.01469) and its improved variant (arXiv 2310.14189).

Networks trained here fit ``CMStochasticIterativeScheduler`` of diffusers: the same c_in, c_skip, c_out
and timesteps 1000 * 0.25 * ln(sigma).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .lpips import Lpips
from .objective import Generators, Objective, Told, rows
from .pipelines import save_pipeline
from .randomness import Draws
from .sections import Consistency


def intervals(config: Consistency, step: int) -> int:
    """Return the number of intervals between noise levels at ``step``, counted from 0.

    The papers' N(k) is the number of levels: one more.
    """
    k, total = min(step, config.total_steps), config.total_steps
    if config.variant == "ict":
        stage = math.floor(total / (math.log2(config.s1 // config.s0) + 1))
        return min(config.s0 * 2 ** (k // max(1, stage)), config.s1)
    s0, s1 = config.s0, config.s1
    return max(1, math.ceil(math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1))


def target_decay(config: Consistency, step: int) -> float:
    """Return mu(k), the decay of the target network's average at ``step``, counted from 0.

    The exponent divides by the number of intervals, as the released code does; the paper prints N(k).
    """
    return math.exp(config.s0 * math.log(config.mu0) / intervals(config, step))


def levels(config: Consistency, count: int) -> Tensor:
    """Return ``(count + 1,)`` noise levels, ascending from sigma_min to sigma_max, in float64."""
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return (low + torch.linspace(0, 1, count + 1, dtype=torch.float64) * (high - low)) ** config.rho


def scalings(config: Consistency, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c_skip, c_out and c_in; at sigma_min the output is the input."""
    data = config.sigma_data
    total = (sigma**2 + data**2).sqrt()
    c_skip = data**2 / ((sigma - config.sigma_min) ** 2 + data**2)
    return c_skip, (sigma - config.sigma_min) * data / total, 1 / total


@dataclass
class Levels:
    """One block at two neighbouring noise levels, with the same noise.

    Parameters
    ----------
    noisier, cleaner : (n, *shape) Tensor
        ``data + sigma * noise``.
    sigma_noisier, sigma_cleaner : (n,) Tensor
        The levels.
    weight : (n,) Tensor
        Weight of each row's loss.
    """

    noisier: Tensor
    cleaner: Tensor
    sigma_noisier: Tensor
    sigma_cleaner: Tensor
    weight: Tensor


class ConsistencyObjective(Objective):
    """Predictions from neighbouring noise levels, pulled together."""

    pipeline_name = "ConsistencyModelPipeline"
    config: Consistency

    def __init__(self, config: Consistency, shape: tuple[int, ...], classes: int | None = None) -> None:
        super().__init__(config, shape, classes)
        self.target: nn.Module | None = None
        self.lpips: Lpips | None = None

    def attach(self, model: nn.Module) -> None:
        """Take the target network, an average of the trained one (``ct``), and the metric."""
        if self.config.variant == "ct":
            self.target = copy.deepcopy(model).requires_grad_(False)
            self._followed = [list(network.parameters()) for network in (self.target, model)]
        if self.config.loss == "lpips":
            self.lpips = Lpips.pretrained(self.config.lpips_pooling)

    def networks(self) -> dict[str, nn.Module]:
        """Return the target network."""
        return {} if self.target is None else {"target": self.target}

    def after_step(self, model: nn.Module, steps: int) -> None:
        """Update the target's average."""
        if self.target is None:
            return
        decay = target_decay(self.config, steps - 1)
        with torch.no_grad():
            torch._foreach_lerp_(*self._followed, 1 - decay)
            for average, current in zip(self.target.buffers(), model.buffers(), strict=True):
                average.copy_(current)

    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Levels:
        """Add the same noise at two neighbouring levels."""
        config = self.config
        # Drawn on the host: on a GPU, sums of which the draw needs some are not the same in every run.
        grid = levels(config, intervals(config, draws.step))
        generator = draws.generator("time", torch.device("cpu"))
        if config.variant == "ct":
            index = torch.randint(len(grid) - 1, (len(data),), generator=generator)
        else:
            edges = torch.erf((grid.log() - config.level_mean) / (math.sqrt(2) * config.level_std))
            index = torch.multinomial(edges.diff(), len(data), replacement=True, generator=generator)
        cleaner, noisier = torch.stack([grid[index], grid[index + 1]]).float().to(data.device, non_blocking=True)
        weight = torch.ones_like(noisier) if config.variant == "ct" else 1 / (noisier - cleaner)
        return Levels(data + rows(noisier, data) * noise, data + rows(cleaner, data) * noise, noisier, cleaner, weight)

    def loss(self, model: nn.Module, data: Tensor, noise: Tensor, draws: Draws, **context: Tensor) -> Tensor:
        """Return each row's distance between its two predictions."""
        mixed = self.mix(data, noise, draws)
        # The same dropout mask on both sides: the global generator is set back in between.
        devices = [data.device] if data.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            teacher = model if self.target is None else self.target
            target = self.denoise(teacher, mixed.cleaner, mixed.sigma_cleaner, **context)
        # Rounded weights of the pass without gradient: torch 2.9 would use them again, and train nothing.
        torch.clear_autocast_cache()
        prediction = self.denoise(model, mixed.noisier, mixed.sigma_noisier, **context)
        return self.distance(prediction, target) * mixed.weight

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the ``(n,)`` distances of predictions from their targets."""
        if self.lpips is not None:
            return self.lpips(prediction, target)
        difference = (prediction - target).flatten(1)
        if self.config.loss == "l2":
            return difference.square().mean(1)
        c = 0.00054 * math.sqrt(difference.shape[1])
        return (difference.square().sum(1) + c**2).sqrt() - c

    def denoise(self, model: nn.Module, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Return the consistency function of ``x`` at noise level ``sigma`` (n,), in float32."""
        c_skip, c_out, c_in = (rows(c, x) for c in scalings(self.config, sigma))
        return c_skip * x + c_out * model(c_in * x, 250 * sigma.log(), **context).sample.float()

    def scheduler(self) -> CMStochasticIterativeScheduler:
        """Return the sampler."""
        config = self.config
        return CMStochasticIterativeScheduler(
            num_train_timesteps=config.s1 + 1,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            sigma_data=config.sigma_data,
            rho=config.rho,
        )

    def sample(
        self, model: nn.Module, noise: Tensor, steps: int, generator: Generators = None, told: Told | None = None
    ) -> Tensor:
        """Denoise in one step, or denoise and add noise back ``steps - 1`` times in between."""
        config, scheduler = self.config, self.scheduler()
        scheduler.set_timesteps(steps, device=noise.device)
        x, ask = config.sigma_max * noise, self.guided(model, noise, told)
        for t, sigma, cleaner in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
            c_skip, c_out, c_in = scalings(config, sigma)
            x = (c_skip * x + c_out * ask(c_in * x, t.float())).clamp(-1, 1)
            first = config.multistep_noise == "first"
            added = noise if first else randn_tensor(noise.shape, generator, noise.device, noise.dtype)
            x = x + (cleaner.clamp(config.sigma_min) ** 2 - config.sigma_min**2).sqrt() * added
        return x

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a folder for ``ConsistencyModelPipeline.from_pretrained``."""
        pipeline = ConsistencyModelPipeline(unet=model, scheduler=self.scheduler())
        save_pipeline(pipeline, folder, "num_inference_steps=1", self)
