"""Rectified flow: straight paths from data to noise (arXiv 2209.03003, 2210.02747)."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from . import flow_matching_pipeline
from .objective import Generators, Mixed, Regression, Told, rows
from .pipelines import save_pipeline
from .randomness import Draws
from .sections import FlowMatching

# Networks made for diffusion expect times of 0 to 1000; diffusers' flow schedulers scale alike.
TIME_SCALE = 1000.0


class FlowMatchingObjective(Regression):
    """The velocity ``noise - data`` along ``x_t = (1 - t) data + t noise``."""

    pipeline_name = "FlowMatchingPipeline"
    config: FlowMatching

    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Mixed:
        """Interpolate at random times."""
        generator = draws.generator("time")
        if self.config.time == "uniform":
            t = torch.rand(len(data), generator=generator, device=data.device)
        else:
            z = torch.randn(len(data), generator=generator, device=data.device)
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * z)
        mixture = torch.lerp(data, noise, rows(t, data))
        return Mixed(mixture, TIME_SCALE * t, noise - data)

    def sample(
        self, model: nn.Module, noise: Tensor, steps: int, generator: Generators = None, told: Told | None = None
    ) -> Tensor:
        """Integrate the flow from ``noise`` at t = 1 to data at t = 0."""
        ask = self.guided(model, noise, told)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return ask(x, TIME_SCALE * t)

        if self.config.solver == "dopri5":
            from torchdiffeq import odeint

            times = torch.tensor([1.0, 0.0], device=noise.device)
            x = odeint(velocity, noise, times, rtol=self.config.tolerance, atol=self.config.tolerance)[-1]
            return x.clamp(-1, 1)
        times = torch.linspace(1, 0, steps + 1, device=noise.device)
        x = noise
        for t, following in itertools.pairwise(times):
            x = x + (following - t) * velocity(t, x)
        return x.clamp(-1, 1)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a folder for ``DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, ...)``."""
        pipeline = flow_matching_pipeline.FlowMatchingPipeline(unet=model, classes=self.classes)
        code = Path(flow_matching_pipeline.__file__)
        save_pipeline(pipeline, folder, "num_inference_steps=10", self, code)
