"""Slices of rows on threads, also where no thread can be had."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from couplings import couple
from couplings.kernels._threads import over_rows, worthwhile
from couplings.problem import Problem


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_every_row_is_in_one_slice(n, threads):
    slices = []
    over_rows(lambda start, stop: slices.append((start, stop)), n, threads)
    assert sorted(row for start, stop in slices for row in range(start, stop)) == list(range(n))


def test_slices_run_beside_each_other():
    meeting = threading.Barrier(2, timeout=20)
    over_rows(lambda _start, _stop: meeting.wait(), 100, 2)


def test_an_error_in_a_slice_is_raised():
    def fail(start, stop):
        if start:
            msg = f"row {start}"
            raise ValueError(msg)

    with pytest.raises(ValueError, match="row 50"):
        over_rows(fail, 100, 2)


def test_without_threads_all_slices_run_in_this_one(monkeypatch):
    def refuse(*_, **__):
        msg = "can't start new thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    slices = []
    over_rows(lambda start, stop: slices.append((start, stop, threading.get_ident())), 90, 3)
    assert sorted(slices) == [(cut, cut + 30, threading.get_ident()) for cut in (0, 30, 60)]


def test_a_thread_outlives_the_main_thread():
    program = """
        import threading
        import time

        from couplings.kernels._threads import over_rows

        def work():
            threading.main_thread().join()
            time.sleep(0.2)
            rows = []
            over_rows(lambda start, stop: rows.extend(range(start, stop)), 100, 4)
            print(len(rows))

        threading.Thread(target=work).start()
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["100"], done.stderr


def test_an_interrupt_in_a_kernel_is_raised_as_what_it_is(monkeypatch):
    def as_numba_does(*_):
        error = KeyboardInterrupt()
        for name in ("<function unpickle>", "CPUDispatcher(<function defer>)"):  # one in the other, while it loads
            before, error = error, SystemError(f"{name} returned a result with an exception set")
            error.__cause__ = before
        raise error

    data, noise = torch.rand(6, 2), torch.rand(6, 2)
    before = couple(data, noise, "greedy").index
    monkeypatch.setattr(Problem, "solve", as_numba_does)
    with pytest.raises(KeyboardInterrupt) as raised:
        couple(data, noise, "greedy")
    assert raised.value.__cause__ is None
    monkeypatch.undo()
    assert torch.equal(couple(data, noise, "greedy").index, before)


def test_as_many_threads_as_pay_for_their_start():
    assert [worthwhile(16, entries) for entries in (0, 1 << 20, 1 << 21, 1 << 24, 1 << 30)] == [1, 1, 2, 5, 16]
    assert worthwhile(None, 1 << 30) == 1
