"""Which data row has the highest score ``potential + <row, noise>`` for each row of noise.

The search is one matrix product, read once. For a fit, far more picks are read off the same product: a combination
of noise rows with weights of norm 1 is standard normal noise again, and its inner products are the same combination
of theirs. Each group of eight rows is combined along the 240 shortest vectors of the E8 lattice, the most directions
in eight dimensions that are at least 60 degrees apart (Conway, Sloane: Sphere packings, lattices and groups), so that
30 picks cost little more than one, and are worth about ten.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from couplings._products import row_products
from couplings.collectives import Ranks
from couplings.semidiscrete.rows import Rows

__all__ = ["GROUP", "Search"]

GROUP = 8  # noise rows that are combined
_NOISE_ROWS = 1024  # that meet a chunk at a time
_COMBINED = 1 << 27  # scores of combinations that a device holds at a time


class Search:
    """Search of data rows; with `ranks`, each searches its own share and all learn the answer.

    Parameters
    ----------
    rows : Rows
    ranks : Ranks or None
    """

    def __init__(self, rows: Rows, ranks: Ranks | None = None) -> None:
        self.rows, self._ranks = rows, ranks
        self._first, self._last = 0, rows.count
        if ranks is not None:
            self._first = rows.count * ranks.rank // ranks.size
            self._last = rows.count * (ranks.rank + 1) // ranks.size

    def highest(self, potentials: Tensor, noise: Tensor, top: int = 1) -> tuple[Tensor, Tensor]:
        """Find the data rows of highest score.

        Parameters
        ----------
        potentials : (N,) Tensor
        noise : (n, d) Tensor
            Where the rows are.
        top : int
            How many, at most N; not over ranks.

        Returns
        -------
        score, index : (n, top) floating and int64 Tensor
            Highest first. Rows that are mirrored have the number that they have unflipped.
        """
        n, noise = len(noise), noise.to(self.rows.dtype)
        best = torch.full((n, top), -math.inf, dtype=noise.dtype, device=noise.device)
        index = torch.zeros((n, top), dtype=torch.int64, device=noise.device)
        for where, rows in self.rows.chunks(self._first, self._last):
            for start in range(0, n, _NOISE_ROWS):
                part = slice(start, start + _NOISE_ROWS)
                scores = row_products(noise[part], rows, potentials[where])
                if self.rows.mirrored:
                    # A flipped row meets noise as the row meets the noise flipped.
                    other = row_products(self.rows.flipped(noise[part]), rows, potentials[where])
                    scores = torch.maximum(scores, other)
                if top == 1:
                    value, at = scores.max(1, keepdim=True)
                    better = value > best[part]
                    best[part] = torch.where(better, value, best[part])
                    index[part] = torch.where(better, at + where.start, index[part])
                else:
                    value, at = scores.topk(min(top, scores.shape[1]), dim=1)
                    value, keep = torch.cat([best[part], value], 1).topk(top, dim=1)
                    index[part] = torch.cat([index[part], at + where.start], 1).gather(1, keep)
                    best[part] = value
        return self._of_all_ranks(best, index)

    def combined(self, potentials: Tensor, noise: Tensor, *, rough: bool = False) -> Tensor:
        """Find the data rows of highest score for the combinations of each eight noise rows.

        Parameters
        ----------
        potentials : (N,) Tensor
        noise : (8 * G, d) Tensor
        rough : bool
            Whether scores may be rounded to bfloat16, on GPUs and processors that have instructions for it: some 4
            times faster.

        Returns
        -------
        (G, 240) int64 Tensor
            Picks in different rows are independent.
        """
        groups = len(noise) // GROUP
        lines = _lines(noise.device)
        if self.rows.dim == 1:
            line = lines @ noise.view(groups, GROUP, 1)
            return self.highest(potentials, torch.cat([line, -line], 1).view(-1, 1))[1].view(groups, -1)
        rough = rough and (noise.device.type == "cuda" or _multiplies_bfloat16())
        if self.rows.mirrored:
            noise = torch.cat([noise, self.rows.flipped(noise)])
        multiplied = noise.bfloat16() if rough else noise
        best = torch.full((len(noise) // GROUP, 2 * len(lines)), -math.inf, device=noise.device)
        pick = torch.zeros(best.shape, dtype=torch.int64, device=noise.device)
        for where, rows in self.rows.chunks(self._first, self._last):
            if rough:  # measured from the mean, which would cost digits
                rows = self.rows.from_mean(rows).bfloat16()
            for start in range(0, len(best), _NOISE_ROWS // GROUP):
                part = slice(start, start + _NOISE_ROWS // GROUP)
                product = row_products(multiplied[start * GROUP : start * GROUP + _NOISE_ROWS], rows)
                scores = product.float().view(-1, GROUP, len(rows))
                take = _read_off_cpu if noise.device.type == "cpu" else _read_off
                take(scores, potentials[where], lines, where.start, best[part], pick[part])
        if self.rows.mirrored:
            pick = torch.where(best[:groups] >= best[groups:], pick[:groups], pick[groups:])
            best = torch.maximum(best[:groups], best[groups:])
        return self._of_all_ranks(best, pick)[1]

    def _of_all_ranks(self, best: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        if self._ranks is None:
            return best, index
        # float64 holds both exactly. Of equal scores the first rank's, whose rows come first, is taken.
        own = torch.stack([best.double().cpu(), index.double().cpu()]).flatten()
        score, number = self._ranks.all_gather("picks", own).view(-1, 2, *best.shape).unbind(1)
        first = score.argmax(0, keepdim=True)
        return (
            score.gather(0, first)[0].to(best.device, best.dtype),
            number.gather(0, first)[0].to(index.device, index.dtype),
        )


def _read_off_cpu(scores: Tensor, potentials: Tensor, lines: Tensor, offset: int, best: Tensor, pick: Tensor) -> None:
    from couplings.kernels._threads import over_rows
    from couplings.semidiscrete._frame import highest

    arrays = [t.numpy() for t in (scores, potentials.contiguous(), lines, best, pick)]
    over_rows(
        lambda start, stop: highest(*arrays[:3], offset, *arrays[3:], start, stop), len(scores), torch.get_num_threads()
    )


def _read_off(scores: Tensor, potentials: Tensor, lines: Tensor, offset: int, best: Tensor, pick: Tensor) -> None:
    """Do what the kernel does, on any device: the potentials are a ninth row, which each combination takes once."""
    groups, _, width = scores.shape
    both = torch.stack([lines, -lines], 1).flatten(0, 1)
    both = torch.cat([both, torch.ones_like(both[:, :1])], 1)
    step = max(1, _COMBINED // (len(both) * width))
    for start in range(0, groups, step):
        part = slice(start, start + step)
        some = scores[part]
        value, at = (both @ torch.cat([some, potentials.expand(len(some), 1, width)], 1)).max(2)
        better = value > best[part]
        best[part] = torch.where(better, value, best[part])
        pick[part] = torch.where(better, at + offset, pick[part])


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16; without them they are slower than float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


@lru_cache(maxsize=8)
def _lines(device: torch.device) -> Tensor:
    """Make the 120 pairs of opposite shortest vectors of the E8 lattice, one of each, at norm 1; ``(120, 8)``."""
    lines = []
    for i, j in itertools.combinations(range(GROUP), 2):
        for sign in (1.0, -1.0):
            line = [0.0] * GROUP
            line[i], line[j] = 1.0, sign
            lines.append(line)
    for signs in itertools.product((0.5, -0.5), repeat=GROUP - 1):
        if math.prod(signs) > 0:  # an even number of minus signs
            lines.append([0.5, *signs])
    return torch.tensor(lines, device=device) / math.sqrt(2.0)
