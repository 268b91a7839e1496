"""The training benchmark: what it trains and measures, what it does when it was ended, what it makes of the records."""

import json

import pytest

from benchmarks import training, training_report
from couplings.assigners import registry
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


@pytest.mark.slow
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
    records = training.read(path)
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
    assert {"auction", "auction-whitened"} <= {r["method"] for r in records if r["kind"] == "coupling"}
    pair = ("v-independent", "epsilon-independent")
    assert {(r["high"], r["low"]) for r in records if r["kind"] == "switched"} == {pair, pair[::-1]}
    assert "| DDIM, v prediction | 2 |" in (tmp_path / "training.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 10_000

    written, _ = path.read_text(), capsys.readouterr()
    training.main(command)
    assert path.read_text() == written
    assert capsys.readouterr().out.count("on record") == 3


def test_where_the_images_lie_is_a_folder_or_a_source(tmp_path, capsys, monkeypatch):
    assert training.source_name("/some/where") == "idx:/some/where"
    assert training.source_name("digits") == "digits"
    monkeypatch.delenv("COUPLINGS_DATA", raising=False)
    with pytest.raises(SystemExit):
        training.main(["--output", str(tmp_path)])
    assert "COUPLINGS_DATA" in capsys.readouterr().err


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
    results = training_report.Results(_points("v-independent", BASE) + faster)
    assert training_report.thresholds(results) == [
        ("v", 10, 20.0, 200, pytest.approx(150)),
        ("v", 10, 15.0, 300, 200),
        ("v", 10, 10.0, 400, None),
    ]
    lines = training_report.threshold_table(results).splitlines()
    assert "| 1.3 x |" in lines[2]
    assert "| > 400 |" in lines[4]


def test_a_loss_is_shown_as_plainly_as_a_win_and_disagreement_of_seeds_in_brackets():
    worse = [*_points("v-coupled", {400: 15.0}), *_points("v-coupled", {400: 9.0}, seed=1)]
    results = training_report.Results(_points("v-independent", BASE) + worse[:1])
    assert "| 400 | +50% |" in training_report.change_table(results)
    base = _points("v-independent", BASE) + _points("v-independent", BASE, seed=1)
    assert "| 400 | (+20%) |" in training_report.change_table(training_report.Results(base + worse))


def test_the_sentences_follow_the_records():
    records = [
        *_points("v-independent", BASE),
        *_points("v-coupled", {400: 5.0}),
        *_points("epsilon-independent", {400: 40.0}),
        *_points("epsilon-coupled", {400: 44.0}),
        *({"kind": "coupling", "method": m, "batch": 128, "explained": x} for m, x in EXPLAINED.items()),
    ]
    for pairing, distance in (("independent", 20.0), ("coupled", 15.0)):
        names = {"high": f"v-{pairing}", "low": f"epsilon-{pairing}"}
        records += [
            {"kind": "switched", **names, "seed": 0, "step": 400, "frechet": {"10": distance}},
            {"kind": "switched", **names, "seed": 0, "step": 200, "frechet": {"10": 1.0}},  # of a shorter training
        ]
    said = "\n".join(training_report.findings(training_report.Results(records)))
    assert "changes the distance by -50% at 10" in said
    assert "samples of the epsilon network change by +10% at 10" in said
    assert "the rest, and they change by -25% at 10" in said
    assert "leaves 5% instead of 30%" in said
    next(r for r in records if r.get("method") == "auction-whitened")["explained"] = 0.4
    assert "whitened" not in "\n".join(training_report.findings(training_report.Results(records)))


EXPLAINED = {"auction": 0.3, "auction-whitened": 0.05}


def test_runs_with_different_settings_are_not_mixed():
    other = _points("v-independent", {400: 9.0}, seed=1)
    other[0]["settings"] = {"train": {"seed": 1, "steps": 9}}
    with pytest.raises(ValueError, match="v-independent is on record with different settings"):
        training_report.Results(_points("v-independent", BASE) + other)


def test_weights_are_blamed_only_where_they_turn_a_gain_into_a_loss():
    def said(weighted):
        ends = {"v": (20.0, 15.0), "weighted": (20.0, weighted), "epsilon": (40.0, 44.0)}
        records = [
            record
            for kind, values in ends.items()
            for pairing, value in zip(("independent", "coupled"), values, strict=True)
            for record in _points(f"{kind}-{pairing}", {400: value})
        ]
        return "\n".join(training_report.findings(training_report.Results(records)))

    assert "v prediction changes by -25% at 10 sampling steps with its own weights; +15% at 10 with" in said(23.0)
    assert "weight of the loss" not in said(19.0)
