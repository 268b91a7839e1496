"""Random numbers addressed by what they are for, so that a step number is the whole random state.

Every optimizer step consists of ``blocks`` blocks of ``train.batch_size_per_device`` rows. Whoever
works on block ``b`` of step ``s`` draws the same numbers, whether one process runs all blocks or
sixteen share them, in an uninterrupted run or in one resumed from a checkpoint.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

PURPOSES = ("augment", "noise", "time", "network", "coupling", "encode", "caption", "offset", "sample")
_STRIDE = 16  # room for further purposes without changing the numbers of these


def _scramble(value: int) -> int:
    # The finaliser of MurmurHash3: a bijection of 32-bit integers, so distinct addresses get
    # distinct seeds. (torch's CPU generator keeps only the low 32 bits of a seed; hashing the
    # address would make two blocks of a long run share their noise, by the birthday paradox.)
    value ^= value >> 16
    value = value * 0x85EBCA6B & 0xFFFFFFFF
    value ^= value >> 13
    value = value * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16


def address(seed: int, step: int, block: int, blocks: int, purpose: str) -> int:
    """Return the 32-bit seed of one purpose in one block of one step.

    Distinct for all addresses of a run with ``steps * blocks <= 2**28``.
    """
    offset = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=4).digest(), "little")
    counter = (step * blocks + block) * _STRIDE + PURPOSES.index(purpose)
    return _scramble((counter + offset) & 0xFFFFFFFF)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one block of one step."""

    seed: int
    step: int
    block: int
    blocks: int
    device: torch.device

    def address(self, purpose: str) -> int:
        """Return the seed for ``purpose``: one of `PURPOSES`."""
        return address(self.seed, self.step, self.block, self.blocks, purpose)

    def generator(self, purpose: str, device: torch.device | None = None) -> torch.Generator:
        """Return a fresh generator for ``purpose``: one of `PURPOSES`."""
        return torch.Generator(device or self.device).manual_seed(self.address(purpose))

    def seed_network(self) -> None:
        """Seed the global generators that a network draws from, for dropout: those of the host and of the device."""
        seed = self.address("network")
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw the block's noise."""
        return torch.randn(*shape, generator=self.generator("noise"), device=self.device)


def epoch_order(seed: int, epoch: int, rows: int) -> torch.Tensor:
    """Return the order in which epoch ``epoch`` visits the data: ``(rows,)`` int64."""
    key = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=4).digest()
    return torch.randperm(rows, generator=torch.Generator().manual_seed(int.from_bytes(key, "little")))
