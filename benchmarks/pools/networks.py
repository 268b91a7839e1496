"""Several networks of one architecture, run and trained as one: small networks leave a GPU waiting for launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from integrations.small_networks import ConvNextModel


@dataclass(frozen=True, eq=False)
class Stack:
    """Networks side by side. `torch.func.vmap` would do the same, but refuses their memory format.

    Attributes
    ----------
    values : (R, W) Tensor
        All weights of each of R networks, and zeros up to a multiple of four: products read four at a time.
    template : ConvNextModel
        One of them, for its sizes.
    """

    values: Tensor
    template: ConvNextModel

    @classmethod
    def of(cls, networks: Sequence[ConvNextModel]) -> Stack:
        """Stack copies of networks."""
        flat = [torch.cat([weight.detach().flatten() for weight in network.parameters()]) for network in networks]
        values = torch.stack(flat)
        return cls(F.pad(values, (0, -values.shape[1] % 4)), networks[0])

    def __len__(self) -> int:
        """Networks."""
        return len(self.values)

    def holding(self, values: Tensor) -> Stack:
        """Return the stack with other weights."""
        return replace(self, values=values)

    def weights(self) -> dict[str, Tensor]:
        """Return views of the weights, ``(R, *shape)``, by their names in a network."""
        named = dict(self.template.named_parameters())
        sizes = [weight.numel() for weight in named.values()]
        parts = self.values.split([*sizes, self.values.shape[1] - sum(sizes)], 1)
        return {name: part.unflatten(1, named[name].shape) for name, part in zip(named, parts[:-1], strict=True)}

    def __call__(self, sample: Tensor, timestep: Tensor | float) -> UNet2DOutput:
        """Denoise as a network does.

        Parameters
        ----------
        sample : (R * N, c, h, w) Tensor
            The first N rows are of the first network.
        timestep : () or (R * N,) Tensor
        """
        if sample.device.type != "cpu":
            return self.together(sample, timestep)
        rows = len(sample) // len(self)  # on a CPU, what one network computes stays in the cache
        times = torch.as_tensor(timestep).expand(len(sample)).split(rows)
        alone = zip(self.values.unbind(), sample.split(rows), times, strict=True)
        return UNet2DOutput(sample=torch.cat([self.holding(w[None]).together(x, t).sample for w, x, t in alone]))

    def together(self, sample: Tensor, timestep: Tensor | float) -> UNet2DOutput:
        """Denoise with one product a layer for all networks."""
        config, w, count = self.template.config, self.weights(), len(self)
        rows, channels, height, width = sample.shape
        p, side, each = config.patch_size, config.sample_size // config.patch_size, rows // count

        def linear(name: str, x: Tensor) -> Tensor:
            return torch.baddbmm(w[f"{name}.bias"].unsqueeze(1), x, w[f"{name}.weight"].mT)

        timestep = torch.as_tensor(timestep, device=sample.device).expand(rows)
        time = self.template.embed_time.frequencies(timestep).to(sample.dtype).view(count, each, -1)
        time = F.silu(linear("embed_time.time.linear_2", F.silu(linear("embed_time.time.linear_1", time))))

        # A convolution whose stride is its width is a product with each patch.
        patches = sample.view(count, each, channels, side, p, side, p).permute(0, 1, 3, 5, 2, 4, 6)
        patches = patches.reshape(count, each * side**2, channels * p * p)
        x = torch.baddbmm(w["embed.bias"].unsqueeze(1), patches, w["embed.weight"].flatten(2).mT)
        x_RNPC = x.view(count, each, side**2, -1) + w["position"].flatten(3).mT
        for k in range(config.depth):
            shift, scale, gate = linear(f"blocks.{k}.modulation", time).unsqueeze(2).chunk(3, -1)
            h = F.layer_norm(_depthwise(x_RNPC, w, f"blocks.{k}.spatial", side), x_RNPC.shape[-1:])
            h = torch.addcmul(shift, h, 1 + scale).view(count, each * side**2, -1)
            h = linear(f"blocks.{k}.mlp.2", F.gelu(linear(f"blocks.{k}.mlp.0", h)))
            x_RNPC = torch.addcmul(x_RNPC, gate, h.view_as(x_RNPC))
        x = F.layer_norm(x_RNPC, x_RNPC.shape[-2:])  # over patches and channels: a GroupNorm of one group
        x = torch.addcmul(w["norm.bias"][:, None, None], x, w["norm.weight"][:, None, None]).flatten(1, 2)
        out = (x @ w["out.weight"].flatten(2)).view(count, each, side, side, config.out_channels, p, p)
        out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(count, each, config.out_channels, height, width)
        return UNet2DOutput(sample=(out + w["out.bias"][:, None, :, None, None]).flatten(0, 1))


def _depthwise(x_RNPC: Tensor, weights: dict[str, Tensor], name: str, side: int) -> Tensor:
    """Convolve every channel of every network by itself; ``(networks, rows, patches, channels)`` to the same."""
    networks, rows, _, channels = x_RNPC.shape
    stacked = x_RNPC.permute(1, 0, 3, 2).reshape(rows, networks * channels, side, side)
    weight = weights[f"{name}.weight"].flatten(0, 1)
    out = F.conv2d(
        stacked, weight, weights[f"{name}.bias"].flatten(), padding=weight.shape[-1] // 2, groups=len(weight)
    )
    return out.view(rows, networks, channels, side**2).permute(1, 0, 3, 2).contiguous()


class Replayed:
    """A function of tensors that a GPU computes by one launch: the thousand launches of a training step take longer.

    Parameters
    ----------
    function : callable
        Takes a dataclass of tensors and returns a tensor, without waiting for the GPU.
    example : dataclass
        Tensors of the shapes that it will be called with.
    """

    def __init__(self, function: Callable[[Any], Tensor], example: Any) -> None:
        self._given = replace(example, **{name: x.clone() for name, x in tensors(example).items()})
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries set up in the first calls is no part of it
            for _ in range(3):
                function(self._given)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._returned = function(self._given)

    def __call__(self, given: Any) -> Tensor:
        """Call the function; the next call overwrites what it returns."""
        for name, x in tensors(given).items():
            getattr(self._given, name).copy_(x)
        self._graph.replay()
        return self._returned


def tensors(fields: Any) -> dict[str, Tensor]:
    """Return the tensors of a dataclass by name, without those that are None."""
    return {name: x for name, x in vars(fields).items() if x is not None}
