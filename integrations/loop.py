"""The training loop, on accelerate: one for all objectives. `Run.train_step` is one step of it.

Every number that a step depends on is a function of (seed, step, block): see `randomness`. The state of a run is
therefore its step number, the weights, their averages and the optimizer.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

import couplings

from . import checkpoint, pictures
from .averages import Averages
from .build import (
    TrainingError,
    build_accelerator,
    build_coupling,
    build_objective,
    build_optimizer,
    build_schedule,
    candidates,
    divide,
)
from .config import Recipe, RecipeError
from .data import Batch, Pieces, Source, load_source, to_signed
from .models import build_model
from .objective import Objective
from .progress import Report, bar
from .randomness import Draws, address

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Run a recipe to its end and return its output folder.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    progress : bool
        Show a progress bar on standard error.

    Raises
    ------
    RecipeError
        If the recipe does not fit its data or the number of processes.
    TrainingError
        For a loss that is not finite, a file that cannot be written, or an output folder that holds another run.
    CheckpointError
        If a checkpoint cannot be written.
    """
    try:
        with _termination() as terminated:
            run = Run(recipe)
            run.start()
            with bar(recipe, run.step, progress and run.accelerator.is_main_process) as report:
                finished = run.advance(report, terminated)
        if finished:
            run.finish()
    except OSError as error:  # a full disk, most of all
        place, reason = error.filename or recipe.output, error.strerror or error
        msg = f"cannot read or write {place}: {reason}; checkpoints are intact"
        raise TrainingError(msg) from error
    return recipe.output


@dataclass
class Block:
    """Data and noise, row by row: as it was drawn at first, then as it is paired."""

    data: Tensor
    noise: Tensor
    draws: Draws
    context: dict[str, Any]


class Run:
    """A recipe being trained.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, train = recipe, recipe.train
        self.coupling = build_coupling(recipe)
        self.candidates = candidates(self.coupling)
        self.accelerator = build_accelerator(recipe)
        self.device = self.accelerator.device
        # Each process works on neighbouring blocks, so the order of blocks over ranks and accumulation is the same for
        # any number of processes.
        self.total_blocks, accumulation = divide(recipe, self.accelerator.num_processes)
        first = self.accelerator.process_index * accumulation
        self.blocks = range(first, first + accumulation)

        self.source: Source = load_source(recipe.data)
        if len(self.source) < train.global_batch_size:
            rows = f"{recipe.data.source} has {len(self.source)} rows"
            msg = f"train.global_batch_size: got {train.global_batch_size}, but {rows}"
            raise RecipeError(msg)
        if recipe.coupling.condition == "class" and len(self.source.classes) < 2:
            msg = f"coupling.condition: got 'class', but {recipe.data.source} has no labels: expected null"
            raise RecipeError(msg)

        torch.manual_seed(address(train.seed, 0, 0, 1, "network"))
        self.objective: Objective = build_objective(recipe, self.source)
        self.bare_model = model = build_model(recipe.model, self.objective)
        if train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.objective.attach(model)
        self.averages = Averages(train, model)
        if train.compile:
            # In place: a wrapper would change the names of the weights.
            for network in (model, *self.objective.networks().values()):
                network.compile()
        optimizer = build_optimizer(recipe.optimizer, model)
        self.learning_rate = build_schedule(recipe, optimizer)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.averages.to(self.device)
        self.objective.to(self.device)
        self.step = 0
        self.unreadable: set[str] = set()
        self.first_bad_step = torch.tensor(torch.inf, device=self.device)

    # One step

    def train_step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor, float]:
        """Do one optimizer step; return its mean loss, mean distance reduction and coupling milliseconds."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        blocks = [self.load(next(batches), number) for number in self.blocks]
        blocks, reduction, milliseconds = self.couple(blocks)
        losses = []
        for block in blocks:
            torch.manual_seed(block.draws.address("network"))  # dropout draws from the global generator
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.objective.loss(self.model, block.data, block.noise, block.draws, **block.context).mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.recipe.optimizer.clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.averages.follow()
        self.step += 1
        self.objective.after_step(self.bare_model, self.step)
        return torch.stack(losses).mean(), reduction, milliseconds

    def load(self, batch: Batch, number: int) -> Block:
        """Turn a batch into data as noise is mixed into it, and draw its noise, still unpaired."""
        for message in set(batch.unreadable) - self.unreadable:
            self.unreadable.add(message)
            log.warning("unreadable image replaced by its neighbour: %s", message)
        draws = Draws(self.recipe.train.seed, self.step, number, self.total_blocks, self.device)
        images = to_signed(batch.images.to(self.device, non_blocking=True))
        if self.recipe.data.flip:
            mirrored = torch.rand(len(images), generator=draws.generator("augment"), device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = batch.labels.to(self.device, non_blocking=True)
        data, context = self.objective.prepare(images, labels, draws)
        noise = draws.normal(len(data) * self.candidates, *data.shape[1:])
        return Block(data, noise, draws, {"labels": labels, **context})

    def couple(self, blocks: list[Block]) -> tuple[list[Block], Tensor, float]:
        """Pair the noise of each block with its data, or that of all blocks of all processes (scope ``global``).

        Also return the mean distance reduction and the milliseconds.
        """
        self._wait_for_device()
        start, paired, reductions = time.perf_counter(), [], []
        for pool in [blocks] if self.coupling.scope == "global" else [[block] for block in blocks]:
            data, noise = (torch.cat([getattr(block, name) for block in pool]) for name in ("data", "noise"))
            condition = None
            if self.recipe.coupling.condition == "class":
                condition = torch.cat([block.context["labels"] for block in pool])
            generator = pool[0].draws.generator("coupling", torch.device("cpu"))
            coupled = self.coupling(data, noise, condition=condition, generator=generator)
            noises = coupled.noise.split([len(block.data) for block in pool])
            paired += [dataclasses.replace(block, noise=noise) for block, noise in zip(pool, noises, strict=True)]
            reductions.append(torch.as_tensor(coupled.reduction))
        self._wait_for_device()
        return paired, torch.stack(reductions).mean(), 1000 * (time.perf_counter() - start)

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # All steps

    def batches(self, terminated: Sequence[int] = ()) -> Iterator[Batch]:
        """Yield the data of each block that this process works on, from this step onward.

        ``terminated`` is not empty once the process is asked to end.
        """
        train, done, pinned = self.recipe.train, 0, self.device.type == "cuda"
        steps = range(self.step, train.steps)
        pieces = Pieces(len(self.source), train.global_batch_size, train.batch_size_per_device, self.blocks, steps)
        try:
            for batch in self.source.blocks(pieces, train.seed, self.recipe.data.workers, pinned):
                yield batch
                done += 1
        except (RuntimeError, OSError, EOFError):  # a process that is gone, or what it was sending
            if not terminated:
                raise
            # A cluster ends all processes of a job, the loading ones too: what this step still needs is loaded here.
            yield from self.source.blocks(itertools.islice(pieces, done, None), train.seed)

    def advance(self, report: Report, terminated: Sequence[int]) -> bool:
        """Train until the last step, or until the process is asked to end; return whether it is finished."""
        train, output = self.recipe.train, self.recipe.output
        batches, times = self.batches(terminated), []
        self.model.train()
        while self.step < train.steps:
            began = time.perf_counter()
            loss, reduction, coupling_ms = self.train_step(batches)
            self._note_if_bad(loss)
            last, record = self.step == train.steps, None
            if self.step % train.log_every == 0 or last:
                self._check_finite()
                record = {"step": self.step, **self._means(loss=loss, reduction=reduction)}  # waits for the device
            times.append((coupling_ms, 1000 * (time.perf_counter() - began)))
            if record is not None:
                record["coupling_ms"], record["step_ms"] = map(fmean, zip(*times, strict=True))
                record["lr"] = self.optimizer.param_groups[0]["lr"]
                self._log(record)
                times.clear()
            report(self.step, record)
            stop = self._any_process(bool(terminated))
            if stop or last or self.step % train.checkpoint_every == 0:
                self.save()
            if train.sample_every and self.step % train.sample_every == 0 and not last:
                self.draw(output / "samples" / f"step-{self.step}.png")
            if stop:
                return last
        return True

    def _means(self, **values: Tensor) -> dict[str, float]:
        """Average values over the processes."""
        stacked = torch.stack([value.float().to(self.device) for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device)).item())

    def _note_if_bad(self, loss: Tensor) -> None:
        # With fp16 a step may overflow: it is skipped and the scale halved, until nothing is left to halve.
        if self.accelerator.scaler is None:
            # Kept on the device: looking at every loss would stall a GPU.
            bad = torch.where(loss.isfinite(), torch.inf, float(self.step))
            self.first_bad_step = torch.minimum(self.first_bad_step, bad)

    def _check_finite(self) -> None:
        # Over all processes, so that they end together.
        step = self.accelerator.gather(self.first_bad_step[None]).min().item()
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 1:
            step = self.step
        if math.isinf(step) and not all(p.isfinite().all() for p in self.bare_model.parameters()):
            step = self.step
        if math.isfinite(step):
            intact = checkpoint.steps(self.checkpoints)
            kept = f"the checkpoint of step {intact[-1]} is intact" if intact else "no checkpoint was written yet"
            msg = f"the loss or a weight is not finite at step {step:.0f}; {kept}. Try a smaller optimizer.lr or bf16."
            raise TrainingError(msg)

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            # JSON has no word for the loss of a step that fp16 skipped.
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with (self.recipe.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(finite) + "\n")
        if self.recipe.train.tracker:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    # Beginning, and going on from a checkpoint

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.recipe.output / "checkpoints"

    def start(self) -> None:
        """Open the output folder: begin, or continue from the newest intact checkpoint."""
        output, found = self.recipe.output, None
        if self.recipe.resume:
            found = self._choose_checkpoint()
        elif checkpoint.steps(self.checkpoints):
            msg = f"{output} already holds checkpoints: continue with --resume auto, or choose another --output"
            raise TrainingError(msg)
        if found is not None:
            self._check_same_run(found)
            self._restore(found)
        if self.accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            (output / "recipe.yaml").write_text(self.recipe.text())
            _truncate(output / "metrics.jsonl", self.step)
        self.accelerator.wait_for_everyone()
        self._warm_up()
        if self.recipe.train.tracker:
            # TensorBoard takes the name as a folder of the output, others as a project.
            name = "tensorboard" if self.recipe.train.tracker == "tensorboard" else "couplings"
            options = {
                "tensorboard": {"purge_step": self.step + 1},  # what an interrupted run logged beyond its checkpoint
                "wandb": {"name": self.recipe.output.name, "dir": str(output), "config": self.recipe.sections()},
            }
            self.accelerator.init_trackers(name, init_kwargs=options)

    def _choose_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Open the newest intact checkpoint that the first process finds; all must find it intact."""
        step, error = None, ""
        if self.accelerator.is_main_process:
            newest = checkpoint.newest(self.checkpoints)
            step = None if newest is None else newest.step
        (step,) = broadcast_object_list([step])
        if step is None:
            return None
        try:
            found = checkpoint.read(self.checkpoints / f"step-{step}")
        except checkpoint.CheckpointError as failure:
            error = f"process {self.accelerator.process_index} cannot read what the first one can: {failure}"
        errors = [each for each in gather_object([error]) if each]  # of all processes, so that they end together
        if errors:
            raise checkpoint.CheckpointError(errors[0])
        return found

    def _warm_up(self) -> None:
        """Couple made-up data once: compiling, and imports at first use, would count as time of the first step."""
        couplings.warmup()
        rows, number = self.recipe.train.batch_size_per_device, self.accelerator.process_index
        draws = Draws(0, 0, number, self.accelerator.num_processes, self.device)
        made_up = draws.normal(rows * (1 + self.candidates), *self.objective.shape)
        self.coupling(made_up[:rows], made_up[rows:])

    def _check_same_run(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue with other settings than the run began with."""
        free = {
            "data": {"workers"},
            "train": {"steps", "log_every", "checkpoint_every", "keep_last", "sample_every", "tracker", "compile"},
        }
        now, before = self.recipe.sections(), yaml.safe_load((found.folder / "recipe.yaml").read_text())
        for section in ("objective", "data", "model", "optimizer", "coupling", "train"):
            for name, value in before[section].items():
                if name not in free.get(section, ()) and now[section].get(name) != value:
                    msg = (
                        f"{section}.{name}: got {now[section].get(name)!r}, but the run in {self.recipe.output} "
                        f"began with {value!r}; choose another --output"
                    )
                    raise TrainingError(msg)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        # Copied into the existing parameters: the memory that the kernels see stays as it was.
        self.bare_model.load_state_dict(found.tensors("model"))
        self.averages.restore({name: found.tensors(name) for name in self.averages.of}, found.state["ema_step"])
        checkpoint.restore_optimizer(self.optimizer, found.tensors("optimizer"), found.state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        for name, network in self.objective.networks().items():
            network.load_state_dict(found.tensors(name))
        self.step = found.step

    def save(self) -> None:
        """Write a checkpoint of the current step.

        Raises
        ------
        TrainingError
            If the loss or a weight is not finite: such a state is not kept.
        """
        self._check_finite()
        if self.accelerator.is_main_process:
            optimizer, plain = checkpoint.optimizer_state(self.optimizer)
            scaler = self.accelerator.scaler
            tensors = {
                "model": self.bare_model.state_dict(),
                **self.averages.tensors(),
                "optimizer": optimizer,
                **{name: network.state_dict() for name, network in self.objective.networks().items()},
            }
            state = {
                "ema_step": self.averages.steps,
                "optimizer": plain,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoint.save(self.checkpoints, self.step, tensors, state, {"recipe.yaml": self.recipe.text()})
            checkpoint.prune(self.checkpoints, self.recipe.train.keep_last)
        self.accelerator.wait_for_everyone()

    # Results

    def draw(self, path: Path, images: int = 64) -> None:
        """Write a grid of samples."""
        if not self.accelerator.is_main_process:
            return
        generator = torch.Generator().manual_seed(address(self.recipe.evaluate.seed, 0, 0, 1, "sample"))
        noise = torch.randn(images, *self.objective.shape, generator=generator).to(self.device)
        with self.averages.lent() as model, torch.no_grad():
            samples = self.objective.sample(model, noise, max(self.recipe.evaluate.steps), generator)
        path.parent.mkdir(exist_ok=True)
        grid = pictures.grid(samples)
        grid.save(path)
        for tracker in self.accelerator.trackers:
            if not hasattr(tracker, "log_images"):  # some keep numbers only
                continue
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=self.step, **layout)

    def finish(self) -> None:
        """Draw the last samples and export the pipeline."""
        output = self.recipe.output
        if self.accelerator.is_main_process:
            self.draw(output / "samples" / f"step-{self.step}.png")
            with self.averages.lent() as model:
                self.objective.export(model, output / "pipeline")
        self.accelerator.wait_for_everyone()
        if self.recipe.train.tracker:
            self.accelerator.end_training()


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and one that was cut short."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break
    replacement = path.with_suffix(".partial")
    replacement.write_text("".join(kept))
    replacement.replace(path)


@contextmanager
def _termination() -> Iterator[list[int]]:
    """Collect SIGTERM: the loop saves and ends in order when a cluster takes the machine back."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number: int, frame: object) -> None:
        received.append(number)
        # The same signal may end the loading processes. The loader finds out when it waits for one of them; the handler
        # that torch set would raise wherever the training process is, also between two halves of a step.
        signal.signal(signal.SIGCHLD, lambda *_: None)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
