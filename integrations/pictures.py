"""Grids of samples."""

from __future__ import annotations

import math
from collections.abc import Sized

from PIL import Image
from torch import Tensor

from .data import to_uint8


def columns(choices: Sized) -> int | None:
    """Return the columns of a grid of samples that are told ``choices`` in turn: one for each, if they are few."""
    return len(choices) if 1 < len(choices) <= 16 else None


def grid(images: Tensor, columns: int | None = None, gap: int = 1) -> Image.Image:
    """Arrange ``(n, c, h, w)`` images in [-1, 1] in rows of ``columns`` (default: about a square)."""
    pixels = to_uint8(images.cpu())
    n, _, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    lines = math.ceil(n / columns)
    canvas = pixels.new_full((pixels.shape[1], lines * (height + gap) - gap, columns * (width + gap) - gap), 255)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
