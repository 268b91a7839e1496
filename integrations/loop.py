"""The training loop, on accelerate: one for all objectives. `Run.train_step` is one step of it.

Every number that a step depends on is a function of (seed, step, block): see `randomness`. The state of a run is
therefore its step number, the weights, their averages and the optimizer.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

import couplings
from couplings.testing import broken_promise

from . import checkpoint, features, latents, lpips, pictures, termination
from .averages import Averages
from .build import (
    TrainingError,
    build_accelerator,
    build_coupling,
    build_objective,
    build_optimizer,
    build_schedule,
)
from .config import Recipe, expect
from .data import Source, load_source
from .dataset_pairs import KINDS
from .models import begin_from, build_model, recompute
from .objective import Objective
from .pairs import Block, Pairs
from .pipelines import say_whose
from .places import check_output, divide, has_checkpoints
from .progress import Report, bar
from .randomness import Draws, address
from .sections import Optimizer

log = logging.getLogger(__name__)

FREE = {
    "objective": {"spacing", "clip_sample", "eta", "solver", "tolerance", "sampler", "guidance_scale"}
    | {"autoencoder_parameters", "multistep_noise"},
    "data": {"workers"},
    "model": {"parameters"},
    "optimizer": {"lr", "warmup_steps", "schedule", "clip", "betas", "eps", "weight_decay"},
    "train": {"steps", "log_every", "checkpoint_every", "keep_last", "sample_every", "tracker", "tracker_project"}
    | {"compile", "mixed_precision", "tf32", "gradient_checkpointing", "channels_last", "cudnn_benchmark"}
    | {"deterministic", "ddp"},
}
"""What a run may go on with otherwise than it began: no weight, row or noise has another meaning for it."""


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
    with _told_in_one_line(recipe):
        with termination.collected() as terminated:
            run = Run(recipe)
            run.start()
            with bar(recipe, run.step, progress and run.accelerator.is_main_process) as report:
                finished = run.advance(report, terminated)
        if finished:
            run.finish()
        if recipe.train.tracker:
            run.accelerator.end_training()
    return recipe.output


@contextmanager
def _told_in_one_line(recipe: Recipe) -> Iterator[None]:
    """Say in one line what the disk, another process or an operation does to a run, and what to type."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk, most of all
        place, reason = recipe.output, error
        if isinstance(error, OSError):
            place, reason = error.filename or place, error.strerror or reason
        msg = f"cannot read or write {place}: {reason}; checkpoints are intact"
        raise TrainingError(msg) from error
    except RuntimeError as error:
        # gloo has no error of its own; that of NCCL is a DistError.
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
            reason = str(error).strip().splitlines()[-1]
            msg = (
                "another process of the run has died, or ended with an error of its own that it tells; go on with "
                f"--resume auto ({reason})"
            )
            raise TrainingError(msg) from error
        if not (recipe.train.deterministic and "does not have a deterministic implementation" in str(error)):
            raise
        operation = str(error).partition(", but you set")[0]
        msg = f"train.deterministic: got true, but {operation}: train with --train.deterministic false"
        raise TrainingError(msg) from error


class Run:
    """A recipe being trained.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, train = recipe, recipe.train
        coupling = build_coupling(recipe)
        features.check(recipe)
        if getattr(recipe.objective, "loss", None) == "lpips":
            lpips.check_weights()
        self.accelerator = build_accelerator(recipe)
        self.device, processes = self.accelerator.device, self.accelerator.num_processes
        # Each process works on neighbouring blocks, so the order of blocks over ranks and accumulation is the same for
        # any number of processes.
        total_blocks, accumulation = divide(recipe, processes)
        first = self.accelerator.process_index * accumulation

        self.source: Source = load_source(recipe.data)
        batch, rows = train.global_batch_size, len(self.source)
        expect(rows >= batch, "train.global_batch_size", batch, f"at most {rows}: {recipe.data.source} has {rows} rows")
        condition, labelled = recipe.coupling.condition, len(self.source.classes) > 1
        fits = labelled or condition != "class"
        expect(fits, "coupling.condition", condition, f"null: {recipe.data.source} has no labels")

        torch.manual_seed(address(train.seed, 0, 0, 1, "network"))
        self.objective: Objective = build_objective(recipe, self.source)
        self.bare_model = model = build_model(recipe.model, self.objective)
        if train.init_from is not None and not (recipe.resume and has_checkpoints(recipe.output)):
            begin_from(train.init_from, model)
        if train.gradient_checkpointing:
            recompute(model)
        if train.channels_last:
            model.to(memory_format=torch.channels_last)
        self.objective.attach(model)
        self.averages = Averages(train, model)
        if train.compile:
            # In place: a wrapper would change the names of the weights.
            for network in (model, *self.objective.networks().values()):
                network.compile()
        self.weights = list(model.parameters())
        self.optimizer = build_optimizer(recipe.optimizer, model)
        self.learning_rate = build_schedule(recipe, self.optimizer)
        # The optimizer is used as it is: accelerate's wrapper looks for packages in every step.
        self.model = self.accelerator.prepare(model)
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)
        self.averages.to(self.device)
        self.objective.to(self.device)
        # Couplings over processes exchange in the background: over a process group of their own.
        group = torch.distributed.new_group(backend="gloo") if coupling.scope == "global" and processes > 1 else None
        coupling = build_coupling(recipe, group)
        blocks = range(first, first + accumulation)
        kind = KINDS.get(recipe.coupling.method, Pairs)
        self.pairs = kind(recipe, self.source, self.objective, coupling, self.device, blocks, total_blocks)
        if self.accelerator.is_main_process and (broken := broken_promise(coupling)):
            log.warning(broken)
        section = recipe.coupling
        mixed = self.objective.tells == "class" and section.condition is None and section.method != "independent"
        if self.accelerator.is_main_process and mixed:
            log.warning(
                "coupling.condition: got null, but the network is told classes: a class is not trained with quite the "
                "noise that it is sampled from; class couples within classes"
            )
        self.ends = termination.Agreement(processes)
        self.step = 0
        self.losses: list[Tensor] = []  # since they were last looked at: looking at every one would stall a GPU

    # Beginning, and going on from a checkpoint

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.recipe.output / "checkpoints"

    def start(self) -> None:
        """Open the output folder: begin, or continue from the newest intact checkpoint."""
        output, found = self.recipe.output, None
        check_output(self.recipe)
        if self.recipe.resume:
            found = self._choose_checkpoint()
            if found is None and self.recipe.train.init_from and has_checkpoints(output):
                msg = f"no checkpoint in {output} is intact: begin again from train.init_from in another --output"
                raise TrainingError(msg)
        if found is not None:
            self._check_same_run(found)
            self._restore(found)
        if self.accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            (output / "recipe.yaml").write_text(self.recipe.text())
            _truncate(output / "metrics.jsonl", self.step)
        self.accelerator.wait_for_everyone()
        if self.recipe.data.latents is not None:
            self.pairs.source = latents.stored(self.recipe, self.source, self.objective, self.accelerator)
        self.pairs.begin(output, found, self.accelerator)
        self._warm_up()
        if self.recipe.train.tracker:
            self._start_tracker(resumed=found is not None)

    def _start_tracker(self, resumed: bool) -> None:
        """Start the tracker; a run that is resumed goes on in the same run of Weights & Biases, whose id it keeps."""
        output, tracker, project = self.recipe.output, self.recipe.train.tracker, self.recipe.train.tracker_project
        options: dict[str, Any] = {}
        if tracker == "tensorboard":  # which takes the name of a folder of the output for that of a project
            project, options = tracker, {"purge_step": self.step + 1}  # what was logged beyond the checkpoint
        elif tracker == "wandb" and self.accelerator.is_main_process:
            kept = output / "wandb-id"
            if not (resumed and kept.is_file()):
                kept.write_text(secrets.token_hex(8))
            options = {"name": output.name, "dir": str(output), "config": self.recipe.sections()}
            options |= {"id": kept.read_text(), "resume": "allow"}
        self.accelerator.init_trackers(project, init_kwargs={tracker: options})

    def _choose_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Open the newest intact checkpoint that the first process finds; all must find it intact."""
        newest = checkpoint.newest(self.checkpoints) if self.accelerator.is_main_process else None
        (step,) = broadcast_object_list([newest and newest.step])
        if step is None:
            return None
        error = ""
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
        with self.accelerator.local_main_process_first():  # the others find on disk what it compiles
            couplings.warmup()
        rows, number = self.recipe.train.batch_size_per_device, self.accelerator.process_index
        draws = Draws(0, 0, number, self.accelerator.num_processes, self.device)
        made_up = draws.normal(rows * (1 + self.pairs.candidates), *self.objective.shape)
        self.pairs.coupling(made_up[:rows], made_up[rows:])

    def _check_same_run(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue as another run than the one that began; say what else is different."""
        now, before = self.recipe.sections(), yaml.safe_load((found.folder / "recipe.yaml").read_text())
        broken = []
        for section in ("objective", "data", "model", "optimizer", "coupling", "train"):
            for name, value in before[section].items():
                if now[section].get(name) == value:
                    continue
                if name not in FREE.get(section, ()):
                    broken.append(f"{section}.{name} {value!r}, not {now[section].get(name)!r}")
                elif self.accelerator.is_main_process:
                    log.warning("resumed with %s.%s %r instead of %r", section, name, now[section].get(name), value)
        if broken:
            msg = f"the run in {self.recipe.output} began with {'; '.join(broken)}: choose another --output"
            raise TrainingError(msg)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        # Copied into the existing parameters: the memory that the kernels see stays as it was.
        self.bare_model.load_state_dict(found.tensors("model"))
        self.averages.restore({name: found.tensors(name) for name in self.averages.of}, found.state["ema_step"])
        checkpoint.restore_optimizer(self.optimizer, found.tensors("optimizer"), found.state["optimizer"])
        if isinstance(self.recipe.optimizer, Optimizer):
            for group in self.optimizer.param_groups:  # they may have been changed
                group.update(self.recipe.optimizer.options())
        if self.scaler.is_enabled() and found.state["scaler"] is not None:
            self.scaler.load_state_dict(found.state["scaler"])
        for name, network in self.objective.networks().items():
            network.load_state_dict(found.tensors(name))
        self.step = found.step

    # Training

    def advance(self, report: Report, terminated: Sequence[int]) -> bool:
        """Train until the last step, or until a process is asked to end; return whether it is finished."""
        train, output, times = self.recipe.train, self.recipe.output, []
        self.model.train()
        with closing(self.pairs.steps(self.step, train.steps, terminated)) as steps:
            while self.step < train.steps:
                began = time.perf_counter()
                step = next(steps)
                self.losses.append(self.train_step(step.blocks))
                last, record = self.step == train.steps, None
                if self.step % train.log_every == 0 or last:
                    numbers = torch.stack([self.losses[-1].float(), step.reduction.float().to(self.device)])
                    self._check_finite()
                    loss, reduction = self.accelerator.reduce(numbers, "mean").tolist()
                    record = {"step": self.step, "loss": loss, "reduction": reduction}
                stop = self.ends(self.step, bool(terminated))
                saves = stop or last or self.step % train.checkpoint_every == 0
                draws = train.sample_every and self.step % train.sample_every == 0 and not last
                if (saves or draws) and self.device.type == "cuda":
                    # Or what follows would take what is left of the step for its own.
                    torch.cuda.current_stream(self.device).synchronize()
                times.append((step.coupling_ms, step.hidden_ms, 1000 * (time.perf_counter() - began)))
                if record is not None:
                    means = map(fmean, zip(*times, strict=True))
                    record |= zip(("coupling_ms", "hidden_ms", "step_ms"), means, strict=True)
                    record["lr"] = self.optimizer.param_groups[0]["lr"]
                    self._log(record)
                    times.clear()
                report(self.step, record)
                if saves:
                    self.save()
                if draws:
                    self.draw(output / "samples" / f"step-{self.step}.png")
                if stop:
                    break
        self.ends.settle()
        return self.step == train.steps

    def train_step(self, blocks: Sequence[Block]) -> Tensor:
        """Do one optimizer step on blocks of data with the noise that they were paired with; return its mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        losses = []
        for number, block in enumerate(blocks, 1):
            block.draws.seed_network()
            # Gradients add up over the blocks; processes exchange the sum.
            with nullcontext() if number == len(blocks) else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.objective.loss(self.model, block.data, block.noise, block.draws, **block.context).mean()
                self.scaler.scale(loss / len(blocks)).backward()
            losses.append(loss.detach())
        if self.recipe.optimizer.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.weights, self.recipe.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.averages.follow()
        self.step += 1
        self.objective.after_step(self.bare_model, self.step)
        return torch.stack(losses).mean()

    def _check_finite(self) -> None:
        losses, self.losses = self.losses, []
        largest = torch._foreach_norm(self.weights, torch.inf)
        finite = torch.stack([value.float() for value in largest]).isfinite().all()
        bad = torch.where(finite, torch.inf, float(self.step))[None]
        if losses and not self.scaler.is_enabled():
            steps = torch.arange(self.step - len(losses) + 1, self.step + 1.0, device=self.device)
            bad = torch.cat([bad, torch.where(torch.stack(losses).isfinite(), torch.inf, steps)])
        # Over all processes, so that they end together.
        step = self.accelerator.gather(bad.min()[None]).min().item()
        # With fp16 a step may overflow: it is skipped and the scale halved, until nothing is left to halve.
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
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
            tensors = {
                "model": self.bare_model.state_dict(),
                **self.averages.tensors(),
                "optimizer": optimizer,
                **self.pairs.tensors(self.step),
                **{name: network.state_dict() for name, network in self.objective.networks().items()},
            }
            state = {
                "ema_step": self.averages.steps,
                "optimizer": plain,
                "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            }
            checkpoint.save(self.checkpoints, self.step, tensors, state, {"recipe.yaml": self.recipe.text()})
            checkpoint.prune(self.checkpoints, self.recipe.train.keep_last)
        self.accelerator.wait_for_everyone()

    # Results

    def draw(self, path: Path) -> None:
        """Write a grid of 64 samples."""
        if not self.accelerator.is_main_process:
            return
        generator = torch.Generator().manual_seed(address(self.recipe.evaluate.seed, 0, 0, 1, "sample"))
        noise = torch.randn(64, *self.objective.shape, generator=generator).to(self.device)
        choices: Any = self.recipe.evaluate.prompts
        if not choices and self.objective.tells == "class":
            choices = range(len(self.source.classes))
        told = self.objective.choose(self.source, 64, self.recipe.evaluate.seed, choices)
        with self.averages.lent() as model, torch.no_grad():
            samples = self.objective.sample(model, noise, max(self.recipe.evaluate.steps), generator, told)
        path.parent.mkdir(exist_ok=True)
        grid = pictures.grid(samples, pictures.columns(choices))
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
            say_whose(output / "pipeline", output.name, self.step, self.recipe.train.ema_decay)
        self.accelerator.wait_for_everyone()


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
