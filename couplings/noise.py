"""Normal noise addressed by seed: row i depends on ``seeds[i]`` alone, so that an epoch of noise is a list of integers.

The words come from Philox4x32-10, a counter-based generator (Salmon et al. 2011): a keyed mixing function that is
applied to 0, 1, 2, ... and holds no state. Integer arithmetic is exact, so every device makes the same words; the
normals that are made of them agree up to the rounding of logarithm, sine and cosine.

References
----------
J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011,
doi:10.1145/2063384.2063405
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

__all__ = ["STREAMS", "as_seed", "normal", "row_seeds"]

# Streams of one seed, so that no noise serves two purposes.
STREAMS = {"fit": 0, "check": 1, "start": 2, "quality": 3, "epoch": 4, "persistent": 5, "slots": 6}

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

# Counters that are mixed at a time: some 100 MB of temporary integers.
_CHUNK = 1 << 20


def normal(
    seeds: Tensor | Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw a row of standard normal noise for each seed.

    Parameters
    ----------
    seeds : (n,) integer Tensor or sequence of int
        Any 64-bit integers. Equal seeds make equal rows, different ones independent rows.
    shape : sequence of int
        Of a row.
    device : torch.device, optional
        Where to draw; by default where `seeds` is.
    dtype : torch.dtype
        Floating. Types narrower than float32 are rounded from it.

    Returns
    -------
    (n, *shape) Tensor
        The same on every device up to rounding, however the seeds are split into calls.

    Raises
    ------
    TypeError
        If the seeds are no integers, or `dtype` is not floating.
    ValueError
        If the seeds are not in one dimension, or `shape` is negative somewhere.

    Notes
    -----
    O(n d) time; memory beyond the result is bounded. The global random state is neither read nor changed.

    Examples
    --------
    >>> import torch
    >>> from couplings.noise import normal
    >>> whole = normal([3, 5, 8], (2, 4))
    >>> torch.equal(normal([8], (2, 4))[0], whole[2])
    True
    """
    keys = torch.as_tensor(seeds)
    if len(keys) == 0 and not isinstance(seeds, Tensor):
        keys = keys.long()
    if keys.is_floating_point() or keys.is_complex() or keys.dtype is torch.bool:
        msg = f"seeds must be 64-bit integers, got {keys.dtype}. Type: seeds.long()"
        raise TypeError(msg)
    if not dtype.is_floating_point:
        msg = f"dtype= must be floating, got {dtype}."
        raise TypeError(msg)
    if keys.dim() != 1:
        msg = f"seeds must have one dimension, a seed for each row, got shape {tuple(keys.shape)}."
        raise ValueError(msg)
    if any(size < 0 for size in shape):
        msg = f"shape= must not be negative, got {tuple(shape)}."
        raise ValueError(msg)
    keys = keys.to(keys.device if device is None else device).long()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    values = math.prod(shape)
    blocks = -(-values // 4)  # each makes four normals
    made = torch.empty((len(keys) * blocks, 4), dtype=dtype, device=keys.device)
    for start in range(0, len(made), _CHUNK):
        place = torch.arange(start, min(start + _CHUNK, len(made)), device=keys.device)
        key = keys[place // blocks]
        words = _philox((place % blocks, 0, 0, 0), key)
        made[start : start + _CHUNK] = _box_muller(words, wide)
    return made.view(len(keys), blocks * 4)[:, :values].reshape(len(keys), *shape)


def as_seed(seed: SupportsIndex) -> int:
    """Take any integer for a seed, such as one of NumPy, and refuse everything else with a TypeError."""
    try:
        return operator.index(seed)
    except TypeError as error:
        msg = f"seed= must be an integer, got {seed!r}."
        raise TypeError(msg) from error


def row_seeds(
    seed: SupportsIndex, first: int, count: int, *, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Derive the seeds of rows `first` to ``first + count - 1`` from one seed.

    Parameters
    ----------
    seed : int
        Of any kind; 64 bits are used.
    first, count : int
        Rows.
    stream : int
        Below 2^32; different streams of one seed are independent.
    device : torch.device, optional

    Returns
    -------
    (count,) int64 Tensor
        For `normal`.

    Raises
    ------
    TypeError
        If the seed is no integer.
    """
    place = torch.arange(first, first + count, device=device)
    key = torch.full_like(place, (as_seed(seed) + 2**63) % 2**64 - 2**63)
    # The third word keeps these counters apart from those of `normal`, where it is 0.
    low, high, *_ = _philox((place & _WORD, (place >> 32) & _WORD, 1, stream), key)
    return low | (high << 32)


def _philox(counter: tuple[Tensor | int, Tensor | int, int, int], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix 128-bit counters under 64-bit keys.

    Parameters
    ----------
    counter : four of (n,) int64 Tensor or int
        Words from 0 to 2^32 - 1, lowest first.
    key : (n,) int64 Tensor

    Returns
    -------
    four (n,) int64 Tensors
        Words from 0 to 2^32 - 1.
    """
    # A number is filled in on the device: the host would wait for a copy of it.
    words = (w if isinstance(w, Tensor) else torch.full((), w, dtype=key.dtype, device=key.device) for w in counter)
    a, b, c, d = (word.expand_as(key) for word in words)
    low, high = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        # int64 products wrap around, which leaves all 64 bits of the unsigned product in place.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _WORD) ^ b ^ low,
            second & _WORD,
            ((first >> 32) & _WORD) ^ d ^ high,
            first & _WORD,
        )
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def _box_muller(words: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Make four independent normals of four independent uniform words; ``(n, 4)``, in float32 or float64."""
    normals = []
    for of_radius, of_angle in (words[:2], words[2:]):
        uniform = (of_radius + 1).to(dtype) * 2.0**-32  # above 0, whose logarithm is not finite
        radius = (-2.0 * uniform.log_()).sqrt_()
        angle = of_angle.to(dtype) * (2.0**-32 * 2.0 * math.pi)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, 1)
