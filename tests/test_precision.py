"""Costs are computed in full float32, whatever precision the process has chosen for its own products."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from couplings import couple
from couplings.distances import full_float32


@pytest.fixture(params=["high", "medium"])
def reduced(request):
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(saved)


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_a_reduced_precision_is_off_inside_and_back_afterwards(reduced):
    chosen, seen = precision(), []

    def method(cost, *, generator=None):
        seen.append(precision())
        return torch.arange(len(cost))

    couple(torch.randn(4, 3), torch.randn(4, 3), method)
    assert seen[0] in ("ieee", "none")
    assert precision() == chosen
    with pytest.raises(ZeroDivisionError):
        couple(torch.randn(4, 3), torch.randn(4, 3), lambda cost: 1 // 0)
    assert precision() == chosen
    assert torch.get_float32_matmul_precision() == reduced


@pytest.mark.parametrize("reduced", ["medium"], indirect=True)
def test_a_thread_that_leaves_does_not_reduce_the_precision_of_another(reduced):
    chosen, entered, left = precision(), threading.Event(), threading.Event()
    assert chosen == "bf16"
    device = torch.device("cpu")

    def second():
        with full_float32(device):
            entered.set()
            assert left.wait(5)
            return precision()

    with ThreadPoolExecutor(1) as pool:
        with full_float32(device):
            future = pool.submit(second)
            assert entered.wait(5)
        left.set()
        assert future.result() == "ieee"
    assert precision() == chosen
