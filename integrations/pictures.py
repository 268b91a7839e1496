"""Grids of samples."""

from __future__ import annotations

import math
from collections.abc import Sized

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .data import to_uint8


def columns(choices: Sized) -> int | None:
    """Return the columns of a grid of samples that are told ``choices`` in turn: one for each, if they are few."""
    return len(choices) if 1 < len(choices) <= 16 else None


def image(pixels: Tensor) -> Image.Image:
    """Make a picture of ``(c, h, w)`` uint8 pixels."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Arrange ``(n, c, h, w)`` images in [-1, 1] in rows of ``columns`` (default: about a square)."""
    cells = F.pad(to_uint8(images.cpu()), (0, 1, 0, 1), value=255)  # a white line between images
    n, channels, height, width = cells.shape
    columns = columns or math.ceil(math.sqrt(n))
    lines = math.ceil(n / columns)
    canvas = cells.new_full((channels, lines * height, columns * width), 255)
    for i, cell in enumerate(cells):
        top, left = i // columns * height, i % columns * width
        canvas[:, top : top + height, left : left + width] = cell
    return image(canvas[:, :-1, :-1])
