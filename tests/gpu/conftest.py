import gc
import threading
from pathlib import Path

import pytest
import torch

import couplings


def pytest_collection_modifyitems(items):
    """Every test of this folder is marked `gpu`, and skipped where there is no CUDA device."""
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_compiled():
    if torch.cuda.is_available():
        couplings.warmup()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "couplings-ahead":
            thread.join(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "couplings-ahead"]


@pytest.fixture
def device():
    return torch.device("cuda")
