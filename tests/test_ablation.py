"""Ablations: what cells a grid has, what is measured of them, and what a killed run leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from couplings import couple
from couplings.ablation import running
from couplings.ablation.grid import Point, points, read_grid
from couplings.ablation.measuring import Measurer
from couplings.ablation.records import Log, read_lines
from couplings.ablation.sources import open_source
from couplings.ablation.workers import Settings, World
from couplings.cli import main

YAML = """
- data: [crops32, latents]
  n: [16, 32]
  methods: [auction, {sinkhorn: {reg: 0.1}}, {nearest: {k: 4, score: dot}}]
  metrics: [l2, cosine]
  quantizers: [none, int8]
  conditions: [none, class]
  scopes: [local, global]
  ranks: 3
  seeds: 2
"""
FLAGS = (
    "--data crops32,latents -n 16,32 --methods auction,sinkhorn:reg=0.1,nearest:k=4:score=dot --metrics l2,cosine "
    "--quantizers none,int8 --conditions none,class --scopes local,global --ranks 3 --seeds 2"
)


def test_a_grid_is_the_same_from_yaml_json_and_flags(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(YAML)
    grids = read_grid(tmp_path / "grid.yaml")
    (tmp_path / "grid.json").write_text(json.dumps(grids))
    told = []
    for axes in (str(tmp_path / "grid.yaml"), str(tmp_path / "grid.json"), FLAGS):
        assert main(["ablate", *axes.split(), "--list"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    cells = points(grids)
    assert len(told[0].splitlines()) == len(cells) == 2 * 2 * 3 * 2 * 2 * 2 * 2 * 2
    assert len({cell.key for cell in cells}) == len(cells)
    assert Point.from_dict(json.loads(cells[-1].key)) == cells[-1]
    assert points([*grids, *grids]) == cells


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"method": "auction"}, "unknown axis of a grid 'method'.*methods"),
        ({"methods": ["auctoin"]}, "unknown method 'auctoin'.*auction"),
        ({"methods": {"sinkhorn": {"rge": 1}}}, "unknown option of the method sinkhorn.*reg"),
        ({"methods": {"sinkhorn": 0.1}}, "options of sinkhorn as a mapping"),
        ({"n": [0]}, "n: expected whole numbers of at least 2, got 0"),
        ({"scopes": "globl"}, "unknown scope 'globl'.*global"),
        ({"conditions": "label"}, "unknown condition 'label'"),
    ],
)
def test_a_mistake_in_a_grid_is_named(grid, said):
    with pytest.raises((ValueError, TypeError), match=said):
        points([grid])


def test_a_file_and_flags_for_its_axes_are_refused_together(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(YAML)
    assert main(["ablate", str(tmp_path / "grid.yaml"), "--metrics", "l1", "--list"]) == 2
    assert "holds the axes: leave --metrics away" in capsys.readouterr().err


def test_a_quality_is_that_of_the_pairs():
    measurer = Measurer("cpu", 1)
    cells = points([{"n": 24, "methods": ["auction", "greedy"], "quantizers": ["none", "fp8_e5m2"], "seeds": [3]}])
    exact, greedy, rounded, _ = (measurer.quality(cell) for cell in cells)
    batch, labels = open_source("crops32").batch(24, 3, 1, None)
    best = couple(batch.data, batch.noise)
    assert exact["reduction"] == pytest.approx(float(best.reduction), rel=1e-4)
    assert (exact["gap"], exact["agreement"], exact["rows_used"], exact["marginal"]) == (0, 1, 24, "permutation")
    assert greedy["gap"] > 1e-4
    assert greedy["agreement"] < 1
    coarse = couple(batch.data, batch.noise, quantize="fp8_e5m2")
    assert rounded["rows_changed"] == float((coarse.index != best.index).double().mean()) > 0
    assert rounded["reduction_lost"] == pytest.approx(exact["reduction"] - rounded["reduction"], abs=1e-12)
    assert rounded["reduction_lost"] > 0
    assert len(torch.unique(labels)) > 1
    assert 0 <= exact["leakage"]["p_value"] <= 1
    timed = measurer.time(cells[0])
    assert sum(timed["phases_ms"].values()) == pytest.approx(timed["ms"], rel=1.0)
    assert all(timed["phases_ms"][name] > 0 for name in ("cost", "conversion", "solve", "gather"))


def test_latents_are_those_of_a_linear_encoder():
    batch, _ = open_source("latents").batch(48, 0, 1, None)
    assert batch.data.shape == (48, 4, 32, 32)
    assert 0.7 < float(batch.data.std()) < 1.3
    channels = batch.data.square().mean((0, 2, 3))
    assert channels[0] > channels[1] > channels[2:].max()  # principal components, in order
    again, _ = open_source("latents").batch(48, 0, 4, None)
    assert torch.equal(again.data, batch.data)
    assert torch.equal(again.noise[:48], batch.noise)
    assert len(again.noise) == 4 * 48


def test_rows_of_a_file_are_drawn_with_their_classes(tmp_path):
    rows = np.arange(40, dtype=np.float32)[:, None]
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "classes.npy", np.arange(40) // 10)
    source = open_source(str(tmp_path / "rows.npy"), str(tmp_path / "classes.npy"))
    batch, labels = source.batch(12, 1, 1, "class")
    assert torch.equal(labels, batch.data[:, 0].long() // 10)
    assert torch.equal(batch.condition, labels)
    with pytest.raises(ValueError, match="has 40 rows, fewer than n = 41"):
        source.batch(41, 0, 1, None)
    with pytest.raises(ValueError, match="without classes"):
        open_source(str(tmp_path / "rows.npy")).batch(8, 0, 1, "class")


def test_a_line_that_was_cut_off_is_written_anew_and_two_writers_are_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with Log(path) as log:
        assert log.records == [{"a": 1}]
        log.add({"a": 3})
        with pytest.raises(RuntimeError, match="another process is writing"):
            Log(path)
    assert read_lines(path)[0] == [{"a": 1}, {"a": 3}]
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_lines(path)


def _measured(path):
    records = read_lines(path)[0] if path.exists() else []
    return [record for record in records if record["task"] in ("quality", "time")]


def test_a_killed_run_continues_and_measures_nothing_twice(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "couplings",
        "ablate",
        "-n",
        "16",
        "--methods",
        "auction,greedy,sliced,independent",
    ]
    command += ["--seeds", "12", "--jobs", "1", "--no-times", "-o", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(_measured(path)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    kept = len(_measured(path))
    assert kept < 48
    subprocess.run(command, check=True, capture_output=True)
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    keys = [(record["task"], Point.from_dict(record).key) for record in _measured(path)]
    assert len(keys) == len(set(keys)) == 4 * 12
    runs = [record for record in read_lines(path)[0] if record["task"] == "run"]
    assert [run["run"] for run in runs] == [0, 1]
    size = path.stat().st_size
    assert main(command[3:]) == 0
    assert "0 measurements made, 48 kept" in capsys.readouterr().out
    assert path.stat().st_size == size


def test_ranks_together_make_the_pairs_of_one_process_with_all_rows(tmp_path):
    grid = {"methods": ["auction", "nearest"], "quantizers": "int8", "conditions": "class", "seeds": [2]}
    (alone, _), (together, chooses) = (
        points([{**grid, "n": n, "scopes": scope}]) for n, scope in ((24, "local"), (12, "global"))
    )
    expected = Measurer("cpu", 1).quality(alone)
    with World("global", Settings("cpu", 1, 2, 60.0), 1, 2) as world:
        answer = world.measure(together)
        skipped = world.measure(chooses)
    for name in ("cost", "cost_before", "agreement", "rows_changed", "rows", "leakage"):
        assert answer["quality"][name] == expected[name], name
    assert answer["time"]["ms"] > 0
    assert {"noise", "solve", "index"} <= answer["time"]["phases_ms"].keys()
    assert "stays local" in skipped["quality"]["skipped"]


def test_a_worker_that_dies_or_hangs_is_the_result_of_its_cell(tmp_path, monkeypatch):
    (cell,) = points([{"n": 8, "methods": "auction", "seeds": [0]}])
    with World("quality", Settings("cpu", 1, 1, 60.0), 1) as world:
        assert world.measure(cell)["quality"]["error"] is None
        os.kill(world._processes[0].pid, signal.SIGKILL)
        assert "its process ended (exit code -9)" in world.measure(cell)["error"]["error"]
        world.settings.timeout = 0.0
        assert "did not finish" in world.measure(cell)["error"]["error"]


def test_cells_that_failed_are_tried_again(tmp_path, monkeypatch):
    cells = points([{"n": 8, "methods": ["auction", "greedy"], "seeds": [0]}])
    reasons = iter(["out of luck", None])

    def side_by_side(groups, settings, jobs):
        for cell in (cell for group in groups for cell in group):
            reason = next(reasons, None) if cell.method == "greedy" else None
            record = cell.to_dict() | {"digest": None, "error": reason}
            yield cell, {"quality": record}

    monkeypatch.setattr(running, "side_by_side", side_by_side)
    settings, path = Settings("cpu", 1, 1, 60.0), tmp_path / "out.jsonl"
    first = running.run(cells, path, settings, jobs=1, times=False)
    assert list(first.failed.values()) == ["out of luck"]
    second = running.run(cells, path, settings, jobs=1, times=False)
    assert (second.measured, second.kept, second.failed) == (1, 1, {})


def test_the_time_left_is_that_of_the_pace_so_far(monkeypatch, capsys):
    from rich.console import Console

    from couplings import cli

    clock = iter([0.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with cli._progress(Console(stderr=True)) as show:
        for cells, work in ((1, 10.0), (2, 20.0), (4, 50.0)):  # the first waited for workers to start
            show(running.Progress(of=9, total=200.0, cells=cells, work=work, title="x"))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "1 of 9 measurements"
    assert said[1] == "4 of 9 measurements, 2 min 30 s left"  # 40 units in 40 s, 150 to go
