import dataclasses
import itertools
import math

import pytest
import scipy.stats
import torch
from diffusers import CMStochasticIterativeScheduler

from integrations import loop
from integrations.config import RecipeError
from integrations.consistency import ConsistencyObjective, intervals, levels, scalings, target_decay
from integrations.lpips import Lpips
from integrations.models import MlpModel
from integrations.randomness import Draws
from integrations.sections import Consistency

CT = Consistency(total_steps=800_000, s0=2, s1=150, mu0=0.9)
ICT = Consistency(variant="ict", total_steps=400_000, s0=10, s1=1280, loss="pseudo_huber")


def draws(step=0):
    return Draws(0, step, 0, 1, torch.device("cpu"))


def blocks(n=16):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 4, 4, generator=generator) * 2 - 1, torch.randn(n, 1, 4, 4, generator=generator)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MlpModel(sample_size=4, width=16, depth=1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("step", "levels_and_decay"),
    [
        # Worked by hand from N(k) and mu(k) with s0 = 2, s1 = 150, mu0 = 0.9, K = 800,000:
        # sqrt(0 + 4) - 1 = 1; sqrt(22797 / 4 + 4) - 1 = 74.52; sqrt(22797 / 2 + 4) - 1 = 105.78; 151 - 1.
        (0, (2, 0.9**2)),
        (200_000, (76, 0.9 ** (2 / 75))),
        (400_000, (107, 0.9 ** (2 / 106))),
        (800_000, (151, 0.9 ** (2 / 150))),
        (900_000, (151, 0.9 ** (2 / 150))),
    ],
)
def test_the_schedules_of_ct(step, levels_and_decay):
    count, decay = levels_and_decay
    assert intervals(CT, step) + 1 == count
    assert target_decay(CT, step) == pytest.approx(decay, rel=1e-12)


def test_the_schedule_of_ct_only_grows():
    counts = [intervals(CT, step) for step in range(0, 800_001, 500)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 150)


def test_the_schedule_of_ict_doubles_from_10_to_1280_in_equal_stages():
    assert [intervals(ICT, stage * 50_000) for stage in range(9)] == [10, 20, 40, 80, 160, 320, 640, 1280, 1280]
    assert intervals(ICT, 49_999) == 10


@pytest.mark.parametrize("count", [1, 17, 150])
def test_the_levels_are_those_that_diffusers_samples_from(count):
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=count + 1)
    scheduler.set_timesteps(count + 1)
    grid = levels(CT, count)
    torch.testing.assert_close(grid.flip(0).float(), scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert grid[0].item() == pytest.approx(0.002)
    assert grid[-1].item() == pytest.approx(80)
    middle = (0.002 ** (1 / 7) + 0.5 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert count % 2 or grid[count // 2].item() == pytest.approx(middle)


def test_the_scalings_are_those_of_diffusers_and_the_identity_at_the_cleanest_level():
    sigma = levels(CT, 40)
    scheduler = CMStochasticIterativeScheduler()
    c_skip, c_out, c_in = scalings(CT, sigma)
    expected = scheduler.get_scalings_for_boundary_condition(sigma)
    torch.testing.assert_close((c_skip, c_out), expected)
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 0.25).sqrt())
    assert (c_skip[0].item(), c_out[0].item()) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("config", [CT, ICT])
def test_both_levels_are_neighbours_and_carry_the_very_noise_that_was_given(config):
    data, noise = blocks()
    mixed = ConsistencyObjective(config, (1, 4, 4)).mix(data, noise, draws(100_000))
    grid = levels(config, intervals(config, 100_000)).float()
    for x, sigma in ((mixed.noisier, mixed.sigma_noisier), (mixed.cleaner, mixed.sigma_cleaner)):
        torch.testing.assert_close(x, data + sigma[:, None, None, None] * noise)
    upper, lower = (torch.searchsorted(grid, s) for s in (mixed.sigma_noisier, mixed.sigma_cleaner))
    assert torch.equal(upper, lower + 1)
    if config.variant == "ict":
        torch.testing.assert_close(mixed.weight, 1 / (mixed.sigma_noisier - mixed.sigma_cleaner))
    else:
        assert (mixed.weight == 1).all()


def test_ict_draws_its_levels_from_a_lognormal():
    objective = ConsistencyObjective(ICT, (1, 1, 1))
    data = torch.zeros(20_000, 1, 1, 1)
    mixed = objective.mix(data, data, draws(400_000))
    logs = (mixed.sigma_noisier.log() + mixed.sigma_cleaner.log()) / 2
    low, high = ((math.log(edge) + 1.1) / 2.0 for edge in (0.002, 80))
    expected = scipy.stats.truncnorm(low, high, loc=-1.1, scale=2.0)
    # Five standard errors.
    assert logs.mean().item() == pytest.approx(expected.mean(), abs=0.07)
    assert logs.std().item() == pytest.approx(expected.std(), abs=0.05)


@pytest.mark.parametrize("loss", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("variant", ["ct", "ict"])
def test_the_loss_is_the_distance_to_the_target_network_and_moves_only_the_trained_one(variant, loss):
    config = Consistency(variant=variant, total_steps=10, s0=4, s1=8, loss=loss)
    objective, model = ConsistencyObjective(config, (1, 4, 4)), network()
    objective.attach(model)
    if variant == "ct":
        with torch.no_grad():
            for parameter in objective.target.parameters():
                parameter.mul_(0.5)
    data, noise = blocks()
    found = objective.loss(model, data, noise, draws())
    mixed = objective.mix(data, noise, draws())
    teacher = objective.target if variant == "ct" else model
    with torch.no_grad():
        a = objective.denoise(model, mixed.noisier, mixed.sigma_noisier)
        b = objective.denoise(teacher, mixed.cleaner, mixed.sigma_cleaner)
    for i in range(len(data)):
        squares = [(x - y) ** 2 for x, y in zip(a[i].flatten().tolist(), b[i].flatten().tolist(), strict=True)]
        c = 0.00054 * math.sqrt(16)
        expected = sum(squares) / 16 if loss == "l2" else math.sqrt(sum(squares) + c * c) - c
        assert found[i].item() == pytest.approx(expected * mixed.weight[i].item(), rel=1e-4, abs=1e-7)
    found.mean().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert variant == "ict" or all(parameter.grad is None for parameter in objective.target.parameters())


def test_the_target_follows_with_the_decay_of_the_step():
    objective, model = ConsistencyObjective(CT, (1, 4, 4)), network()
    objective.attach(model)
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    objective.after_step(model, 1)
    for old, average in zip(before, objective.target.parameters(), strict=True):
        torch.testing.assert_close(average, old + 1 - 0.81)


def test_the_first_noise_can_be_added_again_between_sampling_steps():
    _, noise = blocks(4)
    model, objective = network(), ConsistencyObjective(dataclasses.replace(ICT, multistep_noise="first"), (1, 4, 4))
    scheduler, x = objective.scheduler(), ICT.sigma_max * noise
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for sigma, cleaner in itertools.pairwise(scheduler.sigmas):
            x = objective.denoise(model, x, sigma.expand(4))
            x += math.sqrt(max(float(cleaner), ICT.sigma_min) ** 2 - ICT.sigma_min**2) * noise
        drawn = [objective.sample(model, noise, 3, torch.Generator().manual_seed(seed)) for seed in range(2)]
    torch.testing.assert_close(drawn[0], x.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], ConsistencyObjective(ICT, (1, 4, 4)).sample(model, noise, 3).detach())


def test_both_sides_see_the_same_dropout():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.masks = []

        def forward(self, x, t):
            self.masks.append(torch.nn.functional.dropout(torch.ones(50)))
            return type("Output", (), {"sample": x})

    model = Dropped()
    objective = ConsistencyObjective(ICT, (1, 4, 4))
    objective.attach(model)
    objective.loss(model, *blocks(), draws())
    assert torch.equal(*model.masks)


def vgg(generator):
    """Random weights by torchvision's names: convolutions at these places, poolings and ReLUs between them."""
    widths, found, width = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512), {}, 3
    for place, following in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), widths, strict=True):
        gain = math.sqrt(2 / (9 * width))
        found[f"features.{place}.weight"] = gain * torch.randn(following, width, 3, 3, generator=generator)
        found[f"features.{place}.bias"] = 0.1 * torch.randn(following, generator=generator)
        width = following
    return found


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(vgg(torch.Generator().manual_seed(0)), tmp_path / "checkpoints" / "vgg16-397923af.pth")


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_lpips_is_the_weighted_distance_of_normalised_features(vgg_file, pooling):
    metric = Lpips.pretrained(pooling)
    pool = {"max": torch.nn.functional.max_pool2d, "average": torch.nn.functional.avg_pool2d}[pooling]
    assert metric.side == 224
    metric.side = 32
    weights = vgg(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    pair = torch.rand(2, 1, 3, 32, 32, generator=generator) * 2 - 1
    expected = 0.0
    # ImageNet's statistics of pixels in [0, 1].
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    a, b = ((image[0].permute(1, 2, 0) / 2 + 0.5 - mean) / deviation for image in pair)
    a, b = a.permute(2, 0, 1)[None], b.permute(2, 0, 1)[None]
    stage = 0
    for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        if place in (5, 10, 17, 24):
            a, b = (pool(x, 2) for x in (a, b))
        arguments = weights[f"features.{place}.weight"], weights[f"features.{place}.bias"]
        a, b = (torch.nn.functional.conv2d(x, *arguments, padding=1).relu() for x in (a, b))
        if place in (2, 7, 14, 21, 28):
            unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
            expected += ((unit[0] - unit[1]) ** 2 * metric.linear[stage]).sum(1).mean().item()
            stage += 1
    assert metric(*pair).item() == pytest.approx(expected, rel=1e-3)
    assert metric(pair[0], pair[0]).item() == 0


def test_the_lpips_loss_reaches_the_network(vgg_file):
    config = Consistency(total_steps=10, s0=4, s1=8, loss="lpips", lpips_pooling="average")
    objective, model = ConsistencyObjective(config, (1, 4, 4)), network()
    objective.attach(model)
    assert objective.lpips.pool is torch.nn.functional.avg_pool2d
    objective.lpips.side = 32
    data, noise = blocks(2)
    found = objective.loss(model, data, noise, draws())
    assert found.shape == (2,)
    assert (found > 0).all()
    found.mean().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in objective.lpips.parameters())


def test_lpips_without_its_weights_is_refused_naming_the_file(tmp_path, monkeypatch, make):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RecipeError, match=r"vgg16-397923af\.pth"):
        loop.Run(make("consistency-digits", "--objective.loss", "lpips"))
