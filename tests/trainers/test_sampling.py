import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from test_loop import free_port
from tiny_recipes import tiny

from integrations import checkpoint, evaluate, export, features, loop, measure, sample
from integrations.config import RecipeError
from integrations.data import load_source, to_signed
from integrations.models import build_model
from integrations.network_sections import ConvNext, Ncsnpp
from integrations.sections import Data


@pytest.fixture(
    scope="module", params=["ddim-digits", "flow-matching-digits", "consistency-digits", "stable-diffusion-digits"]
)
def run(request, tmp_path_factory):
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


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier of few steps: one that is good takes seconds."""
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    network, accuracy = features.train_classifier(load_source(Data("digits")), steps=3)
    network.save(path, accuracy)
    return path


def test_evaluate_writes_a_line_for_each_number_of_steps(run, classifier, tmp_path, capsys):
    if run.name != "ddim-digits":  # which trains its own
        shutil.copy(classifier, run)
    evaluate.main([str(run), "--steps", "1", "2", "--samples", "80", "--output", str(tmp_path / "scores.jsonl")])
    found = lines(tmp_path / "scores.jsonl")
    assert [line["sampling_steps"] for line in found] == [1, 2]
    assert all(line["fid"] > 0 and line["kid"] > 0 and line["samples"] == 80 for line in found)
    # Distances in other features, or of other samples, do not compare: a line says whose they are.
    assert all((line["features"], line["seed"], line["coupling"]) == ("classifier", 0, "auction") for line in found)
    said = capsys.readouterr().out
    assert "kid" in said
    assert "in features of classifier" in said


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


@pytest.mark.parametrize("program", [sample, evaluate, export])
def test_several_processes_that_would_write_the_same_results_are_refused(run, capsys, monkeypatch, program):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit) as end:
        program.main([str(run), *(["--output", "none"] if program is export else [])])
    assert end.value.code == 2
    said = "WORLD_SIZE: got 2, expected one process" if program is export else "WORLD_SIZE is 2, but MASTER_ADDR"
    assert said in capsys.readouterr().err


def sample_and_evaluate(run, folder, names=("scores",)):
    for kind in ("folder", "npz"):
        images = ["--images", kind, "--output", str(folder)]
        sample.main([str(run), "--steps", "1", "--samples", "90", *images])
    for name in names:
        evaluate.main([str(run), "--steps", "1", "--samples", "201", "--output", str(folder / name)])


def sample_and_evaluate_in_child(run, folder, names, rank, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    measure.KID_IMAGES = 150
    sample_and_evaluate(run, folder, names)
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_samples_and_draw_and_measure_what_one_does(
    make, classifier, tmp_path, processes, monkeypatch
):
    output = loop.train(make("flow-matching-digits"), progress=False)
    shutil.copy(classifier, output)
    monkeypatch.setattr(measure, "KID_IMAGES", 150)  # not all, of either side
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one" / "cache"))
    sample_and_evaluate(output, tmp_path / "one")
    port, again = free_port(), (output, tmp_path / "two", ("scanned", "kept"))
    children = [processes.Process(target=sample_and_evaluate_in_child, args=(*again, i, port)) for i in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    (one,), *others = (lines(tmp_path / name) for name in ("one/scores", "two/scanned", "two/kept"))
    for (other,) in others:
        assert other == {**one, **{name: pytest.approx(one[name], rel=1e-5) for name in ("fid", "kid", "kid_std")}}
    (a,), (b,) = ((tmp_path / name / "cache/couplings").iterdir() for name in ("one", "two"))
    assert a.name == b.name
    drawn, shared = ({path.name: path for path in (tmp_path / name).glob("**/*.png")} for name in ("one", "two"))
    assert drawn.keys() == shared.keys() == {"steps-1.png", *(f"{i:05}.png" for i in range(90))}
    for name, path in drawn.items():
        with Image.open(path) as expected, Image.open(shared[name]) as found:
            np.testing.assert_allclose(np.array(found, int), np.array(expected, int), atol=1)
    drawn, shared = (np.load(tmp_path / name / "steps-1.npz")["arr_0"].astype(int) for name in ("one", "two"))
    np.testing.assert_allclose(shared, drawn, atol=1)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_data_is_not_read_again_where_its_statistics_are_kept(make, tmp_path, monkeypatch, caplog):
    source = load_source(make("ddim-digits").data)
    network, _ = features.train_classifier(source, steps=3)
    samples = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    scans = []

    def scores(source, network=network):
        scan = type(source).scan
        with monkeypatch.context() as patch:
            patch.setattr(type(source), "scan", lambda self, *given: scans.append(len(self)) or scan(self, *given))
            # A device with a number, as accelerate names it under a launcher.
            return measure.Scores(network, source, torch.device("cpu", 0), kid=True, cache=tmp_path)([samples])

    first = scores(source)
    assert scores(load_source(make("ddim-digits").data)) == first
    assert scans == [1797]
    (kept,) = tmp_path.iterdir()
    part = load_source(make("ddim-digits", "--data.subset_fraction", "0.1").data)
    assert scores(part)["fid"] != first["fid"]
    other, _ = features.train_classifier(source, steps=4)
    assert scores(source, other)["fid"] != first["fid"]
    assert scans == [1797, 180, 1797]
    kept.write_bytes(kept.read_bytes()[:-100])
    assert scores(source) == first
    assert scans == [1797, 180, 1797, 1797]
    assert "damaged statistics of the data" in caplog.text


def test_samples_are_drawn_in_the_precision_of_the_run_or_that_asked_for(make):
    recipe = make("ddim-digits", "--train.steps", "2", "--train.mixed_precision", "bf16")
    output = loop.train(recipe, progress=False)
    found = {}
    for asked in ("null", "no", "bf16"):
        trained = measure.load_trained(output, ["--evaluate.mixed_precision", asked])
        (found[asked],) = measure.draw(trained, 8, 2)
    assert torch.equal(found["null"], found["bf16"])
    assert not torch.equal(found["null"], found["no"])
    torch.testing.assert_close(found["bf16"], found["no"], rtol=0, atol=0.05)
    assert found["bf16"].dtype == torch.float32
    with pytest.raises(RecipeError, match=r"evaluate.mixed_precision: got 'fp16', expected 'bf16' or 'no' on a CPU"):
        measure.load_trained(output, ["--evaluate.mixed_precision", "fp16"])


def test_products_are_rounded_as_in_training_when_samples_are_drawn_and_at_no_other_time(make, monkeypatch):
    output = loop.train(make("ddim-digits", "--train.steps", "1"), progress=False)
    trained, seen = measure.load_trained(output, ["--train.tf32", "true"]), []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    inner = type(trained.objective).sample

    def sampled(*given):
        seen.append([backend.allow_tf32 for backend in backends])
        return inner(*given)

    monkeypatch.setattr(type(trained.objective), "sample", sampled)
    for rounded in (True, False, None):
        trained.recipe.train.tf32 = rounded
        before = [backend.allow_tf32 for backend in backends]
        for _ in measure.draw(trained, 2, 1):
            assert [backend.allow_tf32 for backend in backends] == before
        assert seen.pop() == (before if rounded is None else [rounded, rounded])


def test_the_exported_pipeline_draws_what_the_trainer_draws(run):
    fresh = ["--objective.multistep_noise", "fresh"]  # which is what the pipeline adds between steps
    trained = measure.load_trained(run, fresh if run.name == "consistency-digits" else [])
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


def test_any_checkpoint_and_average_can_be_exported(make, tmp_path, capsys):
    output = loop.train(make("ddim-digits", "--train.further_ema_decays", "[0.5]"), progress=False)
    export.main([str(output), "--checkpoint", "step-4", "--average", "0.5", "-o", str(tmp_path / "exported")])
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "exported")
    for name, value in checkpoint.read(output / "checkpoints" / "step-4").tensors("ema-0.5").items():
        torch.testing.assert_close(pipeline.unet.state_dict()[name], value, rtol=0, atol=0)
    said = (tmp_path / "exported" / "README.md").read_text()
    assert "average of decay 0.5 after training step 4 of the run `run`" in said
    assert "average of decay 0.99 after training step 6 of the run `run`" in (output / "pipeline/README.md").read_text()
    for arguments, message in (
        (["--checkpoint", "step-5"], "--checkpoint: got 'step-5', expected one of .*: step-4, step-6"),
        (["--average", "0.7"], r"evaluate.ema_decay: got 0.7, expected one of \[None, 0.99, 0.5\]"),
        (["-o", str(output)], "exists: choose another --output"),
    ):
        with pytest.raises(SystemExit) as end:
            export.main([str(output), "-o", str(tmp_path / "none"), *arguments])
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "none").exists()


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
