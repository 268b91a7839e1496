"""The recipes of the published experiments: what they say, that they run, and what ``--plan`` tells of them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from test_loop import assert_same_run, trace

from integrations import config, loop, measure
from integrations.models import build_model
from integrations.objectives import build_objective
from integrations.plan import Alive, Sizes, count, expect, launch, plan, unloaded

ROOT = Path(__file__).parents[2]
# Rows coupled together on one device, devices, parameters of the network.
PUBLISHED = {
    "consistency-cifar10": (128, 4, 56_395_651),
    "ddim-cifar10": (256, 1, 35_746_307),
    "consistency-celeba": (128, 8, 295_131_267),
    "sd-unconditional-imagenet10": (128, 4, 859_520_964),
    "consistency-tiny-imagenet": (128, 16, 295_899_267),
    "sd-class-conditional-imagenet": (256, 8, 859_520_964),
    "sd-fine-tune-imagenet": (128, 4, 859_520_964),
}

EXPERIMENTS = ["ddim-cifar10", *(name for name in PUBLISHED if name not in ("ddim-cifar10", "sd-fine-tune-imagenet"))]
RESUME = ["--resume", "auto"]


def test_every_recipe_is_either_published_or_runs_on_a_cpu():
    assert set(config.bundled()) == {*PUBLISHED, *(name for name in config.bundled() if name.endswith("-digits"))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_has_the_parameters_that_the_recipe_states(name):
    recipe = config.load([name])
    with torch.device("meta"):
        objective = build_objective(recipe, expect(recipe), blank=True)
        model = build_model(unloaded(recipe.model), objective)
    assert count(model) == recipe.model.parameters == PUBLISHED[name][2]
    if recipe.objective.name == "stable_diffusion":
        assert count(objective.vae) == recipe.objective.autoencoder_parameters == 83_653_863
        assert count(objective.text_encoder) == 123_060_480  # CLIP ViT-L/14
        assert objective.vae.dtype == torch.float16


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_batch_runs_on_the_published_devices_without_accumulation(name):
    recipe = config.load([name])
    rows, devices, _ = PUBLISHED[name]
    assert recipe.train.batch_size_per_device == rows
    assert recipe.train.global_batch_size == rows * devices
    assert launch(recipe)[1]["num_processes"] == devices
    assert loop.divide(recipe, devices)[1] == 1
    section = recipe.coupling
    assert (section.method, section.metric, section.quantize, section.scope) == ("auction", "l2", "fp16", "local")


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


@pytest.mark.slow
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
    full, (rows, devices, _) = config.load([name]), PUBLISHED[name]
    batches = ["--train.batch_size_per_device", str(rows), "--train.global_batch_size", str(rows * devices)]
    argv = [name, "--overlay", "smoke", "--data.source", full.data.source, "--launch.config", full.launch.config]
    text = plan(config.load([*argv, *batches, "--train.steps", str(full.train.steps), "--plan"]), [*argv, "--plan"])
    told = dict(re.findall(r"^(\S+(?: batch)?) +(.*)$", text, re.MULTILINE))
    assert told["global batch"] == f"{rows * devices} rows a step"
    assert told["device batch"].startswith(f"{rows} rows at once: {rows * devices} = {rows} x {devices} x 1 ")
    assert told["OT batch"].startswith(f"{rows} rows")
    assert told["steps"].startswith(f"{full.train.steps:,} = ")
    assert float(told["coupling"].split()[0]) > 0
    assert re.search(r"24 GB: \w.*48 GB: \w.*80 GB: \w", told["memory"])
    line = shlex.split(told["launch"])
    assert line[:4] == ["accelerate", "launch", "--config_file", f"integrations/launch/{full.launch.config}.yaml"]
    assert line[-len(argv) :] == argv
    assert ("--machine_rank" in line) == (devices == 16)


def test_the_memory_of_a_plan_is_that_of_the_tensors_alive_together():
    with Sizes(), Alive() as alive:
        first = torch.empty(256, 1024)
        second = first * 2
        del first
        third = second[:128] + 1  # the slice is no memory of its own
        assert alive.peak == 2 * 2**20
        assert alive.now == 1.5 * 2**20
        del second, third
    assert alive.now == 0
    argv = ["ddim-digits", "--train.global_batch_size", "64", "--train.batch_size_per_device", "64"]
    text = plan(config.load([*argv, "--plan"]), argv)
    parameters = int(re.search(r"parameters +([\d,]+)", text)[1].replace(",", ""))
    pieces = {name: float(size) for size, name in re.findall(r"([\d.]+) MiB  (.*)", text)}
    assert pieces["weights, float32"] == pytest.approx(4 * parameters / 2**20, abs=0.05)
    assert pieces["moments of adam"] == pytest.approx(8 * parameters / 2**20, abs=0.05)
    assert not any("buckets" in name for name in pieces)
    assert text.endswith("launch        python -m integrations.train " + " ".join(argv))


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
        (["--overlay", "smok"], "--overlay: got 'smok', expected a file or one of smoke"),
    ],
)
def test_what_cannot_be_is_refused_with_the_arithmetic(options, message):
    argv = ["consistency-cifar10", *options, "--plan"]
    with pytest.raises(config.RecipeError, match=message):
        plan(config.load(argv), argv)


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
    run.train_step(run.batches())
    moved = run.optimizer.state[run.bare_model.class_embedding.weight]["exp_avg"].abs().sum(1) > 0
    block = run.load(next(run.batches()), 0)
    assert moved.any()
    assert not moved[10:].any()  # the digits have ten classes
    told = []
    run.bare_model.class_embedding.register_forward_pre_hook(lambda _, given: told.append(given[0].tolist()))
    run.objective.sample(run.bare_model.eval(), block.noise[:4], 1, first=8)
    assert told == [[8, 9, 0, 1]]
