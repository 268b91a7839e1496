import json

import pytest
from PIL import Image

from integrations import demo


def test_the_demo_compares_four_arms_in_a_table_a_picture_and_json(tmp_path, capsys, processes, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda _: processes)  # which start sooner than spawned ones
    options = {"train.steps": "12", "train.log_every": "4", "evaluate.samples": "70", "evaluate.steps": "[1, 2]"}
    further = [word for field, value in options.items() for word in (f"--{field}", value)]
    demo.main(["--output", str(tmp_path), "--objective.prediction", "epsilon", *further])
    document = json.loads((tmp_path / "demo.json").read_text())
    arms = {arm["arm"]: arm for arm in document["arms"]}
    assert list(arms) == ["flow-matching-independent", "flow-matching-auction", "ddim-independent", "ddim-auction"]
    for name, arm in arms.items():
        assert list(arm["frechet"]) == ["1", "2"]
        assert all(value > 0 for value in arm["frechet"].values())
        assert (arm["reduction"] > 0.05) == name.endswith("auction")
        assert 0 <= arm["coupling_share"] < 1
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1]["step"] == 12
    assert arms["ddim-independent"]["prediction"] == "epsilon"
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width >= 1500
    printed = capsys.readouterr().out
    assert "Frechet distance" in printed
    assert "coupled" in printed


def test_the_table_shows_a_loss_as_plainly_as_a_win():
    records = [
        {"title": "Flow", "frechet": {"1": 10.0, "50": 4.0}},
        {"title": "Flow", "frechet": {"1": 5.0, "50": 6.0}},
    ]
    table = demo.distances(records)
    assert list(table.columns[3].cells) == ["[green]-50%[/]", "[bold red]+50%[/]"]


def test_an_unknown_field_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--train.stepz", "3"])
    assert end.value.code == 2
    assert "did you mean 'train.steps'" in capsys.readouterr().err
