"""Networks as users write them: a file that imports nothing of ours, so that it can travel with a pipeline."""

from typing import Literal

import torch
from torch import nn


class Net(nn.Module):
    """A network that returns a tensor."""

    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        width: int = 8,
        kind: Literal["plain", "deep"] = "plain",
        activation: nn.Module | None = None,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.inner = nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.label = None if num_class_embeds is None else nn.Embedding(num_class_embeds, width)
        self.activation = activation or nn.SiLU()
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, timesteps, class_labels=None):
        time = (timesteps / 1000).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = self.inner(torch.cat([x, time], 1))
        if self.label is not None:
            h = h + self.label(class_labels)[:, :, None, None]
        return self.out(self.activation(h))


class Wrong(nn.Module):
    """A network whose answer has another shape."""

    def forward(self, x, timesteps):
        return x.mean(1)


class Broken(nn.Module):
    """A network that cannot be built."""

    def __init__(self, width: int = 8):
        super().__init__()
        message = f"no width of {width}"
        raise KeyError(message)


class Fixed(nn.Module):
    """A network that takes one of the sizes that it is offered, and is told no classes."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.channels, self.layer = in_channels, nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x, timesteps):
        return self.layer(x)


class Captioned(nn.Module):
    """A network that is told captions."""

    def __init__(self, in_channels: int, cross_attention_dim: int, width: int = 8):
        super().__init__()
        self.caption, self.inner = nn.Linear(cross_attention_dim, width), nn.Conv2d(in_channels, width, 3, padding=1)
        self.out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, timesteps, encoder_hidden_states):
        told = self.caption(encoder_hidden_states.mean(1)) + (timesteps / 1000).to(x.dtype)[:, None]
        return self.out(torch.relu(self.inner(x) + told[:, :, None, None]))
