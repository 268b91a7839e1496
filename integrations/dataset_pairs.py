"""Pairs that look beyond the batch: noise that picks its data in the whole dataset, or that stays with its data."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from couplings import persistent, semidiscrete
from couplings.noise import normal

from .checkpoint import Checkpoint
from .config import RecipeError, expect
from .data import Batch, Images
from .pairs import Block, Pairs
from .randomness import Draws, epoch_order

_SCANNED = 256  # rows at a time


class SemidiscretePairs(Pairs):
    """Noise picks the row of the data that it trains with; an epoch uses every row once.

    The plan is that of ``coupling.options.potentials``, or is fitted when the run begins. The run keeps a copy.
    """

    source: Images

    def begin(self, folder: Path, found: Checkpoint | None, accelerator: Accelerator) -> None:
        """Read or fit the plan; a run that goes on reads its copy."""
        kept, given = folder / "plan.safetensors", self.recipe.coupling.options.get("potentials")
        latents = folder / "latents.npy" if self.recipe.objective.name == "stable_diffusion" else None
        if found is None or latents is None:
            data, labels = self._whole()
        if found is None:
            plan = self._read(Path(str(given)), data) if given is not None else None
            if accelerator.is_main_process:
                (self._fitted(data, labels) if plan is None else plan).save(kept)
                if latents is not None:
                    np.save(latents, data.numpy(), allow_pickle=False)
        accelerator.wait_for_everyone()
        # Latents are kept: encoded again, on a GPU, they may differ in their last digits.
        plan = self._read(kept, data if latents is None else np.load(latents, mmap_mode="r", allow_pickle=False))
        batch = self.recipe.train.global_batch_size
        loader = plan.loader(self.source, batch, seed=self.recipe.train.seed, rank=0, world_size=1)
        # Of this epoch, and of the next one if it is loaded ahead.
        self._pairs_of_epoch = lru_cache(2)(loader.pairs)

    def batches(self, steps: range, workers: int) -> Iterator[Batch]:
        """Load the rows that the noise of each block has picked."""
        rows = (
            (self._pairs_of(step, number)[1] % len(self.source)).tolist() for step in steps for number in self.blocks
        )
        return self.source.load(rows, workers, self.device.type == "cuda")

    def mirrored(self, draws: Draws, rows: int) -> Tensor | None:
        """Choose the rows that are mirrored: where the mirror image is the one that was picked."""
        if not self.recipe.data.flip:
            return None
        return (self._pairs_of(draws.step, draws.block)[1] >= len(self.source)).to(self.device)

    def draw(self, draws: Draws, data: Tensor, mirrored: Tensor | None) -> Tensor:
        """Draw the noise that has picked the rows of a block."""
        return normal(self._pairs_of(draws.step, draws.block)[0], data.shape[1:], device=self.device)

    def couple(self, blocks: list[Block]) -> tuple[list[Block], Tensor]:
        """Leave the pairs as they are; the reduction is against each row with the noise of the row before."""
        apart, others = [torch.zeros((), device=self.device) for _ in range(2)]
        for block in blocks:
            apart += (block.data - block.noise).square().sum()
            others += (block.data - block.noise.roll(1, 0)).square().sum()
        return blocks, 1.0 - apart / others

    def _pairs_of(self, step: int, number: int) -> tuple[Tensor, Tensor]:
        """Find the seeds of a block's noise, and the numbers of the rows that it picked."""
        epoch, first, last = self.piece(step, number)
        seeds, index = self._pairs_of_epoch(epoch)
        return seeds[first:last], index[first:last]

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Load all rows as noise is mixed into them, and their labels."""
        data, labels = [], []
        for number, batch in enumerate(self.source.scan(_SCANNED, self.recipe.data.workers)):
            draws = Draws(self.recipe.train.seed, 0, number, 1, self.device)
            data.append(self.data(batch.images, draws).cpu())
            labels.append(batch.labels)
        return torch.cat(data), torch.cat(labels)

    def _fitted(self, data: Tensor, labels: Tensor) -> semidiscrete.Semidiscrete:
        section = self.recipe.coupling
        return semidiscrete.fit(
            data,
            classes=labels if section.condition == "class" else None,
            mirrored=self.recipe.data.flip,
            tolerance=float(section.options.get("tolerance", 0.05)),
            seed=self.recipe.train.seed,
            device=self.device,
            progress=sys.stderr.isatty(),
        )

    def _read(self, path: Path, data: Tensor | np.ndarray) -> semidiscrete.Semidiscrete:
        field = "coupling.options.potentials"
        try:
            plan = semidiscrete.Semidiscrete.load(path, data, device=self.device)
        except (OSError, ValueError) as error:
            msg = f"{field}: {error}"
            raise RecipeError(msg) from error
        flip, condition = self.recipe.data.flip, self.recipe.coupling.condition
        fitted = f"{path} was fitted {'with' if plan.mirrored else 'without'} mirrored data"
        expect(plan.mirrored == flip, "data.flip", flip, f"{plan.mirrored}: {fitted}")
        within = None if plan.classes is None else "class"
        fitted = f"{path} was fitted {'with' if within else 'without'} classes"
        expect(within == condition, "coupling.condition", condition, f"{within}: {fitted}")
        return plan


class PersistentPairs(Pairs):
    """Noise of a few seeds stays with each row of the data, and is coupled again whenever it is drawn."""

    def begin(self, folder: Path, found: Checkpoint | None, accelerator: Accelerator) -> None:
        """Make the file of seeds, and bring it to where the checkpoint has it."""
        expected = f"another: it trains in one process, and there are {accelerator.num_processes}"
        expect(accelerator.num_processes == 1, "coupling.method", "persistent", expected)
        path, flip = folder / "pairs.bin", self.recipe.data.flip
        path.unlink(missing_ok=True)
        # A mirrored row has seeds of its own.
        rows, seeds = len(self.source) * (1 + flip), int(self.recipe.coupling.options.get("seeds", 4))
        self.store = persistent.Pairs.open(path, rows=rows, seeds=seeds, seed=self.recipe.train.seed)
        if found is not None:
            self.store.load_state_dict({"seeds": found.tensors("pairs")["seeds"], "number": 0})
        self._drawn: dict[int, persistent.Drawn] = {}
        self._kept: list[tuple[int, persistent.Drawn]] = []
        self._writing = threading.Lock()

    def draw(self, draws: Draws, data: Tensor, mirrored: Tensor | None) -> Tensor:
        """Draw noise of one of the seeds of each row of a block."""
        epoch, first, last = self.piece(draws.step, draws.block)
        rows = epoch_order(self.recipe.train.seed, epoch, len(self.source))[first:last]
        if mirrored is not None:
            rows = rows + len(self.source) * mirrored.cpu()
        drawn = self._drawn[draws.block] = self.store.draw(rows, draws.generator("coupling", torch.device("cpu")))
        return normal(drawn.seeds, data.shape[1:], device=self.device)

    def couple(self, blocks: list[Block]) -> tuple[list[Block], Tensor]:
        """Pair the noise of a block with its data, and keep the seeds with the rows that got their noise."""
        [block] = blocks
        coupled = self.coupled(blocks)
        drawn = self._drawn.pop(block.draws.block)
        with self._writing:
            self.store.keep(drawn, drawn.seeds[coupled.index.cpu()])
            step = block.draws.step
            self._kept = [(s, d) for s, d in self._kept if s > step - 4] + [(step, drawn)]
        return self.divided(blocks, coupled.noise), torch.as_tensor(coupled.reduction)

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Return the seeds as they were before ``step``: the pairs of steps ahead of it are undone."""
        with self._writing:
            seeds = self.store.state_dict()["seeds"]
            for made, drawn in reversed(self._kept):
                if made >= step:
                    seeds[drawn.rows, drawn.slots] = drawn.seeds
        return {"pairs": {"seeds": seeds}}


KINDS: dict[str, type[Pairs]] = {"semidiscrete": SemidiscretePairs, "persistent": PersistentPairs}
"""Ways to make pairs that are not couplings of a batch, by ``coupling.method``."""
