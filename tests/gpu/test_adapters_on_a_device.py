"""The adapters where the batch lies on a CUDA device."""

import lucidrains
import pytest
import torch
from torch import nn

import couplings
from couplings.adapters.denoising_diffusion import couple_noise
from couplings.adapters.loss import coupled_loss
from couplings.adapters.torchcfm import OTPlanSampler


def batch(n=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 4, 4, generator=generator).cuda(), torch.rand(n, 1, 4, 4, generator=generator).cuda()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("method", ["exact", "sinkhorn", "unbalanced", "partial"])
def test_the_sampler_pairs_as_on_the_cpu_and_leaves_everything_there(method, replace):
    if method in ("unbalanced", "partial"):
        pytest.importorskip("ot")
    (x0, x1), classes = batch(), (torch.arange(32) % 4).cuda()
    samplers = [OTPlanSampler(method, reg=5.0, condition="y1") for _ in range(2)]
    found = samplers[0].sample_plan_with_labels(x0, x1, classes, classes, replace=replace)
    on_cpu = samplers[1].sample_plan_with_labels(*(t.cpu() for t in (x0, x1, classes, classes)), replace=replace)
    assert all(t.is_cuda for t in found)
    assert torch.equal(found[2], found[3])
    assert (found[0].cpu() == on_cpu[0]).flatten(1).all(1).double().mean() > 0.9  # sums are rounded otherwise


def test_trajectories_of_a_batch_on_the_device():
    populations = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = OTPlanSampler().sample_trajectory(populations)
    assert (OTPlanSampler().sample_trajectory(populations.cuda()) == expected).all()


def test_a_diffusion_on_the_device_gets_coupled_noise():
    package = lucidrains.load()
    network = nn.Identity()
    network.channels = network.out_dim = 1
    network.self_condition = network.random_or_learned_sinusoidal_cond = False
    network.forward = lambda x, *_: x
    diffusion = package.GaussianDiffusion(network, image_size=4, timesteps=10).cuda()
    couple_noise(diffusion)
    assert diffusion(batch()[1]).is_cuda


def test_a_loss_and_a_compiled_step_on_the_device():
    noise, data = batch()
    weight = torch.full((), 0.5, device="cuda", requires_grad=True)

    def loss(x, noise, sigma):
        return ((x + sigma * noise) * weight - x).square().mean()

    expected = loss(data, couplings.couple(data, noise).noise, 0.3)
    assert torch.allclose(coupled_loss(loss)(data, noise, 0.3), expected)
    step = torch.compile(lambda x, n: loss(x, couplings.couple(x, n).noise, 0.3), backend="aot_eager")
    assert torch.allclose(step(data, noise), expected)
    step(data, noise).backward()
    assert weight.grad.isfinite()


def test_lightning_puts_coupled_noise_on_the_device():
    pytest.importorskip("pytorch_lightning", exc_type=ImportError)
    from couplings.adapters.lightning import CoupledNoise

    class Trainer:
        current_epoch, global_rank = 0, 0

    held = [batch()[1], torch.arange(32).cuda() % 2]
    CoupledNoise(condition=1, log=False).on_train_batch_start(Trainer(), None, held, 0)
    assert held[2].is_cuda
    assert torch.equal(couplings.couple(held[0], held[2], condition=held[1]).index.cpu(), torch.arange(32))
