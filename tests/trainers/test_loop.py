import contextlib
import json
import logging
import os
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_recipes import TINY, first_block, interrupted, tiny

import couplings
from couplings import couple
from couplings.assigners import registry
from integrations import build, checkpoint, config, loop, pairs, places, termination
from integrations.build import build_objective, build_optimizer, build_schedule
from integrations.data import ArrayImages, load_source, to_signed
from integrations.ddim import DdimObjective
from integrations.models import build_model
from integrations.randomness import Draws, address, epoch_order
from integrations.train import _tell_how_to_go_on, main

RECIPES = ["ddim-digits", "flow-matching-digits", "consistency-digits", "stable-diffusion-digits"]


def trace(folder):
    """What must not depend on interruptions: every logged number that is not a time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["reduction"], line["lr"]) for line in lines]


def weights(folder, step):
    found = checkpoint.read(folder / "checkpoints" / f"step-{step}")
    groups = [name.removesuffix(".safetensors") for name in found.state["files"] if name.endswith(".safetensors")]
    return {f"{group}.{name}": value for group in groups for name, value in found.tensors(group).items()}


def assert_same_run(first, second, step):
    assert trace(first) == trace(second)
    a, b = weights(first, step), weights(second, step)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def run_in_child(recipe, patience=0.0, limit=None):
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if patience:
        inner = loop.Run.train_step

        def slow(self, blocks):
            time.sleep(patience)
            return inner(self, blocks)

        loop.Run.train_step = slow
    try:
        loop.train(recipe, progress=False)
    except checkpoint.CheckpointError:
        os._exit(3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_writes_what_its_readers_expect(make, name):
    recipe = make(name)
    output = loop.train(recipe, progress=False)
    assert config.load([str(output / "recipe.yaml")]).sections() == recipe.sections()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "reduction", "coupling_ms", "hidden_ms", "step_ms"} <= line.keys() for line in lines)
    assert all(line["reduction"] > 0 for line in lines)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert (output / "samples" / "step-6.png").is_file()
    assert (output / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("name", [*RECIPES, "class-conditional-digits"])
def test_independent_coupling_gives_the_loss_trace_of_a_loop_without_coupling(make, name):
    recipe = make(name, "--coupling.method", "independent", "--optimizer.clip", "null")
    output = loop.train(recipe, progress=False)

    source = load_source(recipe.data)
    torch.manual_seed(address(recipe.train.seed, 0, 0, 1, "network"))
    objective = build_objective(recipe, source)
    model = build_model(recipe.model, objective)
    objective.attach(model)
    optimizer = build_optimizer(recipe.optimizer, model)
    learning_rate = build_schedule(recipe, optimizer)
    order = epoch_order(recipe.train.seed, 0, len(source))
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        parts = []
        for block in range(2):
            draws = Draws(recipe.train.seed, step, block, 2, torch.device("cpu"))
            rows = order[16 * step + 8 * block : 16 * step + 8 * block + 8]
            batch = source[rows.tolist()]
            data = objective.encode(to_signed(batch.images), draws)
            context = objective.tell(objective.told(batch.labels, batch.texts, draws))
            loss = objective.loss(model, data, draws.normal(*data.shape), draws, **context).mean()
            (loss / 2).backward()
            parts.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model, step + 1)
        losses.append(torch.stack(parts).mean().item())
    assert [line[1] for line in trace(output)] == losses


UNET = """
objective: {name: ddim}
model: {name: unet, channels: [8, 16], attention: [false, true], layers_per_block: 1, norm_groups: 4, dropout: 0.5}
"""


def test_dropout_is_the_same_in_a_resumed_run_and_differs_between_steps(tmp_path, monkeypatch):
    path = tmp_path / "unet.yaml"
    path.write_text(UNET)
    options = {**TINY, "train.checkpoint_every": "1", "train.steps": "3", "train.keep_last": "9"}

    def recipe(folder, *further):
        shrunk = [argument for field, value in options.items() for argument in (f"--{field}", value)]
        return config.load([str(path), *shrunk, "--output", str(tmp_path / folder), *further])

    whole = loop.train(recipe("whole"), progress=False)
    loop.train(recipe("resumed"), progress=False)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-3")
    torch.manual_seed(123)
    resumed = loop.train(recipe("resumed", "--resume", "auto"), progress=False)
    assert_same_run(whole, resumed, 3)

    run = loop.Run(recipe("masks"))
    masks = []
    drop = torch.nn.functional.dropout
    monkeypatch.setattr(
        "torch.nn.functional.dropout", lambda x, *args, **kwargs: masks.append(drop(torch.ones(64), 0.5)) or x
    )
    for step in run.pairs.steps(0, 2):
        run.train_step(step.blocks)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) >= 4


def test_a_resumed_run_keeps_its_weights_and_moments_in_memory_as_asked_for(tmp_path):
    path = tmp_path / "unet.yaml"
    path.write_text(UNET)
    options = {**TINY, "train.channels_last": "true", "train.deterministic": "true", "train.steps": "3"}

    def recipe(folder, *further):
        shrunk = [argument for field, value in options.items() for argument in (f"--{field}", value)]
        return config.load([str(path), *shrunk, "--output", str(tmp_path / folder), *further])

    whole = loop.train(recipe("whole"), progress=False)
    resumed = loop.train(recipe("resumed"), progress=False)
    shutil.rmtree(resumed / "checkpoints" / "step-3")
    assert_same_run(whole, loop.train(recipe("resumed", "--resume", "auto"), progress=False), 3)

    run = loop.Run(recipe("resumed", "--resume", "auto"))
    run.start()
    run.optimizer.zero_grad()
    convolutions = [weight for weight in run.weights if weight.ndim == 4 and min(weight.shape) > 1]
    assert convolutions
    for weight in convolutions:
        for kept in (weight, run.optimizer.state[weight]["exp_avg"]):
            assert kept.is_contiguous(memory_format=torch.channels_last)
            assert not kept.is_contiguous()


@pytest.mark.parametrize(
    ("started", "value", "message"),
    [(True, None, "CUDA has started without it"), (False, ":0:0", "it is ':0:0'"), (True, ":16:8", None)],
)
def test_the_same_bits_need_a_setting_before_cuda_starts(make, monkeypatch, started, value, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if value:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    train = make("ddim-digits", "--train.deterministic", "true").train
    if message is None:
        build.choose_arithmetic(train)
        assert torch.are_deterministic_algorithms_enabled()
        return
    with pytest.raises(loop.TrainingError, match=f"{message}: set CUBLAS_WORKSPACE_CONFIG=:4096:8 in front"):
        build.choose_arithmetic(train)


def test_fields_of_arithmetic_take_effect_and_contradictions_are_refused(make):
    build.choose_arithmetic(make("ddim-digits", "--train.tf32", "true", "--train.cudnn_benchmark", "true").train)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark
    build.choose_arithmetic(make("ddim-digits", "--train.tf32", "false").train)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    with pytest.raises(config.RecipeError, match=r"train.cudnn_benchmark: got True, expected false with train.determ"):
        make("ddim-digits", "--train.deterministic", "true", "--train.cudnn_benchmark", "true")


def test_an_operation_that_cannot_repeat_itself_says_what_to_type(make, monkeypatch):
    def refused(self, blocks):
        msg = "some_kernel does not have a deterministic implementation, but you set 'torch.use_deterministic_algor'"
        raise RuntimeError(msg)

    monkeypatch.setattr(loop.Run, "train_step", refused)
    message = r"some_kernel does not have a deterministic implementation: train with --train.deterministic false"
    with pytest.raises(loop.TrainingError, match=message):
        loop.train(make("ddim-digits", "--train.deterministic", "true"), progress=False)


ICT = ["--objective.variant", "ict", "--objective.loss", "pseudo_huber"]
INTERRUPTED = [*((name, []) for name in [*RECIPES, "class-conditional-digits"]), ("consistency-digits", ICT)]


@pytest.mark.parametrize(("name", "options"), INTERRUPTED)
def test_an_interrupted_run_resumes_bit_for_bit(make, name, options):
    whole = loop.train(make(name, *options, folder="whole"), progress=False)
    with interrupted(5):
        loop.train(make(name, *options), progress=False)
    output = loop.train(make(name, *options, "--resume", "auto"), progress=False)
    assert_same_run(whole, output, 6)


@pytest.mark.parametrize(("name", "options"), [("flow-matching-digits", []), ("consistency-digits", ICT)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, processes, name, options):
    options = [*options, "--train.steps", "24", "--train.checkpoint_every", "3", "--train.sample_every", "5"]
    whole = tiny(name, tmp_path / "whole", *options)
    child = processes.Process(target=run_in_child, args=(whole,))
    child.start()
    child.join()
    assert child.exitcode == 0

    generator = torch.Generator().manual_seed(0)
    recipe = tiny(name, tmp_path / "killed", *options, "--resume", "auto")
    kills = 0
    for _ in range(12):
        child = processes.Process(target=run_in_child, args=(recipe, 0.05 if kills < 4 else 0.0))
        child.start()
        # Some die while they start, some in a step, some while they write.
        child.join(0.3 + 0.8 * torch.rand((), generator=generator).item() if kills < 4 else None)
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
    assert child.exitcode == 0
    assert kills >= 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 24)


def test_resuming_a_finished_run_changes_nothing(make):
    loop.train(make("ddim-digits"), progress=False)
    output = loop.train(make("ddim-digits", "--resume", "auto"), progress=False)
    assert len(trace(output)) == 6


def test_a_run_is_not_overwritten(make):
    loop.train(make("ddim-digits"), progress=False)
    with pytest.raises(config.RecipeError, match="--resume auto"):
        loop.train(make("ddim-digits"), progress=False)


def test_a_damaged_state_of_a_checkpoint_is_refused_in_one_line(tmp_path):
    folder = checkpoint.save(tmp_path, 7, {"model": {"w": torch.ones(2)}}, {"number": 4}, {})
    document = folder / "state.json"
    whole = document.read_bytes()
    assert checkpoint.read(folder).state["number"] == 4
    no_state = [b"[]", b"3", b'{"files": []}', b'{"step": 7, "files": {"model": 3}}', b"\xff", b""]
    for damaged in (
        whole.replace(b'"number": 4', b'"number": 5'),
        whole.replace(b'"step": 7', b'"step": 6'),
        *no_state,
    ):
        document.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match=r"^[^\n]*(incomplete|checksum)[^\n]*$"):
            checkpoint.read(folder)
    older = json.loads(whole)
    del older["checksum"]
    document.write_text(json.dumps(older))
    assert checkpoint.read(folder).step == 7


def test_a_run_is_not_resumed_as_another_one(make):
    loop.train(make("ddim-digits"), progress=False)
    other = [
        "--train.seed",
        "3",
        "--model.width",
        "8",
        "--objective.prediction",
        "epsilon",
        "--optimizer.name",
        "adamw",
    ]
    began = r"began with objective.prediction 'v_prediction', not 'epsilon'; model.width 16, not 8; "
    with pytest.raises(loop.TrainingError, match=began + r"optimizer.name 'adam', not 'adamw'; train.seed 0, not 3: "):
        loop.train(make("ddim-digits", "--resume", "auto", *other), progress=False)


def test_a_run_goes_on_with_what_cannot_break_it(make, caplog):
    loop.train(make("ddim-digits", "--optimizer.weight_decay", "0.1"), progress=False)
    changes = {"optimizer.lr": "0.5", "optimizer.betas": "[0.5, 0.6]", "optimizer.warmup_steps": "0"}
    changes |= {"optimizer.schedule": "constant", "train.mixed_precision": "bf16", "train.steps": "8"}
    changes |= {"train.checkpoint_every": "1", "data.workers": "1", "objective.eta": "0.5"}
    options = [argument for field, value in changes.items() for argument in (f"--{field}", value)]
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    output = loop.train(make("ddim-digits", "--resume", "auto", *options), progress=False)
    assert [step for step, *_ in trace(output)] == list(range(1, 9))
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["lr"] == 0.5
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("resumed")]
    assert {line.split()[2] for line in said} == {*changes, "optimizer.weight_decay"}
    assert "resumed with optimizer.lr 0.5 instead of 0.001" in said
    [group] = checkpoint.newest(output / "checkpoints").state["optimizer"]["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ([0.5, 0.6], 0.0)


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing"])
def test_a_torn_checkpoint_is_passed_over_with_a_message(make, caplog, damage):
    whole = loop.train(make("ddim-digits", folder="whole"), progress=False)
    output = loop.train(make("ddim-digits"), progress=False)
    victim = output / "checkpoints" / "step-6" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[:-100])
    elif damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    assert checkpoint.newest(output / "checkpoints").step == 4
    assert "step-6" in caplog.text
    loop.train(make("ddim-digits", "--resume", "auto"), progress=False)
    assert_same_run(whole, output, 6)


def main_in_child(arguments):
    os.setsid()
    torch.set_num_threads(1)
    # Seconds between two looks of a loading process for its parent.
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2
    main(arguments)


@pytest.fixture
def job(tmp_path, processes):
    """A training process in its second step or later, with two that load its data, in a session of their own."""
    recipe = tiny("ddim-digits", tmp_path, "--train.steps", "100000", "--train.checkpoint_every", "100000")
    (tmp_path / "recipe.yaml").write_text(recipe.text())
    trainer = processes.Process(target=main_in_child, args=([str(tmp_path / "recipe.yaml"), "--data.workers", "2"],))
    trainer.start()
    wait_for_step(1, trainer, tmp_path)
    yield trainer
    for process in session(trainer):
        process.kill()


def wait_for_step(step, trainer, folder):
    while not (folder / "metrics.jsonl").exists() or len(trace(folder)) < step:
        assert trainer.is_alive()
        time.sleep(0.05)


def session(trainer):
    """Every living process of a job, also those whose parent is gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == trainer.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["every process", "training process"])
def test_sigterm_to_a_job_saves_and_exits_0(job, tmp_path, send):
    send(job.pid, signal.SIGTERM)
    job.join(60)
    assert job.exitcode == 0
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    assert 0 < step < 100_000
    assert trace(tmp_path)[-1][0] == step
    assert not (tmp_path / "pipeline").exists()
    assert not session(job)


def test_what_loading_processes_can_no_longer_bring_is_loaded_for_the_last_step(make):
    run, whole = (loop.Run(make("ddim-digits", "--data.workers", "2", folder=name)) for name in ("ended", "whole"))
    expected, others = list(whole.pairs.steps(0, 6)), set(psutil.Process().children())
    with termination.collected() as terminated:
        steps = run.pairs.steps(0, 6, terminated)
        found = [next(steps)]
        os.kill(os.getpid(), signal.SIGTERM)
        for worker in set(psutil.Process().children()) - others:
            worker.kill()
        found += steps
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x.noise, y.noise) for x, y in zip(a.blocks, b.blocks, strict=True))


def test_a_run_that_was_asked_to_end_says_what_it_saved_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    argv = [str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    (tmp_path / "recipe.yaml").write_text(tiny("ddim-digits", tmp_path).text())
    inner = loop.Run.train_step

    def interrupted(self, blocks):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", interrupted)
        main(argv)
    saved, line = capsys.readouterr().out.splitlines()[-2:]
    assert saved.startswith(f"Ended by SIGTERM at step 3 of 6, saved in {tmp_path}/run/checkpoints/step-3. Go on with")
    resumed = [*argv, "--resume", "auto"]
    assert shlex.split(line) == ["python", "-m", "integrations.train", *resumed]
    with monkeypatch.context() as patch:  # only the launcher knows the rest of its line; the first process speaks
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        _tell_how_to_go_on(config.load(resumed), resumed)
        said = capsys.readouterr().out
        assert "Launch as before, with\n" in said
        assert shlex.split(said.splitlines()[-1]) == ["-m", "integrations.train", *resumed]
        patch.setenv("RANK", "1")
        _tell_how_to_go_on(config.load(resumed), resumed)
        assert not capsys.readouterr().out
    main(resumed)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 6
    assert "Ended" not in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["training", "loading"])
def test_a_job_that_loses_a_process_leaves_none_behind(job, victim):
    loading = [process for process in session(job) if process.pid != job.pid]
    assert len(loading) == 2
    (job if victim == "training" else loading[0]).kill()
    job.join(30)
    assert job.exitcode == (-signal.SIGKILL if victim == "training" else 1)
    psutil.wait_procs(loading, timeout=10)
    assert not session(job)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(make, monkeypatch):
    recipe = make("ddim-digits", "--train.log_every", "100")
    inner = pairs.Pairs.load

    def poisoned(self, batch, step, number):
        found = inner(self, batch, step, number)
        return replace(found, data=found.data * (torch.nan if step == 4 else 1.0))

    monkeypatch.setattr(pairs.Pairs, "load", poisoned)
    monkeypatch.setattr(pairs.Pairs, "couple", lambda self, blocks: (blocks, torch.zeros(())))
    with pytest.raises(loop.TrainingError, match=r"not finite at step 5.*step 4 is intact"):
        loop.train(recipe, progress=False)
    assert checkpoint.newest(recipe.output / "checkpoints").step == 4


def test_data_that_is_not_finite_ends_the_run_where_it_is_coupled(make, monkeypatch):
    inner = pairs.Pairs.load

    def poisoned(self, batch, step, number):
        found = inner(self, batch, step, number)
        return replace(found, data=found.data * (torch.nan if step == 4 else 1.0))

    monkeypatch.setattr(pairs.Pairs, "load", poisoned)
    recipe = make("ddim-digits")
    with pytest.raises(loop.TrainingError, match=r"the data of step 5 cannot be coupled: data contains NaN"):
        loop.train(recipe, progress=False)
    assert checkpoint.newest(recipe.output / "checkpoints").step == 4


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4764"),
        torch.distributed.DistBackendError("NCCL communicator was aborted\nConnection closed by peer"),
    ],
)
def test_a_process_that_has_died_is_said_in_one_line_by_the_others(make, monkeypatch, error):
    def lost(self, blocks):
        raise error

    monkeypatch.setattr(loop.Run, "train_step", lost)
    said = r"another process of the run has died.*--resume auto \(.*Connection closed by peer"
    with pytest.raises(loop.TrainingError, match=said):
        loop.train(make("ddim-digits"), progress=False)


def test_a_full_disk_is_a_clear_error_and_keeps_the_last_checkpoint(tmp_path, processes):
    recipe = tiny("ddim-digits", tmp_path, "--train.steps", "2")
    child = processes.Process(target=run_in_child, args=(recipe,))
    child.start()
    child.join()
    recipe = tiny("ddim-digits", tmp_path, "--train.steps", "4", "--resume", "auto")
    child = processes.Process(target=run_in_child, args=(recipe, 0.0, 10_000))
    child.start()
    child.join()
    assert child.exitcode == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert checkpoint.newest(tmp_path / "checkpoints").step == 2


def test_a_full_disk_beside_the_checkpoints_is_a_clear_error_too(make, capsys):
    recipe = make("ddim-digits")
    (recipe.output / "samples").mkdir(parents=True)
    (recipe.output / "samples" / "step-6.png").symlink_to("/dev/full")
    (recipe.output / "given.yaml").write_text(recipe.text())
    with pytest.raises(SystemExit) as end:
        main([str(recipe.output / "given.yaml")])
    assert end.value.code == 1
    assert "No space left on device; checkpoints are intact" in capsys.readouterr().err
    assert checkpoint.newest(recipe.output / "checkpoints").step == 6


def test_a_folder_that_is_removed_while_a_run_is_in_it_is_a_clear_error(make, monkeypatch, capsys):
    recipe = make("ddim-digits")
    recipe.output.mkdir()
    (recipe.output / "given.yaml").write_text(recipe.text())
    finish = loop.Run.finish
    monkeypatch.setattr(loop.Run, "finish", lambda run: (finish(run), shutil.rmtree(recipe.output)))
    with pytest.raises(SystemExit) as end:
        main([str(recipe.output / "given.yaml")])
    assert end.value.code == 1
    assert "was emptied or removed while the run was in it" in capsys.readouterr().err


def test_a_disk_that_is_full_when_the_pipeline_is_written_is_a_clear_error_too(make, monkeypatch):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def export(*_):
        raise full

    recipe = make("ddim-digits")
    monkeypatch.setattr(DdimObjective, "export", export)
    with pytest.raises(loop.TrainingError, match=f"cannot read or write {recipe.output}: .*No space.*are intact"):
        loop.train(recipe, progress=False)


class Overflowing(torch.amp.GradScaler):
    """The scaler of fp16, on a CPU, where nothing else overflows."""

    start = 2.0**127

    def __init__(self):
        super().__init__("cpu", init_scale=self.start)


def test_steps_that_overflow_are_skipped_and_a_run_that_always_does_is_ended(make, monkeypatch):
    inner = build.Accelerator.__init__

    def scaled(self, **options):
        inner(self, **options)
        self.scaler = Overflowing()

    inner_load, factor = pairs.Pairs.load, 3000.0

    def stretched(self, batch, step, number):
        found = inner_load(self, batch, step, number)
        return replace(found, data=factor * found.data)

    monkeypatch.setattr(build.Accelerator, "__init__", scaled)
    monkeypatch.setattr(pairs.Pairs, "load", stretched)
    options = ["ddim-digits", "--optimizer.clip", "null", "--train.steps", "12"]
    output = loop.train(make(*options, folder="skipping"), progress=False)
    found = checkpoint.newest(output / "checkpoints")
    assert 1 < found.state["scaler"]["scale"] < 2.0**127
    assert all(value.isfinite().all() for value in found.tensors("model").values())
    shutil.rmtree(output / "checkpoints" / "step-12")
    before = weights(output, 10)
    AcceleratorState._reset_state(reset_partial_state=True)
    loop.train(make(*options, "--resume", "auto", folder="skipping"), progress=False)
    resumed = checkpoint.newest(output / "checkpoints")
    assert resumed.state["scaler"] == found.state["scaler"]
    assert any(not torch.equal(before[name], value) for name, value in weights(output, 12).items())

    monkeypatch.setattr(Overflowing, "start", 4.0)
    factor = torch.nan
    monkeypatch.setattr(pairs.Pairs, "couple", lambda self, blocks: (blocks, torch.zeros(())))
    with pytest.raises(loop.TrainingError, match="not finite at step 3"):
        loop.train(make(*options, folder="hopeless"), progress=False)
    lines = (make(*options, folder="hopeless").output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [None, None]


def test_classes_cannot_be_asked_of_data_without_labels(make, monkeypatch):
    bare = ArrayImages(np.zeros((20, 1, 8, 8), np.uint8), np.zeros(20), [""])
    monkeypatch.setattr(loop, "load_source", lambda _: bare)
    with pytest.raises(config.RecipeError, match=r"condition: got 'class', expected null: digits has no labels"):
        loop.Run(make("ddim-digits", "--coupling.condition", "class"))
    options = ["--coupling.condition", "null", "--objective.caption", "class"]
    with pytest.raises(config.RecipeError, match=r"objective.caption: got 'class'"):
        loop.Run(make("stable-diffusion-digits", *options))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(make):
    with pytest.raises(config.RecipeError, match=r"train.tracker: got 'wandb', .* pip install wandb"):
        loop.Run(make("ddim-digits", "--train.tracker", "wandb"))


def test_the_target_is_the_noise_that_was_mixed_and_labels_stay_with_their_data(make):
    recipe = make("ddim-digits", "--coupling.condition", "class", "--objective.prediction", "epsilon")
    run = loop.Run(recipe)
    [block], reduction = run.pairs.couple([first_block(run)])
    assert reduction > 0
    rows = epoch_order(recipe.train.seed, 0, len(run.source))[:8].tolist()
    expected = run.source[rows]
    torch.testing.assert_close(block.data, to_signed(expected.images), rtol=0, atol=0)
    torch.testing.assert_close(block.labels, expected.labels, rtol=0, atol=0)
    drawn = block.draws.normal(*block.data.shape)
    again = couple(block.data, drawn, condition=expected.labels)
    torch.testing.assert_close(block.noise, again.noise, rtol=0, atol=0)
    for label in expected.labels.unique():
        members = expected.labels == label
        assert set(block.noise[members].flatten().tolist()) == set(drawn[members].flatten().tolist())


def rank(recipe, rank, world, port):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    set_seed(0)  # the same on every rank, as scripts do: their noise differs nevertheless
    loop.train(recipe, progress=False)
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_with_two_processes(recipe, processes, target=rank):
    port = free_port()
    children = [processes.Process(target=target, args=(recipe, i, 2, port)) for i in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]


KEPT = ["--data.latents", "cache", "--data.subset_fraction", "0.1"]
DDP = ["--train.ddp.bucket_cap_mb", "1", "--train.ddp.broadcast_buffers", "false"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("class-conditional-digits", ["--coupling.method", "independent", "--data.flip", "true"]),
        ("flow-matching-digits", ["--coupling.scope", "global", "--train.further_ema_decays", "[0.5]"]),
        ("flow-matching-digits", ["--coupling.scope", "global", "--coupling.window", "3", *DDP]),
        ("consistency-digits", ["--coupling.scope", "global", "--optimizer.lr", "1e-4"]),
        ("stable-diffusion-digits", [*KEPT, "--data.flip", "true"]),
    ],
)
def test_two_processes_train_as_one(tmp_path, processes, name, options):
    # One process accumulates four blocks, each of two accumulates two.
    options = ["--train.steps", "5", "--train.global_batch_size", "32", *options]
    loop.train(tiny(name, tmp_path / "one", *options), progress=False)
    train_with_two_processes(tiny(name, tmp_path / "two", *options), processes)
    for a, b in zip(trace(tmp_path / "one"), trace(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    a, b = weights(tmp_path / "one", 5), weights(tmp_path / "two", 5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5, msg=name)


def test_two_processes_in_bfloat16_follow_one_in_float32_within_two_percent(tmp_path, processes):
    options = ["--train.steps", "5", "--train.global_batch_size", "32", "--coupling.scope", "global"]
    loop.train(tiny("ddim-digits", tmp_path / "one", *options), progress=False)
    rounded = tiny("ddim-digits", tmp_path / "two", *options, "--train.mixed_precision", "bf16")
    train_with_two_processes(rounded, processes)
    exact, approximate = ([loss for _, loss, *_ in trace(tmp_path / name)] for name in ("one", "two"))
    assert approximate == pytest.approx(exact, rel=0.02)
    assert approximate != exact


def rank_with_a_log(recipe, number, *place):
    logging.basicConfig(filename=recipe.output.parent / f"rank-{number}.log", level=logging.WARNING)
    logging.warning("begun")
    rank(recipe, number, *place)


def test_processes_warm_up_with_noise_of_their_own(tmp_path, processes):
    recipe = tiny("flow-matching-digits", tmp_path / "run", "--coupling.scope", "global", "--train.steps", "1")
    train_with_two_processes(recipe, processes, rank_with_a_log)
    for number in range(2):
        said = (tmp_path / f"rank-{number}.log").read_text()
        assert "begun" in said
        assert "hold the same noise" not in said


def test_sigterm_to_one_of_two_processes_ends_both_after_the_same_step(tmp_path, processes):
    options = ["--train.steps", "100000", "--train.checkpoint_every", "100000", "--coupling.scope", "global"]
    recipe = tiny("ddim-digits", tmp_path, *options)
    port = free_port()
    children = [processes.Process(target=rank, args=(recipe, i, 2, port)) for i in range(2)]
    for child in children:
        child.start()
    wait_for_step(1, children[0], tmp_path)
    os.kill(children[1].pid, signal.SIGTERM)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert checkpoint.steps(tmp_path / "checkpoints") == [trace(tmp_path)[-1][0]]


def test_processes_that_do_not_know_of_each_other_are_refused(make, monkeypatch):
    Accelerator(cpu=True)  # believes to be alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(loop.TrainingError, match=r"WORLD_SIZE is 2, but MASTER_ADDR.*accelerate launch"):
        loop.Run(make("ddim-digits"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(loop.TrainingError, match="started 2 processes, but accelerate sees 1"):
        loop.Run(make("ddim-digits"))


def test_blocks_that_do_not_divide_among_the_processes_are_refused_with_the_arithmetic(make):
    with pytest.raises(config.RecipeError, match=r"2 blocks .* 3 processes \(2 / 3 = 0.67\)"):
        places.divide(make("ddim-digits"), 3)


@pytest.mark.parametrize("moment", ["is_dir", "exists"])
def test_a_folder_that_another_process_makes_meanwhile_is_no_mistake(make, monkeypatch, moment):
    asked, exists = getattr(Path, moment), Path.exists

    def answered(path, *arguments, **options):
        answer = asked(path, *arguments, **options)
        if not exists(recipe.output):
            recipe.output.mkdir(parents=True)
        return answer

    recipe = make("ddim-digits")
    assert not recipe.output.exists()
    monkeypatch.setattr(Path, moment, answered)
    places.check_output(recipe)


def test_no_two_blocks_share_random_numbers():
    seeds = {
        address(0, step, block, 4, purpose)
        for step in range(200)
        for block in range(4)
        for purpose in ("augment", "noise", "time", "network")
    }
    assert len(seeds) == 200 * 4 * 4
    assert address(0, 1, 0, 4, "noise") != address(1, 1, 0, 4, "noise")


def test_every_epoch_visits_every_row_once_in_another_order():
    first, second = epoch_order(0, 0, 100), epoch_order(0, 1, 100)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()


def test_the_averages_follow_the_ramp(make):
    recipe = make("ddim-digits", "--train.steps", "1", "--train.checkpoint_every", "1")
    run = loop.Run(recipe)
    before = {name: value.detach().clone() for name, value in run.bare_model.named_parameters()}
    output = loop.train(make("ddim-digits", "--train.steps", "1"), progress=False)
    folder = output / "checkpoints" / "step-1"
    after, averaged = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    for name, start in before.items():
        torch.testing.assert_close(averaged[name], start * 2 / 11 + after[name] * 9 / 11)


def test_data_loaded_by_workers_is_the_same_run(make):
    one = loop.train(make("ddim-digits", folder="one"), progress=False)
    two = loop.train(make("ddim-digits", "--data.workers", "2", folder="two"), progress=False)
    assert_same_run(one, two, 6)


def test_tensorboard_gets_every_logged_number(make):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = loop.train(make("ddim-digits", "--train.tracker", "tensorboard"), progress=False)
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert {"loss", "reduction", "coupling_ms", "hidden_ms", "step_ms", "lr"} <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert events.Tags()["images"] == ["samples"]
    assert logged == [(step, pytest.approx(loss)) for step, loss, _, _ in trace(output)]


class Wandb(ModuleType):
    """Stands in for the package and for a run of it; keeps what it is given."""

    Image = staticmethod(lambda array: ("image", array.shape))

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(make, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    options = ["--train.tracker", "wandb", "--train.tracker_project", "noise"]
    output = loop.train(make("ddim-digits", *options, "--train.steps", "4"), progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    loop.train(make("ddim-digits", *options, "--resume", "auto"), progress=False)
    first, second = wandb.started
    assert first["project"] == "noise"
    assert (first["name"], first["dir"], first["resume"]) == ("run", str(output), "allow")
    assert first["config"]["train"]["global_batch_size"] == 16
    assert first["id"] == second["id"] == (output / "wandb-id").read_text()
    losses = [(step, values["loss"]) for step, values in wandb.logged if "loss" in values]
    assert losses == [(step, loss) for step, loss, *_ in trace(output)]
    assert [step for step, values in wandb.logged if "samples" in values] == [4, 6]
    assert wandb.finished == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    loop.train(make("ddim-digits", *options, folder="other"), progress=False)
    assert wandb.started[2]["id"] != first["id"]


def test_bfloat16_follows_float32_within_two_percent(make):
    exact = trace(loop.train(make("ddim-digits", folder="fp32"), progress=False))
    AcceleratorState._reset_state(reset_partial_state=True)
    rounded = trace(loop.train(make("ddim-digits", "--train.mixed_precision", "bf16", folder="bf16"), progress=False))
    assert [line[1] for line in exact] != [line[1] for line in rounded]
    for a, b in zip(exact, rounded, strict=True):
        assert b[1] == pytest.approx(a[1], rel=0.02)
        assert b[2] == a[2]


def test_gradient_checkpointing_changes_memory_only(tmp_path):
    options = ["--model.pretrained", "null", "--train.steps", "2"]
    plain = loop.train(tiny("stable-diffusion-digits", tmp_path / "plain", *options), progress=False)
    options += ["--train.gradient_checkpointing", "true"]
    saving = loop.train(tiny("stable-diffusion-digits", tmp_path / "saving", *options), progress=False)
    for a, b in zip(trace(plain), trace(saving), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_compiling_traces_the_network_and_does_not_change_the_run(make, monkeypatch):
    inner = torch.nn.Module.compile
    # Traces forward and backward pass as for code generation, which itself takes minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: inner(self, backend="aot_eager"))
    torch._dynamo.reset()
    plain = loop.train(make("flow-matching-digits", folder="plain"), progress=False)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finish, traced = loop.Run.finish, []

    def counted(self):
        traced.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        finish(self)

    monkeypatch.setattr(loop.Run, "finish", counted)
    fast = loop.train(make("flow-matching-digits", "--train.compile", "true", folder="fast"), progress=False)
    assert traced[0] >= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced[0]  # none for sampling
    for a, b in zip(trace(plain), trace(fast), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert weights(plain, 6).keys() == weights(fast, 6).keys()


def test_learning_rates_warm_up_and_decay(make):
    def rates(*options):
        recipe = make("ddim-digits", "--train.steps", "10", "--optimizer.warmup_steps", "4", *options)
        learning_rate = build_schedule(recipe, build_optimizer(recipe.optimizer, torch.nn.Linear(1, 1)))
        return [learning_rate(step) / recipe.optimizer.lr for step in range(10)]

    assert rates("--optimizer.schedule", "constant") == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 6)
    assert rates("--optimizer.schedule", "linear")[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates("--optimizer.schedule", "cosine")[7] == pytest.approx(0.5)
    logged = trace(loop.train(make("ddim-digits", "--optimizer.warmup_steps", "4"), progress=False))
    assert [rate / 1e-3 for *_, rate in logged[:4]] == pytest.approx([0, 0.25, 0.5, 0.75])


def test_the_time_of_a_step_counts_neither_checkpoints_nor_samples(make, monkeypatch):
    save, draw = loop.Run.save, loop.Run.draw
    monkeypatch.setattr(loop.Run, "save", lambda self: time.sleep(0.5) or save(self))
    monkeypatch.setattr(loop.Run, "draw", lambda self, path: time.sleep(0.5) or draw(self, path))
    recipe = make("ddim-digits", "--train.sample_every", "1", "--train.checkpoint_every", "1", "--train.steps", "2")
    output = loop.train(recipe, progress=False)
    second = json.loads((output / "metrics.jsonl").read_text().splitlines()[1])
    assert second["coupling_ms"] <= second["step_ms"] < 900


def test_kernels_are_compiled_before_the_first_step(make, monkeypatch):
    warmed, first = [], loop.Run.train_step
    monkeypatch.setattr("couplings.warmup", lambda: warmed.append(True))

    def after_warming(self, blocks):
        assert warmed
        return first(self, blocks)

    monkeypatch.setattr(loop.Run, "train_step", after_warming)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.train(make("ddim-digits", "--coupling.method", "sinkhorn"), progress=False)
    assert warmed == [True]


def test_the_first_process_chooses_the_checkpoint_and_all_must_have_it(make, monkeypatch):
    loop.train(make("ddim-digits"), progress=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = loop.Run(make("ddim-digits", "--resume", "auto"))
    monkeypatch.setattr(loop, "broadcast_object_list", lambda given: [4])  # as another process chose
    assert run._choose_checkpoint().step == 4
    monkeypatch.setattr(loop, "broadcast_object_list", lambda given: [2])
    with pytest.raises(checkpoint.CheckpointError, match=r"process 0 cannot read.*step-2"):
        run._choose_checkpoint()
    others = ["process 3 cannot read what the first one can"]
    monkeypatch.setattr(loop, "broadcast_object_list", lambda given: given)
    monkeypatch.setattr(loop, "gather_object", lambda given: given + others)
    with pytest.raises(checkpoint.CheckpointError, match="process 3"):
        run._choose_checkpoint()


def test_old_checkpoints_are_deleted_after_the_new_one_is_whole(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.ones(3)}}, {}, {"recipe.yaml": "a: 1"})
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [2, 3]
    found = checkpoint.newest(tmp_path)
    assert torch.equal(found.tensors("model")["w"], torch.ones(3))
    assert (found.folder / "recipe.yaml").read_text() == "a: 1"


def test_half_precision_that_a_cpu_would_ignore_is_refused(make):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(config.RecipeError, match="fp16"):
        loop.Run(make("ddim-digits", "--train.mixed_precision", "fp16"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--coupling.method", "auctoin", "auction"),
        ("--coupling.options.kk", "3", "kk"),
        ("--coupling.method", "nearest:k=0", "coupling: k= must be a whole number of at least 1, got 0"),
        ("--coupling.method", "nearest:k=many", "coupling: k= must be .* got 'many'"),
        ("--coupling.method", "sinkhorn:reg=-1", "coupling: reg= must be positive and finite"),
        ("--coupling.metric", "l3", "l2"),
        ("--train.global_batch_size", "1808", "digits has 1797 rows"),
    ],
)
def test_a_coupling_or_batch_that_cannot_be_is_refused(make, option, value, message):
    with pytest.raises(config.RecipeError, match=message):
        loop.Run(make("ddim-digits", option, value))


@pytest.mark.parametrize(("named", "count"), [("nearest", 4), ("nearest:k=150", 150), ("sinkhorn:reg=0.5", 1)])
def test_options_that_can_be_are_taken(make, named, count):
    coupling = build.build_coupling(make("ddim-digits", "--coupling.method", named))
    assert build.candidates(coupling) == count


def test_nearest_gets_its_candidates(make):
    recipe = make("flow-matching-digits", "--coupling.method", "nearest", "--coupling.options.k", "3")
    run = loop.Run(recipe)
    block = first_block(run)
    assert len(block.noise) == 3 * len(block.data)
    paired, reduction = run.pairs.couple([block])
    candidates = block.noise.reshape(len(block.data), 3, -1)
    chosen = paired[0].noise.flatten(1)[:, None]
    assert (candidates == chosen).all(-1).any(1).all()
    assert reduction > 0


def test_a_method_that_breaks_its_promise_is_trained_with_and_warned_of(make, caplog):
    couplings.register("cheapest", lambda cost, *, generator=None: cost.argmin(1) * 0, marginal="resampled")
    try:
        loop.Run(make("flow-matching-digits", "--coupling.method", "cheapest"))
    finally:
        del registry._registry["cheapest"]
    assert "the method cheapest declares the marginal 'resampled' and breaks it" in caplog.text
