"""Networks, objectives, data sets and optimizers of the user's own, by ``class_path`` and ``init_args``."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from own_networks import Captioned
from PIL import Image
from safetensors.torch import save_file
from test_loop import assert_same_run, trace
from tiny_recipes import TINY

from integrations import checkpoint, config, loop, measure, own, sections
from integrations.config import RecipeError
from integrations.data import DataError, load_source
from integrations.models import build_model
from integrations.network_sections import ConvNext, OwnNetwork
from integrations.own_network import OwnModel

NET = ["--model.class_path", "own_networks.Net", "--model.init_args.width", "4"]
GELU = ["--model.init_args.activation", "{class_path: torch.nn.GELU, init_args: {approximate: tanh}}"]
SGD = ["--optimizer.class_path", "torch.optim.SGD", "--optimizer.init_args.momentum", "0.9"]


@pytest.fixture
def own_recipe(tmp_path):
    small = [argument for field, value in TINY.items() for argument in (f"--{field}", value)]

    def load(*options, name="flow-matching-digits", folder="run"):
        return config.load([name, *small, "--output", str(tmp_path / folder), *options])

    return load


def test_every_section_takes_a_class_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("""
objective: {class_path: own_classes.Weighted, init_args: {scale: 2.0}}
data: {class_path: own_classes.Stripes, init_args: {rows: 40}, flip: true, subset_fraction: 0.5}
model: {class_path: own_networks.Net, init_args: {width: 4, kind: deep}}
optimizer: {class_path: own_classes.SignMomentum, init_args: {beta: 0.5}, lr: 0.01, warmup_steps: 2}
train: {steps: 2, global_batch_size: 4, batch_size_per_device: 4, tracker: null}
""")
    output = loop.train(config.load([str(path), "--output", str(tmp_path / "run")]), progress=False)
    kept = yaml.safe_load((output / "recipe.yaml").read_text())
    assert kept["model"]["init_args"] == {"width": 4, "kind": "deep"}
    trained = measure.load_trained(output)
    assert (len(trained.source), trained.source.classes) == (20, ["flat", "upright"])
    assert trained.model.network.inner.out_channels == 4
    assert trained.objective.scale == 2
    assert next(measure.draw(trained, 3, 2)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    "options",
    [
        SGD,
        ["--optimizer.class_path", "torch.optim.NAdam", "--optimizer.init_args.betas", "[0.5, 0.9]"],
        ["--optimizer.class_path", "own_classes.SignMomentum"],
        [*NET, *SGD, "--data.class_path", "own_classes.Stripes", "--data.workers", "1"],
    ],
)
def test_a_run_of_own_classes_is_resumed_bit_for_bit(own_recipe, options):
    whole = loop.train(own_recipe(*options, folder="whole"), progress=False)
    loop.train(own_recipe(*options, "--train.steps", "4", "--optimizer.schedule", "constant"), progress=False)
    constant = ["--optimizer.schedule", "constant"]
    output = loop.train(own_recipe(*options, *constant, "--resume", "auto"), progress=False)
    whole = loop.train(own_recipe(*options, *constant, folder="constant"), progress=False)
    assert_same_run(whole, output, 6)


def test_the_optimizer_keeps_the_recipes_schedule_and_gets_its_learning_rate(own_recipe):
    run = loop.Run(own_recipe(*SGD, "--optimizer.lr", "0.25"))
    [group] = run.optimizer.param_groups
    assert (type(run.optimizer), group["momentum"], group["initial_lr"]) == (torch.optim.SGD, 0.9, 0.25)
    assert own_recipe(*SGD).optimizer.warmup_steps == 50  # of flow-matching-digits
    assert run.learning_rate(25) == 0.125


def test_a_choice_on_the_command_line_takes_the_place_of_the_recipes(own_recipe):
    assert own_recipe(*NET).sections()["model"] == {
        **{"class_path": "own_networks.Net", "init_args": {"width": 4}, "classes": None, "parameters": None}
    }
    assert own_recipe("--model.name", "convnext", "--model.patch_size", "2").model == ConvNext(patch_size=2)
    assert own_recipe("--data.class_path", "own_classes.Stripes").data.source == "own_classes.Stripes"
    smoke = own_recipe(*NET, "--data.class_path", "own_classes.Stripes", "--overlay", "smoke")
    assert (smoke.model.class_path, smoke.data.source) == ("own_networks.Net", "own_classes.Stripes")
    assert own_recipe(*NET, "--overlay", "smoke").data.source == "photo-crops"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.class_path", "own_networks.Net", "--model.init_args.widht", "4"],
            r"model.init_args.widht: .*'width'",
        ),
        ([*NET[:2], "--model.init_args.width", "wide"], "model.init_args.width: Expected a <class 'int'>.* wide"),
        ([*NET[:2], "--model.init_args.kind", "flat"], "model.init_args.kind: Expected .*'plain', 'deep'.* flat"),
        (
            [*NET[:2], "--model.init_args.sample_size", "9"],
            "model.init_args.sample_size: own_networks.Net takes no such",
        ),
        (
            ["--model.class_path", "own_networks.Nett"],
            "model.class_path: got 'own_networks.Nett': module .* no attribute",
        ),
        (
            ["--model.class_path", "own_network.Net"],
            "model.class_path: got .*expected .*there is no module 'own_network'",
        ),
        (["--model.class_path", "Net"], "model.class_path: got 'Net', expected package.module.Class"),
        (["--model.class_path", "torch.optim.SGD"], "model.class_path: got 'torch.optim.SGD': .*subclass of Module"),
        (
            ["--model.class_path", "own_networks.Broken"],
            r"Broken cannot be built: KeyError: 'no width of 8' \(own_netw",
        ),
        (
            ["--model.class_path", "own_networks.Wrong"],
            r"Wrong called as network\(x, timesteps\) gives \(2, 8, 8\) for x of \(2, 1, 8, 8\), expected that shape",
        ),
        ([*SGD, "--optimizer.init_args.lr", "1"], "optimizer.init_args.lr: torch.optim.SGD takes no such argument"),
        (["--optimizer.class_path", "own_networks.Net"], "optimizer.class_path: .*subclass of Optimizer"),
        (["--objective.class_path", "own_networks.Net"], "objective.class_path: .*subclass of Objective"),
        (["--data.class_path", "own_networks.Net"], "data.class_path: .*subclass of Dataset"),
        (["--data.class_path", "own_classes.Unnamed"], "data.class_path: got 'own_classes.Unnamed', expected an"),
        ([*NET, "--train.gradient_checkpointing", "true"], "train.gradient_checkpointing: .*own_networks.Net has no"),
        (["--data.init_args.rows", "3"], "data.init_args: got {'rows': 3}, expected data.class_path too"),
        (["--train.ddp.bucket_cap", "3"], "train.ddp: got an unexpected keyword argument 'bucket_cap'"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_in_a_line_that_names_the_field(own_recipe, options, message):
    with pytest.raises(RecipeError, match=message) as error:
        loop.Run(own_recipe(*options))
    assert "\n" not in str(error.value)


def test_a_network_that_should_be_told_classes_and_cannot_be_is_refused(own_recipe):
    untold = ["--model.class_path", "own_networks.Fixed", "--model.classes", "10"]
    with pytest.raises(RecipeError, match=r"Fixed called as network\(x, timesteps, class_labels=\): TypeError: .*"):
        loop.Run(own_recipe(*untold, name="consistency-digits"))


def test_both_a_name_and_a_class_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: {name: ddim}\nmodel: {name: mlp, class_path: own_networks.Net}")
    with pytest.raises(
        RecipeError, match=r"model.name: got 'mlp', expected null with model.class_path, one of the two"
    ):
        config.load([str(path)])


def test_images_of_a_data_set_are_bytes_in_any_of_the_usual_forms(monkeypatch):
    gradient = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    forms = [gradient, torch.from_numpy(gradient).permute(2, 0, 1), Image.fromarray(gradient)]
    data = sections.Data(class_path="own_classes.Stripes")
    for form in forms:
        monkeypatch.setattr("own_classes.Stripes.__getitem__", lambda self, row, form=form: form)
        monkeypatch.setattr("own_classes.Stripes.classes", ())
        source = load_source(data)
        assert source.shape == (3, 4, 4)
        assert source.classes == [""]
        assert source[[1]].images[0].permute(1, 2, 0).numpy().tolist() == gradient.tolist()
    scaled = load_source(sections.Data(class_path="own_classes.Stripes", resolution=2))
    assert scaled.shape == (3, 2, 2)
    with pytest.raises(DataError, match=r"item 0 is torch.float32 \(1, 8, 8\), expected an image of PIL"):
        load_source(sections.Data(class_path="own_classes.Floats"))


def test_a_network_of_diffusers_is_used_and_exported_as_it_is(own_recipe):
    blocks = "{block_out_channels: [8, 16], down_block_types: [DownBlock2D, DownBlock2D], norm_num_groups: 4,"
    sizes = ["--model.init_args", f"{blocks} up_block_types: [UpBlock2D, UpBlock2D]}}"]
    recipe = own_recipe("--model.class_path", "diffusers.UNet2DModel", *sizes, "--train.gradient_checkpointing", "true")
    run = loop.Run(recipe)
    assert type(run.bare_model).__name__ == "UNet2DModel"
    assert run.bare_model.config.sample_size == 8
    assert run.bare_model.is_gradient_checkpointing


OUTSIDE = """
import os, re, runpy, sys, warnings
sys.path.append(sys.argv[1])
warnings.simplefilter("ignore")
from pathlib import Path
for folder in sys.argv[2:]:
    os.chdir(folder)
    exec(re.search("```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1])
    assert images[0].size == (8, 8)
    assert type(pipeline.unet).__name__ == "OwnModel"
assert not {"own_networks", "integrations"} & set(sys.modules)
"""


def test_an_exported_network_of_ones_own_opens_where_its_module_is_not_there(own_recipe, tmp_path):
    folders = []
    for name, told in (
        ("flow-matching-digits", []),
        ("ddim-digits", []),
        ("consistency-digits", ["--model.classes", "10"]),
    ):
        run = loop.Run(own_recipe(*NET, *GELU, *told, name=name, folder=name))
        run.objective.export(run.bare_model, tmp_path / name / "pipeline")
        folders.append(str(tmp_path / name / "pipeline"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", OUTSIDE, sysconfig.get_path("purelib"), *folders]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_network_of_ones_own_is_told_captions_and_draws_in_its_pipeline_as_in_the_trainer(own_recipe):
    told = ["--model.class_path", "own_networks.Captioned", "--objective.caption", "class", "--train.steps", "2"]
    output = loop.train(own_recipe(*told, name="stable-diffusion-digits"), progress=False)
    trained = measure.load_trained(output)
    assert isinstance(trained.model.network, Captioned)
    noise = torch.randn(1, *trained.objective.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        nine, three = (trained.objective.sample(trained.model, noise, 2, told=torch.tensor([n])) for n in (9, 3))
    assert not torch.equal(nine, three)
    pipeline = DiffusionPipeline.from_pretrained(
        output / "pipeline", custom_pipeline=trained.objective.pipeline_name, trust_remote_code=True
    )
    scale = trained.objective.config.guidance_scale
    assert scale > 1
    drawn = pipeline("9", latents=noise, num_inference_steps=2, guidance_scale=scale, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(drawn).mean(3) * 2 - 1, nine[:, 0], rtol=0, atol=1e-4)


def test_a_network_that_is_saved_and_opened_answers_the_same(own_recipe, tmp_path):
    run = loop.Run(own_recipe(*NET, *GELU))
    run.bare_model.save_pretrained(tmp_path / "unet")
    again = OwnModel.from_pretrained(tmp_path / "unet")
    assert again.network.activation.approximate == "tanh"
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(x, 5.0).sample, run.bare_model(x, torch.tensor([5.0, 5.0])).sample)


def test_modules_of_the_current_directory_are_found(tmp_path):
    (tmp_path / "here.py").write_text("import torch\nclass Odd(torch.nn.Linear):\n    pass\n")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "integrations.train", "ddim-digits", "--plan", "--model.class_path", "here.Odd"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "here.Odd" in found.stderr
    assert "in_features" in found.stderr  # found, and not given what it needs
    assert "Traceback" not in found.stderr


# Weights to begin with


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("network", [["--model.width", "16", "--model.depth", "1"], NET])
def test_a_run_begins_with_the_weights_it_is_given(own_recipe, tmp_path, network):
    first = loop.train(own_recipe(*network, folder="first"), progress=False)
    newest = checkpoint.newest(first / "checkpoints")
    averaged = {**newest.tensors("model"), **newest.tensors("ema")}
    plain = {name.removeprefix("network."): value for name, value in averaged.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    for path in (first, newest.folder, first / "pipeline", first / "pipeline" / "unet", tmp_path / "plain.safetensors"):
        run = loop.Run(own_recipe(*network, "--train.init_from", str(path)))
        assert same(run.bare_model, averaged), path
        assert torch.equal(run.averages.of["ema"].shadow_params[0], next(run.bare_model.parameters()))


def test_weights_that_do_not_fit_are_refused_by_name_and_shape(own_recipe, tmp_path):
    save_file({"embed.weight": torch.zeros(3, 3), "more": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for path, message in (
        ("other.safetensors", r'does not fit the network: Missing key\(s\) in state_dict: ".*", .* \.\.\.$'),
        ("torn.safetensors", r"torn.safetensors cannot be read"),
        ("nothing", r"nothing is no checkpoint, run, pipeline or .safetensors file"),
    ):
        with pytest.raises(RecipeError, match=f"train.init_from: .*{message}"):
            loop.Run(own_recipe("--train.init_from", str(tmp_path / path)))
    whole = loop.Run(own_recipe()).bare_model.state_dict()
    save_file({**whole, "embed.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match=r"size mismatch for embed.weight: .*3, 3.*192, 64"):
        loop.Run(own_recipe("--train.init_from", str(tmp_path / "other.safetensors")))


def test_a_run_that_goes_on_does_not_need_the_weights_that_it_began_with(own_recipe, tmp_path):
    save_file(loop.Run(own_recipe()).bare_model.state_dict(), tmp_path / "first.safetensors")
    given = ["--train.init_from", str(tmp_path / "first.safetensors")]
    whole = loop.train(own_recipe(*given, folder="whole"), progress=False)
    begun = loop.Run(own_recipe(*given))
    begun.start()
    begun.save()
    (tmp_path / "first.safetensors").unlink()
    output = loop.train(own_recipe(*given, "--resume", "auto"), progress=False)
    assert_same_run(whole, output, 6)
    with pytest.raises(loop.TrainingError, match=r"began with train.init_from '.*first.safetensors', not None"):
        loop.train(own_recipe("--resume", "auto"), progress=False)


def test_the_same_recipe_gives_the_same_run_from_a_class_as_from_its_short_name(own_recipe):
    short = loop.train(own_recipe("--model.width", "16", "--model.depth", "1", folder="short"), progress=False)
    sizes = ["--model.init_args", "{width: 16, depth: 1}"]
    named = own_recipe("--model.class_path", "integrations.small_networks.MlpModel", *sizes)
    assert trace(loop.train(named, progress=False)) == trace(short)


def test_what_is_given_is_what_the_constructor_takes():
    section = OwnNetwork(class_path="own_networks.Fixed")
    objective = type("Stand", (), {"shape": (1, 8, 8)})()
    assert isinstance(build_model(section, objective).network, torch.nn.Module)
    assert own.construct("model", section, torch.nn.Module, in_channels=1).channels == 1
