"""One noise, coupled, for mixing and for the target, inside GaussianDiffusion of denoising-diffusion-pytorch."""

import copy
import pickle

import lucidrains
import pytest
import torch
from torch import nn

from couplings import Coupling, couple
from couplings.adapters.denoising_diffusion import couple_noise


class Network(nn.Module):
    """Keeps what it is given, and answers with zeros."""

    channels = out_dim = 1
    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x, t, *_, **__):
        self.seen.append((x.detach().clone(), t))
        return self.scale * x


@pytest.fixture(scope="module")
def package():
    return lucidrains.load()


def make(package, kind="GaussianDiffusion", **options):
    return getattr(package, kind)(Network(), image_size=4, timesteps=10, objective="pred_noise", **options)


@pytest.fixture
def images():
    return torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def noise_seen(diffusion, images):
    """The noise that was mixed in, from what the network saw."""
    x, t = diffusion.model.seen[-1]
    start = diffusion.sqrt_alphas_cumprod[t][:, None, None, None] * (2 * images - 1)
    return (x - start) / diffusion.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]


def test_the_mixed_noise_is_coupled_and_is_the_target(package, images, noise):
    diffusion = make(package)
    couple_noise(diffusion)
    loss = diffusion(images, noise=noise, loss_reduction="none")
    expected = couple(2 * images - 1, noise).noise
    assert torch.allclose(noise_seen(diffusion, images), expected, atol=1e-4)
    # The network answers 0, so that a row's loss is the mean square of its own target.
    assert torch.allclose(loss, expected.square().mean((1, 2, 3)), atol=1e-5)


def test_noise_is_drawn_where_the_library_would(package, images):
    diffusion, plain = make(package), make(package)
    couple_noise(diffusion, Coupling("greedy", metric="l1"))
    times = torch.arange(16) % 10
    torch.manual_seed(0)
    diffusion(images, times=times)
    torch.manual_seed(0)
    plain(images, times=times)
    drawn, coupled = noise_seen(plain, images), noise_seen(diffusion, images)
    assert torch.allclose(coupled, couple(2 * images - 1, drawn, "greedy", metric="l1").noise, atol=1e-3)
    assert not torch.allclose(coupled, drawn, atol=1e-3)


def test_its_own_immiscible_regresses_most_rows_on_another_noise_and_is_refused(package, images, noise):
    diffusion = make(package, immiscible=True)
    with pytest.raises(ValueError, match="immiscible=False"):
        couple_noise(diffusion)
    loss = diffusion(images, noise=noise, loss_reduction="none")
    mixed = noise_seen(diffusion, images)
    wrong = (loss - mixed.square().mean((1, 2, 3))).abs() > 1e-4
    assert wrong.double().mean() > 0.5
    later = make(package)
    couple_noise(later)
    later.immiscible = True
    with pytest.raises(ValueError, match="immiscible=False"):
        later(images)


def test_the_handle_takes_it_away(package, images, noise):
    diffusion = make(package)
    couple_noise(diffusion).remove()
    diffusion(images, noise=noise)
    assert torch.allclose(noise_seen(diffusion, images), noise, atol=1e-4)


def test_a_diffusion_with_coupling_can_be_copied_pickled_and_sampled(package, images, noise):
    diffusion = make(package)
    couple_noise(diffusion)
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        other(images, noise=noise)
        assert torch.allclose(noise_seen(other, images), couple(2 * images - 1, noise).noise, atol=1e-4)
    assert diffusion.sample(batch_size=2).shape == (2, 1, 4, 4)


def test_a_network_trains_with_it(package, images):
    torch.manual_seed(0)
    network = package.Unet(dim=8, dim_mults=(1, 2), channels=1, flash_attn=False)
    diffusion = package.GaussianDiffusion(network, image_size=4, timesteps=10)
    couple_noise(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = diffusion(images)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_classes_are_coupled_within(images, noise):
    guided = lucidrains.load("denoising_diffusion_pytorch.classifier_free_guidance")
    diffusion = guided.GaussianDiffusion(Network(), image_size=4, timesteps=10, objective="pred_noise")
    couple_noise(diffusion, condition="classes")
    classes = torch.arange(16) % 2
    diffusion(images, classes=classes, noise=noise)
    expected = couple(2 * images - 1, noise, condition=classes).noise
    assert torch.allclose(noise_seen(diffusion, images), expected, atol=1e-4)


def test_condition_has_to_be_passed(package, images):
    diffusion = make(package)
    couple_noise(diffusion, condition="classes")
    with pytest.raises(ValueError, match="pass classes="):
        diffusion(images)


def test_a_module_whose_loss_takes_no_noise_is_refused(package):
    network = Network()
    network.random_or_learned_sinusoidal_cond = True
    with pytest.raises(TypeError, match="ElucidatedDiffusion"):
        couple_noise(package.ElucidatedDiffusion(network, image_size=4))
    with pytest.raises(TypeError, match="Linear"):
        couple_noise(nn.Linear(1, 1))
