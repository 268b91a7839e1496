"""Bundled recipes, shrunk to run in a second.

In a module of its own, not in ``conftest``: a forked test process looks for names by module, and there are several
modules of that name.
"""

from contextlib import contextmanager
from functools import cache

import pytest

from integrations import config, loop

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


@contextmanager
def interrupted(at):
    """Within, a training is interrupted before its step ``at``, counted from 0."""
    inner = loop.Run.train_step

    def train_step(self, blocks):
        if self.step == at:
            raise KeyboardInterrupt
        return inner(self, blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            yield


def first_block(run):
    """The first block of a run, unpaired."""
    return run.pairs.load(next(run.pairs.batches(range(1), 0)), 0, 0)


@cache
def shrunk(name):
    """Overrides that make a bundled recipe run in a second."""
    options = {**TINY, **TINY_MODELS[config.load([name]).model.name]}
    return [argument for field, value in options.items() for argument in (f"--{field}", value)]


def tiny(name, output, *overrides):
    """A bundled recipe shrunk to run in a second."""
    return config.load([name, *shrunk(name), "--output", str(output), *overrides])
