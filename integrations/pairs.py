"""What each step trains on: rows are chosen, loaded and encoded, their noise is drawn, and the two are coupled.

All of it happens in the background, one window of steps ahead of the step that is trained on. Every number is a
function of (seed, step, block), so that the pairs are the same as if each step had made its own.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from couplings import Coupled, Coupling
from couplings.ahead import Pending

from .build import TrainingError, candidates
from .checkpoint import Checkpoint
from .config import Recipe
from .data import Batch, DataError, Piece, Source, to_signed
from .latents import StoredLatents, of_sides
from .objective import Objective
from .randomness import Draws

log = logging.getLogger(__name__)

LOST = (RuntimeError, OSError, EOFError, DataError)
"""What is raised where a loading process is gone, or was while it sent."""


@dataclass
class Block:
    """Data and noise, row by row: as it was drawn at first, then as it is paired."""

    data: Tensor
    noise: Tensor
    draws: Draws
    labels: Tensor
    context: dict[str, Tensor]
    """What the network is told: arguments of it."""


@dataclass
class Step:
    """What one step trains on.

    Parameters
    ----------
    blocks : list of Block
        Of this process, paired.
    reduction : 0-d Tensor
        How much nearer the pairs are than they came; mean over the blocks.
    coupling_ms, hidden_ms : float
        What the step waited for the coupling, and how much of the coupling ran behind the steps before.
    """

    blocks: list[Block]
    reduction: Tensor
    coupling_ms: float = 0.0
    hidden_ms: float = 0.0


@dataclass
class Window:
    """Steps that are coupled together, and when the coupling began and ended, in seconds."""

    steps: list[Step]
    began: float
    ended: float

    def tensors(self) -> Iterator[Any]:
        """Yield all that the steps hold."""
        for step in self.steps:
            yield step.reduction
            for block in step.blocks:
                yield from (block.data, block.noise, block.labels, *block.context.values())


class Pairs:
    """The pairs of data and noise that a process trains on.

    `batches` chooses the rows of data, `draw` their noise, `couple` decides which row gets which: another way to make
    pairs overrides these three. All else is when and where they run.

    Parameters
    ----------
    recipe : Recipe
        What is trained.
    source : Source
        Where the data comes from.
    objective : Objective
        Turns images into data as noise is mixed into it.
    coupling : Coupling
        The recipe's; called in the background.
    device : torch.device
        Where the pairs are made.
    blocks : range
        The blocks of each step that this process works on.
    total_blocks : int
        Blocks of a step, over all processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        objective: Objective,
        coupling: Coupling,
        device: torch.device,
        blocks: range,
        total_blocks: int,
    ) -> None:
        self.recipe, self.source, self.objective, self.device = recipe, source, objective, device
        self.blocks, self.total_blocks = blocks, total_blocks
        self.coupling, self.candidates = coupling, candidates(coupling)
        self.unreadable: set[str] = set()

    def begin(self, folder: Path, found: Checkpoint | None, accelerator: Accelerator) -> None:
        """Get ready in the folder of a run that begins, or goes on from a checkpoint; collective."""

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint before ``step`` must hold to make the same pairs again."""
        return {}

    # Choosing, loading and coupling

    def piece(self, step: int, number: int) -> Piece:
        """Return where in its epoch a block of a step lies; what an epoch has left after whole steps is not used."""
        batch, size = self.recipe.train.global_batch_size, self.recipe.train.batch_size_per_device
        epoch, place = divmod(step, len(self.source) // batch)
        first = place * batch + number * size
        return Piece(epoch, first, first + size)

    def batches(self, steps: range, workers: int) -> Iterator[Batch]:
        """Choose the rows of each block of some steps, and yield them, loaded by ``workers`` processes."""
        pieces = (self.piece(step, number) for step in steps for number in self.blocks)
        return self.source.blocks(pieces, self.recipe.train.seed, workers, self.device.type == "cuda")

    def load(self, batch: Batch, step: int, number: int) -> Block:
        """Turn a batch into data as noise is mixed into it, and draw its noise, still unpaired."""
        for message in set(batch.unreadable) - self.unreadable:
            self.unreadable.add(message)
            log.warning("unreadable image replaced by its neighbour: %s", message)
        draws = Draws(self.recipe.train.seed, step, number, self.total_blocks, self.device)
        mirrored = self.mirrored(draws, len(batch.images))
        data = self.data(batch.images, draws, mirrored)
        labels = batch.labels.to(self.device, non_blocking=True)
        context = self.objective.tell(self.objective.told(labels, batch.texts, draws))
        return Block(data, self.draw(draws, data, mirrored), draws, labels, context)

    def data(self, images: Tensor, draws: Draws, mirrored: Tensor | None = None) -> Tensor:
        """Turn images, or what is stored of them, into data as noise is mixed into it."""
        images = images.to(self.device, non_blocking=True)
        if isinstance(self.source, StoredLatents):
            return self.objective.latents(of_sides(images, mirrored), draws)
        images = to_signed(images)
        if mirrored is not None:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return self.objective.encode(images, draws)

    def mirrored(self, draws: Draws, rows: int) -> Tensor | None:
        """Choose which rows of a block are mirrored, ``(rows,)``; None if the recipe mirrors none."""
        if not self.recipe.data.flip:
            return None
        return torch.rand(rows, generator=draws.generator("augment"), device=self.device) < 0.5

    def draw(self, draws: Draws, data: Tensor, mirrored: Tensor | None) -> Tensor:
        """Draw the noise of a block, still unpaired."""
        return draws.normal(len(data) * self.candidates, *data.shape[1:])

    def couple(self, blocks: list[Block]) -> tuple[list[Block], Tensor]:
        """Pair the noise of some blocks with their data, all as one; also return the distance reduction."""
        coupled = self.coupled(blocks)
        return self.divided(blocks, coupled.noise), torch.as_tensor(coupled.reduction)

    def coupled(self, blocks: list[Block]) -> Coupled[Tensor]:
        """Couple the data of some blocks with their noise."""
        data, noise = _joined([block.data for block in blocks]), _joined([block.noise for block in blocks])
        condition = None
        if self.recipe.coupling.condition == "class":
            condition = _joined([block.labels for block in blocks])
        generator = blocks[0].draws.generator("coupling", torch.device("cpu"))
        try:
            return self.coupling(data, noise, condition=condition, generator=generator)
        except ValueError as error:  # data that is not finite, as of an encoder that overflows
            msg = f"the data of step {blocks[0].draws.step + 1} cannot be coupled: {error}"
            raise TrainingError(msg) from error

    def divided(self, blocks: list[Block], noise: Tensor) -> list[Block]:
        """Give the rows of noise to the blocks whose data they were coupled with."""
        noises = noise.split([len(block.data) for block in blocks])
        return [dataclasses.replace(block, noise=own) for block, own in zip(blocks, noises, strict=True)]

    # One window ahead

    def window(self, steps: range, batches: Iterator[Batch], stopped: Callable[[], bool] = lambda: False) -> Window:
        """Make the pairs of some steps; none once ``stopped``."""
        loaded = []
        for step in steps:
            # Over several processes all take part in the coupling, or none could.
            if stopped() and self.coupling.scope == "local":
                return Window([], 0.0, 0.0)
            loaded.append([self.load(next(batches), step, number) for number in self.blocks])
        began = time.perf_counter()
        by_block = [list(column) for column in zip(*loaded, strict=True)]
        # Ordered by block first, so that all processes together have the order of one.
        pools = [list(chain(*by_block))] if self.coupling.scope == "global" else by_block
        paired, reductions = zip(*map(self.couple, pools), strict=True)
        ended = time.perf_counter()
        ordered, reduction = list(chain(*paired)), torch.stack(reductions).mean()
        return Window([Step(ordered[i :: len(steps)], reduction) for i in range(len(steps))], began, ended)

    def steps(self, first: int, last: int, terminated: Sequence[int] = ()) -> Iterator[Step]:
        """Yield what each step from ``first`` to ``last - 1`` trains on; the window after it is made meanwhile.

        An error is raised in the step that it belongs to. ``terminated`` is not empty once the process is asked to end.
        """
        size, workers, stop = self.recipe.coupling.window, self.recipe.data.workers, Event()
        # Whole windows, wherever a run begins and ends: what is coupled together does not depend on it.
        windows = [range(start, start + size) for start in range(first - first % size, last, size)]

        def read_from(window: range, workers: int) -> Iterator[Batch]:
            return self.batches(range(window.start, windows[-1].stop), workers)

        def begin(window: range) -> Pending[Window]:
            work = partial(self.window, window, batches, stop.is_set)
            return Pending(work, device=self.device, tensors=Window.tensors)

        if not windows:
            return
        batches = read_from(windows[0], workers)
        pending = begin(windows[0])
        try:
            for number, window in enumerate(windows):
                asked = time.perf_counter()
                try:
                    found = pending.result()
                except LOST:
                    if not terminated:
                        raise
                    # A cluster ends all processes of a job, the loading ones too: the last steps load here.
                    batches = read_from(window, 0)
                    found = self.window(window, batches)
                if number + 1 < len(windows):
                    pending = begin(windows[number + 1])
                coupling = found.ended - found.began
                waited = max(0.0, found.ended - max(asked, found.began))
                for i, step in zip(window, found.steps, strict=True):
                    if i == max(window.start, first):
                        step.coupling_ms, step.hidden_ms = 1000 * waited, 1000 * (coupling - waited)
                    if first <= i < last:
                        yield step
        finally:
            stop.set()
            pending.wait()
            batches.close()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
