import torch

from couplings import couple

from .networks import Seen, images


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner_model = Seen()

    def loss(self, input, noise, sigma, **kwargs):
        self.noise = noise
        noised = input + noise * sigma[:, None, None, None]
        return (self.inner_model(noised, sigma, **kwargs) - input).square().flatten(1).mean(1)


def run():
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters())
    for reals, _ in images():
        for _ in range(1):
            for _ in range(1):
                if model:
                    noise = torch.randn_like(reals)
                    sigma = torch.randn(len(reals)).exp()
                    losses = model.loss(reals, noise, sigma)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield reals, (model.inner_model.seen - reals) / sigma[:, None, None, None], model.noise
