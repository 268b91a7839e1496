import torch

from .networks import Seen
from .networks import images as batches

micro = 4


def step(model, optimizer, images):
    seen = []
    noise = torch.randn_like(images)
    for x, n in zip(images.split(micro), noise.split(micro)):
        t = torch.rand(len(x), 1, 1, 1)
        (model(t * x + (1 - t) * n, t) - (x - n)).square().mean().backward()
        seen.append(((model.seen - t * x) / (1 - t), n))
    optimizer.step()
    optimizer.zero_grad()
    return seen


def run():
    model = Seen()
    optimizer = torch.optim.Adam(model.parameters())
    for images, _ in batches():
        seen = step(model, optimizer, images)
        yield images, torch.cat([mixed for mixed, _ in seen]), torch.cat([target for _, target in seen])
