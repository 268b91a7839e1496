import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from integrations import evaluate, features, loop, measure, sample
from integrations.config import ConvNext, Ncsnpp
from integrations.data import load_source, to_signed
from integrations.models import build_model


@pytest.fixture(
    scope="module", params=["ddim-digits", "flow-matching-digits", "consistency-digits", "stable-diffusion-digits"]
)
def run(request, tmp_path_factory):
    from tiny_recipes import tiny

    recipe = tiny(request.param, tmp_path_factory.mktemp("run") / request.param, "--train.ema_decay", "0.5")
    return loop.train(recipe, progress=False)


def test_samples_do_not_depend_on_the_batch_size(run):
    small = measure.load_trained(run, ["--evaluate.batch_size", "64"])
    large = measure.load_trained(run, ["--evaluate.batch_size", "500"])
    a, b = (torch.cat(list(measure.draw(trained, 130, 2))) for trained in (small, large))
    assert a.shape == (130, 1, 8, 8)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_samples_come_from_the_averaged_weights_of_the_chosen_checkpoint(run):
    newest = measure.load_trained(run)
    earlier = measure.load_trained(run / "checkpoints" / "step-4")
    assert (newest.step, earlier.step) == (6, 4)
    stored = measure.find(run).tensors("ema")
    for name, value in newest.model.named_parameters():
        torch.testing.assert_close(value, stored[name], rtol=0, atol=0)


def test_another_seed_gives_other_samples(run):
    a, b = (next(measure.draw(measure.load_trained(run, ["--evaluate.seed", s]), 8, 2)) for s in ("0", "1"))
    assert not torch.equal(a, b)


def test_sample_writes_grids_and_images(run, tmp_path):
    for kind in ("folder", "npz"):
        argv = [str(run), "--steps", "1", "3", "--samples", "20", "--images", kind, "--output", str(tmp_path)]
        sample.main(argv)
    with Image.open(tmp_path / "steps-3.png") as grid:
        assert grid.size == (5 * 9 - 1, 4 * 9 - 1)
    pixels = np.load(tmp_path / "steps-3.npz")["arr_0"]
    assert pixels.shape == (20, 8, 8, 1)
    assert pixels.dtype == np.uint8
    files = sorted((tmp_path / "steps-3").iterdir())
    assert len(files) == 20
    with Image.open(files[7]) as image:
        np.testing.assert_array_equal(np.array(image), pixels[7, ..., 0])


def test_evaluate_writes_a_line_for_each_number_of_steps(run, tmp_path, capsys):
    evaluate.main([str(run), "--steps", "1", "2", "--samples", "80", "--output", str(tmp_path / "scores.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["sampling_steps"] for line in lines] == [1, 2]
    assert all(line["fid"] > 0 and line["kid"] > 0 and line["samples"] == 80 for line in lines)
    # Distances in other features, or of other samples, do not compare: a line says whose they are.
    assert all((line["features"], line["seed"], line["coupling"]) == ("classifier", 0, "auction") for line in lines)
    assert "kid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "nowhere.safetensors"], "classifier, inception or the path"),
        (["--features", "inception"], "fid"),
    ],
)
def test_evaluate_refuses_features_it_cannot_have(run, capsys, arguments, message):
    if "inception" in arguments and _importable("torch_fidelity"):
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(run), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_a_distribution_of_one_image(run, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(run), "--samples", "1"])
    assert end.value.code == 2
    assert "evaluate.samples: got 1, expected at least 2" in capsys.readouterr().err


def _importable(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path)])
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("program", [sample, evaluate])
def test_several_processes_that_would_write_the_same_results_are_refused(run, capsys, monkeypatch, program):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        program.main([str(run)])
    assert end.value.code == 2
    assert "got WORLD_SIZE 2, expected one process" in capsys.readouterr().err


def test_the_exported_pipeline_draws_what_the_trainer_draws(run):
    trained = measure.load_trained(run)
    count = 4
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, *trained.objective.shape, generator=generator)
    with torch.no_grad():
        told = trained.objective.choose(trained.source, count, 0, range(count))
        expected = trained.objective.sample(trained.model, noise, 5, generator, told)
    folder, generator = str(run / "pipeline"), torch.Generator().manual_seed(3)
    arguments = {"num_inference_steps": 5, "generator": generator, "output_type": "np"}
    name = trained.objective.pipeline_name
    if name == "StableDiffusionPipeline":
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        arguments |= {
            "prompt": trained.source.classes[:count],
            "guidance_scale": trained.objective.config.guidance_scale,
        }
    elif name == "FlowMatchingPipeline":
        pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
        arguments["batch_size"] = count
    else:
        kinds = {"DDIMPipeline": DDIMPipeline, "ConsistencyModelPipeline": ConsistencyModelPipeline}
        pipeline = kinds[name].from_pretrained(folder)
        arguments["batch_size"] = count
    pipeline.set_progress_bar_config(disable=True)
    signed = torch.from_numpy(pipeline(**arguments).images).permute(0, 3, 1, 2) * 2 - 1
    if signed.shape[1] != expected.shape[1]:
        signed = signed.mean(1, keepdim=True)
    torch.testing.assert_close(signed, expected, rtol=0, atol=1e-4)


OUTSIDE = """
import os, re, sys
packages, *folders = sys.argv[1:]
sys.path.append(packages)
for name in ("integrations", "couplings"):
    try: __import__(name)
    except ModuleNotFoundError: continue
    raise SystemExit(f"{name} can be imported")
for folder in folders:
    os.chdir(folder)
    (code,) = re.findall("```python\\n(.*?)```", open("README.md").read(), re.S)
    exec(code)
    assert len(images) and images[0].size == (8, 8)
    del images
"""


def test_the_lines_in_an_exported_folder_draw_images_offline_and_without_this_package(tmp_path):
    from tiny_recipes import tiny

    folders = []
    names = ("ddim-digits", "flow-matching-digits", "class-conditional-digits", "consistency-digits")
    for name in (*names, "stable-diffusion-digits"):
        options = ["--objective.frozen_precision", "fp16"] if name.startswith("stable") else []
        trained = loop.Run(tiny(name, tmp_path / name, *options))
        folders.append(str(tmp_path / name / "pipeline"))
        trained.objective.export(trained.bare_model, tmp_path / name / "pipeline")
        if name in ("ddim-digits", "consistency-digits"):
            told = type(trained.objective)(trained.objective.config, trained.objective.shape, 10)
            for section in (ConvNext(width=8, depth=1), Ncsnpp(channels=4, layers_per_block=1, norm_groups=4)):
                for objective, classes in ((trained.objective, None), (told, 10)):
                    folders.append(str(tmp_path / name / f"{section.name}-{classes}"))
                    model = build_model(dataclasses.replace(section, classes=classes), objective)
                    objective.export(model, Path(folders[-1]))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-S", "-c", OUTSIDE, sysconfig.get_path("purelib"), *folders]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_more_steps_of_euler_approach_dopri5(tmp_path):
    from tiny_recipes import tiny

    options = {"train.steps": "30", "train.ema_decay": "0", "optimizer.lr": "0.02", "optimizer.warmup_steps": "0"}
    overrides = [argument for field, value in options.items() for argument in (f"--{field}", value)]
    output = loop.train(tiny("flow-matching-digits", tmp_path, *overrides), progress=False)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    exact = measure.load_trained(output, ["--objective.solver", "dopri5"])
    euler = measure.load_trained(output)
    with torch.no_grad():
        reference = exact.objective.sample(exact.model, noise, 1, None)
        errors = [(euler.objective.sample(euler.model, noise, k, None) - reference).abs().max() for k in (2, 20, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-2


def test_the_distance_of_the_data_to_itself_is_nothing_and_to_noise_much(make):
    source = load_source(make("ddim-digits").data)
    network, accuracy = features.train_classifier(source, steps=60)
    assert accuracy > 0.8
    scores = measure.Scores(network, source, torch.device("cpu"), kid=True)
    everything = to_signed(source[list(range(len(source)))].images)
    itself = scores([everything])
    noise = scores(torch.randn(2, 500, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).unbind())
    assert abs(itself["fid"]) < 1e-3
    assert noise["fid"] > 10
    assert noise["kid"] > 100 * abs(itself["kid"])
    with pytest.raises(FloatingPointError):
        scores([everything * torch.nan])


def test_a_classifier_survives_being_written_and_read(make, tmp_path):
    source = load_source(make("ddim-digits").data)
    network, accuracy = features.train_classifier(source, steps=3)
    network.save(tmp_path / "classifier.safetensors", accuracy)
    images = to_signed(source[[0, 1]].images)
    again = measure.feature_network(str(tmp_path / "classifier.safetensors"), source, tmp_path)
    torch.testing.assert_close(again(images), network(images), rtol=0, atol=1e-6)
    assert network(images).dtype == torch.float64
