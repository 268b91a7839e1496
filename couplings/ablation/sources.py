"""What an ablation couples: crops of photographs, latents made of them, or the rows of a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from couplings.comparison import Batch
from couplings.data import image_crops, labelled_crops

__all__ = ["BUILT_IN", "Source", "open_source"]

BUILT_IN = {
    "crops32": "32x32x3 crops of photographs",
    "crops64": "64x64x3 crops of photographs",
    "latents": "4x32x32: leading principal components of the 4x4 patches of 128x128 crops, a linear encoder's latents",
}


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

    def batch(self, n: int, seed: int, candidates: int, condition: str | None) -> tuple[Batch, Tensor | None]:
        """Draw data and noise; the first n rows of the noise do not depend on the candidates.

        Parameters
        ----------
        n : int
        seed : int
        candidates : int
            Rows of noise for each row of data.
        condition : str or None
            ``"class"``: the batch is conditioned on its classes.

        Returns
        -------
        Batch, (n,) Tensor or None
            The batch, and its classes where there are any.

        Raises
        ------
        ValueError
            If a file has fewer rows, or no classes to condition on.
        """
        generator = torch.Generator().manual_seed(seed)
        labels: Tensor | None
        if self.rows is None:
            data, labels = _drawn(self.name, n, generator)
        else:
            if len(self.rows) < n:
                msg = f"{self.name} has {len(self.rows)} rows, fewer than n = {n}."
                raise ValueError(msg)
            chosen = torch.randperm(len(self.rows), generator=generator)[:n]
            data, labels = self.rows[chosen], None if self.labels is None else self.labels[chosen]
        if condition is not None and labels is None:
            msg = f"{self.name} comes without classes to condition on: name their file (labels:, --labels)."
            raise ValueError(msg)
        noise = torch.randn(data.shape, generator=generator)
        if candidates > 1:
            noise = torch.cat([noise, torch.randn(((candidates - 1) * n, *data.shape[1:]), generator=generator)])
        return Batch(data, noise.to(data.dtype), self.name, None if condition is None else labels), labels


def open_source(name: str, labels: str | None = None) -> Source:
    """Find a built-in source, or read a file.

    Parameters
    ----------
    name : str
        One of `BUILT_IN`, or an array as `couplings.files.read_array` takes it.
    labels : str, optional
        The classes of a file's rows.

    Returns
    -------
    Source

    Raises
    ------
    ValueError, TypeError, OSError
        If a file cannot be read or holds no batch of floating rows.
    """
    if name in BUILT_IN:
        return Source(name)
    from couplings.files import read_array, split_key

    path = split_key(name)[0]
    if not path.exists():
        msg = f"data: {name} is neither a file nor one of {', '.join(BUILT_IN)}."
        raise ValueError(msg)
    rows = read_array(name)
    if not rows.is_floating_point() or rows.dim() < 2:
        msg = (
            f"{name} must be floating, of shape (n, *shape), got {rows.dtype} of shape {tuple(rows.shape)}. "
            "Scale images first, for example to [-1, 1]."
        )
        raise TypeError(msg)
    classes = None if labels is None else read_array(labels)
    if classes is not None and (classes.is_floating_point() or classes.shape != rows.shape[:1]):
        got = f"{classes.dtype} of shape {tuple(classes.shape)}"
        msg = f"{labels} must hold a whole number for each of the {len(rows)} rows of {name}, got {got}."
        raise ValueError(msg)
    return Source(name, _digest(path), rows, classes)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _drawn(name: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if name == "latents":
        crops, labels = labelled_crops(n, 128, generator)
        axes, mean, scale = _encoder()
        return ((_patches(crops) - mean) @ axes / scale).reshape(n, 32, 32, 4).permute(0, 3, 1, 2).contiguous(), labels
    return labelled_crops(n, 64 if name == "crops64" else 32, generator)


def _patches(crops: Tensor) -> Tensor:
    """``(n, 3, 128, 128)`` to ``(n, 32 * 32, 48)``."""
    return torch.nn.functional.unfold(crops, kernel_size=4, stride=4).transpose(1, 2)


@cache
def _encoder() -> tuple[Tensor, Tensor, Tensor]:
    """Leading axes of patches, their mean, and the scale that gives latents unit variance, as latent diffusion does."""
    patches = _patches(image_crops(256, 128)).reshape(-1, 48).double()
    mean = patches.mean(0)
    _, axes = torch.linalg.eigh(torch.cov(patches.T))
    leading = axes[:, -4:].flip(1)
    leading = leading * leading.sum(0).sign()  # an eigenvector has no sign of its own
    scale = ((patches - mean) @ leading).std()
    return leading.float(), mean.float(), scale.float()
