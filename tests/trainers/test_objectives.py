import pytest
import torch
from torch import nn

from integrations.ddim import DdimObjective
from integrations.flow_matching import FlowMatchingObjective
from integrations.randomness import Draws
from integrations.sections import Ddim, FlowMatching

SHAPE = (1, 4, 4)


def draws(step=0):
    return Draws(0, step, 0, 1, torch.device("cpu"))


def blocks(n=64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, *SHAPE, generator=generator) * 2 - 1, torch.randn(n, *SHAPE, generator=generator)


class Oracle(nn.Module):
    """Knows the one image that all data are, and answers as the prediction type asks."""

    def __init__(self, image, answer):
        super().__init__()
        self.image, self.answer, self.asked = image, answer, []

    def forward(self, x, t):
        self.asked.append(float(t))
        return type("Output", (), {"sample": self.answer(x, t, self.image)})


def test_flow_matching_regresses_the_velocity_of_the_very_noise_that_is_mixed():
    data, noise = blocks()
    mixed = FlowMatchingObjective(FlowMatching(), SHAPE).mix(data, noise, draws())
    t = (mixed.timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(mixed.inputs, (1 - t) * data + t * noise)
    torch.testing.assert_close(mixed.target, noise - data)
    # One Euler step along the target, from anywhere on the path, meets the data.
    torch.testing.assert_close(mixed.inputs - t * mixed.target, data, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusion_regresses_the_very_noise_that_is_mixed(prediction, schedule):
    data, noise = blocks()
    objective = DdimObjective(Ddim(prediction=prediction, schedule=schedule), SHAPE)
    mixed = objective.mix(data, noise, draws())
    steps = torch.arange(1000, dtype=torch.float64)
    if schedule == "linear":
        betas = 1e-4 + steps / 999 * (0.02 - 1e-4)
    else:
        bar = [torch.cos((s / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2 for s in (steps, steps + 1)]
        betas = (1 - bar[1] / bar[0]).clamp(max=0.999)
    alpha = (1 - betas).cumprod(0)[mixed.timesteps].float()[:, None, None, None]
    torch.testing.assert_close(mixed.inputs, alpha.sqrt() * data + (1 - alpha).sqrt() * noise, rtol=1e-3, atol=1e-4)
    target = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * data, "sample": data}
    torch.testing.assert_close(mixed.target, target[prediction], rtol=1e-3, atol=1e-4)


def test_times_cover_the_whole_range_and_follow_the_step():
    data, noise = blocks(4000)
    uniform = FlowMatchingObjective(FlowMatching(), SHAPE).mix(data, noise, draws()).timesteps
    assert uniform.min() < 5
    assert uniform.max() > 995
    assert uniform.mean().item() == pytest.approx(500, abs=25)  # five standard errors
    normal = FlowMatchingObjective(FlowMatching(time="logit_normal", logit_mean=1.0), SHAPE)
    logits = torch.logit(normal.mix(data, noise, draws()).timesteps / 1000)
    assert logits.mean().item() == pytest.approx(1, abs=0.08)
    assert logits.std().item() == pytest.approx(1, abs=0.06)
    ddim = DdimObjective(Ddim(), SHAPE)
    first, again, later = (ddim.mix(data, noise, draws(step)).timesteps for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert (first.min(), first.max()) == (0, 999)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_flow_matching_with_the_true_velocity_arrives_in_any_number_of_steps(steps):
    data, noise = blocks(3)
    image = data[:1]
    objective = FlowMatchingObjective(FlowMatching(), SHAPE)
    # The velocity of a path to one image: what is left to go over the time that is left.
    oracle = Oracle(image, lambda x, t, image: (x - image) / (t / 1000))
    torch.testing.assert_close(objective.sample(oracle, noise, steps), image.expand(3, -1, -1, -1), atol=1e-4, rtol=0)
    assert oracle.asked == pytest.approx([1000 * (1 - i / steps) for i in range(steps)])


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_the_true_prediction_arrives_in_any_number_of_steps(prediction, steps):
    data, noise = blocks(3)
    image = data[:1]
    objective = DdimObjective(Ddim(prediction=prediction, spacing="trailing"), SHAPE)

    def answer(x, t, image):
        alpha = objective.scheduler.alphas_cumprod[int(t)]
        epsilon = (x - alpha.sqrt() * image) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * image
        return {"epsilon": epsilon, "v_prediction": velocity, "sample": image.expand_as(x)}[prediction]

    oracle = Oracle(image, answer)
    found = objective.sample(oracle, noise, steps)
    torch.testing.assert_close(found, image.expand(3, -1, -1, -1), atol=2e-3, rtol=0)
    assert oracle.asked == [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]


def test_leading_steps_are_the_even_ones_of_the_published_sampler():
    oracle = Oracle(torch.zeros(1, *SHAPE), lambda x, t, image: torch.zeros_like(x))
    DdimObjective(Ddim(), SHAPE).sample(oracle, blocks(1)[1], 20)
    assert oracle.asked == list(range(950, -1, -50))


def test_eta_puts_noise_back_and_0_does_not():
    noise = blocks(2)[1]
    oracle = Oracle(torch.zeros(1, *SHAPE), lambda x, t, image: 0.1 * x)

    def twice(eta):
        objective = DdimObjective(Ddim(eta=eta), SHAPE)
        return [objective.sample(oracle, noise, 4, torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    assert torch.equal(*twice(0.0))
    assert not torch.equal(*twice(1.0))


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_of_a_row_is_its_weighted_mean_squared_error(gamma):
    data, noise = blocks(4)
    objective = DdimObjective(Ddim(prediction="v_prediction", min_snr_gamma=gamma), SHAPE)
    mixed = objective.mix(data, noise, draws())

    def network(x, t):
        return type("Output", (), {"sample": 0.3 * x})

    found = objective.loss(network, data, noise, draws())
    for i in range(4):
        errors = (0.3 * mixed.inputs[i] - mixed.target[i]).flatten().tolist()
        weight = 1.0 if gamma is None else mixed.weight[i].item()
        assert found[i].item() == pytest.approx(weight * sum(e * e for e in errors) / len(errors), rel=1e-4)
