"""Train all networks of one way of pairing, and measure them along the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from couplings import couple, semidiscrete
from couplings._files import written_atomically
from integrations import measure
from integrations.build import build_optimizer, build_schedule
from integrations.config import Recipe
from integrations.data import Source, load_source, to_signed
from integrations.models import build_model
from integrations.randomness import Draws
from integrations.sections import Data

from ..record import append, environment, read
from ..training import VERSIONS, settings
from . import pairs
from .networks import Replayed, Stack
from .studies import STUDIES, Study

SAVE_EVERY = 120  # seconds
AT_ONCE = 1000  # rows of each network that are sampled at a time
NOISE_SEED = 1_000_003  # of the noise that is sampled from, the same for all networks


@dataclass(frozen=True)
class Task:
    """One way of pairing, on several seeds.

    Attributes
    ----------
    study, pairing : str
    seeds : tuple of int
    data : str
        A recipe's ``data.source``.
    device : str
    folder : Path
        Where classifier and plan are.
    records : Path
        File of the records.
    deadline : float or None
        Time after which nothing more is begun, in seconds since the epoch.
    further : tuple of str
        Overrides of the recipes.
    """

    study: str
    pairing: str
    seeds: tuple[int, ...]
    data: str
    device: str
    folder: Path
    records: Path
    deadline: float | None = None
    further: tuple[str, ...] = ()


def images_of(source: Source, device: str) -> Tensor:
    """Read all images, in [-1, 1]."""
    # Scaled on the CPU: a GPU rounds otherwise, and a plan belongs to the bits of its data.
    return torch.cat([to_signed(batch.images) for batch in source.scan(5000)]).to(device)


def prepare(data: str, device: str, folder: Path) -> None:
    """Make what all tasks share: compiled kernels, the classifier and the dataset-level coupling."""
    source = load_source(Data(source=data))
    for rows in (128, 2048):
        couple(torch.randn(rows, 8), torch.randn(rows, 8))
    measure.feature_network("classifier", source, folder)
    if not (folder / pairs.PLAN).is_file():
        pairs.fit(images_of(source, device), folder)


def run(task: Task) -> str:
    """Train and measure; return how it ended.

    What is on record is not measured again, and what a run that was ended has trained is not trained again: its pairs
    are only counted off.
    """
    torch.set_num_threads(1)
    device = torch.device(task.device)
    source = load_source(Data(source=task.data))
    study = STUDIES[task.study](source, task.pairing, task.further)
    train = next(iter(study.recipes.values())).train
    keys = {
        (name, seed): {"study": task.study, "objective": name, "pairing": task.pairing, "seed": seed}
        | {"settings": _settings(recipe)}
        for name, recipe in study.recipes.items()
        for seed in task.seeds
    }
    known = read(task.records)
    checkpoints = [*range(train.checkpoint_every, train.steps, train.checkpoint_every), train.steps]
    wanted = [
        key | {"step": step}
        for step in checkpoints
        for key in keys.values()
        if not any((key | {"step": step}).items() <= record.items() for record in known)
    ]
    if not wanted:
        return "on record"
    study.to(device)
    images = images_of(source, task.device)
    scores = measure.Scores(
        measure.feature_network(str(task.folder / "classifier.safetensors"), source, task.folder), source, device
    )
    count = train.global_batch_size
    chi2 = semidiscrete.Semidiscrete.load(task.folder / pairs.PLAN).chi2 if task.pairing == "semidiscrete" else None
    trainer = Trainer(study, task.seeds, device)
    kept = Kept(task.folder / f"{'-'.join([task.study, task.pairing, *map(str, task.seeds)])}.pt", list(keys.values()))
    trained, spent = kept.give(trainer, not_after=wanted[0]["step"])
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=-(-trainer.recipe.evaluate.samples // count))
    passed = max(0, trained - recent.maxlen)
    streams = [
        pairs.PAIRINGS[task.pairing](pairs.Run(images, count, train.steps, seed, task.folder, passed + 1))
        for seed in task.seeds
    ]
    began = time.perf_counter() - spent
    for step in range(1, train.steps + 1):
        if task.deadline is not None and time.time() > task.deadline:
            if trainer.steps:
                kept.take(trainer, time.perf_counter() - began, now=True)
            return f"ended after {trainer.steps} steps: the time is over"
        parts = [next(stream) for stream in streams]
        if step <= passed:
            continue
        data, noise = (torch.stack(side) for side in zip(*parts, strict=True))
        recent.append((data, noise))
        if step > trained:
            trainer.step(data.flatten(0, 1), noise.flatten(0, 1))
            kept.take(trainer, time.perf_counter() - began, now=step in checkpoints)
        if step not in checkpoints or step < trained:
            continue
        before = max((earlier for earlier in checkpoints if earlier < step), default=0)
        seconds, means = time.perf_counter() - began, (trainer.distance / (step - before)).tolist()
        found = trainer.frechet(scores, *(torch.cat(side, 1) for side in zip(*recent, strict=True)))
        place = environment(1, None, VERSIONS) | {"device": _name(device)}
        for key in (key for key in wanted if key["step"] == step):
            about = {"distance": means[task.seeds.index(key["seed"])], "seconds": seconds, "chi2": chi2}
            append(task.records, key | about | {"frechet": found[key["objective"], key["seed"]], "environment": place})
        trainer.distance.zero_()
        began = time.perf_counter()
    kept.path.unlink(missing_ok=True)
    return f"{train.steps} steps"


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what is the same for all pairings and seeds."""
    values = settings(recipe)
    del values["coupling"]
    values["train"].pop("seed", None)
    return values


@dataclass
class Kept:
    """A file that training goes on from.

    Attributes
    ----------
    path : Path
    about : list
        What is trained; a file about something else is not read.
    at : float
        When it was written, in seconds.
    """

    path: Path
    about: list[dict[str, Any]]
    at: float = field(default_factory=time.perf_counter)

    def take(self, trainer: Trainer, seconds: float, *, now: bool) -> None:
        """Keep what is trained, and the seconds since the last checkpoint: now, or if it is time."""
        if now or time.perf_counter() > self.at + SAVE_EVERY:
            with written_atomically(self.path, force=True) as file:
                torch.save({"about": self.about, "seconds": seconds, "trainer": trainer.state()}, file)
            self.at = time.perf_counter()

    def give(self, trainer: Trainer, *, not_after: int) -> tuple[int, float]:
        """Return the steps that are trained, and the seconds since the last checkpoint: none if there is no file."""
        kept = torch.load(self.path, map_location=trainer.device, weights_only=True) if self.path.is_file() else None
        if kept is None or kept["about"] != self.about or kept["trainer"]["steps"] > not_after:
            return 0, 0.0
        trainer.restore(kept["trainer"])
        return trainer.steps, kept["seconds"]


class Trainer:
    """Networks of a study: one for each objective and seed.

    Parameters
    ----------
    study : Study
    seeds : sequence of int
    device : torch.device
    """

    def __init__(self, study: Study, seeds: tuple[int, ...], device: torch.device) -> None:
        self.study, self.seeds, self.device = study, seeds, device
        networks = []
        for name, recipe in study.recipes.items():
            for seed in seeds:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    networks.append(build_model(recipe.model, study.objectives[name]))
        self.recipe = recipe
        stack = Stack.of(networks)
        self.weights = nn.Parameter(stack.values.to(device))
        self.stack = stack.holding(self.weights)
        self.average = self.weights.detach().clone()
        self.optimizer = build_optimizer(recipe.optimizer, nn.ParameterList([self.weights]))
        self.rate = build_schedule(recipe, self.optimizer)
        self.steps = 0
        self.distance = torch.zeros(len(seeds), device=device)  # of the pairs of each seed, added up over the steps
        study.begin(self.average)
        self._gradient = self.gradient
        if device.type == "cuda":
            shape = len(seeds) * self.recipe.train.global_batch_size, *next(iter(study.objectives.values())).shape
            self._gradient = Replayed(self.gradient, self.mixed(*torch.randn(2, *shape, device=device)))

    def mixed(self, data: Tensor, noise: Tensor) -> Any:
        """Mix a batch for each seed, for the next step."""
        return self.study.mixed(data, noise, Draws(0, self.steps, 0, 1, self.device))

    def gradient(self, mixed: Any) -> Tensor:
        """Return the gradient of each network's loss by its weights."""
        losses = self.study.losses(self.stack, mixed).view(len(self.stack), -1)
        return torch.autograd.grad(losses.mean(1).sum(), self.weights)[0]

    def step(self, data: Tensor, noise: Tensor) -> None:
        """Train on a batch for each seed."""
        self.distance += (data - noise).square().flatten(1).sum(1).view(len(self.seeds), -1).mean(1)
        self.weights.grad = self._gradient(self.mixed(data, noise))
        if self.recipe.optimizer.clip is not None:
            norms = self.weights.grad.norm(dim=1, keepdim=True)
            self.weights.grad.mul_((self.recipe.optimizer.clip / (norms + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.steps)
        self.optimizer.step()
        self.steps += 1
        decay, ramp = self.recipe.train.ema_decay, (1 + self.steps) / (10 + self.steps)
        self.average.lerp_(self.weights.detach(), 1 - (min(decay, ramp) if self.recipe.train.ema_ramp else decay))
        self.study.after_step(self.stack, self.steps)

    def state(self) -> dict[str, Any]:
        """Return all that training changes."""
        tensors = {"weights": self.weights.detach(), "average": self.average, "target": self.study.target}
        tensors["distance"] = self.distance
        return tensors | {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        with torch.no_grad():
            self.weights.copy_(state["weights"])
        self.average, self.distance, self.steps = state["average"], state["distance"], state["steps"]
        if self.study.target is not None:
            self.study.target.copy_(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def frechet(
        self, scores: measure.Scores, data: Tensor, paired: Tensor
    ) -> dict[tuple[str, int], dict[str, float | None]]:
        """Return the Frechet distance of each network's samples, for every way of sampling; None if not finite.

        `data` and its noise are ``(seeds, n, *shape)``; fewer rows than samples come again.
        """
        count, shape, seeds = self.recipe.evaluate.samples, data.shape[2:], len(self.seeds)
        again = torch.arange(count, device=self.device) % data.shape[1]
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise, fresh = (torch.randn(count, *shape, generator=generator).to(self.device) for _ in range(2))
        found: dict[tuple[str, int], dict[str, float | None]] = {}
        for name, average in zip(self.study.objectives, self.average.split(seeds), strict=True):
            images: dict[str, list[Tensor]] = {}
            for rows in torch.arange(count, device=self.device).split(AT_ONCE):
                repeated = (x[rows].repeat(seeds, *[1] * len(shape)) for x in (noise, fresh))
                pair = tuple(x[:, again[rows]].flatten(0, 1) for x in (data, paired))
                for way, samples in self.study.samples(name, self.stack.holding(average), *repeated, pair):
                    images.setdefault(way, []).append(samples.unflatten(0, (seeds, -1)))
            for k, seed in enumerate(self.seeds):
                found[name, seed] = {way: _distance(scores, (x[k] for x in drawn)) for way, drawn in images.items()}
        return found


def _distance(scores: measure.Scores, images: Iterable[Tensor]) -> float | None:
    try:
        return scores(images)["fid"]
    except FloatingPointError:
        scores.fid.reset()
        return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
