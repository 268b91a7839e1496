"""The pairs that a step trains on: made behind the step before, and the same as if each step had made its own."""

import json
import threading
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from test_loop import assert_same_run, trace
from tiny_recipes import interrupted

from couplings import Coupling, couple, register
from couplings.assigners import registry
from integrations import config, loop, pairs
from integrations.build import build_coupling, build_objective, candidates
from integrations.data import load_source, to_signed
from integrations.randomness import Draws, epoch_order

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_thread_left_behind():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "couplings-ahead"]


def made_inline(recipe, steps):
    """The blocks of each step, one after another, as the text of the recipe says."""
    train, source = recipe.train, load_source(recipe.data)
    objective, coupling = build_objective(recipe, source), build_coupling(recipe)
    count, order = train.global_batch_size // train.batch_size_per_device, epoch_order(train.seed, 0, len(source))
    window, made = recipe.coupling.window, {}
    for start in range(0, steps, window):
        for block in range(count):
            data, noise, labels = [], [], []
            for step in range(start, start + window):
                draws = Draws(train.seed, step, block, count, CPU)
                first = step * train.global_batch_size + block * train.batch_size_per_device
                batch = source[order[first : first + train.batch_size_per_device].tolist()]
                data.append(objective.encode(to_signed(batch.images), draws))
                noise.append(draws.normal(candidates(coupling) * len(data[-1]), *data[-1].shape[1:]))
                labels.append(batch.labels)
            generator = Draws(train.seed, start, block, count, CPU).generator("coupling")
            condition = torch.cat(labels) if recipe.coupling.condition else None
            coupled = coupling(torch.cat(data), torch.cat(noise), condition=condition, generator=generator)
            for i, part in enumerate(coupled.noise.split(train.batch_size_per_device)):
                made[start + i, block] = data[i], part
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim-digits", []),
        ("stable-diffusion-digits", []),
        ("flow-matching-digits", ["--coupling.method", "sinkhorn"]),
        ("flow-matching-digits", ["--coupling.window", "3"]),
        ("flow-matching-digits", ["--coupling.window", "3", "--coupling.method", "nearest"]),
        ("ddim-digits", ["--coupling.window", "4", "--coupling.condition", "class", "--data.workers", "2"]),
    ],
)
def test_a_step_gets_the_pairs_that_it_would_have_made_itself(make, name, options):
    recipe = make(name, *options)
    expected = made_inline(recipe, 6)
    for step, found in enumerate(loop.Run(recipe).pairs.steps(0, 6)):
        for number, block in enumerate(found.blocks):
            data, noise = expected[step, number]
            assert block.draws.step == step
            assert torch.equal(block.data, data)
            assert torch.equal(block.noise, noise)


def test_the_pool_of_a_window_is_the_blocks_of_its_steps(make):
    def reduction(*options):
        AcceleratorState._reset_state(reset_partial_state=True)
        steps = list(loop.Run(make("ddim-digits", "--train.steps", "8", *options)).pairs.steps(0, 8))
        noises = torch.cat([block.noise for step in steps for block in step.blocks]).flatten(1)
        return torch.stack([step.reduction for step in steps]).mean(), sorted(noises.sum(1).tolist())

    (alone, drawn), (pooled, coupled) = reduction(), reduction("--coupling.window", "4")
    assert pooled > 1.2 * alone
    assert coupled == drawn  # the same noise, in other hands


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_run_resumes_bit_for_bit_inside_a_window(make, scope):
    options = ["--coupling.window", "4", "--coupling.scope", scope, "--train.steps", "7", "--train.keep_last", "9"]
    whole = loop.train(make("ddim-digits", *options, "--train.checkpoint_every", "1", folder="whole"), progress=False)
    further = [*options, "--train.checkpoint_every", "3", "--resume", "auto"]
    for step in (3, 6):
        with interrupted(step):
            loop.train(make("ddim-digits", *further), progress=False)
    assert_same_run(whole, loop.train(make("ddim-digits", *further), progress=False), 7)


def test_a_run_that_is_made_longer_goes_on_as_the_long_one(make):
    options = ["--coupling.window", "4", "--optimizer.schedule", "constant"]
    whole = loop.train(make("ddim-digits", *options, "--train.steps", "9", folder="whole"), progress=False)
    loop.train(make("ddim-digits", *options), progress=False)
    longer = loop.train(make("ddim-digits", *options, "--train.steps", "9", "--resume", "auto"), progress=False)
    assert trace(whole) == trace(longer)


@pytest.mark.parametrize(("part", "window", "surfaces"), [("load", 1, 4), ("couple", 1, 4), ("load", 3, 3)])
def test_an_error_surfaces_in_the_step_that_it_belongs_to(make, monkeypatch, part, window, surfaces):
    inner = getattr(pairs.Pairs, part)

    def failing(self, *arguments):
        step = arguments[1] if part == "load" else arguments[0][0].draws.step
        if step == 4:
            msg = "no such thing"
            raise LookupError(msg)
        return inner(self, *arguments)

    monkeypatch.setattr(pairs.Pairs, part, failing)
    recipe = make("ddim-digits", "--coupling.window", str(window))
    with pytest.raises(LookupError, match="no such thing"):
        loop.train(recipe, progress=False)
    assert [line[0] for line in trace(recipe.output)] == list(range(1, surfaces + 1))


@pytest.fixture
def slow_method(monkeypatch):
    monkeypatch.setattr(loop, "broken_promise", lambda coupling: None)  # it would couple often

    def slow(cost, *, generator=None):
        time.sleep(0.3)
        return torch.arange(len(cost))

    register("slow-identity", slow, marginal="permutation")
    yield "slow-identity"
    del registry._registry["slow-identity"]


def test_a_coupling_hides_behind_a_step_that_is_longer(make, monkeypatch, slow_method):
    inner = loop.Run.train_step
    blocks = ["--train.batch_size_per_device", "16", "--train.steps", "4", "--train.checkpoint_every", "9"]

    def times(patience, folder):
        monkeypatch.setattr(loop.Run, "train_step", lambda self, got: time.sleep(patience) or inner(self, got))
        AcceleratorState._reset_state(reset_partial_state=True)
        output = loop.train(
            make("ddim-digits", "--coupling.method", slow_method, *blocks, folder=folder), progress=False
        )
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

    def total(name, lines):
        return sum(line[name] for line in lines)

    first, *others = times(0.6, "hidden")
    assert first["coupling_ms"] >= 250  # nothing to hide behind
    assert first["hidden_ms"] < 30  # but for the start of a thread
    assert all(line["coupling_ms"] + line["hidden_ms"] >= 300 for line in others)
    assert total("coupling_ms", others) < total("hidden_ms", others) / 4
    _, *others = times(0.0, "waited")
    assert total("coupling_ms", others) > total("hidden_ms", others)
    assert all(line["coupling_ms"] <= line["step_ms"] for line in others)


def test_waiting_for_data_is_not_booked_as_coupling(make, monkeypatch):
    inner = pairs.Pairs.load
    monkeypatch.setattr(pairs.Pairs, "load", lambda *given: time.sleep(0.05) or inner(*given))
    output = loop.train(make("ddim-digits", "--coupling.method", "independent"), progress=False)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step_ms"] > 90
    assert sum(line["coupling_ms"] for line in lines) < sum(line["step_ms"] for line in lines) / 2


def test_leaving_early_ends_the_thread_and_the_loading_processes(make):
    import psutil

    others = set(psutil.Process().children())
    run = loop.Run(make("ddim-digits", "--data.workers", "2", "--train.steps", "100"))
    steps = run.pairs.steps(0, 100)
    next(steps)
    assert set(psutil.Process().children()) - others
    steps.close()
    assert not set(psutil.Process().children()) - others


def test_a_window_of_no_steps_is_refused():
    with pytest.raises(config.RecipeError, match=r"coupling.window: got 0, expected at least 1"):
        config.load(["ddim-digits", "--coupling.window", "0"])


def test_a_global_coupling_over_one_process_is_one_pool(make):
    recipe = make("ddim-digits", "--coupling.scope", "global", "--coupling.window", "2")
    steps = list(loop.Run(recipe).pairs.steps(0, 2))
    # Block by block, each of all steps: the order in which processes that share the blocks would bring them.
    blocks = [step.blocks[number] for number in range(2) for step in steps]
    data = torch.cat([block.data for block in blocks])
    drawn = torch.cat([block.draws.normal(*block.data.shape) for block in blocks])
    expected = couple(data, drawn).noise.split(8)
    assert all(torch.equal(block.noise, noise) for block, noise in zip(blocks, expected, strict=True))
    assert build_coupling(recipe) == Coupling("auction", scope="global")
