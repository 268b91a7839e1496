"""An objective, data sets and an optimizer as users write them."""

import numpy as np
import torch

from integrations.flow_matching import FlowMatchingObjective
from integrations.sections import FlowMatching


class Weighted(FlowMatchingObjective):
    """An objective on top of one of ours."""

    def __init__(self, config, shape, scale: float = 1.0):
        super().__init__(FlowMatching(), shape)
        self.scale = scale

    def loss(self, model, data, noise, draws, **context):
        return self.scale * super().loss(model, data, noise, draws, **context)


class Stripes(torch.utils.data.Dataset):
    """Images as arrays, with labels."""

    classes = ("flat", "upright")

    def __init__(self, rows: int = 64, side: int = 8):
        self.rows, self.side = rows, side

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        image = np.full((self.side, self.side), 255 * row // self.rows, np.uint8)
        image[::2] = 0
        return (image if row % 2 else image.T.copy()), row % 2


class Floats(Stripes):
    """Images that are not bytes."""

    def __getitem__(self, row):
        return torch.zeros(1, 8, 8), 0


class Unnamed(Stripes):
    """Labels without names."""

    classes = ()


class SignMomentum(torch.optim.Optimizer):
    """Steps by the sign of a moving average, with a state that is not shaped as its weight."""

    def __init__(self, params, lr: float, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                state["largest"] = torch.maximum(state.get("largest", torch.zeros(1)), weight.grad.abs().max())
                state["count"] = state.get("count", 0) + 1
                average.lerp_(weight.grad, 1 - group["beta"])
                weight.sub_(average.sign(), alpha=group["lr"])
