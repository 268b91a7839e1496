import multiprocessing

import pytest
from accelerate.state import AcceleratorState

from integrations import config

TINY = {
    "train.steps": "6",
    "train.global_batch_size": "16",
    "train.batch_size_per_device": "8",
    "train.log_every": "1",
    "train.checkpoint_every": "2",
    "train.tracker": "null",
    "evaluate.steps": "[2]",
    "evaluate.samples": "16",
}
TINY_MODELS = {
    "mlp": {"model.width": "16", "model.depth": "1"},
    "condition_unet": {"model.channels": "[8, 16]", "model.norm_groups": "4"},
}


def tiny(name, output, *overrides):
    """A bundled recipe shrunk to run in a second."""
    options = {**TINY, **TINY_MODELS[config.load([name]).model.name]}
    shrunk = [argument for field, value in options.items() for argument in (f"--{field}", value)]
    return config.load([name, *shrunk, "--output", str(output), *overrides])


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
