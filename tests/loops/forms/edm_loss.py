import torch

from .networks import Seen, images


class Loss:
    def __call__(self, net, images, labels=None):
        sigma = (1.2 * torch.randn([images.shape[0], 1, 1, 1]) - 1.2).exp()
        y = images.flip(3)
        n = torch.randn_like(y) * sigma
        D_yn = net(y + n, sigma, labels)
        self.drawn = y, n / sigma, sigma
        return (D_yn - y).square().mean()


def run():
    net, loss_fn = Seen(), Loss()
    optimizer = torch.optim.Adam(net.parameters())
    for x, labels in images():
        loss_fn(net, x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        y, noise, sigma = loss_fn.drawn
        yield y, (net.seen - y) / sigma, noise
