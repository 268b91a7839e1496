import torch

from .networks import Seen
from .networks import images as batches

accumulate = 4
model = Seen()
optimizer = torch.optim.Adam(model.parameters())
loader = list(batches(8, rows=4))
seen = []
for step, (images, labels) in enumerate(loader):
    noise = torch.randn_like(images)
    t = torch.rand(len(images), 1, 1, 1)
    (model(t * images + (1 - t) * noise, t, labels) - (images - noise)).square().mean().backward()
    seen.append((images, (model.seen - t * images) / (1 - t), noise))
    if (step + 1) % accumulate == 0:
        optimizer.step()
        optimizer.zero_grad()


def run():
    for first in range(0, len(seen), accumulate):
        yield tuple(torch.cat(parts) for parts in zip(*seen[first : first + accumulate], strict=True))
