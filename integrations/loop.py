"""The training loop, on accelerate: one for all objectives.

Every number that a step depends on is a function of (seed, step, block): see `randomness`. The state
of a run is therefore its step number, the weights, their averages and the optimizer.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from couplings import Coupling

from . import checkpoint, pictures
from .averages import Averages
from .config import Optimizer, Recipe, RecipeError
from .data import Batch, Piece, Source, load_source, to_signed
from .models import build_model
from .objective import Objective
from .objectives import build_objective
from .randomness import Draws, address

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is intact."""


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
            with _bar(recipe, run.step, progress and run.accelerator.is_main_process) as bar:
                finished = run.advance(bar, terminated)
        if finished:
            run.finish()
    except OSError as error:  # a full disk, most of all
        msg = (
            f"cannot read or write {error.filename or recipe.output}: {error.strerror or error}; checkpoints are intact"
        )
        raise TrainingError(msg) from error
    return recipe.output


@dataclass
class Block:
    """Data and the noise paired with it."""

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
        self.recipe = recipe
        train = recipe.train
        self.coupling = build_coupling(recipe)
        # Noise rows for each data row: `nearest` alone chooses from several.
        self.candidates = self.coupling.options.get("k") or 4 if self.coupling.method == "nearest" else 1
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and "MASTER_ADDR" not in os.environ:
            msg = (
                f"WORLD_SIZE is {processes}, but MASTER_ADDR, where the processes meet, is not set: start them with "
                "accelerate launch or torchrun (integrations/launch/README.md), or unset WORLD_SIZE to train in one"
            )
            raise TrainingError(msg)
        self.total_blocks, accumulation = divide(recipe, processes)
        if train.tracker and train.tracker not in map(str, get_available_trackers()):  # accelerate only warns
            msg = f"train.tracker: got {train.tracker!r}, which is not installed: pip install {train.tracker}, or null"
            raise RecipeError(msg)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=accumulation,
            log_with=train.tracker,
            project_dir=recipe.output,
        )
        if self.accelerator.num_processes != processes:
            msg = (
                f"the launcher started {processes} processes, but accelerate sees {self.accelerator.num_processes}: "
                "each would train alone and write the same files. Use a configuration of integrations/launch."
            )
            raise TrainingError(msg)
        self.device = self.accelerator.device
        if train.mixed_precision == "fp16" and self.device.type == "cpu":
            msg = "train.mixed_precision: got 'fp16', which accelerate ignores on a CPU: expected 'bf16' or 'no'"
            raise RecipeError(msg)
        # Each process works on neighbouring blocks, so the order of blocks over ranks and accumulation
        # is the same for any number of processes.
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
        model = build_model(recipe.model, self.objective)
        if train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        try:
            self.objective.attach(model)
        except FileNotFoundError as error:
            raise RecipeError(str(error)) from None
        self.optimizer = build_optimizer(recipe.optimizer, model)
        self.averages = Averages(train, model)
        self.bare_model = model
        if train.compile:
            # In place: a wrapper would change the names of the weights.
            for network in (model, *self.objective.networks().values()):
                network.compile()
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.averages.to(self.device)
        self.objective.to(self.device)
        self.step = 0
        self.unreadable: set[str] = set()
        self.first_bad_step = torch.tensor(torch.inf, device=self.device)

    # Checkpoints

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.recipe.output / "checkpoints"

    def start(self) -> None:
        """Open the output folder: begin, or continue from the newest intact checkpoint."""
        output, found = self.recipe.output, None
        if self.recipe.resume:
            found = checkpoint.newest(self.checkpoints)
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

    def _warm_up(self) -> None:
        """Couple made-up data once: compiling kernels in the first step would be counted as its time."""
        size = self.recipe.train.batch_size_per_device
        draws = Draws(0, 0, 0, 1, self.device)
        data = draws.normal(size, *self.objective.shape)
        noise = data.repeat(self.candidates, *[1] * (data.ndim - 1))
        self.coupling(data, noise)

    def _check_same_run(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue with other settings than the run began with."""
        free = {
            "data": {"workers"},
            "train": {"steps", "log_every", "checkpoint_every", "keep_last", "sample_every", "tracker", "compile"},
        }
        now, before = self.recipe.sections(), yaml.safe_load((found.folder / "recipe.yaml").read_text())
        for section in ("objective", "data", "model", "optimizer", "coupling", "train"):
            for name, value in before[section].items():
                if name in free.get(section, ()):
                    continue
                if now[section].get(name) != value:
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

    # Steps

    def pieces(self) -> Iterator[Piece]:
        """Yield where in its epoch the data of each block lies that this process works on, from this step onward."""
        train = self.recipe.train
        per_epoch = len(self.source) // train.global_batch_size
        for step in range(self.step, train.steps):
            epoch, place = divmod(step, per_epoch)
            for block in self.blocks:
                first = place * train.global_batch_size + block * train.batch_size_per_device
                yield Piece(epoch, first, first + train.batch_size_per_device)

    def batches(self) -> Iterator[Batch]:
        """Yield the data of each block of this process, in order."""
        pinned = self.device.type == "cuda"
        return self.source.blocks(self.pieces(), self.recipe.train.seed, self.recipe.data.workers, pinned)

    def load(self, batch: Batch, block: int) -> Block:
        """Turn a batch into data as the noise is mixed into it, with that noise, still unpaired."""
        train = self.recipe.train
        draws = Draws(train.seed, self.step, block, self.total_blocks, self.device)
        for name in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                log.warning("unreadable image replaced (%d so far): %s", len(self.unreadable), name)
        images = to_signed(batch.images.to(self.device, non_blocking=True))
        if self.recipe.data.flip:
            mirrored = torch.rand(len(images), generator=draws.generator("augment"), device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = batch.labels.to(self.device, non_blocking=True)
        data, context = self.objective.prepare(images, labels, draws)
        noise = draws.normal(len(data) * self.candidates, *data.shape[1:])
        return Block(data, noise, draws, {"labels": labels, **context})

    def couple(self, blocks: list[Block]) -> tuple[list[Block], Tensor, float]:
        """Pair the noise of ``blocks``, together; also return the distance reduction and the milliseconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        data = torch.cat([block.data for block in blocks]) if len(blocks) > 1 else blocks[0].data
        noise = torch.cat([block.noise for block in blocks]) if len(blocks) > 1 else blocks[0].noise
        condition = None
        if self.recipe.coupling.condition == "class":
            condition = torch.cat([block.context["labels"] for block in blocks])
        generator = blocks[0].draws.generator("coupling", torch.device("cpu"))
        coupled = self.coupling(data, noise, condition=condition, generator=generator)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - start)
        paired = coupled.noise.split([len(block.data) for block in blocks])
        blocks = [Block(b.data, noise, b.draws, b.context) for b, noise in zip(blocks, paired, strict=True)]
        return blocks, coupled.reduction, milliseconds

    def paired_blocks(self, batches: Iterator[Batch]) -> Iterator[tuple[Block, Tensor, float]]:
        """Yield one step's blocks with their noise, and the reduction and milliseconds of their coupling."""
        pools = [self.blocks] if self.coupling.scope == "global" else [[block] for block in self.blocks]
        for pool in pools:
            blocks, reduction, milliseconds = self.couple([self.load(next(batches), block) for block in pool])
            for block in blocks:
                yield block, reduction, milliseconds / len(blocks)

    def train_step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor, float]:
        """Do one optimizer step; return its mean loss, mean reduction and coupling milliseconds."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * schedule(self.recipe, self.step)
        losses, reductions, milliseconds = [], [], 0.0
        for block, reduction, spent in self.paired_blocks(batches):
            # Dropout draws from the global generator.
            torch.manual_seed(address(block.draws.seed, self.step, block.draws.block, self.total_blocks, "network"))
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.objective.loss(self.model, block.data, block.noise, block.draws, **block.context).mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.recipe.optimizer.clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
            reductions.append(torch.as_tensor(reduction))
            milliseconds += spent
        self.averages.follow()
        self.step += 1
        self.objective.after_step(self.bare_model, self.step)
        return torch.stack(losses).mean(), torch.stack(reductions).mean(), milliseconds

    def advance(self, report: Callable[..., None], terminated: list[int]) -> bool:
        """Train until the last step, or until the process is asked to end; return whether it is finished."""
        train, output = self.recipe.train, self.recipe.output
        batches, window, began = self.batches(), [], time.perf_counter()
        self.model.train()
        while self.step < train.steps:
            loss, reduction, milliseconds = self.train_step(batches)
            window.append(milliseconds)
            # With fp16 a step may overflow: it is skipped and the scale halved, until nothing is left to halve.
            if self.accelerator.scaler is None:
                # Kept on the device: looking at every loss would stall a GPU.
                bad = torch.where(loss.isfinite(), torch.inf, float(self.step))
                self.first_bad_step = torch.minimum(self.first_bad_step, bad)
            record = None
            if self.step % train.log_every == 0 or self.step == train.steps:
                self._check_finite()
                mean = self.accelerator.reduce(torch.stack([loss.float(), reduction.to(loss).float()]), "mean").tolist()
                record = {
                    "step": self.step,
                    "loss": mean[0],
                    "reduction": mean[1],
                    "coupling_ms": sum(window) / len(window),
                    "step_ms": 1000 * (time.perf_counter() - began) / len(window),
                    "lr": self.optimizer.param_groups[0]["lr"],
                }
                self._log(record)
                window, began = [], time.perf_counter()
            report(self.step, record)
            stop = self._any_process(bool(terminated))
            if stop or self.step % train.checkpoint_every == 0 or self.step == train.steps:
                self.save()
            if train.sample_every and self.step % train.sample_every == 0 and self.step < train.steps:
                self.draw(output / "samples" / f"step-{self.step}.png")
            if stop:
                return self.step == train.steps
        return True

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device)).item())

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            # JSON has no word for the loss of a step that fp16 skipped.
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with (self.recipe.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(finite) + "\n")
        if self.recipe.train.tracker:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

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


def build_coupling(recipe: Recipe) -> Coupling:
    """Build the coupling that a recipe names.

    Raises
    ------
    RecipeError
        For an unknown name or option.
    """
    section = recipe.coupling
    try:
        return Coupling(section.method, section.metric, section.quantize, section.scope, **section.options)
    except (ValueError, TypeError) as error:
        msg = f"coupling: {error}"
        raise RecipeError(msg) from None


def divide(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Return the blocks of a step and how many of them each process accumulates.

    Raises
    ------
    RecipeError
        With the arithmetic, if the blocks do not divide among the processes.
    """
    train = recipe.train
    blocks = train.global_batch_size // train.batch_size_per_device
    if blocks % processes:
        msg = (
            f"train.global_batch_size {train.global_batch_size} = {blocks} blocks of train.batch_size_per_device "
            f"{train.batch_size_per_device}, which do not divide among {processes} processes ({blocks} / {processes} = "
            f"{blocks / processes:.2f})"
        )
        raise RecipeError(msg)
    return blocks, blocks // processes


def build_optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that a recipe names."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
    # One pass over the weights instead of ten; RAdam has no such form.
    fused = {} if config.name == "radam" else {"fused": True}
    return kinds[config.name](
        model.parameters(),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **fused,
    )


def schedule(recipe: Recipe, step: int) -> float:
    """Return the factor of the learning rate at ``step``, counted from 0."""
    optimizer, steps = recipe.optimizer, recipe.train.steps
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    return {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
    }[optimizer.schedule]


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
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _bar(recipe: Recipe, step: int, visible: bool) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not visible) as bar:
        task = bar.add_task(recipe.name, total=recipe.train.steps, completed=step, status="")

        def report(step: int, record: dict[str, float] | None) -> None:
            if record is None:
                bar.update(task, completed=step)
                return
            share = record["coupling_ms"] / record["step_ms"]
            status = (
                f"loss {record['loss']:.4f}  distance {-100 * record['reduction']:+.1f}%  "
                f"coupling {record['coupling_ms']:.1f} ms, {100 * share:.0f}% of the step"
            )
            bar.update(task, completed=step, status=status)
            if visible and not console.is_terminal:  # the log of a batch job
                console.print(f"step {step} of {recipe.train.steps}  {status}", soft_wrap=True, highlight=False)

        yield report
