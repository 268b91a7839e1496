import torch as th

from .networks import Seen, images


class Denoiser:
    def consistency_losses(self, model, x_start, num_scales, target_model=None, noise=None):
        if noise is None:
            noise = th.randn_like(x_start)
        steps = th.randint(0, num_scales - 1, (len(x_start), 1, 1, 1))
        t, t2 = (80 * (1 - at / num_scales) for at in (steps, steps + 1))
        answer = model(x_start + noise * t, t)
        with th.no_grad():
            target = target_model(x_start + noise * t2, t2)
        self.levels = t, t2
        return {"loss": (answer - target).square()}


def run():
    model, target_model, diffusion = Seen(), Seen(), Denoiser()
    optimizer = th.optim.RAdam(model.parameters())
    for x, _ in images():
        diffusion.consistency_losses(model, x, 18, target_model=target_model)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        t, t2 = diffusion.levels
        yield x, (model.seen - x) / t, (target_model.seen - x) / t2
