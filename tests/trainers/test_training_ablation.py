"""The training ablation: what it records, and what it does not do twice."""

import json
import sys

import pytest
import torch
from couplings.report.reading import read
from couplings.report.training_part import sections

from benchmarks import ablation
from integrations import loop
from integrations.features import Classifier


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The program with everything small; features of a network that was not trained."""
    torch.manual_seed(0)
    Classifier(1, 10).save(tmp_path / "features.safetensors", 0.1)
    # fmt: off
    argv = [
        "--objectives", "DDIM, v prediction", "--arms", "independent", "auction", "greedy", "--seeds", "3",
        "--along", "1", "--equality-steps", "2", "--work", str(tmp_path / "work"),
        "--output", str(tmp_path / "t.jsonl"),
        "--train.steps", "4", "--train.checkpoint_every", "2", "--train.global_batch_size", "16",
        "--train.batch_size_per_device", "16", "--model.width", "16", "--model.depth", "1", "--train.log_every", "1",
        "--evaluate.steps", "[1, 2]", "--evaluate.samples", "24",
        "--evaluate.features", str(tmp_path / "features.safetensors"),
    ]
    # fmt: on
    monkeypatch.setattr(sys, "argv", ["ablation", *argv])
    threads = torch.get_num_threads()
    yield lambda *further: ablation.main([*argv, *further])
    torch.set_num_threads(threads)


def test_a_small_ablation_is_complete_and_not_repeated(run, tmp_path, monkeypatch):
    run()
    path = tmp_path / "t.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [record for record in records if record["task"] == "training"]
    assert [(r["arm"], r["seed"]) for r in trained] == [(arm, 3) for arm in ("independent", "auction", "greedy")]
    for record in trained:
        assert [(each["step"], each["nfe"]) for each in record["frechet"]] == [(2, 1), (4, 1), (4, 2)]
        assert record["environment"]["versions"]["torch"]
        assert (record["reduction"] > 0) == (record["arm"] != "independent")
    assert len({record["loss"] for record in trained}) == 3  # paired otherwise, so trained otherwise
    equal = {tuple(r["of"]): r for r in records if r["task"] == "equality"}
    assert equal["hungarian", "lapjv", "auction", "emd"]["largest_difference"] < 1e-12
    assert equal["greedy", "stable"]["same_pairs"] == 1
    pictures = [record for record in records if record["task"] == "one step"]
    assert [record["arm"] for record in pictures] == ["independent", "auction"]
    titles = [section.title for section in sections(read([path]).training)]
    assert titles[0] == "Training: DDIM, v prediction, digits"
    assert len(titles) == 4

    monkeypatch.setattr(ablation, "train", lambda arm: pytest.fail("trained again"))
    size = path.stat().st_size
    run()
    assert path.stat().st_size == size
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run("--optimizer.lr", "0.002")  # another experiment


def test_a_run_that_is_asked_to_end_is_not_measured_and_goes_on_later(run, tmp_path, monkeypatch):
    begin = loop.train

    def ended(recipe, **options):
        recipe.train.steps = 2
        return begin(recipe, **options)

    monkeypatch.setattr(loop, "train", ended)
    with pytest.raises(SystemExit):
        run()
    assert not (tmp_path / "t.jsonl").read_text()
    seen = []

    def resumed(recipe, **options):
        seen.append(recipe.resume)
        return begin(recipe, **options)

    monkeypatch.setattr(loop, "train", resumed)
    run("--arms", "independent")
    assert seen == [True]
