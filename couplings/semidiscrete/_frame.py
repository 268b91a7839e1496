"""The hot loop of a fit on CPUs: which data row has the highest score, for every combination of eight noise rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from couplings.kernels._jit import jit

__all__ = ["highest"]

_BLOCK = 256


@jit(fastmath={"contract", "ninf", "nnan", "nsz", "reassoc"})
def highest(scores: Any, potentials: Any, lines: Any, offset: int, best: Any, pick: Any, start: int, stop: int) -> None:
    """Raise `best` and `pick` by a chunk of data rows, for groups `start` to `stop` of eight noise rows.

    Parameters
    ----------
    scores : (G, 8, C) float32
        Inner products of noise rows and data rows.
    potentials : (C,) float32
    lines : (L, 8) float32
        Combinations of a group's noise rows; each is taken with both signs.
    offset : int
        Number of the chunk's first data row.
    best, pick : (G, 2 * L) float32 and int64
        Highest score so far, and its data row.
    """
    # Scores of a block under a line and under its opposite. LLVM finds maxima of integers in vector registers, those
    # of floats one by one: their bits are compared as integers, negative ones turned round.
    held = np.empty((2, _BLOCK), np.float32)
    bits = held.view(np.int32)
    rest = np.int32(0x7FFFFFFF)
    found = np.empty(1, np.int32)
    for k in range(start, stop):
        for a in range(0, scores.shape[2], _BLOCK):
            b = min(a + _BLOCK, scores.shape[2])
            g = potentials[a:b]
            s0, s1, s2, s3 = scores[k, 0, a:b], scores[k, 1, a:b], scores[k, 2, a:b], scores[k, 3, a:b]
            s4, s5, s6, s7 = scores[k, 4, a:b], scores[k, 5, a:b], scores[k, 6, a:b], scores[k, 7, a:b]
            for i in range(lines.shape[0]):
                r0, r1, r2, r3 = lines[i, 0], lines[i, 1], lines[i, 2], lines[i, 3]
                r4, r5, r6, r7 = lines[i, 4], lines[i, 5], lines[i, 6], lines[i, 7]
                for j in range(g.size):
                    x = r0 * s0[j] + r1 * s1[j] + r2 * s2[j] + r3 * s3[j]
                    x += r4 * s4[j] + r5 * s5[j] + r6 * s6[j] + r7 * s7[j]
                    held[0, j], held[1, j] = g[j] + x, g[j] - x
                for side in range(2):
                    most = np.int32(-0x80000000)
                    for j in range(g.size):
                        x = np.int32(bits[side, j] ^ ((bits[side, j] >> np.int32(31)) & rest))
                        most = x if x > most else most
                    top = np.int32(most ^ ((most >> np.int32(31)) & rest))
                    found[0] = top
                    if found.view(np.float32)[0] > best[k, 2 * i + side]:
                        # Few blocks of many hold a new maximum: only these are searched for its place.
                        at = 0
                        while bits[side, at] != top:
                            at += 1
                        best[k, 2 * i + side] = held[side, at]
                        pick[k, 2 * i + side] = offset + a + at
