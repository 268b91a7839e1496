"""What the programs that try to break the library find: nothing in it, and every fault that is planted."""

import dataclasses
import gc
import io
import pickle
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

import couplings
from benchmarks.record import read
from benchmarks.robustness import PARTS, Outcome, __main__, calls, damaged, fuzz, memory, statistics, tables, trial

TINY = {
    "fuzz": 2e-4,
    "calls": 0.02,
    "damaged": 0.002,
    "recipes": 0.005,
    "commands": 0.003,
    "statistics": 0.02,
}  # the others start processes and strike at random moments: they are slow


class Here:
    """In place of a process of its own, which takes seconds to start."""

    running = True

    def __init__(self, serve, judge):
        self.judge = judge

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def send(self, seed):
        self.answer = self.judge(seed)

    def receive(self, patience):
        return self.answer


def some(every, names, *arguments):
    """Of the cases of a part, those of a few names."""
    for case in every(*arguments):
        if (case[0] if isinstance(case, tuple) else case.title) in names:
            yield case


@pytest.fixture
def frozen():
    """Collections need not go through everything that the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("part", TINY)
def test_nothing_is_lost(part, monkeypatch):
    monkeypatch.setattr(trial, "Child", Here)
    few = ("sinkhorn, draw=rows", "auction, classes", "nearest")
    monkeypatch.setattr(statistics, "cases", partial(some, statistics.cases, few))
    monkeypatch.setattr(statistics, "planted", partial(some, statistics.planted, ("planted: one_class_shifted",)))
    outcome = PARTS[part](TINY[part])
    assert outcome.tried > 0
    assert outcome.lost == 0, outcome.about["lost"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_lost_in_a_tenth_of_the_full_size(part):
    outcome = PARTS[part](0.1)
    assert outcome.lost == 0, outcome.about
    assert outcome.tried or "skipped" in outcome.about


def test_a_part_is_recorded_once_and_what_it_lost_is_the_exit_code(tmp_path, monkeypatch, capsys):
    ran = []

    def part(share):
        ran.append(share)
        return Outcome.of(30, [f"seed {k}" for k in range(25)])

    monkeypatch.setitem(PARTS, "loses", part)
    here = {"kernels": "abc", "versions": {}, "python": "3"}
    monkeypatch.setattr(__main__, "environment", lambda **_: here)
    command = ["loses", "--output", str(tmp_path / "records.jsonl"), "--share"]
    assert [__main__.main([*command, share]) for share in ("0.5", "0.25", "1.0")] == [1, 1, 1]
    assert ran == [0.5, 1.0]
    first, _ = read(tmp_path / "records.jsonl")
    assert (first["part"], first["share"], first["tried"], first["lost"]) == ("loses", 0.5, 30, 25)
    assert first["about"]["lost"] == [f"seed {k}" for k in range(20)]
    assert "loses: on record, 25 of 30 lost" in capsys.readouterr().out
    here["kernels"] = "abc+"  # sources that are not committed are measured again
    __main__.main([*command, "0.5"])
    assert ran == [0.5, 1.0, 0.5]


def test_a_wrong_answer_of_a_method_is_lost(monkeypatch):
    assert fuzz.judge_seed(0)[0] == "right"
    monkeypatch.setattr(fuzz, "answer", lambda _, cost: ("ok", [0] * len(cost), -np.inf))
    kind, said = fuzz.judge_seed(0)
    assert kind == "lost"
    assert "auction: repeated column" in said


def good():
    data, noise = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    return calls.Call(data, noise, "auction")


def changed(coupled, **fields):
    return dataclasses.replace(coupled, **fields)


def wrong_rows(call):
    coupled = call.run()
    return changed(coupled, noise=coupled.noise.flip(0))


def wrong_pairs(call):
    coupled = call.run()
    return changed(coupled, noise=call.noise, index=torch.arange(6), cost=coupled.cost_before)


def row_twice(call):
    index = torch.zeros(6, dtype=torch.int64)
    return changed(call.run(), noise=call.noise[index], index=index)


def wrong_cost(call):
    coupled = call.run()
    return changed(coupled, cost=coupled.cost * 1.01)


def in_place(call):
    call.noise += 1
    return call.run()


def with_warning(call):
    warnings.warn("slow", stacklevel=1)
    return call.run()


def global_draw(call):
    torch.rand(1)
    return call.run()


def foreign_error(call):
    return call.data @ call.noise


def other_type(call):
    raise KeyError(call.method)


def two_lines(call):
    return couplings.inputs.report_not_finite(torch.ones(1, 1), torch.ones(1, 1), "first\nsecond")


def refused(call):
    return couplings.couple(call.data, call.noise, "none such")


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (wrong_rows, "noise[index]"),
        (wrong_pairs, "and the optimum is"),
        (row_twice, "no permutation"),
        (wrong_cost, "it reports"),
        (in_place, "changed its inputs"),
        (with_warning, "it warned: slow"),
        (global_draw, "global random state"),
        (foreign_error, "RuntimeError from"),
        (other_type, "KeyError"),
        (two_lines, "one line"),
        (refused, "refused what can be coupled"),
    ],
)
def test_a_planted_fault_of_a_call_is_lost(run, what):
    assert calls.judge(good()) == ("right", "")
    kind, said = calls.judge(good(), run)
    assert kind == "lost"
    assert what in said


def test_what_must_be_refused_and_is_answered_is_lost():
    call = dataclasses.replace(good(), must_fail=["two types"])
    assert calls.judge(call) == ("lost", "answered in spite of: two types")
    assert calls.judge(dataclasses.replace(call, method="none such")) == ("refused", "two types")


def hangs(seed):
    if seed == 2:
        time.sleep(600)
    return ("refused", "odd") if seed % 2 else ("right", "")


def test_what_hangs_is_lost_and_the_next_one_is_tried():
    outcome = trial.judged(hangs, range(6), 2.0)
    assert (outcome.tried, outcome.lost, outcome.about["right"]) == (6, 1, 2)
    assert outcome.about["refused"] == {"odd": 3}
    assert outcome.about["lost"] == ["seed 2: did not finish in 2 s"]


def test_the_fuzzer_tells_wrong_answers_from_right_ones():
    inf = float("inf")
    cost = np.array([[1.0, 2.0, inf], [2.0, 1.0, 5.0], [3.0, 9.0, 1.0]])
    right = ("ok", [0, 1, 2], 3.0)
    answers = {
        "right": right,
        "twice": ("ok", [0, 0, 2], 0.0),
        "forbidden": ("ok", [2, 1, 0], 0.0),
        "dear": ("ok", [1, 0, 2], 0.0),
        "boasts": ("ok", [0, 1, 2], 3.5),
        "refuses": ("refused", "no", 0.0),
        "breaks": ("failed", "KeyError", 0.0),
    }
    assert fuzz.failures(cost, answers) == {
        "twice": "repeated column",
        "forbidden": "forbidden column",
        "dear": "7e-01 above the optimum",
        "boasts": "false bound",
        "breaks": "KeyError",
    }
    cost[:, 0] = cost[0] = inf
    assert fuzz.failures(cost, {"refuses": ("refused", "no", 0.0)}) == {}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_problem_is_the_same_every_time(kind):
    name, cost = fuzz.problem(3, (kind,))
    assert name == kind
    np.testing.assert_array_equal(cost, fuzz.problem(3, (kind,))[1])


GOOD = pickle.dumps(list(range(100)))


def subject(load):
    def make(folder):
        (folder / "file").write_bytes(GOOD)
        return folder / "file"

    return (damaged.Subject("file", make, load),)


def unpickles(path):
    try:
        return pickle.loads(path.read_bytes())
    except Exception as error:
        raise OSError("damaged") from error


def raises_what_it_likes(path):
    return {GOOD: 1}[path.read_bytes()]


def test_a_damaged_file_that_is_executed_or_not_noticed_is_lost():
    verdicts = {damaged.judge_file(seed, subject(unpickles)) for seed in range(60)}
    assert ("lost", "file (file), a pickle in its place: code in it was executed") in verdicts
    assert ("lost", "file (file), a bit flipped: loaded, and it is not what was saved") in verdicts
    assert ("refused", "file") in verdicts
    verdicts = [damaged.judge_file(seed, subject(raises_what_it_likes)) for seed in range(20)]
    assert any(kind == "lost" and "KeyError" in what for kind, what in verdicts)


def test_every_dress_of_a_payload_is_executed_by_a_careless_reader(tmp_path):
    careless = {
        "pickle": pickle.loads,
        "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
        "npz": lambda content: np.load(io.BytesIO(content), allow_pickle=True)["noise"],
        "pt": lambda content: torch.load(io.BytesIO(content), weights_only=False),
        "old pt": lambda content: torch.load(io.BytesIO(content), weights_only=False),
    }
    for name, content in damaged.payloads(tmp_path / "executed").items():
        careless[name](content)
        (tmp_path / "executed").rmdir()


def test_a_recipe_that_is_executed_or_refused_in_two_lines_is_lost(monkeypatch):
    from integrations import config

    monkeypatch.setattr(config, "load", lambda argv: yaml.unsafe_load(Path(argv[0]).read_text()))
    verdicts = [damaged.judge_recipe(seed) for seed in range(60)]
    assert any(kind == "lost" and what.startswith("code in it was executed") for kind, what in verdicts)
    assert any(kind == "lost" and "ScannerError" in what for kind, what in verdicts)


@pytest.mark.parametrize(
    ("main", "what"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: sys.exit(3), "SystemExit 3"),
        (lambda _: 2, "exit code 2 with ''"),
        (lambda _: 5, "exit code 5"),
        (lambda _: Path("data.npy").unlink() or 0, "it changed ['data.npy']"),
        (lambda _: np.load("bad.npy", allow_pickle=True) is None, "code in a file was executed"),
    ],
)
def test_a_command_that_fails_badly_is_lost(monkeypatch, main, what):
    monkeypatch.setattr("couplings.cli.main", main)
    kind, said = damaged.judge_command(0)
    assert kind == "lost"
    assert what in said


def grows(kept):
    def step(number):
        kept.append(bytearray(b"x" * (4 << 20)))

    return step


def opens(kept):
    return lambda number: kept.append(Path("/dev/null").open())


def starts(kept):
    def step(number):
        event = threading.Event()
        kept.append(event)
        threading.Thread(target=event.wait, daemon=True).start()

    return step


def remembers(kept):
    return lambda number: kept.extend([number] for _ in range(1000))


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(
    ("leak", "what"), [(grows, "bytes"), (opens, "descriptors"), (starts, "threads"), (remembers, "objects")]
)
def test_a_planted_leak_is_lost(leak, what):
    kept = []
    try:
        assert memory.leaks(memory.measure("step", lambda number: None, 12)) == []
        (found, *_) = memory.leaks(memory.measure("step", leak(kept), 12))
    finally:
        for each in kept:
            getattr(each, "close", getattr(each, "set", int))()
    assert found.startswith("step: ")
    assert found.endswith(f" more {what} after 12 times")


def test_a_bias_that_is_not_planted_where_it_is_said_to_be_is_lost():
    share = 0.02
    (shifted,) = some(statistics.planted, ("planted: shifted",), share)
    honest = dataclasses.replace(shifted, title="said to be shifted", bias=None)
    hidden = dataclasses.replace(shifted, title="said to be unbiased", found=False)
    outcome = statistics.measure(share, [honest, hidden])
    assert any("said to be shifted: not found" in what for what in outcome.about["lost"])
    assert any("said to be unbiased, mean: p = " in what for what in outcome.about["lost"])


def test_p_values_of_noise_are_uniform():
    rng = np.random.default_rng(0)
    found = [statistics.anderson_darling(rng.standard_normal(50)) for _ in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert statistics.holm({"a": 1e-5, "b": 0.004, "c": 0.9}, 0.01) == {"a", "b"}
    assert statistics.holm({"a": 0.006, "b": 0.006}, 0.01) == set()


def test_the_table_shows_the_last_record_of_each_part():
    old, new = ({"part": "calls", "share": share, "tried": 10_000, "lost": 2, "seconds": 3.0} for share in (0.1, 1.0))
    new["about"] = {"right": 7, "refused": {"odd": 2, "even": 1}}
    assert tables.tried_table([old, new]).splitlines()[2:] == ["| `calls` | 100% | 10,000 | 2 | 3 |"]
    assert tables.refused_table([old, new]).splitlines()[2:] == ["| `calls` | 7 | 3 |"]
