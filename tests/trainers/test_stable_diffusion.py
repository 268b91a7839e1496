import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline

from couplings import couple
from integrations import config, loop, models, sections, stable_diffusion
from integrations.models import build_model
from integrations.network_sections import ConditionUnet
from integrations.randomness import Draws
from integrations.stable_diffusion import StableDiffusionObjective


@pytest.fixture(scope="module")
def source():
    from integrations.data import load_source

    return load_source(sections.Data("digits"))


def build(source, **options):
    return StableDiffusionObjective(sections.StableDiffusion(pretrained="tiny-random", **options), source)


def draws(step=0):
    return Draws(0, step, 0, 1, torch.device("cpu"))


def test_latents_are_coupled_after_scaling_and_the_offset_is_added_after_the_coupling(make):
    recipe = make("stable-diffusion-digits", "--objective.noise_offset", "0.5", "--objective.prediction", "epsilon")
    run = loop.Run(recipe)
    images = next(run.pairs.batches(range(1), 0))
    [block], _ = run.pairs.couple([run.pairs.load(images, 0, 0)])
    pixels = images.images.float() / 127.5 - 1
    posterior = run.objective.vae.encode(pixels.expand(-1, 3, -1, -1)).latent_dist
    scaled = posterior.sample(block.draws.generator("encode")) * run.objective.vae.config.scaling_factor
    torch.testing.assert_close(block.data, scaled.detach())
    drawn = block.draws.normal(*block.data.shape)
    expected = couple(block.data, drawn, condition=images.labels).noise
    torch.testing.assert_close(block.noise, expected, rtol=0, atol=0)
    mixed = run.objective.mix(block.data, block.noise, block.draws)
    shift = (mixed.target - block.noise).flatten(2)
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift))
    assert shift.std() > 0.2
    alpha = run.objective.scheduler.alphas_cumprod[mixed.timesteps][:, None, None, None]
    torch.testing.assert_close(mixed.inputs, alpha.sqrt() * block.data + (1 - alpha).sqrt() * mixed.target)


def test_the_schedule_is_that_of_stable_diffusion(source):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0).float()
    torch.testing.assert_close(build(source).scheduler.alphas_cumprod, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_min_snr_weight_makes_every_prediction_the_same_loss_on_the_clean_latents(source, prediction):
    objective = build(source, prediction=prediction, min_snr_gamma=5.0)
    data = torch.zeros(64, *objective.shape)
    mixed = objective.mix(data, data, draws())
    alpha = objective.scheduler.alphas_cumprod[mixed.timesteps].double()
    snr = alpha / (1 - alpha)
    # An error of the clean latents of 1 is an error of sqrt(snr) in epsilon and sqrt(snr + 1) in v.
    gain = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    torch.testing.assert_close(mixed.weight.double() * gain, snr.clamp(max=5), rtol=1e-4, atol=1e-8)


def test_the_caption_is_the_name_of_the_class_of_its_own_row(source):
    objective = build(source, caption="class")
    labels = torch.tensor([3, 1, 3])
    context = objective.tell(objective.told(labels, {}, draws()))
    for row, name in enumerate(["3", "1", "3"]):
        tokens = objective.tokenizer([name], padding="max_length", max_length=77, return_tensors="pt")
        expected = objective.text_encoder(tokens.input_ids)[0][0]
        torch.testing.assert_close(context["encoder_hidden_states"][row], expected)


def test_captions_are_dropped_at_the_asked_rate_and_empty_when_unconditional(source):
    labels = torch.full((200,), 7)
    empty = build(source).describe(torch.tensor([-1]))
    told = build(source, caption="class", caption_dropout=0.3)
    context = told.describe(told.told(labels, {}, draws()))
    dropped = torch.isclose(context, empty).flatten(1).all(1).sum().item()
    assert 30 <= dropped <= 95  # binomial(200, 0.3): five standard deviations are 32
    silent = build(source)
    torch.testing.assert_close(silent.describe(silent.told(labels[:5], {}, draws())), empty.expand(5, -1, -1))


def test_guidance_extrapolates_from_the_empty_caption(source):
    section = ConditionUnet(channels=[8, 16], layers_per_block=1, head_channels=4, norm_groups=4)
    guided = build(source, caption="class", guidance_scale=3.0)
    model = build_model(section, guided).eval()
    asked = []

    def record(x, t, encoder_hidden_states):
        out = model(x, t, encoder_hidden_states=encoder_hidden_states)
        asked.append((x, t, out.sample))
        return out

    noise = torch.randn(3, *guided.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guided.sample(record, noise, 2, told=torch.tensor([3, 1, 4]))
    (_, t, prediction), (following, _, _) = asked
    without, told = prediction.chunk(2)
    assert not torch.allclose(without, told)
    scheduler = guided.sampler()
    scheduler.set_timesteps(2)
    expected = scheduler.step(without + 3 * (told - without), t, noise).prev_sample
    torch.testing.assert_close(following[:3], expected)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_a_run_goes_on_from_an_exported_pipeline(make, sampler):
    options = ["--objective.sampler", sampler, "--train.steps", "1", "--coupling.method", "independent"]
    output = loop.train(make("stable-diffusion-digits", *options, folder="first"), progress=False)
    pipeline = StableDiffusionPipeline.from_pretrained(output / "pipeline")
    assert pipeline.scheduler.__class__.__name__ == {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler"}[sampler]
    folder = str(output / "pipeline")
    recipe = make(
        "stable-diffusion-digits",
        *options,
        "--model.pretrained",
        folder,
        "--objective.pretrained",
        folder,
        folder="next",
    )
    run = loop.Run(recipe)
    for name, value in run.bare_model.state_dict().items():
        torch.testing.assert_close(value, pipeline.unet.state_dict()[name], rtol=0, atol=0)
    torch.testing.assert_close(
        run.objective.describe(torch.tensor([4])),
        StableDiffusionObjective(dataclasses.replace(recipe.objective, pretrained="tiny-random"), run.source).describe(
            torch.tensor([4])
        ),
    )


def test_images_the_autoencoder_cannot_take_are_refused(source):
    odd = type("Odd", (), {"shape": (1, 9, 9), "classes": ["a"]})()
    with pytest.raises(config.RecipeError, match="multiples of 2"):
        build(odd)


def test_a_network_that_takes_captions_is_refused_where_there_are_none():
    recipe = config.load(["stable-diffusion-digits"])
    with pytest.raises(config.RecipeError, match=r"model.name: got 'condition_unet', expected mlp or convnext or unet"):
        dataclasses.replace(recipe, objective=sections.Ddim())


def test_pretrained_networks_are_asked_for_at_their_revision(monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["subfolder"], options["revision"]))
        return torch.nn.Linear(1, 1)

    kinds = [stable_diffusion.AutoencoderKL, stable_diffusion.CLIPTextModel, stable_diffusion.CLIPTokenizer]
    for kind in [*kinds, models.UNet2DConditionModel]:
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    stable_diffusion.load_frozen(sections.StableDiffusion(pretrained="some/pipeline", revision="abc"))
    with pytest.raises(AttributeError):  # of what stands in for a network
        models._condition_unet(ConditionUnet(pretrained="some/pipeline", revision="def"), {}, 8, False)
    revisions = {"vae": "abc", "text_encoder": "abc", "tokenizer": "abc", "unet": "def"}
    assert asked == [("some/pipeline", folder, revision) for folder, revision in revisions.items()]
