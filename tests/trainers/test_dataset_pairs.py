"""Pairs that look beyond the batch, in every objective: what they promise, resuming, and what does not go together."""

import json
from itertools import pairwise

import pytest
import torch
from test_loop import assert_same_run, trace, train_with_two_processes, weights
from tiny_recipes import interrupted, tiny

from couplings import semidiscrete
from couplings.noise import normal
from couplings.persistent import Pairs
from integrations import checkpoint, config, loop
from integrations.data import load_source, to_signed

OBJECTIVES = ["ddim-digits", "flow-matching-digits", "consistency-digits", "stable-diffusion-digits"]
METHODS = ["semidiscrete", "persistent", "nearest"]
QUICK = ["--coupling.options.tolerance", "5.0"]


@pytest.fixture(scope="module")
def digits():
    return load_source(config.load(["ddim-digits"]).data)


def method(name):
    return ["--coupling.method", name, *(QUICK if name == "semidiscrete" else [])]


@pytest.mark.parametrize("name", [f"{name}-digits" for name in METHODS])
def test_its_recipe_runs(make, name):
    recipe = make(name, *(QUICK if name.startswith("semidiscrete") else []))
    output = loop.train(recipe, progress=False)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["reduction"] > 0 for line in lines)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_run_of_every_objective_resumes_bit_for_bit(make, objective, name):
    options = [*method(name), "--data.flip", "true", "--train.checkpoint_every", "3"]
    if name == "persistent":
        options += ["--coupling.options.seeds", "2"]
    # Few rows: a second epoch begins within the run.
    options += ["--data.subset_fraction", "0.03"]
    whole = loop.train(make(objective, *options, folder="whole"), progress=False)
    with interrupted(5):
        loop.train(make(objective, *options), progress=False)
    assert_same_run(whole, loop.train(make(objective, *options, "--resume", "auto"), progress=False), 6)


# --- semidiscrete


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("flip", ["false", "true"])
def test_noise_picks_each_row_once_an_epoch_and_labels_follow(make, digits, flip, workers):
    recipe = make("ddim-digits", *method("semidiscrete"), "--data.flip", flip, "--data.workers", workers)
    run = loop.Run(recipe)
    run.start()
    data = to_signed(digits.images)
    plan = semidiscrete.Semidiscrete.load(recipe.output / "plan.safetensors", data)
    assert plan.mirrored == (flip == "true")
    seeds, index = plan.loader(data, 16, seed=0).pairs(0)
    last = len(data) // 16
    steps = run.pairs.steps(0, last)
    blocks = [block for step in steps for block in step.blocks]
    rows = index[: len(blocks) * 8]
    expected = torch.where((rows >= len(data))[:, None, None, None], data[rows % 1797].flip(-1), data[rows % 1797])
    assert torch.equal(torch.cat([block.data for block in blocks]), expected)
    assert torch.equal(torch.cat([block.noise for block in blocks]), normal(seeds, (1, 8, 8))[: len(rows)])
    assert torch.equal(torch.cat([block.labels for block in blocks]), digits.labels[rows % 1797])
    assert len((rows % 1797).unique()) == len(rows)


def test_a_plan_from_a_file_is_used_and_kept(make, digits, tmp_path):
    plan = semidiscrete.fit(to_signed(digits.images), classes=digits.labels, steps=1, tolerance=9.0)
    plan.save(tmp_path / "given.safetensors")
    options = [
        "--coupling.method",
        "semidiscrete",
        "--coupling.options.potentials",
        str(tmp_path / "given.safetensors"),
    ]
    options += ["--coupling.condition", "class"]
    output = loop.train(make("flow-matching-digits", *options), progress=False)
    kept = semidiscrete.Semidiscrete.load(output / "plan.safetensors")
    assert torch.equal(kept.potentials, plan.potentials)
    (tmp_path / "given.safetensors").unlink()  # a run that goes on has its own
    longer = ["--train.steps", "8", "--train.seed", "3", "--resume", "auto"]
    with pytest.raises(loop.TrainingError, match=r"train\.seed"):
        loop.train(make("flow-matching-digits", *options, *longer), progress=False)
    loop.train(make("flow-matching-digits", *options, "--train.steps", "8", "--resume", "auto"), progress=False)
    assert [line[0] for line in trace(output)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (None, [], "no such file"),
        ({}, ["--data.subset_fraction", "0.5"], "was fitted to data of shape"),
        ({"other": True}, [], "was fitted to other data"),
        ({}, ["--data.flip", "true"], "data.flip: .* was fitted without mirrored data"),
        ({"mirrored": True}, [], "data.flip: .* was fitted with mirrored data"),
        ({}, ["--coupling.condition", "class"], "coupling.condition: .* was fitted without classes"),
        ({"classes": torch.arange(1797) % 2}, [], "coupling.condition: .* was fitted with classes"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(make, digits, tmp_path, given, options, message):
    path = tmp_path / "plan.safetensors"
    if given is not None:
        data = to_signed(digits.images)
        if given.pop("other", False):
            data = data + 1.0
        semidiscrete.fit(data, steps=1, tolerance=99.0, **given).save(path)
    recipe = make(
        "ddim-digits", "--coupling.method", "semidiscrete", "--coupling.options.potentials", str(path), *options
    )
    with pytest.raises(config.RecipeError, match=message):
        loop.train(recipe, progress=False)


def test_two_processes_train_as_one(tmp_path, processes):
    options = ["--train.steps", "4", "--train.global_batch_size", "32", *method("semidiscrete")]
    loop.train(tiny("flow-matching-digits", tmp_path / "one", *options), progress=False)
    train_with_two_processes(tiny("flow-matching-digits", tmp_path / "two", *options), processes)
    for a, b in zip(trace(tmp_path / "one"), trace(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    a, b = weights(tmp_path / "one", 4), weights(tmp_path / "two", 4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


# --- persistent


def test_the_pairs_of_the_run_never_come_apart(make, digits):
    run = loop.Run(make("ddim-digits", *method("persistent"), "--train.steps", "20"))
    run.start()
    totals = []
    for _ in run.pairs.steps(0, 20):
        noise = normal(run.pairs.store.state_dict()["seeds"].flatten(), (64,)).view(1797, -1, 64)
        totals.append(float((to_signed(digits.images).view(1797, 1, 64) - noise).square().sum(dtype=torch.float64)))
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.999 * totals[0]


def test_a_checkpoint_holds_the_seeds_of_its_step(make):
    """The pairs of the next steps are made ahead; they are not in it."""
    options = [*method("persistent"), "--train.checkpoint_every", "1", "--train.keep_last", "9"]
    output = loop.train(make("ddim-digits", *options), progress=False)
    seeds = [checkpoint.read(output / "checkpoints" / f"step-{step}").tensors("pairs")["seeds"] for step in range(1, 7)]
    for before, after in pairwise(seeds):
        changed = (before != after).any(1).sum()
        assert 0 < changed <= 16  # the rows of one step
    with Pairs.open(output / "pairs.bin", rows=1797, seeds=4) as pairs:
        assert torch.equal(pairs.state_dict()["seeds"], seeds[-1])


def test_persistent_pairs_train_in_one_process(make, monkeypatch):
    run = loop.Run(make("ddim-digits", *method("persistent")))
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    with pytest.raises(config.RecipeError, match="'persistent', expected another: it trains in one process"):
        run.start()


# --- what does not go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*method("semidiscrete"), "--coupling.scope", "global"], "coupling.scope: got 'global', expected local"),
        ([*method("persistent"), "--coupling.scope", "global"], "coupling.scope: got 'global', expected local"),
        ([*method("semidiscrete"), "--coupling.window", "4"], "coupling.window: got 4, expected 1"),
        ([*method("persistent"), "--coupling.window", "4"], "coupling.window: got 4, expected 1"),
        ([*method("semidiscrete"), "--coupling.metric", "l2"], "coupling.metric: got 'l2', expected sqeuclidean"),
        ([*method("semidiscrete"), "--coupling.quantize", "fp16"], "coupling.quantize: got 'fp16', expected null"),
        ([*method("semidiscrete"), "--coupling.options.seeds", "4"], "got 4, expected only potentials and tolerance"),
        ([*method("persistent"), "--coupling.options.seeds", "0"], "coupling.options.seeds: got 0, expected a whole"),
        ([*method("persistent"), "--coupling.options.seeds", "1.5"], "coupling.options.seeds: got 1.5"),
        (["--coupling.method", "semidiscrete", "--coupling.options.tolerance", "0"], "expected a number above 0"),
        (["--coupling.method", "semidiscrete", "--coupling.options.potentials", "7"], "expected the path of a plan"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(config.RecipeError, match=message):
        config.load(["ddim-digits", *options])


@pytest.mark.parametrize("name", ["semidiscrete", "persistent"])
def test_streams_have_no_rows_by_number(name):
    with pytest.raises(config.RecipeError, match=f"data.streaming: got True, expected false for .* = {name}"):
        config.load(
            [
                "ddim-cifar10",
                "--data.streaming",
                "true",
                "--coupling.metric",
                "sqeuclidean",
                "--coupling.quantize",
                "null",
                "--coupling.method",
                name,
            ]
        )
