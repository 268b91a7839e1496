"""A few photographs inside the package, so that couplings can be compared on real images without a download."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor


__all__ = ["image_crops", "labelled_crops"]


def image_crops(n: int, size: int = 32, generator: torch.Generator | None = None) -> Tensor:
    """Draw square crops of four photographs (sources and licences: README.md beside this file).

    Parameters
    ----------
    n : int
        How many. Every position of every photograph is equally likely; half of the crops are mirrored.
    size : int
        Height and width in pixels, at most 160.
    generator : torch.Generator, optional
        Decides the crops; None is a private generator with a fixed seed.

    Returns
    -------
    (n, 3, size, size) float32 Tensor
        Values in [-1, 1].

    Raises
    ------
    ValueError
        If `n` is not positive, or the size is not between 1 and the height of the photographs.

    Examples
    --------
    >>> from couplings.data import image_crops
    >>> image_crops(4).shape
    torch.Size([4, 3, 32, 32])
    """
    return labelled_crops(n, size, generator)[0]


def labelled_crops(n: int, size: int = 32, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw the same crops as `image_crops`, and say which of the four photographs each is from.

    Parameters
    ----------
    n : int
    size : int
    generator : torch.Generator, optional

    Returns
    -------
    (n, 3, size, size) float32 Tensor, (n,) int64 Tensor

    Raises
    ------
    ValueError
        As `image_crops` does.
    """
    photos = _photographs()
    largest = min(min(photo.shape[:2]) for photo in photos)
    if n < 1:
        msg = f"n= must be at least 1, got {n}."
        raise ValueError(msg)
    if not 1 <= size <= largest:
        msg = f"size= must be between 1 and {largest} pixels, the height of the photographs, got {size}."
        raise ValueError(msg)
    generator = generator or torch.Generator().manual_seed(0x5EED)
    positions = [(photo.shape[0] - size + 1, photo.shape[1] - size + 1) for photo in photos]
    starts = np.cumsum([0, *(rows * columns for rows, columns in positions)])
    places = torch.randint(int(starts[-1]), (n,), generator=generator, device=generator.device).tolist()
    mirrored = torch.randint(2, (n,), generator=generator, device=generator.device).tolist()
    crops = np.empty((n, size, size, 3), dtype=np.uint8)
    sources = np.searchsorted(starts, places, side="right") - 1
    for crop, place, mirror, which in zip(crops, places, mirrored, sources.tolist(), strict=True):
        top, left = divmod(place - int(starts[which]), positions[which][1])
        part = photos[which][top : top + size, left : left + size]
        crop[:] = part[:, ::-1] if mirror else part
    return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0, torch.from_numpy(sources)


@cache
def _photographs() -> tuple[np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], ...]:
    """Read the photographs, ``(160, width, 3)`` each."""
    source = files(__name__) / "photos.npz"
    with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return tuple(archive[name] for name in sorted(archive.files))
