"""The solver benchmark: what it times, what it makes of the answers, what it writes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from benchmarks import report, solvers
from benchmarks.contenders import OURS, TASKS, Contender
from benchmarks.instances import CROPS, HARD, Instance
from benchmarks.record import Records, environment
from benchmarks.worker import Worker, certified_bound, judge

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_run_writes_a_complete_record_of_every_contender_and_is_not_repeated(tmp_path):
    # fmt: off
    command = [
        sys.executable, "-m", "benchmarks.solvers", "--quick", "--sizes", "24", "--families", CROPS, "integers",
        "--tasks", "solve", "couple", "step", "--peers", "scipy", "torchcfm", "--threads", "1", "--resume",
        "--output", str(tmp_path),
    ]
    # fmt: on
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = (tmp_path / "solvers.jsonl").read_text().splitlines()
    cells = {(r["task"], r["family"], r["contender"]): r for r in map(json.loads, lines)}
    assert len(cells) == len(lines)
    for record in cells.values():
        assert record["status"] in ("ok", "absent")
        assert {"hardware", "versions", "commit", "date", "threads"} <= record["environment"].keys()
        assert record["config"]
    for family in (CROPS, "integers"):
        for solver in (OURS, "scipy"):
            assert cells["solve", family, solver]["gap"] <= report.EXACT
            assert cells["solve", family, solver]["median"] > 0
    assert cells["solve", CROPS, "greedy"]["gap"] > report.EXACT
    assert ("solve", "integers", "GEMM") not in cells
    assert cells["couple", CROPS, OURS]["reduction"] > 0
    assert cells["couple", CROPS, OURS]["kept"] == 1
    page = (tmp_path / "solvers.md").read_text()
    assert "| couplings |" in page
    present = importlib.util.find_spec("torchcfm") is not None
    assert cells["couple", CROPS, "TorchCFM"]["status"] == ("ok" if present else "absent")
    assert present or any(line.startswith("- Absent:") and "torchcfm" in line for line in page.splitlines())
    assert (tmp_path / "solvers-time.png").stat().st_size > 0

    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert again.stdout.count("on record") == 4
    assert (tmp_path / "solvers.jsonl").read_text().splitlines() == lines


def test_a_solver_that_hangs_is_ended_and_the_session_goes_on():
    with Worker(1, None) as worker:
        late = worker.run("solve", "scipy", "points-2d", 512, 0.0)
        assert late == {"status": "failed", "note": "did not finish in 0 s"}
        reply = worker.run("solve", "scipy", "points-2d", 16, 30.0)
        assert reply["status"] == "ok"
        assert reply["gap"] <= report.EXACT
        if Path("/proc/self/clear_refs").exists():  # scipy works on a copy in float64
            reply = worker.run("solve", "scipy", "points-2d", 1024, 30.0, memory=True)
            assert reply["memory"] >= 8 * 1024**2
            assert worker.run("memory", "empty", "points-2d", 1024, 30.0, memory=True)["memory"] < 2 * 1024**2


@pytest.mark.parametrize("family", [CROPS, *HARD])
def test_the_certified_bound_is_the_optimum(family):
    cost = Instance.make(family, 48).cost
    optimum = cost[linear_sum_assignment(cost)].astype(np.float64).sum()
    bound, rounding = certified_bound(cost)
    assert bound - rounding <= optimum
    assert optimum - bound <= rounding + 1e-6 * abs(optimum)


def test_an_instance_is_the_same_every_time():
    for family in (CROPS, *HARD):
        np.testing.assert_array_equal(Instance.make(family, 16).cost, Instance.make(family, 16).cost)


@pytest.mark.parametrize("family", ["points-2d", "pareto", "huge-entry", "denormal"])
def test_a_wrong_answer_is_told_from_a_right_one(family):
    instance, known = Instance.make(family, 48), {}
    right = linear_sum_assignment(instance.cost)[1]
    assert judge("solve", instance, right, known)["gap"] <= report.EXACT
    assert judge("solve", instance, np.roll(right, 1), known)["gap"] > report.EXACT
    assert judge("solve", instance, np.zeros(48, np.int64), known)["gap"] is None


def test_a_coupling_is_judged_by_the_tensors_it_returns():
    instance = Instance.make(CROPS, 32)
    best = linear_sum_assignment(instance.cost)[1]
    good = judge("couple", instance, (instance.data, instance.noise[best]), {})
    assert good["kept"] == 1
    assert good["reduction"] > 0
    repeated = judge("couple", instance, (instance.data, instance.noise[best // 2]), {})
    assert repeated["kept"] < 1


class Scripted:
    """A worker whose contenders take as long as they are told to."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, []

    def run(self, task, name, family, n, timeout, memory=False):
        self.calls.append(name)
        if self.seconds[name] is None:
            return {"status": "failed", "note": "did not finish"}
        return {"status": "ok", "seconds": self.seconds[name], "gap": 0.0, "note": ""}


def _group(*names, n=256):
    entries = tuple(Contender(name, None, lambda instance, threads: None) for name in names)
    return solvers.Group("solve", CROPS, n, entries)


def test_contenders_take_turns_and_a_slow_one_is_not_waited_for(tmp_path):
    worker = Scripted({OURS: 0.1, "slow": 100.0, "hangs": None})
    config = solvers.Config(runs=4, share=0.2)
    results = solvers.measure(_group(OURS, "slow", "hangs"), Records(tmp_path / "r"), config, worker, None)
    assert worker.calls == [OURS, "slow", "hangs", OURS, OURS]
    ours, slow, hangs = results
    assert (ours["runs"], ours["median"], ours["gap"]) == (3, 0.1, 0.0)
    assert slow["runs"] == 1
    assert (hangs["status"], hangs["note"]) == ("failed", "did not finish")


@pytest.mark.parametrize(("gaps", "worst"), [((0.0, 0.5, 0.1), 0.5), ((0.5, None, 0.1), None)])
def test_the_worst_answer_is_the_one_on_record(tmp_path, gaps, worst):
    worker, replies = Scripted({OURS: 1.0}), iter(gaps)
    run = worker.run
    worker.run = lambda *arguments, **options: run(*arguments, **options) | {"gap": next(replies)}
    (result,) = solvers.measure(_group(OURS), Records(tmp_path / "r"), solvers.Config(), worker, None)
    assert (result["runs"], result["gap"]) == (3, worst)


def test_a_slow_solver_is_predicted_and_says_so(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    records.replace([_record("slow", 256, 1.0), _record("hangs", 256, None), _record(OURS, 256, 1e6)])
    records.replace([_record("slow", 2048, None)])  # of an earlier run: predicts nothing about itself
    worker = Scripted({OURS: 1.0})
    results = solvers.measure(_group(OURS, "slow", "hangs", n=2048), records, solvers.Config(), worker, None)
    assert set(worker.calls) == {OURS}
    assert results[1]["note"] == "predicted 181.0 s; limit 12.5 s"
    assert results[2]["note"] == "a smaller size did not finish; limit 12.5 s"


def test_only_what_was_measured_with_this_library_counts_as_done(tmp_path):
    records, config, group = Records(tmp_path / "records.jsonl"), solvers.Config(), _group(OURS, "scipy")
    here = environment(1, None) | {"kernels": "abc"}
    records.replace([_record(OURS, 256, 1.0) | {"config": vars(config), "environment": here}])
    assert not solvers.done(group, records, here, config, resume=True)
    records.replace([_record("scipy", 256, 1.0) | {"config": vars(config), "environment": here}])
    assert solvers.done(group, Records(records.path), here, config, resume=False)
    for other in ({"kernels": "def"}, {"threads": 9}):
        assert not solvers.done(group, records, here | other, config, resume=False)
        assert solvers.done(group, records, here | other, config, resume=True)
    dirty = here | {"kernels": "abc+"}
    records.replace([record | {"environment": dirty} for record in records.all])
    assert not solvers.done(group, records, dirty, config, resume=False)


def _record(name, n, seconds, *, task="solve", family=CROPS, gap=0.0, exact=True):
    record = {"task": task, "family": family, "n": n, "contender": name, "exact": exact, "config": {}}
    record["environment"] = {
        "hardware": {"cpu": "abacus", "cores": 2, "memory_gib": 1},
        **dict.fromkeys(("system", "python", "commit", "kernels", "date"), "x"),
        **{"threads": 2, "versions": {"scipy": "1", "lapx": None}},
    }
    if seconds is None:
        return record | {"status": "failed", "note": "did not finish"}
    return record | {"status": "ok", "median": seconds, "quartiles": [seconds] * 2, "runs": 3, "gap": gap}


@pytest.fixture
def records(tmp_path):
    records = Records(tmp_path / "solvers.jsonl")
    records.replace(
        [
            *(_record(OURS, n, 1e-8 * n**2) for n in (512, 1024, 2048, 4096, 8192)),
            _record("scipy", 1024, 1e-8 * 1024**2 * 30),
            _record("lapjv", 1024, 1e-8 * 1024**2 * 7),
            _record("fastlap.auction", 1024, 1e-8 * 1024**2 * 2, gap=1e-3),
            _record("greedy", 1024, 1e-8 * 1024**2, gap=1e-1, exact=False),
            _record("POT", 1024, None),
            _record("couple", 1024, 1.0, task="step"),
            _record("gather", 1024, 0.25, task="step"),
            *(_record(OURS, 1024, 2.0, family=family) for family in ("blocks", "pareto")),
            *(_record("scipy", 1024, seconds, family=f) for f, seconds in (("blocks", 1.0), ("pareto", 8.0))),
        ]
    )
    return records


def test_the_goals_are_ratios_of_medians_of_right_answers(records):
    values = {(what, against): value for what, against, _, value, _ in report.goals(records)}
    assert values["solve, n = 1024", "scipy"] == pytest.approx(30)
    assert values["solve, n = 1024", "best other (lapjv)"] == pytest.approx(7)
    assert values["growth of the time, n = 512 to 8192", ""] == pytest.approx(2)
    assert values["hardest family, n = 1024 (blocks)", "scipy"] == pytest.approx(2)
    assert values["solve, n = 4096", "scipy"] is None


def test_wrong_missing_and_missed_are_shown(records, tmp_path):
    assert report.write(records, tmp_path) == [tmp_path / f"solvers{end}" for end in (".md", "-time.png", "-step.png")]
    lines = (tmp_path / "solvers.md").read_text().splitlines()

    def row(start):
        return next(line for line in lines if line.startswith(start))

    assert row("| fastlap.auction |").count("**wrong**") == 1
    assert "**wrong**" not in row("| greedy |")
    assert "failed" in row("| POT |")
    assert "**missed**" in row("| hardest family")
    assert "| met |" in row("| solve, n = 1024 | scipy")
    assert "not measured" in row("| solve, n = 4096 | scipy")
    assert "- Absent: lapx" in lines
    assert any("POT, failed: did not finish (solve crops n = 1024)" in line for line in lines)


def test_the_readme_block_is_replaced_and_nothing_else(records, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write(records, tmp_path, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "30.0 times as fast as scipy" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        report.write(records, tmp_path, readme)


def test_every_installed_solver_is_optimal_on_crops():
    instance = Instance.make(CROPS, 24)
    for entry in TASKS["solve"]:
        if not entry.exact or entry.crops_only or entry.name == "fastlap.cost_scaling":
            continue
        try:
            call = entry.make(instance, 1)
        except ImportError:
            continue
        assert judge("solve", instance, call(), {})["gap"] <= report.EXACT, entry.name


def test_tasks_name_their_contenders_once():
    for task, entries in TASKS.items():
        assert len({entry.name for entry in entries}) == len(entries), task


def test_large_sizes_are_ours_alone():
    arguments = SimpleNamespace(
        sizes=None, quick=False, families=[CROPS], tasks=list(TASKS), peers=None, threads=1, resume=False
    )
    large = [group for group in solvers.groups(arguments) if group.n == solvers.LARGE]
    assert [[entry.name for entry in group.contenders] for group in large] == [["empty", OURS]]
