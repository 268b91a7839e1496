"""Couplings whose cost sees whitened pixels, so that a few directions of large variance do not take all of it.

The squared distance between an image and noise ranks pairs by their inner product, to which every direction of pixel
space contributes in proportion to the image's extent along it: mostly brightness, for small pictures. Here the image
is multiplied by a matrix first; the noise is white already and stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

import couplings
from couplings import couple
from integrations.data import Images, to_signed

ROWS = 20_000
_matrices: dict[str, Tensor] = {}


def prepare(source: Images) -> None:
    """Register the methods ``auction-whitened`` and ``auction-standardised`` for the images of a source.

    Each divides by standard deviations, after adding the mean variance of a pixel to the variance: directions above
    average are levelled and empty ones are not blown up. ``whitened`` does so along principal directions,
    ``standardised`` pixel by pixel.
    """
    pixels = flat(source, ROWS)
    covariance = pixels.T.cov()
    average = covariance.diagonal().mean()
    variances, directions = torch.linalg.eigh(covariance)
    _matrices["whitened"] = (directions * (variances + average).rsqrt()) @ directions.T
    _matrices["standardised"] = (covariance.diagonal() + average).rsqrt().diag()
    for name in _matrices.keys() - {info.name.partition("-")[2] for info in couplings.methods("auction-*")}:
        couplings.register(
            f"auction-{name}", _on(name), marginal="permutation", needs="points", summary=f"auction on {name} pixels"
        )


def _on(name: str) -> object:
    def assign(data: Tensor, noise: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return couple(data @ _matrices[name].to(data), noise, "auction").index

    return assign


def flat(source: Images, rows: int) -> Tensor:
    """Return ``(n, d)`` pixels in [-1, 1] of at most ``rows`` images, spread over the source."""
    chosen = torch.linspace(0, len(source) - 1, min(rows, len(source))).long()
    return to_signed(source[chosen.tolist()].images).flatten(1)
