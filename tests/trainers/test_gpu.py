"""What only a CUDA device can show of the trainers."""

import pytest
import torch
from accelerate.state import AcceleratorState
from test_loop import ICT, UNET, assert_same_run, trace
from tiny_recipes import TINY, first_block, interrupted

from couplings.ahead import _side_stream
from integrations import build, checkpoint, config, loop, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def make_unet(tmp_path):
    """Of convolutions, attention and dropout."""
    path = tmp_path / "unet.yaml"
    path.write_text(UNET)
    shrunk = [argument for field, value in TINY.items() for argument in (f"--{field}", value)]
    return lambda *further, folder="run": config.load(
        [str(path), *shrunk, "--output", str(tmp_path / folder), *further]
    )


def train(recipe):
    AcceleratorState._reset_state(reset_partial_state=True)
    return loop.train(recipe, progress=False)


def test_a_run_in_fp16_keeps_its_scaler_and_learns(make):
    options = ["--train.mixed_precision", "fp16", "--train.steps", "40", "--train.checkpoint_every", "20"]
    output = train(make("ddim-digits", *options))
    found = checkpoint.newest(output / "checkpoints")
    assert found.state["scaler"]["scale"] >= 1
    losses = [loss for _, loss, _, _ in trace(output) if loss is not None]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("name", ["flow-matching-digits", "stable-diffusion-digits"])
def test_bfloat16_follows_float32(make, name):
    exact = trace(train(make(name, folder="fp32")))
    rounded = trace(train(make(name, "--train.mixed_precision", "bf16", folder="bf16")))
    assert [line[1] for line in exact] != [line[1] for line in rounded]
    for a, b in zip(exact, rounded, strict=True):
        assert b[1] == pytest.approx(a[1], rel=0.03)
        assert b[2] == a[2]  # the pairs are made in float32


def interrupt_and_resume(whole, recipe, resumed):
    whole = train(whole)
    with interrupted(5):
        train(recipe)
    assert_same_run(whole, train(resumed), 6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flow-matching-digits", []),
        ("ddim-digits", ["--train.mixed_precision", "fp16"]),
        ("consistency-digits", []),
        ("consistency-digits", ICT),
        ("stable-diffusion-digits", []),
        ("stable-diffusion-digits", ["--train.mixed_precision", "bf16", "--coupling.window", "4"]),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(make, name, options):
    options = ["--train.deterministic", "true", *options]
    resumed = make(name, *options, "--resume", "auto")
    interrupt_and_resume(make(name, *options, folder="whole"), make(name, *options), resumed)


def test_a_unet_resumes_bit_for_bit(make_unet):
    options = ["--train.deterministic", "true", "--train.channels_last", "true", "--train.mixed_precision", "bf16"]
    resumed = make_unet(*options, "--resume", "auto")
    interrupt_and_resume(make_unet(*options, folder="whole"), make_unet(*options), resumed)


def test_the_same_bits_are_refused_once_cuda_has_started_without_the_setting(make, monkeypatch):
    torch.zeros(1, device="cuda")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(build.TrainingError, match="set CUBLAS_WORKSPACE_CONFIG=:4096:8 in front of the command"):
        train(make("ddim-digits", "--train.deterministic", "true"))


def test_generated_code_follows_the_plain_network_and_none_is_generated_for_sampling(make, monkeypatch):
    plain = train(make("flow-matching-digits", folder="plain"))
    finish, traced, stats = loop.Run.finish, [], torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(loop.Run, "finish", lambda self: traced.append(stats["unique_graphs"]) or finish(self))
    fast = train(make("flow-matching-digits", "--train.compile", "true", folder="fast"))
    assert stats["unique_graphs"] == traced[0] >= 1
    for a, b in zip(trace(plain), trace(fast), strict=True):
        assert b[1] == pytest.approx(a[1], rel=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_copied_from_pinned_memory(make, workers):
    run = loop.Run(make("ddim-digits"))
    batch = next(run.pairs.batches(range(1), workers))
    assert batch.images.is_pinned()
    assert batch.labels.is_pinned()


@pytest.mark.parametrize(
    ("name", "options"),
    [("flow-matching-digits", []), ("stable-diffusion-digits", []), ("ddim-digits", ["--coupling.window", "3"])],
)
def test_pairs_made_ahead_are_those_made_in_the_step(make, name, options):
    recipe = make(name, *options, "--train.deterministic", "true")
    run, size = loop.Run(recipe), recipe.coupling.window
    batches, expected = run.pairs.batches(range(6), 0), []
    for first in range(0, 6, size):
        expected += run.pairs.window(range(first, first + size), batches).steps
    wanted = [[(block.data.cpu(), block.noise.cpu()) for block in step.blocks] for step in expected]
    torch.cuda.synchronize()
    junk = torch.randn(1024, 1024, device="cuda")
    for step, kept in zip(run.pairs.steps(0, 6), wanted, strict=True):
        torch.cuda._sleep(20_000_000)  # the step is still at work when the next pairs are made
        found = [(block.data.clone(), block.noise.clone()) for block in step.blocks]
        del step  # its memory may be used again, but not before the copies are made
        junk = junk @ junk.T / 1024
        for (data, noise), (x, y) in zip(found, kept, strict=True):
            assert torch.equal(data.cpu(), x)
            assert torch.equal(noise.cpu(), y)


@pytest.mark.parametrize(
    "name", ["flow-matching-digits", "ddim-digits", "consistency-digits", "stable-diffusion-digits"]
)
def test_a_step_does_not_wait_for_the_device(make, name):
    options = ["--coupling.method", "independent", "--coupling.condition", "null"]
    run = loop.Run(make(name, *options, "--coupling.options.check_finite", "false"))
    run.start()
    steps = run.pairs.steps(0, 6)
    run.train_step(next(steps).blocks)
    run.train_step(next(steps).blocks)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in steps:
            run.train_step(step.blocks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 6


def test_tf32_rounds_products_and_its_absence_does_not(make):
    a, b = (torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(i)) for i in (0, 1))
    exact = a.double() @ b.double()
    errors = []
    for value in ("true", "false"):
        build.choose_arithmetic(make("ddim-digits", "--train.tf32", value).train)
        errors.append(((a @ b).double() - exact).norm() / exact.norm())
    assert errors[0] > 1e-4 > 1e-5 > errors[1]


def test_channels_last_reaches_the_convolutions(make_unet, monkeypatch):
    formats = []
    run = loop.Run(make_unet("--train.channels_last", "true"))
    for layer in run.bare_model.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels > 1:
            layer.register_forward_hook(lambda layer, _, out: formats.append(out))
    run.train_step(next(run.pairs.steps(0, 1)).blocks)
    assert formats
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in formats if min(out.shape) > 1)


def test_samples_in_fp16_follow_those_in_float32(make):
    output = train(make("ddim-digits", "--train.mixed_precision", "fp16"))
    exact, rounded = (
        torch.cat(list(measure.draw(measure.load_trained(output, ["--evaluate.mixed_precision", asked]), 16, 2)))
        for asked in ("no", "fp16")
    )
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)


def test_pairs_come_from_the_one_stream_of_background_work(make):
    run = loop.Run(make("ddim-digits"))
    own = _side_stream(torch.cuda.current_stream(run.device).device)
    assert own != torch.cuda.current_stream()
    seen, load = [], run.pairs.load
    run.pairs.load = lambda *given: seen.append(torch.cuda.current_stream()) or load(*given)
    assert len(list(run.pairs.steps(0, 4))) == 4
    assert set(seen) == {own}
    assert first_block(run).data.is_cuda
