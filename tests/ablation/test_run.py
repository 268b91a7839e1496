"""Ablations that are killed, that fail, and that run over ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from couplings.ablation import run as running
from couplings.ablation.grid import Point, points
from couplings.ablation.measure import Measurer
from couplings.ablation.records import read_lines
from couplings.ablation.run import run
from couplings.ablation.workers import Settings, Worker, measure
from couplings.cli import main


def _measured(path):
    records = read_lines(path)[0] if path.exists() else []
    return [record for record in records if record["task"] in ("quality", "time")]


def test_a_killed_run_continues_and_measures_nothing_twice(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    argv = "ablate -n 16 --methods auction,greedy,sliced,independent --seeds 12 --jobs 1 --no-times -o"
    command = [sys.executable, "-m", "couplings", *argv.split(), str(path)]
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
    answers = measure([[together, chooses]], ["quality", "time"], Settings(repeats=2), ranks=2)
    (_, answer), (_, skipped) = answers
    for name in ("cost", "cost_before", "agreement", "rows_changed", "rows", "leakage"):
        assert answer["quality"][name] == expected[name], name
    assert answer["time"]["ms"] > 0
    assert {"noise", "solve", "index"} <= answer["time"]["phases_ms"].keys()
    assert "stays local" in skipped["quality"]["skipped"]


def test_a_worker_that_dies_or_hangs_is_the_result_of_its_cell():
    (cell,) = points([{"n": 8, "methods": "auction", "seeds": [0]}])
    worker = Worker(["quality"], Settings(), 1, 1)

    def answer():
        worker.begin(cell)
        return worker.answer(cell)["quality"]["error"]

    try:
        assert answer() is None
        os.kill(worker._processes[0].pid, signal.SIGKILL)
        assert "its process ended (exit code -9)" in answer()
        worker.settings = Settings(timeout=0.0)
        assert "did not finish" in answer()
    finally:
        worker.end()


def test_cells_that_failed_are_tried_again_and_have_no_time(tmp_path, monkeypatch):
    cells = points([{"n": 8, "methods": ["auction", "greedy"], "seeds": [0]}])
    reasons = iter(["out of luck", None])
    timed = []

    def measure(groups, tasks, settings, **_):
        for cell in (cell for group in groups for cell in group):
            if tasks == ["quality"]:
                reason = next(reasons, None) if cell.method == "greedy" else None
                yield cell, {"quality": cell.to_dict() | {"digest": None, "error": reason}}
            else:
                timed.append(cell.method)
                yield cell, {"time": cell.to_dict() | {"ms": 1.0}}

    monkeypatch.setattr(running, "measure", measure)
    path = tmp_path / "out.jsonl"
    first = run(cells, path, Settings(), jobs=1)
    assert list(first.failed.values()) == ["out of luck"]
    assert (first.measured, first.missing, first.work, timed) == (3, 3, pytest.approx(first.total), ["auction"])
    second = run(cells, path, Settings(), jobs=1)
    assert (second.measured, second.kept, second.failed) == (2, 2, {})
    assert timed == ["auction", "greedy"]
