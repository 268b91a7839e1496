"""Losses that are given their noise, in the forms of k-diffusion, EDM and OpenAI's consistency models."""

import pytest
import torch

from couplings import Coupling, couple
from couplings.adapters.loss import coupled_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(16, 1, 4, 4, generator=generator), torch.randn(16, 1, 4, 4, generator=generator)


class Denoiser:
    """A preconditioned denoiser in the form of k-diffusion's, whose loss is a method."""

    def loss(self, input, noise, sigma, **kwargs):
        self.seen = input + noise * sigma[:, None, None, None], kwargs
        return noise.square().flatten(1).mean(1)


def edm(net, images, noise, sigma, labels=None):
    return net(images + noise * sigma, sigma, labels)


def consistency(model, x_start, num_scales, model_kwargs=None, noise=None):
    return model(x_start, noise, num_scales)


def test_a_method_of_k_diffusions_form_gets_coupled_noise(batch):
    data, noise = batch
    model, sigma = Denoiser(), torch.linspace(0.1, 2.0, 16)
    losses = coupled_loss(model.loss)(data, noise, sigma, aug_cond=torch.zeros(16, 9))
    expected = couple(data, noise).noise
    assert torch.equal(losses, expected.square().flatten(1).mean(1))
    assert torch.equal(model.seen[0], data + expected * sigma[:, None, None, None])
    assert model.seen[1].keys() == {"aug_cond"}


def test_the_condition_may_be_a_parameter_or_any_keyword(batch):
    data, noise = batch
    classes = torch.arange(16) % 4
    expected = couple(data, noise, condition=classes).noise
    model, sigma = Denoiser(), torch.ones(16)
    coupled_loss(model.loss, condition="class_cond")(data, noise, sigma=sigma, class_cond=classes)
    assert torch.equal(model.seen[0], data + expected)
    mixed = coupled_loss(edm, condition="labels")(lambda x, *_: x, data, noise, 1.0, classes)
    assert torch.equal(mixed, data + expected)
    with pytest.raises(ValueError, match="pass labels="):
        coupled_loss(edm, condition="labels")(lambda x, *_: x, data, noise, 1.0)


def test_noise_that_may_be_left_out_is_drawn(batch):
    data, noise = batch
    loss = coupled_loss(consistency, Coupling("greedy"), data="x_start")
    torch.manual_seed(0)
    drawn = torch.randn_like(data)
    torch.manual_seed(0)
    assert torch.equal(loss(lambda x, y, _: y, data, 18), couple(data, drawn, "greedy").noise)
    assert torch.equal(loss(lambda x, y, _: y, data, 18, noise=noise), couple(data, noise, "greedy").noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "noize"}, "Did you mean 'noise'"),
        ({"data": "image"}, "Did you mean 'images'"),
        ({"noise": "net"}, "name the data's"),
    ],
)
def test_parameters_that_the_loss_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        coupled_loss(edm, **options)


def test_the_wrapper_looks_like_the_loss():
    import inspect

    assert inspect.signature(coupled_loss(edm)) == inspect.signature(edm)
    assert coupled_loss(edm).__name__ == "edm"
