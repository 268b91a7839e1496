from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from integrations import config, sections
from integrations.consistency import ConsistencyObjective
from integrations.models import align, build_model
from integrations.network_sections import Adm, ConditionUnet, ConvNext, Mlp, Ncsnpp, Unet
from integrations.randomness import Draws

# Counts computed with the networks' published code or configurations.
FULL_SIZE = [
    (Unet(), (3, 32, 32), 35_746_307),  # google/ddpm-cifar10-32
    (Ncsnpp(), (3, 32, 32), 56_395_651),  # openai/consistency_models_cifar10
    (Adm(), (3, 64, 64), 295_131_267),  # openai/consistency_models
    (ConditionUnet(), (4, 64, 64), 859_520_964),  # CompVis/stable-diffusion-v1-4
]
SMALL = [
    Mlp(width=16, depth=1),
    ConvNext(patch_size=2, width=16, depth=1, kernel_size=3),
    Unet(channels=[8, 16], attention=[False, True], layers_per_block=1, norm_groups=4),
    Ncsnpp(channels=8, multipliers=[1, 2], attention=[False, True], layers_per_block=1, norm_groups=4),
    Adm(channels=[8, 16], attention=[False, True], layers_per_block=1, head_channels=8, norm_groups=4),
]


def randomised(section):
    """A small network whose every weight matters: as built, many start at zero."""
    model = build_model(section, SimpleNamespace(shape=(3, 8, 8))).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("section", "shape", "count"), FULL_SIZE, ids=lambda value: getattr(value, "name", None))
def test_the_published_networks_have_the_published_number_of_parameters(section, shape, count):
    with torch.device("meta"):
        model = build_model(section, SimpleNamespace(shape=shape, caption_width=768))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("section", "side", "message"),
    [
        (
            Unet(),
            28,
            "data.resolution: got 28, expected a multiple of 8: the network halves the images 3 times",
        ),
        (Ncsnpp(), 30, "data.resolution: got 30, expected a multiple of 4"),
        (Adm(), 20, "data.resolution: got 20, expected a multiple of 8"),
        (
            ConvNext(patch_size=3),
            8,
            "model.patch_size: got 3, expected a divisor of the images' 8 pixels",
        ),
        (Mlp(width=-1), 8, "model: mlp cannot be built for images of 3 x 8 x 8: "),
        (ConvNext(width=-1), 8, "model: convnext cannot be built for images of 3 x 8 x 8: "),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_images_that_a_network_cannot_take_are_refused_in_a_line(section, side, message):
    with torch.device("meta"), pytest.raises(config.RecipeError) as error:
        build_model(section, SimpleNamespace(shape=(3, side, side)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            Unet,
            {"norm_groups": 48},
            r"model.norm_groups: got 48, expected a divisor .*\[128, 256, 256, 256\]",
        ),
        (
            Ncsnpp,
            {"channels": 8, "norm_groups": 16},
            r"model.norm_groups: got 16, .*\[8, 16, 16, 16\]",
        ),
        (
            ConditionUnet,
            {"channels": [8, 20], "norm_groups": 8},
            r"model.norm_groups: got 8, .*\[8, 20\]",
        ),
        (
            ConditionUnet,
            {"channels": [4, 8], "norm_groups": 4},
            "model.head_channels: got 8.* at most 4",
        ),
        (Unet, {"head_channels": 512}, "model.head_channels: got 512, expected at most 256"),
        (Adm, {"head_channels": 0}, "model.head_channels: got 0, expected at most 384"),
        (ConvNext, {"kernel_size": 4}, "model.kernel_size: got 4, expected an odd number"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(kind, options, message):
    with pytest.raises(config.RecipeError, match=message):
        kind(**options)


DEPTHS = [
    "channels: [32, 64], attention: [false, true], head_channels: 64",
    "channels: [32, 32, 32, 32, 32], attention: [false, false, false, false, true], head_channels: 32",
]


@pytest.mark.parametrize("sizes", DEPTHS, ids=["2 levels", "5 levels"])
@pytest.mark.parametrize("name", ["unet", "adm"])
def test_the_smoke_overlay_takes_networks_of_any_depth(tmp_path, name, sizes):
    path = tmp_path / "deep.yaml"
    data = "data: {source: imagenet, streaming: true}"
    path.write_text(f"objective: {{name: ddim}}\n{data}\nmodel: {{name: {name}, {sizes}}}\n")
    config.load([str(path)])
    recipe = config.load([str(path), "--overlay", "smoke"])
    model = build_model(recipe.model, SimpleNamespace(shape=(3, recipe.data.side, recipe.data.side)))
    x = torch.zeros(2, 3, 16, 16)
    assert model(x, 5.0).sample.shape == x.shape


@pytest.mark.parametrize("section", SMALL, ids=lambda section: section.name)
def test_networks_take_one_time_or_one_each_and_are_finite_at_negative_times(section):
    model = randomised(section)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = model(x, -1500.0).sample
        each = model(x, torch.tensor([-1500.0, 900.0])).sample
    assert one.shape == x.shape
    assert one.isfinite().all()
    torch.testing.assert_close(one[0], each[0])
    assert not torch.allclose(one[1], each[1])


@pytest.mark.parametrize("section", [s for s in SMALL if s.name in ("unet", "adm", "ncsnpp")], ids=lambda s: s.name)
def test_residual_branches_attention_and_output_start_at_zero(section):
    model = build_model(section, SimpleNamespace(shape=(3, 8, 8)))
    ends = [model.conv_out]
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            ends.append(module.conv2)
            assert module.conv1.weight.abs().sum() > 0
        elif isinstance(module, Attention):
            ends.append(module.to_out[0])
            assert module.to_q.weight.abs().sum() > 0
    assert len({type(end) for end in ends}) == 2
    assert all(not end.weight.any() and not end.bias.any() for end in ends)


@pytest.mark.parametrize("section", SMALL, ids=lambda section: section.name)
def test_networks_survive_being_saved_and_loaded(section, tmp_path):
    model = randomised(section)
    model.save_pretrained(tmp_path)
    again = align(type(model).from_pretrained(tmp_path))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(x, 10.0).sample, model(x, 10.0).sample)


@pytest.mark.parametrize("section", [s for s in SMALL if s.name in ("mlp", "convnext", "ncsnpp")], ids=lambda s: s.name)
def test_class_conditional_networks_listen_to_the_class(section):
    built = build_model(section, SimpleNamespace(shape=(3, 8, 8)))
    model = type(built)(**{**built.config, "num_class_embeds": 4}).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(x, 10.0, class_labels=torch.tensor([0, 0])).sample
        second = model(x, 10.0, class_labels=torch.tensor([0, 3])).sample
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    with pytest.raises(ValueError, match="class_labels"):
        model(x, 10.0)


@pytest.mark.parametrize("section", SMALL, ids=lambda section: section.name)
def test_every_weight_gets_a_gradient_in_bfloat16_although_the_target_is_computed_first(section):
    model = build_model(section, SimpleNamespace(shape=(3, 8, 8)))
    objective = ConsistencyObjective(sections.Consistency(variant="ict", s0=10, s1=20), (3, 8, 8))
    objective.attach(model)
    data, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):  # remembers the rounded weights, also those of a pass without gradient
        loss = objective.loss(model, data, noise, Draws(0, 0, 0, 1, torch.device("cpu")))
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
