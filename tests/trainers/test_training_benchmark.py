"""The training benchmark: what it trains and measures, what it does when it was ended, what it makes of the records."""

import json

import pytest

from benchmarks import training, training_tables
from benchmarks.record import read
from couplings.assigners import registry
from integrations import loop
from integrations.features import Classifier

TINY = {
    "model.width": "8",
    "model.depth": "1",
    "train.steps": "4",
    "train.checkpoint_every": "2",
    "train.log_every": "1",
    "train.global_batch_size": "32",
    "train.batch_size_per_device": "16",
    "evaluate.steps": "[3, 20]",
    "evaluate.samples": "70",
}


@pytest.fixture
def _own_registry(monkeypatch):
    """The benchmark registers methods."""
    registry.methods()  # entry points are read before the copy
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())


@pytest.mark.usefixtures("_own_registry")
def test_a_benchmark_that_was_ended_goes_on_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    arms = ["v-independent", "v-coupled", "epsilon-independent"]
    command = ["--data", "digits", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path), "--seeds", "3"]
    command += ["--arms", *arms, *(text for field, value in TINY.items() for text in (f"--{field}", value))]
    (tmp_path / "runs").mkdir()
    Classifier(1, 10).save(tmp_path / "runs" / "classifier.safetensors", 0.1)  # training one takes seconds
    path, measure, calls = tmp_path / "training.jsonl", training.Session.frechet, []

    def ended(session, trained, steps):
        calls.append(trained.step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(session, trained, steps)

    with monkeypatch.context() as patched:
        patched.setattr(training.Session, "frechet", ended)
        with pytest.raises(KeyboardInterrupt):
            training.main(command)
    assert calls == [2, 4, 2, 4]
    before = path.read_text()
    assert len(before.splitlines()) == 3
    path.write_text(before + '{"kind": "poi')  # a line that the end cut short

    training.main(command)
    records = read(path)
    assert path.read_text().startswith(before)
    points = [(r["arm"], r["step"]) for r in records if r["kind"] == "point"]
    assert points == [(arm, step) for arm in arms for step in (2, 4)]
    for record in records:
        assert {"hardware", "versions", "commit", "date"} <= record["environment"].keys()
        assert record["environment"]["versions"]["diffusers"]
        assert "digits" not in json.dumps(record)
    for record, measured in zip(records[:2], (["3"], ["3", "20"]), strict=True):  # 20 at every second checkpoint
        assert list(record["frechet"]) == measured
        assert all(value > 0 for value in record["frechet"].values())
        assert record["settings"]["coupling"]["method"] == "independent"
        assert record["reduction"] == 0
    assert records[2]["reduction"] > 0.05
    assert {r["arm"] for r in records if r["kind"] == "levels"} == set(arms)
    pictures = {r["arm"]: r for r in records if r["kind"] == "one step"}
    assert set(pictures) == set(arms)
    assert all(picture["spread"] > 0 and picture["png"] for picture in pictures.values())
    assert {"auction", "auction-whitened"} <= {r["method"] for r in records if r["kind"] == "coupling"}
    pair = ("v-independent", "epsilon-independent")
    assert {(r["high"], r["low"]) for r in records if r["kind"] == "switched"} == {pair, pair[::-1]}
    assert "| DDIM, v prediction | coupled | 2 |" in training_tables.change_table(training_tables.Results(records))

    written, _ = path.read_text(), capsys.readouterr()
    training.main(command)
    assert path.read_text() == written
    assert capsys.readouterr().out.count("on record") == 3


@pytest.mark.usefixtures("_own_registry")
def test_a_run_that_is_asked_to_end_is_not_measured(tmp_path, monkeypatch):
    begin = loop.train

    def ended(recipe, **options):
        recipe.train.steps = 2
        return begin(recipe, **options)

    monkeypatch.setattr(loop, "train", ended)
    command = [
        "digits",
        "--runs",
        str(tmp_path / "runs"),
        "--output",
        str(tmp_path),
        "--arms",
        "v-greedy",
        "--no-analysis",
    ]
    with pytest.raises(SystemExit):
        training.main([*command, *(text for field, value in TINY.items() for text in (f"--{field}", value))])
    assert not (tmp_path / "training-digits.jsonl").exists()


@pytest.mark.parametrize("name", training.SUITES)
def test_every_arm_of_a_suite_is_a_recipe_of_its_own(name, tmp_path):
    suite = training.SUITES[name]
    session = training.Session(suite, "digits", tmp_path, tmp_path / "records.jsonl")
    found = {arm: training.settings(session.recipe(arm, 0)) for arm in suite.names}
    assert len({json.dumps(settings) for settings in found.values()}) == len(suite.names)
    for arm in suite.names:
        kind, pairing = training_tables.arm_of(arm)
        assert kind in training_tables.KINDS
        assert pairing in training_tables.PAIRINGS


def test_where_the_images_lie_has_to_be_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COUPLINGS_DATA", raising=False)
    with pytest.raises(SystemExit):
        training.main(["--output", str(tmp_path)])
    assert "COUPLINGS_DATA" in capsys.readouterr().err


def test_an_unknown_arm_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        training.main(["--suite", "digits", "--output", str(tmp_path), "--arms", "v-nothing"])
    assert "unknown v-nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("_own_registry")
def test_an_arm_may_be_any_method_with_its_options(tmp_path, monkeypatch):
    (tmp_path / "own_pairing.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    session = training.Session(training.SUITES["digits"], "digits", tmp_path, tmp_path / "records.jsonl")
    own, sinkhorn = (session.recipe(arm, 0) for arm in ("v-own_pairing:roll:by=2", "flow-sinkhorn:reg=0.3"))
    assert (own.coupling.method, own.coupling.options) == ("own_pairing:roll", {"by": 2})
    assert (sinkhorn.coupling.method, sinkhorn.coupling.options) == ("sinkhorn", {"reg": 0.3})
    plugin = training.settings(own)["coupling"]["plugin"]
    assert plugin["package"] == "own_pairing"
    assert plugin["source"] in own.output.name
    assert "plugin" not in training.settings(sinkhorn)["coupling"]
    for arm, said in (("v-own_pairing:rolls", "no attribute 'rolls'"), ("v-sinkhorn:rge=1", "Did you mean 'reg'")):
        with pytest.raises((ValueError, TypeError), match=said):
            training.overrides(arm.partition("-")[2])


OWN = """
import torch

def roll(cost, *, generator=None, by=1):
    return torch.arange(len(cost)).roll(by)
"""


def _points(arm, curve, seed=0, steps="10"):
    settings = {"train": {"seed": seed}}
    common = {"kind": "point", "arm": arm, "seed": seed, "settings": settings, "environment": ENVIRONMENT}
    common |= dict.fromkeys(training.MEANS, 1.0)
    return [common | {"step": step, "frechet": {steps: value}} for step, value in curve.items()]


ENVIRONMENT = {
    "hardware": {"cpu": "abacus", "cores": 2, "memory_gib": 1, "load": 0.0},
    "versions": {"torch": "2", "diffusers": "1"},
    "system": "x",
    "python": "3",
    "threads": 1,
    "commit": "c",
    "date": "2026-01-01T00:00:00+00:00",
}
BASE = {100: 40.0, 200: 20.0, 300: 15.0, 400: 10.0}


def test_thresholds_are_read_off_the_baseline_and_crossed_on_straight_lines():
    faster = _points("v-coupled", {100: 25.0, 200: 15.0, 300: 12.5, 400: 11.0})
    results = training_tables.Results(_points("v-independent", BASE) + faster)
    assert training_tables.thresholds(results) == [
        ("v", 10, 20.0, 200, pytest.approx(150)),
        ("v", 10, 15.0, 300, 200),
        ("v", 10, 10.0, 400, None),
    ]
    lines = training_tables.threshold_table(results).splitlines()
    assert "| 1.3 x |" in lines[2]
    assert "| > 400 |" in lines[4]


def test_a_loss_is_shown_as_plainly_as_a_win_and_disagreement_of_seeds_in_brackets():
    worse = [*_points("v-coupled", {400: 15.0}), *_points("v-coupled", {400: 9.0}, seed=1)]
    results = training_tables.Results(_points("v-independent", BASE) + worse[:1])
    assert "| coupled | 400 | +50% |" in training_tables.change_table(results)
    base = _points("v-independent", BASE) + _points("v-independent", BASE, seed=1)
    assert "| coupled | 400 | (+20%) |" in training_tables.change_table(training_tables.Results(base + worse))


def test_runs_with_different_settings_are_not_mixed():
    other = _points("v-independent", {400: 9.0}, seed=1)
    other[0]["settings"] = {"train": {"seed": 1, "steps": 9}}
    with pytest.raises(ValueError, match="v-independent is on record with different settings"):
        training_tables.Results(_points("v-independent", BASE) + other)
