"""DDPM training with DDIM sampling (arXiv 2006.11239, 2010.02502)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from .objective import Generators, Mixed, Regression, Told
from .pipelines import save_pipeline
from .randomness import Draws
from .sections import Ddim, StableDiffusion

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


class DiffusionObjective(Regression):
    """Noise prediction, velocity prediction or clean-image prediction on a discrete schedule."""

    config: Ddim | StableDiffusion
    scheduler: DDIMScheduler

    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Mixed:
        """Add noise at uniformly drawn levels."""
        levels, generator = self.scheduler.config.num_train_timesteps, draws.generator("time")
        timesteps = torch.randint(levels, (len(data),), generator=generator, device=data.device)
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.scheduler.get_velocity(data, noise, timesteps),
            "sample": lambda: data,
        }[self.config.prediction]()
        weight = None if self.config.min_snr_gamma is None else self._min_snr(timesteps)
        return Mixed(self.scheduler.add_noise(data, noise, timesteps), timesteps, target, weight)

    def _min_snr(self, timesteps: Tensor) -> Tensor:
        snr = compute_snr(self.scheduler, timesteps)
        clamped = snr.clamp(max=self.config.min_snr_gamma)
        weights = {"epsilon": clamped / snr, "v_prediction": clamped / (snr + 1), "sample": clamped}
        return weights[self.config.prediction]

    def sampler(self) -> SchedulerMixin:
        """Return the sampling scheme."""
        return DDIMScheduler.from_config(self.scheduler.config)

    def sample(
        self, model: nn.Module, noise: Tensor, steps: int, generator: Generators = None, told: Told | None = None
    ) -> Tensor:
        """Walk the scheme's ``steps`` noise levels from ``noise`` to data, and decode it."""
        scheduler, eta = self.sampler(), getattr(self.config, "eta", 0.0)
        added = {"eta": eta, "generator": generator} if eta else {}
        scheduler.set_timesteps(steps, device=noise.device)
        x, ask = noise, self.guided(model, noise, told)
        for t in scheduler.timesteps:
            x = scheduler.step(ask(x, t), t, x, **added).prev_sample
        return self.decode(x)

    def decode(self, data: Tensor) -> Tensor:
        """Turn data into images in [-1, 1]."""
        return data


class DdimObjective(DiffusionObjective):
    """Diffusion on pixels."""

    pipeline_name = "DDIMPipeline"
    config: Ddim

    def __init__(self, config: Ddim, shape: tuple[int, ...], classes: int | None = None) -> None:
        super().__init__(config, shape, classes)
        self.scheduler = DDIMScheduler(
            num_train_timesteps=config.diffusion_steps,
            beta_schedule=SCHEDULES[config.schedule],
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            prediction_type=config.prediction,
            timestep_spacing=config.spacing,
            clip_sample=config.clip_sample,
            # The last step goes to the clean image, not to the first noise level.
            set_alpha_to_one=True,
        )

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a folder for ``DDIMPipeline.from_pretrained``."""
        pipeline = DDIMPipeline(unet=model, scheduler=self.sampler())
        save_pipeline(pipeline, folder, f"num_inference_steps=20, eta={self.config.eta}", self)
