import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from .networks import Seen, images


def run():
    accelerator = Accelerator(cpu=True)
    noise_scheduler = DDPMScheduler(num_train_timesteps=100)
    model = Seen(sample=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    for step, batch in enumerate({"input": x} for x, _ in images()):
        if step >= 0:
            clean_images = batch["input"]
            noise = torch.randn(clean_images.shape, device=clean_images.device)
            bsz = clean_images.shape[0]
            timesteps = torch.randint(0, 100, (bsz,), device=clean_images.device).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy_images, timesteps).sample, noise)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            alpha = noise_scheduler.alphas_cumprod[timesteps][:, None, None, None]
            yield clean_images, (model.seen - alpha.sqrt() * clean_images) / (1 - alpha).sqrt(), noise
