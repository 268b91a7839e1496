"""Latents that are encoded once and kept."""

import json
import shutil

import pytest
import torch
from PIL import Image
from test_loop import assert_same_run, trace, weights

from integrations import config, latents, loop
from integrations.stable_diffusion import StableDiffusionObjective

NAME = "stable-diffusion-digits"
FEW = ["--data.subset_fraction", "0.03", "--data.flip", "true"]


@pytest.fixture
def encoded(monkeypatch):
    """How many images the autoencoder has encoded, in each step of training or before."""
    counts, inner, step = [], StableDiffusionObjective.posterior, loop.Run.train_step

    def posterior(self, images):
        counts.append(len(images))
        return inner(self, images)

    def train_step(self, blocks):
        counts.append("step")
        return step(self, blocks)

    monkeypatch.setattr(StableDiffusionObjective, "posterior", posterior)
    monkeypatch.setattr(loop.Run, "train_step", train_step)
    return counts


def test_a_run_with_kept_latents_is_the_run_without(make, monkeypatch, encoded):
    monkeypatch.setattr(latents, "ROWS", 20)
    plain = loop.train(make(NAME, *FEW, folder="plain"), progress=False)
    encoded.clear()
    kept = loop.train(make(NAME, *FEW, "--data.latents", "cache", folder="kept"), progress=False)
    before = encoded[: encoded.index("step")]
    assert sum(before) == 2 * 54 + 2 * 3  # rows and mirror images, and three to compare
    assert set(encoded[len(before) :]) == {"step"}
    for a, b in zip(trace(plain), trace(kept), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = weights(plain, 6), weights(kept, 6)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4, msg=name)


def test_latents_are_shared_by_runs_and_encoding_goes_on_where_it_was_interrupted(make, monkeypatch, encoded, tmp_path):
    monkeypatch.setattr(latents, "ROWS", 20)
    options = [*FEW, "--data.latents", str(tmp_path / "latents"), "--train.steps", "3"]
    whole = loop.train(make(NAME, *options, folder="whole"), progress=False)
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == [
        *(f"{i:05}.{kind}" for i in range(3) for kind in ("json", "npy")),
        "about.json",
    ]
    encoded.clear()
    loop.train(make(NAME, *options, "--data.flip", "false", folder="plain"), progress=False)
    assert sum(count for count in encoded if count != "step") == 2 * 3
    (tmp_path / "latents" / "00001.npy").unlink()
    (tmp_path / "latents" / "00001.partial").write_bytes(b"torn")
    encoded.clear()
    assert_same_run(whole, loop.train(make(NAME, *options, folder="again"), progress=False), 3)
    assert sum(count for count in encoded if count != "step") == 2 * 20 + 2 * 3


def test_pairs_of_the_whole_dataset_take_kept_latents(make, encoded):
    options = [*FEW, "--data.latents", "cache", "--coupling.method", "semidiscrete"]
    options += ["--coupling.options.tolerance", "5.0"]
    output = loop.train(make(NAME, *options), progress=False)
    assert len(trace(output)) == 6
    assert set(encoded[encoded.index("step") :]) == {"step"}
    whole = shutil.copytree(output, output.with_name("whole"))
    shutil.rmtree(output / "checkpoints" / "step-6")
    assert_same_run(whole, loop.train(make(NAME, *options, "--resume", "auto"), progress=False), 6)


def test_latents_that_do_not_fit_are_refused(make, tmp_path):
    place = ["--data.latents", str(tmp_path / "latents"), "--train.steps", "1"]
    loop.train(make(NAME, *place, "--data.subset_fraction", "0.03", folder="first"), progress=False)
    for options, message in (
        (["--data.subset_fraction", "0.04"], "was made with data.subset_fraction 0.03, not 0.04: name another folder"),
        ([*FEW], "was made with data.flip False, not True"),
    ):
        with pytest.raises(config.RecipeError, match=f"data.latents: .*{message}"):
            loop.train(make(NAME, *place, *options, folder="other"), progress=False)
    about = json.loads((tmp_path / "latents" / "about.json").read_text())
    (tmp_path / "latents" / "about.json").write_text(json.dumps(about | {"data.subset_seed": 1}))
    options = ["--data.subset_fraction", "0.03", "--data.subset_seed", "1"]  # other rows than were encoded
    with pytest.raises(config.RecipeError, match="has other latents of row"):
        loop.train(make(NAME, *place, *options, folder="other"), progress=False)


def test_latents_notice_a_changed_file_and_not_that_the_folder_is_a_copy(make, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(16):
        Image.new("L", (8, 8), i).save(pictures / f"{i}.png")
    options = ["--data.source", f"folder:{pictures}", "--data.latents", str(tmp_path / "latents")]
    options += ["--coupling.condition", "null", "--objective.caption", "empty", "--train.steps", "1"]
    loop.train(make(NAME, *options, folder="first"), progress=False)
    shutil.copytree(pictures, tmp_path / "copy", copy_function=shutil.copyfile)  # with another time
    shutil.rmtree(pictures)
    (tmp_path / "copy").rename(pictures)
    about = tmp_path / "latents" / "about.json"
    told = json.loads(about.read_text())
    about.write_text(json.dumps({name: value for name, value in told.items() if name != "data.interpolation"}))
    loop.train(make(NAME, *options, folder="copied"), progress=False)  # latents of before that was told
    Image.effect_noise((8, 8), 9.0).save(pictures / "3.png")
    with pytest.raises(config.RecipeError, match=r"was made with files '16, .*', not '16, .*': name another folder"):
        loop.train(make(NAME, *options, folder="changed"), progress=False)


def test_a_stream_has_no_rows_to_keep():
    options = ["--data.source", "folder:/nowhere", "--data.streaming", "true", "--data.latents", "cache"]
    with pytest.raises(config.RecipeError, match=r"data.latents: got 'cache', expected null for data.streaming"):
        config.load([NAME, *options])
