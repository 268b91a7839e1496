"""Latents of all images, encoded once and kept in files: ``data.latents``.

What is kept is what the autoencoder says of an image, mean and variance of its latents, so that their noise is drawn
in every step as if the image had been encoded there. Each row is kept as it is and, where the recipe mirrors, mirrored.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .config import Recipe, RecipeError
from .data import Batch, Images, Text, to_signed

if TYPE_CHECKING:  # transformers takes seconds to import
    from .stable_diffusion import StableDiffusionObjective

log = logging.getLogger(__name__)

ROWS = 4096
"""Rows of a file."""


class StoredLatents(Images):
    """A source whose images are what is kept of their latents: ``(n, sides, 2 c, h, w)``.

    Parameters
    ----------
    source : Images
        Whose images were encoded.
    folder : Path
        Where they are kept.
    """

    def __init__(self, source: Images, folder: Path) -> None:
        self.shape, self.classes, self.texts = source.shape, source.classes, source.texts
        places = [folder / _name(first) for first in range(0, len(source), ROWS)]
        self.files = [np.load(place, mmap_mode="r", allow_pickle=False) for place in places]
        rows = [json.loads(place.with_suffix(".json").read_text()) for place in places]
        self.labels = torch.tensor([label for part in rows for label in part["labels"]])
        self.columns = {name: [text for part in rows for text in part["texts"][name]] for name in self.texts}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> Batch:
        found = torch.from_numpy(np.stack([self.files[row // ROWS][row % ROWS] for row in rows]))
        texts = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        return Batch(found, self.labels[rows], [], texts)


def of_sides(stored: Tensor, mirrored: Tensor | None) -> Tensor:
    """Choose from ``(n, sides, ...)`` what is kept of each row: of the mirrored ones, of their mirror image."""
    side = torch.zeros(len(stored), dtype=torch.int64, device=stored.device) if mirrored is None else mirrored.long()
    return stored[torch.arange(len(stored), device=stored.device), side]


def stored(
    recipe: Recipe, source: Images, objective: StableDiffusionObjective, accelerator: Accelerator
) -> StoredLatents:
    """Open the latents that a recipe keeps; what is missing of them is encoded, shared by all processes.

    Raises
    ------
    RecipeError
        If the folder has the latents of other images, or of another autoencoder.
    """
    kept = str(recipe.data.latents)
    folder = recipe.output / "latents" if kept == "cache" else Path(kept)
    about, asked = folder / "about.json", _about(recipe, source)
    if accelerator.is_main_process and not about.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(about, asked)
    accelerator.wait_for_everyone()
    found = json.loads(about.read_text())
    for name, value in asked.items():
        # Mirror images that are kept too do no harm; older latents do not say all of it.
        if found.get(name, value) != value and not (name == "data.flip" and found[name]):
            msg = f"data.latents: {folder} was made with {name} {found.get(name)!r}, not {value!r}: name another folder"
            raise RecipeError(msg)
    encode = partial(_encode, recipe, source, objective, 1 + found["data.flip"])
    firsts = range(0, len(source), ROWS)[accelerator.process_index :: accelerator.num_processes]
    missing = [first for first in firsts if not (folder / _name(first)).is_file()]
    hidden = not (accelerator.is_main_process and missing)
    for first in track(missing, "encoding", console=Console(stderr=True), disable=hidden):
        rows = range(first, min(first + ROWS, len(source)))
        _write_rows(encode(rows), len(rows), source.texts, folder / _name(first))
    accelerator.wait_for_everyone()
    latents = StoredLatents(source, folder)
    for row in {0, len(source) // 2, len(source) - 1}:
        again, _ = next(encode(range(row, row + 1)))
        # Rounding differs with the batch; another image or autoencoder gives something else altogether.
        if (again - latents[[row]].images).float().norm() > 0.1 * again.float().norm():
            msg = f"data.latents: {folder} has other latents of row {row} than are encoded now: name another folder"
            raise RecipeError(msg)
    return latents


def _encode(
    recipe: Recipe, source: Images, objective: StableDiffusionObjective, sides: int, rows: range
) -> Iterator[tuple[Tensor, Batch]]:
    """Encode neighbouring rows, as they are and, with two ``sides``, mirrored; yield with each batch what is kept."""
    for batch in source.scan(recipe.train.batch_size_per_device, recipe.data.workers, rows):
        for message in batch.unreadable:
            log.warning("unreadable image replaced by its neighbour: %s", message)
        images = to_signed(batch.images.to(objective.vae.device))
        posteriors = [objective.posterior(side) for side in (images, images.flip(-1))[:sides]]
        yield torch.stack(posteriors, 1).cpu(), batch


def _write_rows(encoded: Iterator[tuple[Tensor, Batch]], rows: int, columns: Sequence[str], path: Path) -> None:
    """Write a file of latents, after the one of labels and texts."""
    part, kept, done = path.with_suffix(".partial"), None, 0
    labels: list[int] = []
    texts: dict[str, list[Text]] = {name: [] for name in columns}
    for latents, batch in encoded:
        if kept is None:
            shape = (rows, *latents.shape[1:])
            kept = np.lib.format.open_memmap(part, "w+", latents.numpy().dtype, shape)
        kept[done : done + len(latents)] = latents.numpy()
        done += len(latents)
        labels += batch.labels.tolist()
        for name, column in texts.items():
            column += batch.texts[name]
    kept.flush()
    _write(path.with_suffix(".json"), {"labels": labels, "texts": texts})
    part.replace(path)


def _name(first: int) -> str:
    return f"{first // ROWS:05}.npy"


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".json-partial")
    partial.write_text(json.dumps(content, indent=2 if "rows" in content else None))
    partial.replace(path)


def _about(recipe: Recipe, source: Images) -> dict[str, Any]:
    """Return what latents depend on, by the names of fields."""
    rows = ("source", "init_args", "split", "revision", "subset_fraction", "subset_seed")
    pixels = ("resolution", "crop", "interpolation", "mode", "flip")
    networks = ("pretrained", "revision", "frozen_precision")
    return {
        **{f"data.{name}": getattr(recipe.data, name) for name in (*rows, *pixels)},
        **{f"objective.{name}": getattr(recipe.objective, name) for name in networks},
        "rows": len(source),
        "files": _files(recipe.data.source.partition(":")[2]),
    }


def _files(place: str) -> str | None:
    """Return what differs if a file of a folder is added, removed or replaced by one of another size.

    The time of a file is not looked at: a copy of the folder is the same data.
    """
    if not (place and Path(place).is_dir()):
        return None
    files = sorted(path for path in Path(place).rglob("[!.]*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(place)} {path.stat().st_size}\n".encode())
    return f"{len(files)}, {digest.hexdigest()[:16]}"
