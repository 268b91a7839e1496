"""Many callers at once, in `benchmarks.robustness`: an answer that changes, a hang and a lost Ctrl-C are found out."""

import os
import signal
import time

import pytest
import torch

from benchmarks.robustness import concurrency
from couplings import Coupling

pytestmark = pytest.mark.slow  # processes that are started to be ended


def test_shared_state_is_found_out_and_couplings_have_none():
    shared = {name: Coupling(name) for name in concurrency.METHODS}
    assert concurrency.at_once(lambda number: concurrency.answer(number, shared), range(8), threads=4) == []
    held = []

    def through_a_shared_list(number):
        held[:] = [number]
        time.sleep(0.001)
        return held[0]

    assert "another answer than in one thread" in concurrency.at_once(through_a_shared_list, range(20), threads=4)[0]


def test_a_changed_number_of_threads_is_found_out():
    before = torch.get_num_threads()
    try:
        told = concurrency.at_once(lambda _: torch.set_num_threads(before + 1), range(2), threads=2)
    finally:
        torch.set_num_threads(before)
    assert told == [f"torch had {before} threads, and has {before + 1}"]


def answers_with_its_number(folder):
    (folder / f"{os.getpid()}.json").write_text(str(os.getpid()))


def dies_where_another_has_been(folder):
    if list(folder.iterdir()):
        os._exit(3)
    (folder / "1.json").touch()


@pytest.mark.parametrize(
    ("work", "said"), [(answers_with_its_number, "another answer"), (dies_where_another_has_been, "exit code 3")]
)
def test_a_process_that_does_otherwise_than_its_parent_is_found_out(work, said):
    assert said in concurrency.after_a_start(work, "fork")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("pass", None),
        ("import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()", "it hung"),
        ("import threading; threading.Thread(target=lambda: 1 / 0).start()", "ZeroDivisionError"),
        ("raise SystemExit(2)", "exit code 2"),
    ],
)
def test_a_program_that_does_not_end_in_peace_is_found_out(monkeypatch, program, said):
    monkeypatch.setattr(concurrency, "IN_TIME", 10.0 if said != "it hung" else 0.2)
    what = concurrency.ends_in_time(program, 0.0)
    assert (what is None) if said is None else (said in what)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print(1)", None),
        ("import os; print(os.getpid())", "the answers differ"),
        ("import os; open(os.environ['NUMBA_CACHE_DIR'] + '/lock', 'x')", "FileExistsError"),
    ],
)
def test_processes_that_get_into_each_others_way_are_found_out(program, said):
    what = concurrency.in_one_cache(program)
    assert (what is None) if said is None else (said in what)


def begins(folder, method):
    (folder / "begun").touch()
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()


def does_not_listen(folder, method):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begins(folder, method)


def breaks(folder, method):
    begins(folder, method)
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("work", "said"), [(begins, None), (does_not_listen, "no KeyboardInterrupt"), (breaks, "does not work on")]
)
def test_an_interrupt_that_is_not_felt_or_does_harm_is_found_out(work, said):
    what = concurrency.interrupted(work, "", 1, 1.0 if work is does_not_listen else 10.0)
    assert (what is None) if said is None else (said in what)
