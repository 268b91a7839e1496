"""Networks that keep what they were given."""

from types import SimpleNamespace

import torch


class Seen(torch.nn.Module):
    """Answers with its input, scaled; `seen` is the last one, `told` what came with it."""

    def __init__(self, sample=False):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((), 0.5))
        self.sample = sample

    def forward(self, x, *args, **kwargs):
        self.seen, self.told = x.detach(), args
        answer = self.scale * x
        return SimpleNamespace(sample=answer) if self.sample else answer


def images(batches=2, rows=16, classes=2):
    """Batches of images in clusters and their classes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        labels = torch.arange(rows) % classes
        yield torch.rand(rows, 1, 8, 8, generator=generator) + labels[:, None, None, None], labels
