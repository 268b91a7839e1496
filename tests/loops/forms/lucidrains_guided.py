import torch
from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion

from couplings.adapters.denoising_diffusion import couple_noise

from .networks import Seen
from .networks import images as batches


def run():
    model = Seen()
    model.channels = model.out_dim = 1
    model.random_or_learned_sinusoidal_cond = False
    diffusion = GaussianDiffusion(model, image_size=8, timesteps=10)
    optimizer = torch.optim.Adam(model.parameters())
    for x, classes in batches():
        images = x / 2
        loss = diffusion(images, classes=classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        t, data = model.told[0], 2 * images - 1
        mixed = model.seen - diffusion.sqrt_alphas_cumprod[t][:, None, None, None] * data
        mixed = mixed / diffusion.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
        yield data, mixed, mixed
