"""Data sources: each gives uint8 images with their labels by row number."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import Data, RecipeError
from .randomness import epoch_order

# Names of hub data sets, and the centred square that is usual for them (CelebA's faces fill 140 of 178 x 218).
HUB = {
    "cifar10": ("uoft-cs/cifar10", 32, None),
    "celeba": ("flwrlabs/celeba", 64, 140),
    "tiny-imagenet": ("zh-plus/tiny-imagenet", 64, None),
    "imagenet": ("ILSVRC/imagenet-1k", 256, None),
}


class DataError(RuntimeError):
    """Data that cannot be read."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring places ``first`` to ``last - 1`` in the order of an epoch."""

    epoch: int
    first: int
    last: int


@dataclass
class Batch:
    """Rows of a source.

    Parameters
    ----------
    images : (n, c, h, w) uint8 Tensor
        Pixels.
    labels : (n,) int64 Tensor
        Classes; all zero for unlabelled data.
    unreadable : list of str
        What could not be read and was replaced.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[str] = field(default_factory=list)


class Source(ABC):
    """Where images come from.

    Attributes
    ----------
    shape : tuple
        Shape (c, h, w) of every image.
    classes : list of str
        Names of the classes.
    """

    shape: tuple[int, int, int]
    classes: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def scan(self, size: int, workers: int = 0) -> Iterator[Batch]:
        """Yield all rows in order, ``size`` at a time, loaded by ``workers`` workers."""

    @abstractmethod
    def blocks(self, pieces: Iterable[Piece], seed: int, workers: int = 0, pinned: bool = False) -> Iterator[Batch]:
        """Yield the shuffled rows of each piece of an epoch, loaded by ``workers`` workers."""


class Images(Source, Dataset[Batch]):
    """A map-style source: ``source[rows]`` is the `Batch` of those rows."""

    @abstractmethod
    def __getitem__(self, rows: list[int]) -> Batch: ...

    def scan(self, size: int, workers: int = 0) -> Iterator[Batch]:
        """Yield all rows in order, ``size`` at a time, loaded by ``workers`` workers."""
        yield from self._load((rows.tolist() for rows in torch.arange(len(self)).split(size)), workers)

    def blocks(self, pieces: Iterable[Piece], seed: int, workers: int = 0, pinned: bool = False) -> Iterator[Batch]:
        """Yield the rows of each piece, every epoch in an order of its own."""
        return self._load(self._shuffled(pieces, seed), workers, pinned)

    def _shuffled(self, pieces: Iterable[Piece], seed: int) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for piece in pieces:
            if piece.epoch != epoch:
                epoch, order = piece.epoch, epoch_order(seed, piece.epoch, len(self))
            yield order[piece.first : piece.last].tolist()

    def _load(self, batches: Iterable[list[int]], workers: int, pinned: bool = False) -> Iterator[Batch]:
        forked = workers > 0 and sys.platform == "linux"
        loader = DataLoader(
            _Told(self),
            sampler=_Given(batches),
            batch_size=None,
            num_workers=workers,
            pin_memory=pinned,
            # Whatever Python's default is: a fork server falls to a signal that it gets too, which ends all that it
            # has forked, and hides from them that the training process was killed.
            multiprocessing_context="fork" if forked else None,
            worker_init_fn=_end_by_parent if forked else None,
        )
        for batch in _start(loader) if forked else loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Given(Sampler[list[int]]):
    """Rows decided elsewhere."""

    def __init__(self, batches: Iterable[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Told(Dataset[Any]):
    """Hands errors over as values: a worker process would bury their text in its traceback."""

    def __init__(self, source: Images) -> None:
        self.source = source

    def __getitem__(self, rows: list[int]) -> Batch | DataError:
        try:
            return self.source[rows]
        except DataError as error:
            return error


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    # A cluster sends SIGTERM to every process of a job: the training process still needs its data to end the step
    # and save. Loading processes inherit that it is held back, so that no moment of their start is open to it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_by_parent(worker: int) -> None:
    # A training process that fails ends its children with the same signal, and waits for them.
    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class ArrayImages(Images):
    """Images held in memory.

    Parameters
    ----------
    images : (n, c, h, w) uint8 array
        Pixels.
    labels : (n,) int array
        Classes.
    classes : list of str
        Their names.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.classes = classes
        channels, height, width = self.images.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: list[int]) -> Batch:
        index = torch.as_tensor(rows)
        return Batch(self.images[index], self.labels[index])


class Decoder:
    """Decodes rows of a data set of encoded images.

    Parameters
    ----------
    features : datasets.Features
        Its columns: one of images and, maybe, one of labels.
    config : Data
        How to cut and scale the images, and what to do about unreadable ones.

    Raises
    ------
    RecipeError
        If there is no column of images.
    """

    def __init__(self, features: Any, config: Data) -> None:
        import datasets

        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not images:
            msg = f"data.source: got {config.source!r} with columns {list(features)}, expected a column of images"
            raise RecipeError(msg)
        self.image, self.label = images[0], labels[0] if labels else None
        self.classes: list[str] = list(features[self.label].names) if self.label else [""]
        self.config = config
        self.shape: tuple[int, ...] = ()
        self.first: Row

    def measure(self, rows: Iterable[Row]) -> None:
        """Take the first readable image: all others must have its shape."""
        for row in itertools.islice(rows, 100):
            image, _ = self.read(row)
            if image is not None:
                self.shape, self.first = tuple(image.shape), row
                return
        msg = f"data.source: {self.config.source}: none of the first images can be read"
        raise DataError(msg)

    def read(self, row: Row) -> tuple[Tensor | None, str]:
        """Decode one image, or say why it cannot be done."""
        entry = row.values[self.image]
        try:
            content = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                return square(image.convert(self.config.mode), self.config), ""
        except UnidentifiedImageError:  # its own text names a buffer
            return None, f"{entry['path'] or 'image'} (row {row.number}): not an image"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return None, f"{entry['path'] or 'image'} (row {row.number}): {error}"

    def decode(self, asked: int, fetch: Callable[[int], Row], count: int) -> tuple[Tensor, int, list[str]]:
        """Return the image and label of one of ``count`` rows, and what was unreadable on the way.

        Raises
        ------
        DataError
            If it cannot be read and should not be replaced, or has another shape than the first image.
        """
        unreadable: list[str] = []
        row = fetch(asked)
        image, error = self.read(row)
        while image is None:
            if self.config.on_unreadable == "raise" or len(unreadable) == 100:
                msg = f"unreadable image: {error}"
                raise DataError(msg)
            unreadable.append(error)
            # Its neighbour, not a random one: the same whoever loads it.
            row = fetch((asked + len(unreadable)) % count) if len(unreadable) < count else self.first
            image, error = self.read(row)
        if tuple(image.shape) != self.shape:
            found = f"row {row.number} is {tuple(image.shape)}, the first image is {self.shape}"
            msg = f"{found}: set data.resolution"
            raise DataError(msg)
        return image, row.values[self.label] if self.label else 0, unreadable

    @staticmethod
    def collate(decoded: Iterable[tuple[Tensor, int, list[str]]]) -> Batch:
        """Make a batch of decoded rows."""
        images, labels, unreadable = zip(*decoded, strict=True)
        return Batch(torch.stack(images), torch.tensor(labels), list(itertools.chain(*unreadable)))


@dataclass
class Row:
    """An encoded row of a data set, and its number there."""

    number: int
    values: dict[str, Any]


class FileImages(Images):
    """Encoded images of a ``datasets.Dataset``, decoded when asked for.

    Parameters
    ----------
    table : datasets.Dataset
        Has a column of images and, maybe, one of labels.
    config : Data
        How to cut and scale them.
    """

    def __init__(self, table: Any, config: Data) -> None:
        import datasets

        self.decoder = Decoder(table.features, config)
        # Decoded here rather than by datasets, so that a damaged file can be named and replaced.
        self.table = table.cast_column(self.decoder.image, datasets.Image(decode=False))
        self.decoder.measure(map(self._row, range(len(table))))
        self.shape, self.classes = self.decoder.shape, self.decoder.classes

    def __len__(self) -> int:
        return len(self.table)

    def _row(self, number: int) -> Row:
        return Row(number, self.table[number])

    def __getitem__(self, rows: list[int]) -> Batch:
        return Decoder.collate(self.decoder.decode(row, self._row, len(self)) for row in rows)


def square(image: Image.Image, config: Data) -> Tensor:
    """Cut the centred square, scale it to the resolution and return ``(c, h, w)`` uint8."""
    side = config.crop or min(image.size)
    if config.resolution is not None or config.crop is not None:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        target = config.resolution or side
        # Cut first: a filter given a box would still look beyond its edges.
        image = image.crop((left, top, left + side, top + side)).resize((target, target), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


class Subset(Images):
    """Some rows of a source."""

    def __init__(self, source: Images, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.shape, self.classes = source.shape, source.classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: list[int]) -> Batch:
        return self.source[self.rows[torch.as_tensor(rows)].tolist()]


def load_source(config: Data) -> Source:
    """Open the source that a recipe names.

    Raises
    ------
    DataError
        If it cannot be read.
    RecipeError
        If it does not fit the recipe.
    """
    kind, _, place = config.source.partition(":")
    if kind == "digits":
        source: Source = _digits()
    elif kind == "photo-crops":
        source = _photo_crops(config.resolution or 32)
    elif kind == "idx":
        source = _idx(Path(place))
    else:
        source = _hub(config, kind, place)
    if config.resolution is not None and source.shape[1:] != (config.resolution, config.resolution):
        height, width = source.shape[1:]
        msg = f"data.resolution: got {config.resolution}, but the images of {config.source} are {height} x {width}"
        raise RecipeError(msg)
    if isinstance(source, Images) and config.subset_fraction < 1:
        source = Subset(source, subset(config, len(source)))
    return source


def subset(config: Data, rows: int) -> Tensor:
    """Return the numbers of the rows that a recipe uses of ``rows``, ascending."""
    generator = torch.Generator().manual_seed(config.subset_seed)
    count = max(1, round(config.subset_fraction * rows))
    return torch.randperm(rows, generator=generator)[:count].sort().values


def _digits() -> ArrayImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return ArrayImages(pixels, digits.target, [str(name) for name in digits.target_names])


def _photo_crops(side: int, stride: int = 8) -> ArrayImages:
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    samples = load_sample_images()
    photographs |= {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    crops, labels = [], []
    for label, image in enumerate(photographs.values()):
        windows = np.lib.stride_tricks.sliding_window_view(image, (side, side), axis=(0, 1))[::stride, ::stride]
        crops.append(windows.reshape(-1, *windows.shape[2:]))
        labels.append(np.full(len(crops[-1]), label))
    return ArrayImages(np.concatenate(crops), np.concatenate(labels), list(photographs))


def _idx(folder: Path) -> ArrayImages:
    images, labels = _read_idx(folder / "train-images-idx3-ubyte"), _read_idx(folder / "train-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        found = f"images {images.shape} and labels {labels.shape}"
        msg = f"data.source: idx:{folder}: got {found}, expected (n, h, w) and (n,)"
        raise DataError(msg)
    return ArrayImages(images[:, None], labels, [str(label) for label in range(labels.max() + 1)])


def _read_idx(path: Path) -> np.ndarray:
    zipped = path.with_name(f"{path.name}.gz")
    try:
        content = gzip.decompress(zipped.read_bytes()) if zipped.is_file() else path.read_bytes()
    except (OSError, EOFError) as error:
        msg = f"data.source: cannot read {zipped if zipped.is_file() else path}: {error}"
        raise DataError(msg) from error
    # Magic number: two zero bytes, 8 for uint8, the number of axes; then their lengths, big-endian.
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    start = 4 + 4 * axes
    if not axes or len(content) - start != int(np.prod(shape)):
        msg = f"data.source: {path}: not a complete idx file of bytes"
        raise DataError(msg)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _hub(config: Data, kind: str, place: str) -> Source:
    import datasets

    if kind in HUB:
        place, side, crop = HUB[kind]
        config = dataclasses.replace(config, resolution=config.resolution or side, crop=config.crop or crop)
    try:
        table = _open(config, kind, place)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        msg = f"data.source: cannot open {config.source}: {error}"
        raise DataError(msg) from error
    if config.streaming:
        from .streaming import StreamedImages

        return StreamedImages(table, config, local=kind == "folder" or Path(place).is_dir())
    return FileImages(table, config)


def _open(config: Data, kind: str, place: str) -> Any:
    """Open a ``datasets.Dataset``, or an ``IterableDataset`` if it is streamed."""
    import datasets

    if kind == "folder":
        folder = os.fspath(Path(place))
        return datasets.load_dataset("imagefolder", data_dir=folder, split="train", streaming=config.streaming)
    saved = Path(place)
    if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():  # by save_to_disk
        table = datasets.load_from_disk(place)
        table = table[config.split] if isinstance(table, datasets.DatasetDict) else table
        return table.to_iterable_dataset() if config.streaming else table
    return datasets.load_dataset(place, split=config.split, streaming=config.streaming)


def to_signed(images: Tensor) -> Tensor:
    """Map uint8 pixels to floats in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8 pixels, clipping."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
