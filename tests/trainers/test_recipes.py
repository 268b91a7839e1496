"""The recipes of the published experiments: what they say, that they run, and what ``--plan`` tells of them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from own_networks import Net
from PIL import Image
from test_loop import assert_same_run, trace
from tiny_recipes import first_block

from integrations import build, config, loop, measure, places
from integrations.models import build_model
from integrations.plan import count, expect, launch, optimizer_state, plan

ROOT = Path(__file__).parents[2]
# What the paper and the baselines' repositories say, by fields of the recipe; written out here, not read from it.
CONSISTENCY = {
    "objective": {"name": "consistency", "variant": "ct", "total_steps": 800_000, "s0": 2, "loss": "lpips"}
    | {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0},
    "data": {"flip": True, "crop": None, "subset_fraction": 1.0},
    "model": {"dropout": 0.0},
    "optimizer": {"name": "radam", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip": None}
    | {"warmup_steps": 0, "schedule": "constant"},
    "coupling": {"method": "auction", "metric": "l2", "quantize": "fp16", "scope": "local", "condition": None},
    "train": {"steps": 800_000, "batch_size_per_device": 128, "ema_decay": 0.9999, "ema_ramp": False}
    | {"gradient_checkpointing": False},
    "evaluate": {"steps": [1], "samples": 50_000, "features": "inception"},
}
CONSISTENCY_64 = {
    "objective": {"s1": 200, "mu0": 0.95, "lpips_pooling": "average"},
    "data": {"resolution": 64},
    "model": {"name": "adm", "channels": [192, 384, 576, 768], "attention": [False, True, True, True]}
    | {"layers_per_block": 3, "head_channels": 64},
    "optimizer": {"lr": 1e-4},
    "train": {"mixed_precision": "fp16", "further_ema_decays": [0.999, 0.9999432189950708]},
}
STABLE_DIFFUSION = {
    "objective": {"name": "stable_diffusion", "pretrained": "CompVis/stable-diffusion-v1-4", "prediction": "epsilon"}
    | {"frozen_precision": "fp16", "caption_dropout": 0.0, "min_snr_gamma": None, "noise_offset": 0.0}
    | {"autoencoder_parameters": 83_653_863},
    "data": {"source": "imagenet", "resolution": 256, "interpolation": "bilinear", "flip": True},
    "model": {"name": "condition_unet", "channels": [320, 640, 1280, 1280], "layers_per_block": 2, "head_channels": 8}
    | {"pretrained": None, "parameters": 859_520_964},
    "optimizer": {"name": "adamw", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-2, "clip": 1.0}
    | {"warmup_steps": 0, "schedule": "constant"},
    "coupling": {"method": "auction", "metric": "l2", "quantize": "fp16", "scope": "global", "condition": None},
    "train": {"mixed_precision": "fp16", "gradient_checkpointing": True, "ema_decay": 0.9999},
    "evaluate": {"steps": [20], "samples": 50_000, "features": "inception"},
}
PUBLISHED = {
    "consistency-cifar10": [
        CONSISTENCY,
        {
            "objective": {"s1": 150, "mu0": 0.9, "lpips_pooling": "max"},
            "data": {"source": "cifar10"},
            "model": {"name": "ncsnpp", "channels": 128, "multipliers": [2, 2, 2], "attention": [False, True, False]}
            | {"layers_per_block": 4, "fourier_scale": 16.0, "classes": None, "parameters": 56_395_651},
            "optimizer": {"lr": 4e-4},
            "train": {"global_batch_size": 512, "mixed_precision": "no", "further_ema_decays": []},
            "devices": 4,
        },
    ],
    "consistency-celeba": [
        CONSISTENCY,
        CONSISTENCY_64,
        {
            "data": {"source": "celeba"},
            "model": {"classes": None, "parameters": 295_131_267},
            "train": {"global_batch_size": 1024},
            "devices": 8,
        },
    ],
    "consistency-tiny-imagenet": [
        CONSISTENCY,
        CONSISTENCY_64,
        {
            "data": {"source": "tiny-imagenet"},
            "model": {"classes": 1000, "parameters": 295_899_267},
            "train": {"global_batch_size": 2048},
            "devices": 16,
        },
    ],
    "ddim-cifar10": [
        {
            "objective": {"name": "ddim", "prediction": "epsilon", "schedule": "linear", "diffusion_steps": 1000}
            | {"beta_start": 1e-4, "beta_end": 0.02, "min_snr_gamma": None, "spacing": "leading", "eta": 0.0},
            "data": {"source": "cifar10", "flip": True},
            "model": {"name": "unet", "channels": [128, 256, 256, 256], "attention": [False, True, False, False]}
            | {"layers_per_block": 2, "dropout": 0.1, "parameters": 35_746_307},
            "optimizer": {"name": "adam", "lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
            | {"clip": 1.0, "warmup_steps": 5000, "schedule": "constant"},
            "coupling": {"method": "auction", "metric": "l2", "quantize": "fp16", "scope": "local", "condition": None},
            "train": {"steps": 163_800, "global_batch_size": 256, "batch_size_per_device": 256, "ema_ramp": True}
            | {"mixed_precision": "no", "ema_decay": 0.9999, "further_ema_decays": [], "checkpoint_every": 23_400},
            "evaluate": {"steps": [20, 50, 100, 500, 1000], "samples": 50_000, "features": "inception"},
            "devices": 1,
        }
    ],
    "sd-unconditional-imagenet10": [
        STABLE_DIFFUSION,
        {
            "objective": {"caption": "empty"},
            "data": {"subset_fraction": 0.1},
            "train": {"steps": 70_000, "global_batch_size": 512, "batch_size_per_device": 128},
            "devices": 4,
        },
    ],
    "sd-class-conditional-imagenet": [
        STABLE_DIFFUSION,
        {
            "objective": {"caption": "class"},
            "data": {"subset_fraction": 1.0},
            "train": {"steps": 20_000, "global_batch_size": 2048, "batch_size_per_device": 256},
            "devices": 8,
        },
    ],
    "sd-fine-tune-imagenet": [
        STABLE_DIFFUSION,
        {
            "objective": {"caption": "class"},
            "data": {"subset_fraction": 1.0},
            "model": {"pretrained": "CompVis/stable-diffusion-v1-4"},
            "optimizer": {"lr": 1e-5},
            "train": {"steps": 5000, "global_batch_size": 512, "batch_size_per_device": 128},
            "devices": 4,
        },
    ],
}

# Of Improved Immiscible Diffusion (arXiv 2505.18521) and its authors' code.
NEAREST = {
    "flow-matching-digits": 4,
    "ddim-cifar10": 8,
    "sd-class-conditional-imagenet": 64,
    "sd-fine-tune-imagenet": 64,
}

EXPERIMENTS = ["ddim-cifar10", *(name for name in PUBLISHED if name not in ("ddim-cifar10", "sd-fine-tune-imagenet"))]
RESUME = ["--resume", "auto"]


def test_every_recipe_is_either_published_or_runs_on_a_cpu():
    assert set(config.bundled()) == {*PUBLISHED, *(name for name in config.bundled() if name.endswith("-digits"))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_was_published(name):
    recipe = config.load([name])
    expected = {"devices": launch(recipe)[1]["num_processes"]}
    found = {**recipe.sections(), "devices": expected["devices"]}
    for part in PUBLISHED[name]:
        for section, values in part.items():
            expected[section] = expected.get(section, {}) | values if isinstance(values, dict) else values
    assert found["devices"] == expected.pop("devices")
    for section, values in expected.items():
        assert {field: found[section][field] for field in values} == values, section
    devices = PUBLISHED[name][-1]["devices"]
    assert recipe.train.global_batch_size == recipe.train.batch_size_per_device * devices
    assert places.divide(recipe, devices)[1] == 1


@pytest.mark.parametrize(("name", "k"), NEAREST.items())
def test_each_row_takes_the_nearest_of_as_many_noises_as_published(name, k, tmp_path):
    recipe, plain = config.load([name, "--overlay", "nearest"]), config.load([name])
    expected = {"method": "nearest", "metric": "l2", "quantize": "fp16", "scope": "local", "options": {"k": k}}
    coupling = recipe.sections()["coupling"]
    assert {field: coupling[field] for field in expected} == expected
    assert recipe.sections() | {"coupling": None} == plain.sections() | {"coupling": None}
    small = config.load([name, "--overlay", "nearest", "--overlay", "smoke", "--output", str(tmp_path)])
    assert small.coupling == recipe.coupling
    assert build.candidates(build.build_coupling(small)) == k


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_has_the_parameters_that_the_recipe_states(name):
    recipe = config.load([name])
    with torch.device("meta"):
        objective = build.build_objective(recipe, expect(recipe), blank=True)
        model = build_model(recipe.model, objective, blank=True)
    assert count(model) == recipe.model.parameters
    if recipe.objective.name == "stable_diffusion":
        assert count(objective.vae) == recipe.objective.autoencoder_parameters
        assert count(objective.text_encoder) == 123_060_480  # CLIP ViT-L/14
        assert objective.vae.dtype == torch.float16


@pytest.mark.parametrize("path", sorted(config.LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_launch_configurations(path):
    found = load_config_from_file(str(path))
    assert found.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert path.name in (config.LAUNCH / "README.md").read_text()
    assert any(path.stem == config.load([name]).launch.config for name in PUBLISHED) or path.stem == "cpu-2"


def start(folder, *arguments):
    """Run what the documentation says, on CPU cores alone."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/trainers'}", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = ["accelerate", "launch", "--config_file", "integrations/launch/cpu-2.yaml", "-m", *arguments]
    assert " ".join(line[:5]) in (config.LAUNCH / "README.md").read_text()
    program = [str(Path(sys.executable).parent / "accelerate"), *line[1:]]
    with (folder / "launch.txt").open("w") as said:
        process = subprocess.Popen(program, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        assert process.wait(540) == 0, (folder / "launch.txt").read_text()[-3000:]
    finally:
        process.terminate()  # it ends its processes
        process.wait()


@pytest.mark.timeout(1200)
def test_every_recipe_runs_and_resumes_under_accelerate_launch(tmp_path):
    first, *others = EXPERIMENTS
    start(tmp_path, "several", str(tmp_path), first, *others)
    # One by the documented command itself.
    start(tmp_path, "integrations.train", first, "--overlay", "smoke", "--output", str(tmp_path / first), *RESUME)
    for name in EXPERIMENTS:
        output = tmp_path / name
        assert [step for step, *_ in trace(output)] == [1, 2, 3]
        assert all(reduction > 0 for _, _, reduction, _ in trace(output))
        assert (output / "pipeline" / "model_index.json").is_file()
        assert_same_run(tmp_path / "whole" / name, output, 3)
        run, full = yaml.safe_load((output / "recipe.yaml").read_text()), config.load([name]).sections()
        for section in ("objective", "optimizer", "coupling"):
            changed = {field for field, value in run[section].items() if value != full[section][field]}
            assert changed <= {"loss", "pretrained", "frozen_precision", "autoencoder_parameters"}


@pytest.mark.parametrize("name", ["ddim-cifar10", "consistency-tiny-imagenet", "sd-class-conditional-imagenet"])
def test_a_plan_tells_what_the_recipes_own_machines_do(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    full, devices = config.load([name]), PUBLISHED[name][-1]["devices"]
    rows = full.train.batch_size_per_device
    batches = ["--train.batch_size_per_device", str(rows), "--train.global_batch_size", str(rows * devices)]
    argv = [name, "--overlay", "smoke", "--data.source", full.data.source, "--launch.config", full.launch.config]
    text = plan(config.load([*argv, *batches, "--train.steps", str(full.train.steps), "--plan"]), [*argv, "--plan"])
    told = dict(re.findall(r"^(\S+(?: batch)?) +(.*)$", text, re.MULTILINE))
    assert told["global batch"] == f"{rows * devices} rows a step"
    assert told["device batch"].startswith(f"{rows} rows at once: {rows * devices} = {rows} x {devices} x 1 ")
    coupled = full.train.global_batch_size if full.coupling.scope == "global" else rows
    assert told["OT batch"].startswith(f"{coupled} rows")
    assert told["steps"].startswith(f"{full.train.steps:,} = ")
    assert float(told["coupling"].split()[0]) > 0
    assert re.match(r"\d+\.\d GiB per device, an estimate", told["memory"])
    line = shlex.split(told["launch"])
    assert line[:4] == ["accelerate", "launch", "--config_file", f"integrations/launch/{full.launch.config}.yaml"]
    assert line[-len(argv) :] == argv
    assert ("--machine_rank" in line) == (devices == 16)


def test_the_memory_of_a_plan_is_arithmetic_on_the_parameters():
    argv = ["ddim-digits", "--train.global_batch_size", "64", "--train.batch_size_per_device", "64"]
    text = plan(config.load([*argv, "--plan"]), argv)
    parameters = int(re.search(r"parameters +([\d,]+)", text)[1].replace(",", ""))
    pieces = {name.strip(): float(size) for name, size in re.findall(r"^  (.*?)([\d.]+) MiB$", text, re.MULTILINE)}
    assert list(pieces) == ["weights", "gradients", "optimizer", "averages (1)", "batch, costs"]
    sizes = [4 * parameters, 4 * parameters, 8 * parameters, 4 * parameters, 4 * 64 * (2 * (64 + 64) + 64)]
    assert [size * 2**20 for size in pieces.values()] == pytest.approx(sizes, abs=0.05 * 2**20)
    assert text.endswith("launch         python -m integrations.train " + " ".join(argv))
    further = ["--train.further_ema_decays", "[0.5]", "--launch.config", "cpu-2", "--train.batch_size_per_device", "32"]
    text = plan(config.load([*argv, *further, "--plan"]), argv)
    assert "averages (2)" in text
    assert "DDP buckets" not in text
    apart = [*further, "--train.ddp.gradient_as_bucket_view", "false", "--plan"]
    assert "DDP buckets" in plan(config.load([*argv, *apart]), argv)


def test_a_plan_reads_the_sizes_of_local_networks_and_counts_local_images(make, tmp_path):
    run = loop.Run(make("stable-diffusion-digits"))
    run.objective.export(run.bare_model, tmp_path / "pipeline")
    for number in range(40):
        path = tmp_path / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    (tmp_path / "images" / "0" / "notes.txt").write_text("no image")
    options = {"objective.pretrained": tmp_path / "pipeline", "model.pretrained": tmp_path / "pipeline"}
    options |= {"data.source": f"folder:{tmp_path}/images", "data.resolution": 16, "train.global_batch_size": 16}
    argv = [word for field, value in options.items() for word in (f"--{field}", str(value))]
    argv = ["stable-diffusion-digits", "--train.batch_size_per_device", "16", *argv, "--plan"]
    text = plan(config.load(argv), argv)
    counts = [f"{count(network):,}" for network in (run.bare_model, run.objective.vae, run.objective.text_encoder)]
    assert f"{counts[0]}; frozen: autoencoder {counts[1]}, text encoder {counts[2]}" in text
    assert "40 rows" in text
    assert "100.0 epochs of 2 steps" in text


def test_a_plan_of_own_classes_counts_them(tmp_path):
    argv = [
        "flow-matching-digits",
        "--model.class_path",
        "own_networks.Net",
        "--data.class_path",
        "own_classes.Stripes",
    ]
    argv += ["--train.batch_size_per_device", "16", "--train.global_batch_size", "16", "--plan"]
    text = plan(config.load(argv), argv)
    assert "flow_matching with own_networks.Net, 1 x 8 x 8 images" in text
    assert "parameters     225" in text  # 8 x 2 x 9 + 8 and 8 x 9 + 1
    assert "own_classes.Stripes: 64 rows" in text


# Four weights, 225 numbers; a scalar is kept for each weight, or two.
KEPT = {
    "torch.optim.SGD": 0,
    "torch.optim.SGD --optimizer.init_args.momentum 0.9": 4 * 225,
    "torch.optim.NAdam": 4 * (2 * 225 + 2 * 4),
    "own_classes.SignMomentum": 4 * (225 + 4),
    "torch.optim.LBFGS": None,
}


@pytest.mark.parametrize(("optimizer", "kept"), KEPT.items())
def test_a_plan_counts_what_an_optimizer_of_ones_own_keeps_or_says_that_it_is_not_known(optimizer, kept):
    argv = ["flow-matching-digits", "--model.class_path", "own_networks.Net", "--optimizer.class_path"]
    argv += optimizer.split()
    recipe = config.load([*argv, "--plan"])
    assert optimizer_state(recipe.optimizer, Net(8, 1, 1)) == kept
    text = plan(recipe, argv)
    if kept is None:
        assert re.search(r"^  optimizer +not known$", text, re.MULTILINE)
        assert "come on top, and what torch.optim.LBFGS keeps" in text
    else:
        assert re.search(rf"^  optimizer +{kept / 2**20:.1f} MiB$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.batch_size_per_device", "100"], r"512.*expected a multiple of .* = 100 \(512 / 100 = 5.12\)"),
        (["--train.batch_size_per_device", "256"], r"512 = 2 blocks .* 4 processes \(2 / 4 = 0.50\)"),
        (["--launch.config", "3-a5000"], r"launch.config: got '3-a5000'.*4-a6000"),
        (["--train.global_batch_size", "65536"], "cifar10 has 50,000 rows"),
        (["--model.classes", "2"], "model.classes: got 2, but cifar10 has 10 classes"),
        (["--evaluate.ema_decay", "0.5"], r"evaluate.ema_decay: got 0.5, expected one of \[None, 0.9999\]"),
        (["--train.further_ema_decays", "[0.9999]"], "train.further_ema_decays"),
        (["--overlay", "smok"], "smok: no such overlay file, .*did you mean 'smoke'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_arithmetic(options, message):
    argv = ["consistency-cifar10", *options, "--plan"]
    with pytest.raises(config.RecipeError, match=message):
        plan(config.load(argv), argv)


@pytest.mark.parametrize(
    ("name", "option", "present", "message"),
    [
        ("ddim-cifar10", "--evaluate.features=inception", [], r"torch-fidelity, .*: pip install 'couplings\[fid\]'"),
        (
            "ddim-cifar10",
            "--evaluate.features=inception",
            ["package"],
            r"curl -L --create-dirs -o {}/weights-incep.*pth h",
        ),
        (
            "ddim-cifar10",
            "--evaluate.features=inception",
            ["package", "weights-inception-2015-12-05-6726825d.pth"],
            None,
        ),
        (
            "ddim-cifar10",
            "--evaluate.features=none.safetensors",
            [],
            r"'none.safetensors', expected classifier, inception",
        ),
        (
            "consistency-cifar10",
            "--objective.loss=lpips",
            [],
            r"lpips needs .*curl -L --create-dirs -o {}/vgg16-397923af.pth h",
        ),
        ("consistency-cifar10", "--objective.loss=lpips", ["vgg16-397923af.pth"], None),
    ],
)
def test_what_a_recipe_needs_at_its_end_is_asked_for_at_its_beginning(
    name, option, present, message, tmp_path, monkeypatch
):
    class OpenedError(Exception):  # the data: all that is asked for before it is there
        pass

    def load_source(data):
        raise OpenedError

    monkeypatch.setattr(loop, "load_source", load_source)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for file in present:
        if file != "package":
            (folder / file).touch()
    package = None if "package" not in present else SimpleNamespace(FeatureExtractorInceptionV3=torch.nn.Module)
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", package)
    recipe = config.load([name, "--overlay", "smoke", "--train.global_batch_size", "4", option])
    with pytest.raises(OpenedError if message is None else config.RecipeError) as error:
        loop.Run(recipe)
    if message is not None:
        assert re.search(message.format(folder), str(error.value))
        assert ("--evaluate.features classifier" in str(error.value)) == ("features" in option)


def test_further_averages_are_kept_and_sampled_from(make):
    options = ["--train.further_ema_decays", "[0.5, 0.9]", "--train.ema_ramp", "false", "--train.checkpoint_every", "1"]
    output = loop.train(make("ddim-digits", *options, "--train.keep_last", "9"), progress=False)
    start, after = (measure.find(output / "checkpoints" / f"step-{step}") for step in (5, 6))
    for name, decay in (("ema-0.5", 0.5), ("ema-0.9", 0.9), ("ema", 0.99)):
        for key, value in after.tensors(name).items():
            expected = decay * start.tensors(name)[key] + (1 - decay) * after.tensors("model")[key]
            torch.testing.assert_close(value, expected)
    trained = measure.load_trained(output, ["--evaluate.ema_decay", "0.5"])
    for key, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, after.tensors("ema-0.5")[key])


CLASSES = """
objective: {name: consistency}
model:
  {name: adm, channels: [8, 16], attention: [false, true], layers_per_block: 1, head_channels: 8, norm_groups: 4,
   classes: 12}
evaluate: {steps: [1]}
"""


def test_a_class_conditional_consistency_model_is_told_the_classes_of_its_data(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(CLASSES)
    batches = ["--train.global_batch_size", "16", "--train.batch_size_per_device", "16"]
    recipe = config.load([str(path), "--output", str(tmp_path / "run"), *batches])
    run = loop.Run(recipe)
    assert run.bare_model.class_embedding.num_embeddings == 12
    torch.nn.init.normal_(run.bare_model.conv_out.weight)  # zero at first, where nothing before it gets a gradient
    for block in (*run.bare_model.down_blocks, run.bare_model.mid_block, *run.bare_model.up_blocks):
        for layer in block.resnets:
            torch.nn.init.normal_(layer.conv2.weight)
    run.train_step(next(run.pairs.steps(0, 1)).blocks)
    moved = run.optimizer.state[run.bare_model.class_embedding.weight]["exp_avg"].abs().sum(1) > 0
    block = first_block(run)
    assert moved.any()
    assert not moved[10:].any()  # the digits have ten classes
    told = []
    run.bare_model.class_embedding.register_forward_pre_hook(lambda _, given: told.append(given[0].tolist()))
    run.objective.sample(run.bare_model.eval(), block.noise[:4], 1, told=torch.tensor([8, 9, 0, 1]))
    assert told == [[8, 9, 0, 1]]
