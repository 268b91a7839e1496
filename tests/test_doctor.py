"""`couplings doctor`: what it finds, and what it says to write."""

import json

import pytest
import torch

from couplings.cli import main
from couplings.doctor import Speed, advise, code


def speed(**changed):
    usual = {"batch": 256, "shape": (3, 32, 32), "device": "cpu", "couple": 2.0, "product": 0.5, "step": 100.0}
    return Speed(**usual | {"inline": 2.0, "ahead": 0.1, "windows": {2: 8.0, 4: 40.0, 8: 900.0}} | changed)


def test_what_delays_a_step_goes_behind_it():
    write, _, why = advise(speed())
    assert write == "submit"
    assert "2.0% to a step inside it and 0.1% behind it" in why


def test_what_does_not_delay_a_step_stays_in_it():
    assert advise(speed(inline=0.9))[0] == "inline"


def test_where_hiding_takes_longer_nothing_is_hidden():
    write, _, why = advise(speed(inline=20.0, ahead=30.0))
    assert write == "inline"
    assert "no time to spare" in why


def test_few_rows_are_coupled_over_a_window():
    write, window, _ = advise(speed(batch=16))
    assert (write, window) == ("lookahead", 4)
    assert code(write, window) == "for images, noise in lookahead(loader, Coupling(), window=4):"


@pytest.mark.parametrize(("windows", "largest"), [({}, 1), ({2: 99.0, 4: 300.0}, 2), ({2: 101.0, 4: 100.0}, 4)])
def test_a_window_is_coupled_in_half_the_time_of_its_steps(windows, largest):
    assert advise(speed(windows=windows))[1] == largest


def test_doctor_measures_this_machine(capsys):
    assert main(["doctor", "--batch", "8", "--shape", "1x4x4", "--step", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"environment", "load", "extras", "kernels", "speed", "advice"}
    assert found["extras"]["lapjv"] == {"installed": True, "missing": []}
    counted = {**found["kernels"]["loaded"], **found["kernels"]["compiled"]}
    assert {"assignment.bidding.bid", "assignment.dense.solve_dense", "l1.tiles"} <= set(counted)
    timed = found["speed"]
    assert (timed["batch"], timed["shape"], timed["device"]) == (8, [1, 4, 4], "cpu")
    assert min(timed[name] for name in ("couple", "product", "step")) > 0
    assert sorted(map(int, timed["windows"])) == [2, 4, 8, 16, 32, 64, 128, 256]
    assert found["advice"]["write"] in ("inline", "submit", "lookahead")


def test_doctor_shows_lines(capsys):
    assert main(["doctor", "--batch", "4", "--shape", "6", "--step", "1"]) == 0
    said = capsys.readouterr().out
    for expected in ("Installed", "Kernels", "Speed, 4 rows of 6 on cpu", "In your loop", "batches as one"):
        assert expected in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_doctor_measures_a_gpu(capsys):
    assert main(["doctor", "--batch", "128", "--shape", "3x32x32", "--device", "cuda", "--step", "20", "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)["speed"]
    assert timed["device"] == "cuda"
    assert 0 < timed["product"] < timed["couple"]


@pytest.mark.parametrize("shape", ["3x", "0x4", "ab", "-1"])
def test_doctor_refuses_what_is_no_shape(capsys, shape):
    assert main(["doctor", "--shape", shape]) == 2
    assert "such as 3x32x32" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_doctor_says_that_there_is_no_such_device(capsys):
    assert main(["doctor", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "CUDA" in error or "NVIDIA" in error  # as torch says it, built without CUDA or with it
