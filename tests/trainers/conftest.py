import multiprocessing

import pytest
from accelerate.state import AcceleratorState
from tiny_recipes import tiny


@pytest.fixture(autouse=True)
def _own_accelerator():
    """Accelerate keeps one state per process; a test starts without its predecessor's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make(tmp_path):
    return lambda name, *overrides, folder="run": tiny(name, tmp_path / folder, *overrides)


@pytest.fixture(scope="session")
def processes():
    """Processes that start in a moment: forked from one that has imported the trainers and run nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["integrations.loop"])
    return context
