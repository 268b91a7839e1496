"""The solver behind SciPy's signature."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from couplings.kernels import linear_sum_assignment


def test_scipys_own_tests_pass(tmp_path):
    found = importlib.util.find_spec("scipy.optimize.tests.test_linear_assignment")
    if found is None:
        pytest.skip("this SciPy was installed without its tests")
    text = Path(found.origin).read_text()
    theirs = "from scipy.optimize import linear_sum_assignment\n"
    assert theirs in text
    copy = tmp_path / "test_linear_assignment.py"
    copy.write_text(text.replace(theirs, "from couplings.kernels import linear_sum_assignment\n"))
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5), (300, 260)])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.float16, np.float32, np.float64])
def test_totals_are_scipys(dtype, shape, maximize):
    cost = (np.random.default_rng(0).random(shape) * 9).astype(dtype)
    rows, columns = linear_sum_assignment(cost, maximize)
    assert rows.dtype == columns.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert len(set(columns.tolist())) == len(columns) == min(shape)
    expected = optimize.linear_sum_assignment(cost, maximize)
    assert cost[rows, columns].sum(dtype=float) == pytest.approx(cost[expected].sum(dtype=float), rel=1e-6)


@pytest.mark.parametrize(
    "cost",
    [
        np.zeros(3),
        np.float64(1),
        np.zeros((2, 2), object),
        np.zeros((2, 2), complex),
        np.array([["a"]]),
        [[np.nan]],
        [[-np.inf]],
        [[np.inf, np.inf], [1.0, 2.0]],
    ],
)
def test_errors_are_scipys(cost):
    with pytest.raises((TypeError, ValueError)) as theirs:
        optimize.linear_sum_assignment(cost)
    with pytest.raises(type(theirs.value), match="^" + str(theirs.value).partition("(")[0]):
        linear_sum_assignment(cost)
