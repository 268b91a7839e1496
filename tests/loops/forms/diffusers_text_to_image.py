from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from .networks import Seen, images


def run(noise_offset=0.0):
    args = SimpleNamespace(noise_offset=noise_offset)
    accelerator = Accelerator(cpu=True)
    noise_scheduler = DDPMScheduler(num_train_timesteps=100)
    unet, optimizer = Seen(sample=True), None
    optimizer = torch.optim.AdamW(unet.parameters())
    unet, optimizer = accelerator.prepare(unet, optimizer)
    for pixel_values, labels in images():
        batch = {"pixel_values": pixel_values, "input_ids": torch.stack([labels, labels + 7], 1)}
        with accelerator.accumulate(unet):
            if batch:
                latents = batch["pixel_values"] * 0.18215
                noise = torch.randn_like(latents)
                if args.noise_offset:
                    noise += args.noise_offset * torch.randn((latents.shape[0], latents.shape[1], 1, 1))
                timesteps = torch.randint(0, 100, (latents.shape[0],), device=latents.device).long()
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
                loss = F.mse_loss(unet(noisy_latents, timesteps, batch["input_ids"]).sample, target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        alpha = noise_scheduler.alphas_cumprod[timesteps][:, None, None, None]
        mixed = (unet.seen - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        yield latents, mixed, (target + (1 - alpha).sqrt() * latents) / alpha.sqrt()
