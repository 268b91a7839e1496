"""What the benchmarks time, what they make of the answers, what they write."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from benchmarks import contenders, distributed, solver_tables, solvers
from benchmarks.contenders import COLUMN_ERROR, OURS, TASKS, Contender
from benchmarks.instances import CROPS, HARD, Instance
from benchmarks.record import Records, append, environment, provenance, read
from benchmarks.worker import Worker, certified_bound, judge, timed

ROOT = Path(__file__).parents[1]


def test_a_run_writes_a_complete_record_of_every_contender_and_is_not_repeated(tmp_path):
    # fmt: off
    command = [
        sys.executable, "-m", "benchmarks.solvers", "--quick", "--sizes", "24", "--families", CROPS, "integers",
        "--only", "solve", "hard", "couple", "--peers", "scipy", "torchcfm", "--threads", "1", "--resume",
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
            assert cells["solve", family, solver]["gap"] <= solver_tables.EXACT
            assert cells["solve", family, solver]["median"] > 0
    assert cells["solve", CROPS, "greedy"]["gap"] > solver_tables.EXACT
    assert ("solve", "integers", "GEMM") not in cells
    assert cells["couple", CROPS, OURS]["reduction"] > 0
    assert cells["couple", CROPS, OURS]["kept"] == 1
    present = importlib.util.find_spec("torchcfm") is not None
    assert cells["couple", CROPS, "TorchCFM"]["status"] == ("ok" if present else "absent")
    assert "| couplings |" in solver_tables.grid(Records(tmp_path / "solvers.jsonl"), "solve")

    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert again.stdout.count("on record") == 3
    assert (tmp_path / "solvers.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("task", sorted({task for task, *_ in solvers.CELLS.values()} - {"start", "memory"}))
def test_every_contender_of_every_cell_runs(task):
    """At a tiny size and in this process; what starts others and measures memory is tested apart."""
    instance = Instance.make(CROPS, 16)
    for entry in TASKS[task]:
        try:
            seconds, answer = timed(partial(entry.run, instance, 1))
        except ImportError:
            continue
        assert seconds > 0
        found = judge(task, instance, answer, {})
        assert found.get("column_error", 0) < 10 * COLUMN_ERROR, entry.name


@pytest.mark.parametrize("code", [contenders.FIRST, contenders.WARMUP, contenders.LATER])
def test_the_first_calls_of_a_new_process_are_timed(code):
    """With the cache there is: compiling everything anew takes a minute."""
    assert contenders.fresh(code) > -1.0  # a difference of two times


def test_an_empty_cache_is_empty():
    code = "import os; print(float(not os.listdir(os.environ['NUMBA_CACHE_DIR'])))"
    assert contenders.fresh(code, cached=False) == 1.0


def test_cells_are_chosen_by_name_and_size():
    parse = solvers.parser().parse_args
    (small,) = solvers.groups(parse(["--only", "small", "--sizes", "12"]))
    assert (small.task, small.n) == ("small", 12)
    hard = solvers.groups(parse(["--only", "hard"]))
    assert {group.family for group in hard} == set(HARD)
    assert {group.n for group in hard} == {256, 1024}
    classes = {
        group.n: [entry.name for entry in group.contenders] for group in solvers.groups(parse(["--only", "classes"]))
    }
    assert "1000 classes" in classes[4096]
    assert "1000 classes" not in classes[128]
    (*_, large) = solvers.groups(parse(["--only", "memory"]))
    assert [entry.name for entry in large.contenders] == ["empty", OURS]


def test_a_solver_that_hangs_is_ended_and_the_session_goes_on():
    with Worker(1, None) as worker:
        late = worker.run("solve", "scipy", "points-2d", 512, 0.0)
        assert late == {"status": "failed", "note": "did not finish in 0 s"}
        reply = worker.run("solve", "scipy", "points-2d", 16, 30.0)
        assert reply["status"] == "ok"
        assert reply["gap"] <= solver_tables.EXACT
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
    assert judge("solve", instance, right, known)["gap"] <= solver_tables.EXACT
    assert judge("solve", instance, np.roll(right, 1), known)["gap"] > solver_tables.EXACT
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
    entries = tuple(Contender(name, lambda instance, threads: None) for name in names)
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
        "hardware": {"cpu": "abacus", "cores": 2, "memory_gib": 1, "load": 0.5},
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
            _record(OURS, 8, 0.004, task="small"),
            _record("GEMM", 8, 0.001, task="small"),
            *(_record("dot", n, 1.0, task="metric") for n in (512, 1024)),
            *(_record("l2", n, seconds, task="metric") for n, seconds in ((512, 2.0), (1024, 5.0))),
            *(_record(OURS, 1024, 2.0, family=family) for family in ("blocks", "pareto")),
            *(_record("scipy", 1024, seconds, family=f) for f, seconds in (("blocks", 1.0), ("pareto", 8.0))),
        ]
    )
    return records


def test_the_goals_are_ratios_of_medians_of_right_answers(records):
    values = {(what, against): value for what, against, _, _, value in solver_tables.goals(records)}
    assert values["solve, n = 1024", "scipy, times as fast"] == pytest.approx(30)
    assert values["solve, n = 1024", "best other, times as fast"] == pytest.approx(7)
    assert values["solve, n = 512 to 8192", "exponent of n"] == pytest.approx(2)
    assert values["solve `blocks`, worst family, n = 1024", "best other"] == pytest.approx(2)
    assert values["solve, n = 4096", "scipy, times as fast"] is None
    assert values["`couple`, n = 8", "beyond its matrix product, ms"] == pytest.approx(3)
    assert values["solve `l2`, worst size", "-2 <x, n> of the same data"] == pytest.approx(5)


def test_wrong_missing_and_missed_are_shown(records):
    lines = (solver_tables.grid(records, "solve") + solver_tables.goals_table(records)).splitlines()

    def row(start):
        return next(line for line in lines if line.startswith(start))

    assert row("| fastlap.auction |").count("**wrong**") == 1
    assert "**wrong**" not in row("| greedy |")
    assert "failed" in row("| POT |")
    assert "**missed**" in row("| solve `blocks`, worst family, n = 1024")
    assert "| met |" in row("| solve, n = 512 to 8192")
    assert "not measured" in row("| solve, n = 4096 | scipy")
    assert "| POT | failed | did not finish | solve crops n = 1024 |" in solver_tables.remarks_table(records)
    assert "| absent | lapx |" in provenance(records.all)


def test_every_installed_solver_is_optimal_on_crops():
    instance = Instance.make(CROPS, 24)
    for entry in TASKS["solve"]:
        if not entry.exact or entry.crops_only or entry.name == "fastlap.cost_scaling":
            continue
        try:
            answer = entry.run(instance, 1)
        except ImportError:
            continue
        assert judge("solve", instance, answer, {})["gap"] <= solver_tables.EXACT, entry.name


def test_tasks_name_their_contenders_once():
    for task, entries in TASKS.items():
        assert len({entry.name for entry in entries}) == len(entries), task


def test_a_line_that_was_cut_short_is_dropped_and_not_written_on(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    append(path, {"c": 3})
    assert read(path) == [{"a": 1}, {"c": 3}]


def test_ranks_are_timed_by_phase_and_counted_in_bytes():
    records = distributed.measure(ranks=(1, 2), rows=(8,), repeats=2)
    couples = {(r["ranks"], r["contender"]): r for r in records}
    assert set(couples) == {(1, "local"), *((2, name) for name in distributed.CONTENDERS if "groups" not in name)}
    whole = couples[2, "global"]
    assert whole["phases"]["noise"]["received"] == 8 * 3 * 32 * 32 * 4  # the noise of the other rank
    assert all(received >= 8 * 3 * 32 * 32 * 4 for received in whole["received"])
    assert 0 < sum(phase["seconds"] for phase in whole["phases"].values()) <= 2 * whole["seconds"]
    assert couples[1, "local"]["received"] == [0]
    assert all(record["environment"]["date"] for record in records)
    for table in (distributed.calls_table, distributed.phases_table):
        assert table(records).startswith("| ")
