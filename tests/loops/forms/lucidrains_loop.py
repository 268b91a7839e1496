import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

from couplings import couple

from .networks import Seen
from .networks import images as batches


def run():
    model = Seen()
    model.channels = model.out_dim = 1
    model.self_condition = model.random_or_learned_sinusoidal_cond = False
    diffusion = GaussianDiffusion(model, image_size=8, timesteps=10)
    optimizer = torch.optim.Adam(model.parameters())
    for x, _ in batches():
        images = x / 2
        loss = diffusion(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        t = model.told[0]
        data = diffusion.normalize(images)
        mixed = model.seen - diffusion.sqrt_alphas_cumprod[t][:, None, None, None] * data
        mixed = mixed / diffusion.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
        yield data, mixed, mixed  # the target is in tests/adapters
