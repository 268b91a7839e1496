import multiprocessing
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_recipes import tiny

# Read when CUDA starts: for runs that are to give the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate and PyTorch keep settings per process; a test starts without its predecessor's."""
    backends = ((torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"))
    backends += ((torch.backends.cudnn, "benchmark"), (torch.utils.deterministic, "fill_uninitialized_memory"))
    settings = [(place, name, getattr(place, name)) for place, name in backends]
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    for place, name, value in settings:
        setattr(place, name, value)


@pytest.fixture
def make(tmp_path):
    return lambda name, *overrides, folder="run": tiny(name, tmp_path / folder, *overrides)


@pytest.fixture(scope="session")
def processes():
    """Processes that start in a moment: forked from one that has loaded what a training needs, and run none yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainers.warm"])
    return context
