import torch as th

from .networks import Seen, images


class Transport:
    def sample(self, x1):
        x0 = th.randn_like(x1)
        t = th.rand((x1.shape[0],)).to(x1)
        return t, x0, x1

    def training_losses(self, model, x1, model_kwargs):
        t, x0, x1 = self.sample(x1)
        self.t = t[:, None, None, None]
        self.ut = x1 - x0
        output = model(self.t * x1 + (1 - self.t) * x0, t, **model_kwargs)
        return {"loss": (output - self.ut).square()}


def run():
    model, transport = Seen(), Transport()
    opt = th.optim.AdamW(model.parameters())
    for x, y in images():
        model_kwargs = {"y": y}
        transport.training_losses(model, x, model_kwargs)["loss"].mean().backward()
        opt.step()
        opt.zero_grad()
        yield x, (model.seen - transport.t * x) / (1 - transport.t), x - transport.ut
