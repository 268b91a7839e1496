"""Data sources: each gives uint8 images with their labels by row number."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from couplings.ablation.files import read_idx

from .config import expect
from .own import construct
from .randomness import epoch_order
from .sections import HUB, Data


class DataError(Exception):
    """Data that cannot be read."""


class Piece(NamedTuple):
    """Neighbouring places ``first`` to ``last - 1`` in the order of an epoch."""

    epoch: int
    first: int
    last: int


Text = str | list[str] | None
"""What a column of text has for a row: a text, several, or nothing."""


class Batch(NamedTuple):
    """Rows of a source: a named tuple, so that a ``DataLoader`` can copy its tensors to pinned memory.

    Parameters
    ----------
    images : (n, c, h, w) uint8 Tensor
        Pixels.
    labels : (n,) int64 Tensor
        Classes; all zero for unlabelled data.
    unreadable : list of str
        What could not be read and was replaced.
    texts : dict of str to list
        Columns of text.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[str]
    texts: dict[str, list[Text]] = {}  # noqa: RUF012 - nothing changes it


class Source(ABC):
    """Where images come from.

    Attributes
    ----------
    shape : tuple
        Shape (c, h, w) of every image.
    classes : list of str
        Names of the classes.
    texts : sequence of str
        Names of the columns of text.
    """

    shape: tuple[int, int, int]
    classes: list[str]
    texts: Sequence[str] = ()

    def fingerprint(self) -> str | None:
        """Return what differs for other images; None if that is not known."""
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def blocks(
        self, pieces: Iterable[Piece], seed: int | None, workers: int = 0, pinned: bool = False
    ) -> Iterator[Batch]:
        """Yield the rows of each piece of an epoch, shuffled unless ``seed`` is None, loaded by ``workers`` workers."""

    def scan(self, size: int, workers: int = 0, rows: range | None = None) -> Iterator[Batch]:
        """Yield all rows, or some neighbouring ones, in order, ``size`` at a time."""
        rows = range(len(self)) if rows is None else rows
        starts = range(rows.start, rows.stop, size)
        return self.blocks([Piece(0, i, min(i + size, rows.stop)) for i in starts], None, workers)


class Images(Source, Dataset[Batch]):
    """A map-style source: ``source[rows]`` is the `Batch` of those rows."""

    @abstractmethod
    def __getitem__(self, rows: list[int]) -> Batch: ...

    def blocks(
        self, pieces: Iterable[Piece], seed: int | None, workers: int = 0, pinned: bool = False
    ) -> Iterator[Batch]:
        """Yield the rows of each piece, every epoch in an order of its own."""
        return self.load(self._rows(pieces, seed), workers, pinned)

    def load(self, rows: Iterable[list[int]], workers: int = 0, pinned: bool = False) -> Iterator[Batch]:
        """Yield the `Batch` of each list of rows, loaded by ``workers`` workers."""
        # Forked where that is usual, whatever Python's default: a fork server would stand between a training process
        # that is killed and the loading processes that should end with it.
        context = "fork" if workers and sys.platform == "linux" else None
        options = {"num_workers": workers, "multiprocessing_context": context, "pin_memory": pinned}
        # A generator of its own: a loader draws from one, and the global one is the network's.
        options["generator"] = torch.Generator()
        try:
            yield from DataLoader(self, batch_size=None, sampler=rows, **options)
        except DataError as error:
            # Of a loading process: its text ends a traceback.
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: ")) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            # Told by the loader, or by a pipe whose other end is gone.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            msg = f"a process that loads data has ended ({error}): if memory is short, try fewer data.workers"
            raise DataError(msg) from error

    def _rows(self, pieces: Iterable[Piece], seed: int | None) -> Iterator[list[int]]:
        for epoch, group in itertools.groupby(pieces, lambda piece: piece.epoch):
            order = torch.arange(len(self)) if seed is None else epoch_order(seed, epoch, len(self))
            for piece in group:
                yield order[piece.first : piece.last].tolist()


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

    def fingerprint(self) -> str:
        """Return what differs for other images."""
        return _digest(self.shape, self.images.numpy().tobytes())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: list[int]) -> Batch:
        index = torch.as_tensor(rows)
        return Batch(self.images[index], self.labels[index], [])


class Decoder:
    """Decodes rows of a data set of encoded images.

    Parameters
    ----------
    table : datasets.Dataset or datasets.IterableDataset
        Has a column of images and, maybe, one of labels and some of text.
    config : Data
        How to cut and scale the images, and what to do about unreadable ones.

    Raises
    ------
    RecipeError
        If there is no column of images.
    """

    def __init__(self, table: Any, config: Data) -> None:
        import datasets

        features = table.features or table._resolve_features().features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        expect(bool(images), "data.source", config.source, f"a column of images among its columns {list(features)}")
        self.image, self.label = images[0], labels[0] if labels else None
        self.classes: list[str] = list(features[self.label].names) if self.label else [""]
        # One text a row, or a list of them.
        kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
        self.texts = [name for name, kind in kinds.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
        self.config = config
        # Decoded here rather than by datasets, so that a damaged file can be named and replaced.
        self.table = table.cast_column(self.image, datasets.Image(decode=False))
        self.shape: tuple[int, ...] | None = None
        first, *_ = self.decode(enumerate(itertools.islice(self.table, 100)))
        self.shape = tuple(first.shape)  # all others must have it

    def decode(self, candidates: Iterable[tuple[int, dict[str, Any]]]) -> tuple[Tensor, int, list[str], dict]:
        """Return image, label and texts of the first row that can be read, and what could not be read before it.

        Parameters
        ----------
        candidates : iterable of (int, dict)
            Numbers and values of the row that is asked for and of those that may stand in for it.

        Raises
        ------
        DataError
            If none can be read, if none should be replaced, or for another shape than that of the first image.
        """
        unreadable: list[str] = []
        for number, row in candidates:
            path = row[self.image]["path"] or "image"
            try:
                image = self._open(row[self.image])
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                # The text of an UnidentifiedImageError names a buffer.
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
                unreadable.append(f"{path} (row {number}): {reason}")
                if self.config.on_unreadable == "raise":
                    break
                continue
            if self.shape not in (None, tuple(image.shape)):
                found = f"{path} (row {number}) is {tuple(image.shape)}, the first image is {self.shape}"
                msg = f"{found}: set data.resolution"
                raise DataError(msg)
            texts = {name: row[name] for name in self.texts}
            return image, row[self.label] if self.label else 0, unreadable, texts
        msg = f"unreadable image: {unreadable[-1]}" if unreadable else f"data.source: {self.config.source} has no rows"
        raise DataError(msg)

    def _open(self, entry: dict[str, Any]) -> Tensor:
        content = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return square(image.convert(self.config.mode), self.config)

    def collate(self, decoded: Iterable[tuple[Tensor, int, list[str], dict]]) -> Batch:
        """Make a batch of decoded rows."""
        images, labels, unreadable, texts = zip(*decoded, strict=True)
        columns = {name: [row[name] for row in texts] for name in self.texts}
        return Batch(torch.stack(images), torch.tensor(labels), list(itertools.chain(*unreadable)), columns)


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
        self.decoder = Decoder(table, config)
        self.shape, self.classes, self.texts = self.decoder.shape, self.decoder.classes, self.decoder.texts

    def fingerprint(self) -> str:
        """Return what differs for other images: the table's own fingerprint, and how they are cut and scaled."""
        config = self.decoder.config
        how = (config.resolution, config.crop, config.interpolation, config.mode, config.on_unreadable)
        return _digest(self.decoder.table._fingerprint, how)

    def __len__(self) -> int:
        return len(self.decoder.table)

    def __getitem__(self, rows: list[int]) -> Batch:
        return self.decoder.collate(self.decoder.decode(self._from(row)) for row in rows)

    def _from(self, row: int) -> Iterator[tuple[int, dict[str, Any]]]:
        # A damaged image is replaced by its neighbour, not by a random one: the same whoever loads it.
        for number in range(row, row + 100):
            yield number % len(self), self.decoder.table[number % len(self)]


class StreamedImages(Source):
    """Encoded images of a ``datasets.IterableDataset``, shuffled by ``datasets`` in a buffer, anew every epoch.

    Every process reads the whole stream and decodes its own rows, so that the order does not depend on the number of
    processes; one that resumes passes over what the epoch has had, without decoding it. The stream's own
    ``state_dict`` would lose the rows that were in the buffer.

    Parameters
    ----------
    table : datasets.IterableDataset
        Has a column of images and, maybe, one of labels.
    config : Data
        How to cut, scale and shuffle them.

    Raises
    ------
    RecipeError
        If the number of rows is unknown.
    """

    def __init__(self, table: Any, config: Data) -> None:
        described = (table.info.splits or {}).get(str(table.split))
        self._rows = config.rows or (described.num_examples if described else None)
        expect(bool(self._rows), "data.rows", config.rows, f"the number of rows, which {config.source} does not say")
        self.decoder = Decoder(table, config)
        self.shape, self.classes, self.texts = self.decoder.shape, self.decoder.classes, self.decoder.texts

    def __len__(self) -> int:
        return self._rows

    def blocks(
        self, pieces: Iterable[Piece], seed: int | None, workers: int = 0, pinned: bool = False
    ) -> Iterator[Batch]:
        """Yield the rows of each piece, the next one being read and decoded by ``workers`` threads meanwhile."""
        # Not in a process of a DataLoader: there datasets shuffles in another order.
        with ThreadPoolExecutor(max(1, workers)) as decoders, ThreadPoolExecutor(1) as reader:
            batches = self._read(pieces, seed, decoders)
            pending = reader.submit(next, batches, None)
            while (batch := pending.result()) is not None:
                pending = reader.submit(next, batches, None)
                images, labels, *rest = batch
                yield Batch(images.pin_memory(), labels.pin_memory(), *rest) if pinned else batch

    def _read(self, pieces: Iterable[Piece], seed: int | None, decoders: Executor) -> Iterator[Batch]:
        for epoch, group in itertools.groupby(pieces, lambda piece: piece.epoch):
            table = self.decoder.table
            if seed is not None:
                # From one file at a time: threads that read several end seconds after the last row.
                size = self.decoder.config.shuffle_buffer
                table = table.shuffle(seed=seed, buffer_size=size, max_buffer_input_shards=1)
                table.set_epoch(epoch)
            rows, place = enumerate(table), 0
            for piece in group:
                block = list(itertools.islice(rows, piece.first - place, piece.last - place))
                place = piece.last
                if len(block) < piece.last - piece.first:
                    end = f"{self.decoder.config.source} ended before its row {piece.first + len(block)}"
                    msg = f"data.rows: {end}: expected the number of its rows"
                    raise DataError(msg)
                # A damaged image is replaced by the next of its block, the same whoever loads it.
                candidates = (block[i:] + block[:i] for i in range(len(block)))
                yield self.decoder.collate(decoders.map(self.decoder.decode, candidates))


def square(image: Image.Image, config: Data) -> Tensor:
    """Cut the centred square, scale it to the resolution and return ``(c, h, w)`` uint8."""
    side = config.crop or min(image.size)
    if config.resolution is not None or config.crop is not None:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        target = config.resolution or side
        # Cut first: a filter given a box would still look beyond its edges.
        method = Image.Resampling[config.interpolation.upper()]
        image = image.crop((left, top, left + side, top + side)).resize((target, target), method)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


class Subset(Images):
    """Some rows of a source."""

    def __init__(self, source: Images, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.shape, self.classes, self.texts = source.shape, source.classes, source.texts

    def fingerprint(self) -> str | None:
        """Return what differs for other images; None if that is not known of the source."""
        whole = self.source.fingerprint()
        return whole and _digest(whole, self.rows.numpy().tobytes())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: list[int]) -> Batch:
        return self.source[self.rows[torch.as_tensor(rows)].tolist()]


class ItemImages(Images):
    """A map-style data set of images, or of pairs of an image and a label.

    Parameters
    ----------
    config : Data
        Names the class of the data set, and how to cut and scale its images.

    Raises
    ------
    RecipeError
        If it cannot be built, or its labels have no names.
    DataError
        If an item is no image.
    """

    def __init__(self, config: Data) -> None:
        self.config, self.items = config, construct("data", config, Dataset)
        image, label = self._item(0)
        self.shape = tuple(image.shape)
        self.classes = [str(name) for name in getattr(self.items, "classes", [])] or [""]
        named = label is None or self.classes != [""]
        expect(named, "data.class_path", config.class_path, "an attribute classes too, the names of its labels")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: list[int]) -> Batch:
        images, labels = zip(*map(self._item, rows), strict=True)
        for row, image in zip(rows, images, strict=True):
            if image.shape != self.shape:
                found = f"item {row} is {tuple(image.shape)}, the first is {self.shape}"
                msg = f"{self.config.class_path}: {found}: set data.resolution"
                raise DataError(msg)
        return Batch(torch.stack(images), torch.tensor([int(label or 0) for label in labels]), [], {})

    def _item(self, row: int) -> tuple[Tensor, int | None]:
        item = self.items[row]
        image, label = (item[0], item[1]) if isinstance(item, tuple | list) else (item, None)
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            image = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            found = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}".strip()
            expected = "an image of PIL, a uint8 array (h, w) or (h, w, c), or a uint8 tensor (c, h, w)"
            msg = f"data.class_path: {self.config.class_path}: item {row} is {found}, expected {expected}"
            raise DataError(msg)
        return square(image if image.mode in ("L", "RGB") else image.convert("RGB"), self.config), label


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
    if config.class_path is not None:
        source: Source = ItemImages(config)
    elif kind == "digits":
        source = _digits()
    elif kind == "photo-crops":
        source = _photo_crops(config.resolution or 32)
    elif kind == "idx":
        source = _idx(Path(place))
    else:
        source = _hub(config, kind, place)
    side, (_, height, width) = config.resolution, source.shape
    fits = side is None or side == height == width
    expect(fits, "data.resolution", side, f"null: the images of {config.source} are {height} x {width}")
    if config.class_names is not None:
        source.classes = _class_names(config, len(source.classes))
    if isinstance(source, Images) and config.subset_fraction < 1:
        generator = torch.Generator().manual_seed(config.subset_seed)
        count = max(1, round(config.subset_fraction * len(source)))
        source = Subset(source, torch.randperm(len(source), generator=generator)[:count].sort().values)
    return source


def _class_names(config: Data, classes: int) -> list[str]:
    try:
        names = Path(config.class_names).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"data.class_names: cannot read {config.class_names}: {error}"
        raise DataError(msg) from error
    expected = f"a file of {classes} lines, one for each class of {config.source}, not of {len(names)}"
    expect(len(names) == classes, "data.class_names", config.class_names, expected)
    return names


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
    try:
        images, labels = read_idx(folder / "train-images-idx3-ubyte"), read_idx(folder / "train-labels-idx1-ubyte")
    except (OSError, ValueError) as error:
        msg = f"data.source: {error}"
        raise DataError(msg) from error
    if labels.shape != images.shape[:1]:
        found = f"images {images.shape} and labels {labels.shape}"
        msg = f"data.source: idx:{folder}: got {found}, expected as many"
        raise DataError(msg)
    return ArrayImages(images[:, None], labels, [str(label) for label in range(labels.max() + 1)])


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
    return StreamedImages(table, config) if config.streaming else FileImages(table, config)


def _open(config: Data, kind: str, place: str) -> Any:
    """Open a ``datasets.Dataset``, or an ``IterableDataset`` if it is streamed."""
    import datasets

    if kind == "folder":
        options = {"data_dir": os.fspath(Path(place)), "split": "train", "streaming": config.streaming}
        return datasets.load_dataset("imagefolder", **options)  # nosec B615: nothing is downloaded
    saved = Path(place)
    if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():  # by save_to_disk
        table = datasets.load_from_disk(place)
        table = table[config.split] if isinstance(table, datasets.DatasetDict) else table
        return table.to_iterable_dataset() if config.streaming else table
    split, streaming = config.split, config.streaming
    return datasets.load_dataset(place, split=split, streaming=streaming, revision=config.revision)


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


def to_signed(images: Tensor) -> Tensor:
    """Map uint8 pixels to floats in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8 pixels, clipping."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
