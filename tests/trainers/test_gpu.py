"""What only a CUDA device can show."""

import pytest
import torch
from accelerate.state import AcceleratorState
from test_loop import assert_same_run, trace

from integrations import checkpoint, loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_in_fp16_keeps_its_scaler_and_learns(make):
    options = ["--train.mixed_precision", "fp16", "--train.steps", "40", "--train.checkpoint_every", "20"]
    output = loop.train(make("ddim-digits", *options), progress=False)
    found = checkpoint.newest(output / "checkpoints")
    assert found.state["scaler"]["scale"] >= 1
    losses = [loss for _, loss, _, _ in trace(output) if loss is not None]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("name", ["flow-matching-digits", "stable-diffusion-digits"])
def test_an_interrupted_run_resumes_bit_for_bit_on_a_gpu(make, monkeypatch, name):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole = loop.train(make(name, folder="whole"), progress=False)
    inner = loop.Run.train_step

    def interrupted(self, blocks):
        if self.step == 5:
            raise KeyboardInterrupt
        return inner(self, blocks)

    monkeypatch.setattr(loop.Run, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(make(name), progress=False)
    monkeypatch.setattr(loop.Run, "train_step", inner)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_same_run(whole, loop.train(make(name, "--resume", "auto"), progress=False), 6)


def test_generated_code_follows_the_plain_network(make):
    plain = loop.train(make("flow-matching-digits", folder="plain"), progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    fast = loop.train(make("flow-matching-digits", "--train.compile", "true", folder="fast"), progress=False)
    for a, b in zip(trace(plain), trace(fast), strict=True):
        assert b[1] == pytest.approx(a[1], rel=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_copied_from_pinned_memory(make, workers):
    run = loop.Run(make("ddim-digits"))
    batch = next(run.pairs.batches(range(1), workers))
    assert batch.images.is_pinned()
    assert batch.labels.is_pinned()
