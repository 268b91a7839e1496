"""What is coupled: crops of photographs, latents made of them, or the rows of a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from couplings._names import unknown
from couplings.ablation.files import SUFFIXES, read_array, split_key
from couplings.ablation.grid import CANDIDATES
from couplings.coupling import couple

__all__ = ["BUILT_IN", "Batch", "Source", "first_batch", "open_source", "photo_crops"]

BUILT_IN = {
    "crops32": "32x32x3 crops of photographs",
    "crops64": "64x64x3 crops of photographs",
    "latents": "4x32x32: leading principal components of the 4x4 patches of 128x128 crops, a linear encoder's latents",
}


@dataclass(frozen=True, eq=False)
class Batch:
    """Data and the noise that may be paired with it.

    Attributes
    ----------
    data : (n, *shape) Tensor
    noise : (k * n, *shape) Tensor
        Methods that choose among candidates get all of it, the others its first n rows.
    name : str
        What the data is, for people.
    condition : (n,) integer or (n, c) floating Tensor, optional
        What every coupling is conditioned on.
    labels : (n,) integer Tensor, optional
        Classes of the data, whether couplings are conditioned on them or not.

    Raises
    ------
    TypeError, ValueError
        If the two cannot be coupled.
    """

    data: Tensor
    noise: Tensor
    name: str
    condition: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        couple(self.data, self.noise, "nearest")  # refuses what no method could couple, and takes k * n rows

    def to(self, device: str) -> Batch:
        """Move it to a device; a RuntimeError if there is none."""
        if device == "cpu":
            return self
        try:
            condition = None if self.condition is None else self.condition.to(device)
            return replace(self, data=self.data.to(device), noise=self.noise.to(device), condition=condition)
        except AssertionError as error:  # torch was built without it
            raise RuntimeError(str(error)) from error


@dataclass(frozen=True)
class Source:
    """Data to draw batches from.

    Attributes
    ----------
    name : str
        One of `BUILT_IN`, or a file.
    digest : str or None
        Of a file's contents: rows of another file are another cell.
    rows : Tensor or None
        All rows of a file.
    labels : Tensor or None
        Their classes.
    """

    name: str
    digest: str | None = None
    rows: Tensor | None = None
    labels: Tensor | None = None

    def batch(self, n: int, seed: int, candidates: int = 1, condition: str | None = None) -> Batch:
        """Draw data and `candidates` rows of noise for each; the first n rows of noise do not depend on their number.

        Raises
        ------
        ValueError
            If a file has fewer rows, or no classes although ``condition="class"``.
        """
        generator = torch.Generator().manual_seed(seed)
        labels: Tensor | None
        if self.rows is None:
            data, labels = _draw(self.name, n, generator)
        else:
            if len(self.rows) < n:
                msg = f"{self.name} has {len(self.rows)} rows, fewer than n = {n}."
                raise ValueError(msg)
            chosen = torch.randperm(len(self.rows), generator=generator)[:n]
            data, labels = self.rows[chosen], None if self.labels is None else self.labels[chosen]
        if condition is not None and labels is None:
            msg = f"{self.name} comes without classes to condition on: name their file (labels:, --labels)."
            raise ValueError(msg)
        noise = _gaussian(data, candidates, generator)
        return Batch(data, noise, self.name, None if condition is None else labels, labels)


def open_source(name: str, labels: str | None = None) -> Source:
    """Find a built-in source, or read a file.

    Parameters
    ----------
    name : str
        One of `BUILT_IN`, or an array as `couplings.ablation.files.read_array` takes it.
    labels : str, optional
        The same, for the classes of a file's rows.
    """
    if name in BUILT_IN:
        return Source(name)
    if not any(suffix in name.lower() for suffix in SUFFIXES):
        msg = f"{unknown('source of data', name, BUILT_IN)} A file of arrays ends in {', '.join(SUFFIXES)}."
        raise ValueError(msg)
    rows = read_array(name)
    if not rows.is_floating_point() or rows.dim() < 2:
        msg = f"{name} must be floating, of shape (n, *shape), got {rows.dtype} of shape {tuple(rows.shape)}. {_SCALE}"
        raise TypeError(msg)
    classes = None if labels is None else read_array(labels)
    if classes is not None and (classes.is_floating_point() or classes.shape != rows.shape[:1]):
        got = f"{classes.dtype} of shape {tuple(classes.shape)}"
        msg = f"{labels} must hold a whole number for each of the {len(rows)} rows of {name}, got {got}."
        raise ValueError(msg)
    with split_key(name)[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return Source(name, digest, rows, classes)


_SCALE = "Scale images first, for example to [-1, 1]."


def first_batch(data: str | None, noise: str | None, n: int | None, seed: int) -> Batch:
    """Take the first rows of files, in their order.

    Parameters
    ----------
    data : str or None
        A file; None for crops of photographs.
    noise : str or None
        A file of n or k * n rows; None for Gaussian noise.
    n : int or None
        Rows; None for all of a file, or 256 crops.
    seed : int
        Of what is drawn.
    """
    if data is None:
        return replace(Source("crops32").batch(n or 256, seed, CANDIDATES), name="built-in image crops")
    rows = _first(read_array(data), n, data)
    if noise is None:
        if not rows.is_floating_point():
            msg = f"{data} must be floating, got {rows.dtype}. {_SCALE}"
            raise TypeError(msg)
        drawn = _gaussian(rows, CANDIDATES, torch.Generator().manual_seed(seed))
        return Batch(rows, drawn, data)
    offered = read_array(noise)
    multiple = None if n is None or not offered.dim() else max(n, len(offered) // n * n)
    return Batch(rows, _first(offered, multiple, noise), data)


def _first(value: Tensor, n: int | None, name: str) -> Tensor:
    if not value.dim():
        msg = f"{name} holds a single number: it needs a batch axis."
        raise ValueError(msg)
    if n is not None and len(value) < n:
        msg = f"{name} has {len(value)} rows, fewer than -n {n}."
        raise ValueError(msg)
    return value if n is None else value[:n]


def _gaussian(data: Tensor, candidates: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(data.shape, generator=generator)
    if candidates > 1:
        others = torch.randn(((candidates - 1) * len(data), *data.shape[1:]), generator=generator)
        noise = torch.cat([noise, others])
    return noise.to(data.dtype)


def _draw(name: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows of a built-in source, and the photograph that each is from."""
    if name == "latents":
        crops, labels = photo_crops(n, 128, generator)
        axes, mean, scale = _encoder()
        return ((_patches(crops) - mean) @ axes / scale).reshape(n, 32, 32, 4).permute(0, 3, 1, 2).contiguous(), labels
    return photo_crops(n, 64 if name == "crops64" else 32, generator)


def _patches(crops: Tensor) -> Tensor:
    """``(n, 3, 128, 128)`` to ``(n, 32 * 32, 48)``."""
    return torch.nn.functional.unfold(crops, kernel_size=4, stride=4).transpose(1, 2)


@cache
def _encoder() -> tuple[Tensor, Tensor, Tensor]:
    """Leading axes of patches, their mean, and the scale that gives latents unit variance, as latent diffusion does."""
    patches = _patches(photo_crops(256, 128, torch.Generator().manual_seed(0x5EED))[0]).reshape(-1, 48).double()
    mean = patches.mean(0)
    _, axes = torch.linalg.eigh(torch.cov(patches.T))
    leading = axes[:, -4:].flip(1)
    leading = leading * leading.sum(0).sign()  # an eigenvector has no sign of its own
    scale = ((patches - mean) @ leading).std()
    return leading.float(), mean.float(), scale.float()


def photo_crops(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw square crops of four photographs (sources and licences: data/README.md beside this file).

    Parameters
    ----------
    n : int
        How many. Every position of every photograph is equally likely; half of the crops are mirrored.
    size : int
        Height and width in pixels, at most 160.
    generator : torch.Generator
        Decides the crops.

    Returns
    -------
    (n, 3, size, size) float32 Tensor
        Values in [-1, 1].
    (n,) int64 Tensor
        Which of the photographs each is from.
    """
    photos = _photographs()
    positions = [(photo.shape[0] - size + 1, photo.shape[1] - size + 1) for photo in photos]
    starts = np.cumsum([0, *(rows * columns for rows, columns in positions)])
    places = torch.randint(int(starts[-1]), (n,), generator=generator).tolist()
    mirrored = torch.randint(2, (n,), generator=generator).tolist()
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
    source = files("couplings.ablation") / "data" / "photos.npz"
    with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return tuple(archive[name] for name in sorted(archive.files))
